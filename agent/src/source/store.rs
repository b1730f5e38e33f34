//! The objects of one kind, as a watch tells of them: no I/O, and every `now` is an argument.
//!
//! Invariant: an object goes because its deletion was told, or because a whole list did without it. A list that has lost
//! half of what stood, or more, is doubted: an API server on an empty or restored store says the same. What it lacks
//! stands for [`GRACE`], and until then the store is not [`Store::is_complete`].

use std::{collections::BTreeMap, time::Duration};

/// How long what a doubted list lacks stands on: somebody can look.
pub const GRACE: Duration = Duration::from_secs(300);

/// What a watch says, in its order. A list begins anew at any time, also before the one before has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event<T> {
    ListBegins,
    Listed(String, T),
    ListEnds,
    Set(String, T),
    Deleted(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Store<T> {
    /// By name.
    standing: BTreeMap<String, T>,
    listing: Option<BTreeMap<String, T>>,
    synced: bool,
    /// What a doubted list lacks, and since when.
    doubted: BTreeMap<String, Duration>,
}

impl<T> Default for Store<T> {
    fn default() -> Store<T> {
        Store { standing: BTreeMap::new(), listing: None, synced: false, doubted: BTreeMap::new() }
    }
}

impl<T: PartialEq> Store<T> {
    /// Returns whether anything stands differently, or is doubted differently.
    pub fn hear(&mut self, now: Duration, event: Event<T>) -> bool {
        match event {
            Event::ListBegins => {
                self.listing = Some(BTreeMap::new());
                false
            }
            Event::Listed(name, object) => {
                self.listing.get_or_insert_default().insert(name, object);
                false
            }
            Event::ListEnds => {
                let listed = self.listing.take().unwrap_or_default();
                self.replace(now, listed)
            }
            Event::Set(name, object) => {
                let trusted = self.doubted.remove(&name).is_some();
                let same = self.standing.get(&name) == Some(&object);
                self.standing.insert(name, object);
                trusted || !same
            }
            Event::Deleted(name) => {
                self.doubted.remove(&name);
                self.standing.remove(&name).is_some()
            }
        }
    }

    fn replace(&mut self, now: Duration, listed: BTreeMap<String, T>) -> bool {
        let first = !std::mem::replace(&mut self.synced, true);
        let renewed = listed.iter().any(|(name, object)| self.standing.get(name) != Some(object));
        let before = std::mem::replace(&mut self.standing, listed);
        let known = before.len();
        let missing: Vec<_> = before.into_iter().filter(|(name, _)| !self.standing.contains_key(name)).collect();
        let lost = missing.len();
        let suspicious = lost > 0 && lost * 2 >= known;
        let mut doubted = BTreeMap::new();
        for (name, object) in missing {
            let since = self.doubted.get(&name).copied();
            if let Some(since) = since.or(suspicious.then_some(now)) {
                doubted.insert(name.clone(), since);
                self.standing.insert(name, object);
            }
        }
        let before = std::mem::replace(&mut self.doubted, doubted);
        first || renewed || self.doubted.len() < lost || self.doubted != before
    }
}

impl<T> Store<T> {
    /// Lets go of what was doubted for long enough. Returns whether anything stands differently.
    pub fn tick(&mut self, now: Duration) -> bool {
        let before = self.doubted.len();
        let Store { standing, doubted, .. } = self;
        doubted.retain(|name, since| {
            let keep = now < *since + GRACE;
            if !keep {
                standing.remove(name);
            }
            keep
        });
        doubted.len() != before
    }

    /// When [`Store::tick`] has something to do next.
    pub fn next(&self) -> Option<Duration> {
        self.doubted.values().min().map(|since| *since + GRACE)
    }

    /// Whether a whole list has been heard.
    pub fn is_synced(&self) -> bool {
        self.synced
    }

    /// Whether what stands is all that there is: nothing is doubted.
    pub fn is_complete(&self) -> bool {
        self.synced && self.doubted.is_empty()
    }

    /// The names of what a doubted list lacks.
    pub fn doubted(&self) -> impl Iterator<Item = &str> {
        self.doubted.keys().map(String::as_str)
    }

    pub fn get(&self, name: &str) -> Option<&T> {
        self.standing.get(name)
    }

    /// With their names, in the order of these.
    pub fn objects(&self) -> impl Iterator<Item = (&String, &T)> {
        self.standing.iter()
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn name() -> impl Strategy<Value = String> {
        (0..8u8).prop_map(|n| n.to_string())
    }

    /// A list at once, or single news.
    #[derive(Clone, Debug)]
    enum News {
        List(BTreeMap<String, u8>),
        /// A list that breaks off.
        Half(BTreeMap<String, u8>),
        Set(String, u8),
        Deleted(String),
        Wait(u64),
    }

    fn news() -> impl Strategy<Value = News> {
        let list = || proptest::collection::btree_map(name(), 0..2u8, 0..8);
        prop_oneof![
            3 => list().prop_map(News::List),
            1 => list().prop_map(News::Half),
            2 => (name(), 0..2u8).prop_map(|(name, value)| News::Set(name, value)),
            2 => name().prop_map(News::Deleted),
            1 => (0..400u64).prop_map(News::Wait),
        ]
    }

    struct Heard {
        store: Store<u8>,
        now: Duration,
        /// What the API server said last.
        truth: BTreeMap<String, u8>,
    }

    impl Heard {
        fn new() -> Heard {
            Heard { store: Store::default(), now: Duration::ZERO, truth: BTreeMap::new() }
        }

        /// Returns whether the store said that anything changed.
        fn hear(&mut self, news: &News) -> bool {
            match news {
                News::List(list) | News::Half(list) => {
                    let mut changed = self.store.hear(self.now, Event::ListBegins);
                    for (name, value) in list {
                        changed |= self.store.hear(self.now, Event::Listed(name.clone(), *value));
                    }
                    if matches!(news, News::List(_)) {
                        self.truth = list.clone();
                        changed |= self.store.hear(self.now, Event::ListEnds);
                    }
                    changed
                }
                News::Set(name, value) => {
                    self.truth.insert(name.clone(), *value);
                    self.store.hear(self.now, Event::Set(name.clone(), *value))
                }
                News::Deleted(name) => {
                    self.truth.remove(name);
                    self.store.hear(self.now, Event::Deleted(name.clone()))
                }
                News::Wait(seconds) => {
                    self.now += Duration::from_secs(*seconds);
                    self.store.tick(self.now)
                }
            }
        }
    }

    proptest! {
        #[test]
        fn all_that_was_said_stands_and_the_rest_is_doubted(all in vec(news(), 0..40)) {
            let mut heard = Heard::new();
            for news in &all {
                heard.hear(news);
                let Heard { store, truth, .. } = &heard;
                for (name, value) in truth {
                    prop_assert_eq!(store.standing.get(name), Some(value));
                }
                let more: Vec<_> = store.standing.keys().filter(|name| !truth.contains_key(*name)).collect();
                prop_assert_eq!(more, store.doubted.keys().collect::<Vec<_>>());
            }
        }

        #[test]
        fn a_change_is_told_if_and_only_if_there_is_one(all in vec(news(), 0..40)) {
            let mut heard = Heard::new();
            for news in &all {
                let before = Store { listing: None, ..heard.store.clone() };
                let changed = heard.hear(news);
                prop_assert_eq!(changed, before != Store { listing: None, ..heard.store.clone() });
            }
        }

        #[test]
        fn what_is_deleted_goes_at_once(all in vec(news(), 0..40), name in name()) {
            let mut heard = Heard::new();
            all.iter().for_each(|news| _ = heard.hear(news));
            heard.hear(&News::Deleted(name.clone()));
            prop_assert!(!heard.store.standing.contains_key(&name));
        }

        #[test]
        fn doubts_end(all in vec(news(), 0..40)) {
            let mut heard = Heard::new();
            all.iter().for_each(|news| _ = heard.hear(news));
            heard.hear(&News::Wait(GRACE.as_secs()));
            prop_assert_eq!(heard.store.next(), None);
            prop_assert_eq!(&heard.store.standing, &heard.truth);
        }

        #[test]
        fn a_list_that_lost_half_takes_nothing_away_before_the_grace_is_over(
            before in proptest::collection::btree_map(name(), any::<u8>(), 1..8), keep in 0..8usize, then in vec(0..60u64, 0..8),
        ) {
            let keep = keep % (before.len() / 2 + 1);
            let kept: BTreeMap<_, _> = before.iter().take(keep).map(|(name, value)| (name.clone(), *value)).collect();
            let mut heard = Heard::new();
            heard.hear(&News::List(before.clone()));
            heard.hear(&News::List(kept.clone()));
            for wait in then {
                // Told again, it is no younger.
                heard.hear(&News::List(kept.clone()));
                let over = heard.now >= GRACE;
                prop_assert_eq!(heard.store.standing == before, !over);
                prop_assert_eq!(heard.store.is_complete(), over);
                heard.hear(&News::Wait(wait));
            }
        }

        #[test]
        fn the_first_list_and_one_that_lost_less_than_half_are_believed(
            before in proptest::collection::btree_map(name(), any::<u8>(), 0..8), lost in 0..8usize,
        ) {
            let lost = lost.min(before.len().saturating_sub(1) / 2);
            let after: BTreeMap<_, _> = before.iter().skip(lost).map(|(name, value)| (name.clone(), *value)).collect();
            let mut heard = Heard::new();
            prop_assert!(!heard.store.is_synced());
            for list in [before, after] {
                heard.hear(&News::List(list.clone()));
                prop_assert_eq!(&heard.store.standing, &list);
                prop_assert!(heard.store.is_complete());
            }
        }
    }
}
