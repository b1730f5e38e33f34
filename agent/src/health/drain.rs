//! Taking a gateway out of service without losing a packet.

use std::time::Duration;

use super::pulse::SLOW;

/// Nobody has sent for so long: nobody will.
const QUIET: Duration = Duration::from_secs(2);
/// Whoever still sends after so long has no other way.
const LONGEST: Duration = Duration::from_secs(30);

/// How far a drain is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Drain {
    #[default]
    No,
    /// Told to everybody who asks; waiting until nobody sends.
    Waiting,
    /// Nobody sends through this gateway any more.
    Quiet,
    /// Some still send after 30 s: they have no other way.
    GaveUp,
}

#[derive(Debug, Default)]
pub(super) struct Drainer {
    state: Drain,
    since: Duration,
    /// What was last counted, and since when it has been the same.
    counted: Option<(u64, Duration)>,
}

impl Drainer {
    pub(super) fn state(&self) -> Drain {
        self.state
    }

    /// Returns whether that changes anything.
    pub(super) fn set(&mut self, now: Duration, on: bool) -> bool {
        if on == (self.state != Drain::No) {
            return false;
        }
        let state = if on { Drain::Waiting } else { Drain::No };
        *self = Drainer { state, since: now, counted: None };
        true
    }

    pub(super) fn count(&mut self, now: Duration, packets: u64) {
        if self.counted.is_none_or(|(before, _)| before != packets) {
            self.counted = Some((packets, now));
        }
    }

    /// Returns whether the state changed.
    pub(super) fn tick(&mut self, now: Duration) -> bool {
        if self.state != Drain::Waiting {
            return false;
        }
        // Everybody has asked since: an idle pair that wakes later knows better than to come here.
        let told = now >= self.since + SLOW * 7 / 5;
        if told && self.counted.is_some_and(|(_, same)| now >= same + QUIET) {
            self.state = Drain::Quiet;
        } else if now >= self.since + LONGEST {
            self.state = Drain::GaveUp;
        }
        self.state != Drain::Waiting
    }
}
