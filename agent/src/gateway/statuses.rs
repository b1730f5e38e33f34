//! What a gateway writes into status: that of its own MeshGateway, and, where it speaks for its cluster, those of the mesh's
//! objects. Pure: what to ask next, given what is known.
//!
//! Invariant: an object is written when something is to be said otherwise, and once in [`WRITE_AGAIN`] at most, whatever
//! comes and goes; all objects together [`AT_ONCE`] times a second.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use k8s_openapi::jiff::Timestamp;

use super::{Ask, WRITE_AGAIN};
use crate::{
    api::MeshGatewayStatus,
    conditions::{Saying, Subject},
    names::Ordinal,
};

/// How often a gateway that has nothing new to say shows that it lives. People look at it; nothing here does.
const HEARTBEAT: Duration = Duration::from_secs(60);
/// Objects that are written within a second at most: a hundred thousand of them must not keep the API server busy.
const AT_ONCE: usize = 20;

#[derive(Debug, Default)]
pub(super) struct Statuses {
    /// Of this node's MeshGateway, without the heartbeat: what is to stand, and what does.
    own: Option<(MeshGatewayStatus, MeshGatewayStatus)>,
    /// When that was last written.
    beat: Option<Duration>,
    sayings: Arc<BTreeMap<Subject, Saying>>,
    /// Those of which something is to be written.
    due: BTreeSet<Subject>,
    /// When they were last written, the youngest of them for the pace.
    written: BTreeMap<Subject, Duration>,
}

impl Statuses {
    /// `own`: what is to stand of this node's MeshGateway, and what does; `None`: there is none yet.
    pub(super) fn know(
        &mut self,
        own: Option<(MeshGatewayStatus, MeshGatewayStatus)>,
        sayings: &Arc<BTreeMap<Subject, Saying>>,
    ) {
        self.own = own;
        if Arc::ptr_eq(&self.sayings, sayings) {
            return;
        }
        // The time goes into what is written only, and that is made anew when it is.
        let is_due = |(_, saying): &(&Subject, &Saying)| saying.due(Timestamp::UNIX_EPOCH).is_some();
        self.due = sayings.iter().filter(is_due).map(|(subject, _)| subject.clone()).collect();
        self.written.retain(|subject, _| sayings.contains_key(subject));
        self.sayings = sayings.clone();
    }

    /// `hold`: the slot that this node holds; `speaks`: it speaks for its cluster.
    pub(super) fn next(&self, now: Duration, hold: Ordinal, speaks: bool) -> Option<Ask> {
        let since = |written: &Duration| now.saturating_sub(*written);
        if let Some((wanted, stands)) = &self.own {
            let pause = if wanted == stands { HEARTBEAT } else { WRITE_AGAIN };
            if self.beat.as_ref().is_none_or(|beat| since(beat) >= pause) {
                return Some(Ask::Report(hold, wanted.clone()));
            }
        }
        let lately = self.written.values().filter(|written| since(written) < Duration::from_secs(1)).count();
        if !speaks || lately >= AT_ONCE {
            return None;
        }
        let may = |subject: &&Subject| self.written.get(subject).is_none_or(|written| since(written) >= WRITE_AGAIN);
        let subject = self.due.iter().find(may)?;
        Some(Ask::Say(subject.clone(), self.sayings.get(subject)?.clone()))
    }

    pub(super) fn reported(&mut self, now: Duration) {
        self.beat = Some(now);
    }

    /// It was written, or is no more.
    pub(super) fn said(&mut self, now: Duration, subject: &Subject) {
        self.due.remove(subject);
        self.written.insert(subject.clone(), now);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::conditions::tests::{mesh, sayings};

    fn slot(n: i64) -> Ordinal {
        Ordinal::new(n).unwrap()
    }

    /// The first second in which each object is written, and how often within so many.
    fn written(statuses: &mut Statuses, seconds: std::ops::Range<u64>) -> BTreeMap<String, Vec<u64>> {
        let mut written: BTreeMap<String, Vec<u64>> = BTreeMap::new();
        for second in seconds {
            let now = Duration::from_secs(second);
            while let Some(ask) = statuses.next(now, slot(0), true) {
                match ask {
                    Ask::Report(..) => {
                        written.entry("itself".to_owned()).or_default().push(second);
                        statuses.reported(now);
                    }
                    Ask::Say(subject, _) => {
                        written.entry(subject.name.clone()).or_default().push(second);
                        statuses.said(now, &subject);
                    }
                    other => panic!("{other:?}"),
                }
            }
        }
        written
    }

    #[test]
    fn a_gateway_shows_that_it_lives_once_a_minute_and_what_is_new_after_ten_seconds() {
        let mut statuses = Statuses::default();
        let quiet = MeshGatewayStatus::default();
        let drains = MeshGatewayStatus { draining: Some(true), ..quiet.clone() };
        statuses.know(Some((quiet.clone(), quiet.clone())), &Arc::default());
        assert_eq!(written(&mut statuses, 0..125)["itself"], [0, 60, 120]);
        statuses.know(Some((drains, quiet)), &Arc::default());
        assert_eq!(written(&mut statuses, 125..145)["itself"], [130, 140], "until it stands");
    }

    #[test]
    fn who_does_not_speak_for_the_cluster_says_nothing_of_the_mesh() {
        let mut statuses = Statuses::default();
        statuses.know(None, &Arc::new(sayings(&mesh(3))));
        assert_eq!(statuses.next(Duration::ZERO, slot(1), false), None);
        assert!(statuses.next(Duration::ZERO, slot(1), true).is_some());
    }

    proptest! {
        #[test]
        fn each_object_is_written_and_none_too_often(members in 1..70u16, again in 1..30u64) {
            let mut statuses = Statuses::default();
            let all = sayings(&mesh(members));
            statuses.know(None, &Arc::new(all.clone()));
            let first = written(&mut statuses, 0..again);
            // Nothing of it stands yet when it is known anew.
            statuses.know(None, &Arc::new(all));
            let mut times = written(&mut statuses, again..again + 30);
            let mut a_second: BTreeMap<u64, usize> = BTreeMap::new();
            for (name, seconds) in first {
                times.entry(name).or_default().splice(..0, seconds);
            }
            for (name, seconds) in &times {
                prop_assert!(seconds.windows(2).all(|pair| pair[1] - pair[0] >= WRITE_AGAIN.as_secs()), "{name} {seconds:?}");
                seconds.iter().for_each(|second| *a_second.entry(*second).or_default() += 1);
            }
            prop_assert_eq!(times.len(), usize::from(members));
            prop_assert!(a_second.values().all(|written| *written <= AT_ONCE), "{:?}", a_second);
        }
    }
}
