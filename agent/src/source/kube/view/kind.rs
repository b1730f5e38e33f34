//! What is known of one kind: its objects as far as they could be read, and why there are no more.

use std::time::Duration;

use super::{
    super::watch::{Heard, Trouble},
    STANDS, problem,
};
use crate::source::{
    Problem,
    store::{Event, GRACE, Store},
};

/// Names told of what a doubted list lacks.
const MAX_NAMES: usize = 5;

/// An object, as far as it could be read.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Known<T> {
    /// As it last could.
    good: Option<T>,
    /// Why what is there now cannot be used.
    flaw: Option<String>,
}

/// What is known of one kind.
#[derive(Clone, Debug)]
pub(super) struct Kind<T> {
    pub(super) name: &'static str,
    pub(super) store: Store<Known<T>>,
    trouble: Option<Trouble>,
    /// What was known before this start stands until it is heard.
    pub(super) recalled: bool,
    /// It is nothing to tell of where the API server does not have it.
    optional: bool,
}

impl<T: Clone + PartialEq> Kind<T> {
    pub(super) fn new(name: &'static str) -> Kind<T> {
        Kind { name, store: Store::default(), trouble: None, recalled: false, optional: false }
    }

    pub(super) fn optional(name: &'static str) -> Kind<T> {
        Kind { optional: true, ..Kind::new(name) }
    }

    /// Returns whether anything is different.
    pub(super) fn hear(&mut self, now: Duration, heard: Heard<T>) -> bool {
        let event = match heard {
            Heard::Failed(trouble) => {
                let news = self.trouble.as_ref() != Some(&trouble);
                self.trouble = Some(trouble);
                return news;
            }
            Heard::Event(event) => event,
        };
        // That a list begins, or goes on, is no sign yet that it will end.
        let recovered =
            matches!(event, Event::ListEnds | Event::Set(..) | Event::Deleted(_)) && self.trouble.take().is_some();
        let event = match event {
            Event::Listed(name, read) => Event::Listed(name.clone(), self.known(&name, read)),
            Event::Set(name, read) => Event::Set(name.clone(), self.known(&name, read)),
            Event::ListBegins => Event::ListBegins,
            Event::ListEnds => Event::ListEnds,
            Event::Deleted(name) => Event::Deleted(name),
        };
        self.store.hear(now, event) || recovered
    }

    fn known(&self, name: &str, read: Result<T, String>) -> Known<T> {
        match read {
            Ok(object) => Known { good: Some(object), flaw: None },
            Err(flaw) => Known { good: self.store.get(name).and_then(|known| known.good.clone()), flaw: Some(flaw) },
        }
    }

    pub(super) fn recall(&mut self, objects: Vec<T>, name: impl Fn(&T) -> Option<String>) {
        let known = |object: T| Some((name(&object)?, Known { good: Some(object), flaw: None }));
        self.store.recall(objects.into_iter().filter_map(known));
        self.recalled = true;
    }

    /// Whether something stands, be it that there is nothing.
    fn stands(&self) -> bool {
        self.recalled || self.store.is_synced()
    }

    /// Whether its watch has said something, be it that it cannot.
    pub(super) fn is_settled(&self) -> bool {
        self.store.is_synced() || self.trouble.is_some()
    }

    pub(super) fn is_complete(&self) -> bool {
        let unserved = self.trouble == Some(Trouble::NotServed);
        !unserved && self.store.is_complete() && self.store.objects().all(|(_, known)| known.good.is_some())
    }

    pub(super) fn objects(&self) -> impl Iterator<Item = &T> {
        self.store.objects().filter_map(|(_, known)| known.good.as_ref())
    }

    /// Why it has not been listed.
    pub(super) fn missing(&self) -> Option<(&str, &'static str)> {
        let why = self.trouble.as_ref().map_or("not listed yet", Trouble::told);
        (!self.stands()).then_some((why, self.name))
    }

    pub(super) fn problems<'a>(&'a self, host: &'a str) -> impl Iterator<Item = Problem> + 'a {
        let stands = if self.stands() { format!(" ({STANDS})") } else { String::new() };
        let told = self.trouble.iter().filter(|trouble| !self.optional || **trouble != Trouble::NotServed);
        let trouble = told.map(move |trouble| match trouble {
            Trouble::NotServed => problem(format!("{host} {}", self.name), format!("{}{stands}", trouble.told())),
            // Of the API server as a whole, more often than not: then every kind says the same.
            Trouble::Other(why) => problem(host.to_owned(), format!("{why}{stands}")),
        });
        let flawed =
            self.store.objects().filter_map(|(name, known)| known.flaw.as_ref().map(|flaw| (name, flaw, known)));
        let flawed = flawed.map(move |(name, flaw, known)| {
            let stands = if known.good.is_some() { format!(" ({STANDS})") } else { String::new() };
            let message = format!("cannot be read by this version: {flaw}: correct it{stands}");
            problem(format!("{host} {} {name}", self.name), message)
        });
        let doubted = self.doubted().map(|message| problem(format!("{host} {}", self.name), message));
        trouble.chain(flawed).chain(doubted)
    }

    fn doubted(&self) -> Option<String> {
        let names: Vec<&str> = self.store.doubted().collect();
        let more = names.len().saturating_sub(MAX_NAMES);
        let mut shown = names[..names.len() - more].join(", ");
        if more > 0 {
            shown += &format!(" and {more} more");
        }
        (!names.is_empty()).then(|| {
            format!(
                "half or more are gone from one list to the next: {shown}. They stay in force for {} s after it: put them \
                 back, unless they are to go",
                GRACE.as_secs()
            )
        })
    }
}

impl Trouble {
    /// With the remedy.
    pub(in crate::source::kube) fn told(&self) -> &str {
        match self {
            Trouble::NotServed => {
                "the API server does not have this kind, or is about to lose it: install the chart's CRDs"
            }
            Trouble::Other(why) => why,
        }
    }
}
