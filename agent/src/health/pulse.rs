//! Whether one target lives: what it was asked, how long it takes to answer, how often it has changed its mind.
//!
//! Invariant: a target's life changes only by what came from it, did not come in time, or cannot come.

use std::{collections::VecDeque, time::Duration};

/// Between two asks of a target that traffic depends on.
pub const FAST: Duration = Duration::from_millis(200);
/// Between two asks of any other, give or take a fifth.
pub const SLOW: Duration = Duration::from_secs(5);
/// Asks lost in a row that take a target out.
pub const LOST: u8 = 3;
/// Answers in a row that bring one back.
const GOOD: u32 = 2;
/// After so long without a change the flaps before it are forgotten.
const CALM: Duration = Duration::from_secs(60);
const LONGEST_HOLD: Duration = Duration::from_secs(30);
const LONGEST_RTT: Duration = Duration::from_secs(2);
/// How long an ask is remembered: a late answer still tells the round trip. Longer than any patience.
pub(super) const FORGET: Duration = Duration::from_secs(5);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It has never answered.
    New,
    Up,
    Down,
}

#[derive(Debug)]
pub(super) struct Pulse {
    life: Life,
    /// When `life` last changed.
    changed: Duration,
    /// Oldest first.
    asks: VecDeque<Sent>,
    /// Smoothed.
    rtt: Option<Duration>,
    /// In a row.
    lost: u8,
    /// Answers in a row since it went down, and when the first of them came.
    good: u32,
    good_since: Duration,
    flaps: u32,
    due: Duration,
    last_ask: Option<Duration>,
    /// When the latest ask that was answered had been sent.
    heard: Option<Duration>,
}

#[derive(Debug)]
struct Sent {
    nonce: u64,
    at: Duration,
    fate: Fate,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Waiting,
    /// Counted as lost; its answer may still come.
    Lost,
    /// The prober was away: neither its answer nor the lack of it says anything.
    Void,
}

/// What an answer was to a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Heard {
    /// Nothing like it was asked.
    Unasked,
    /// It was asked before the prober was away.
    Void,
    Good,
}

impl Pulse {
    pub(super) fn new(life: Life, now: Duration, due: Duration) -> Pulse {
        Pulse {
            life,
            changed: now,
            asks: VecDeque::new(),
            rtt: None,
            lost: 0,
            good: 0,
            good_since: now,
            flaps: 0,
            due,
            last_ask: None,
            heard: None,
        }
    }

    pub(super) fn life(&self) -> Life {
        self.life
    }

    pub(super) fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    pub(super) fn heard(&self) -> Option<Duration> {
        self.heard
    }

    pub(super) fn fell_since(&self, then: Duration) -> bool {
        self.life == Life::Down && self.changed >= then
    }

    /// How long an answer may take.
    pub(super) fn patience(&self) -> Duration {
        FAST.max(2 * self.rtt.unwrap_or_default())
    }

    pub(super) fn is_due(&self, now: Duration) -> bool {
        self.due <= now
    }

    /// When something is to be done next, if nothing comes.
    pub(super) fn deadline(&self) -> Duration {
        let waiting = self.asks.iter().find(|ask| ask.fate == Fate::Waiting);
        waiting.map_or(self.due, |ask| self.due.min(ask.at + self.patience()))
    }

    /// Asks as soon as may be.
    pub(super) fn hurry(&mut self, now: Duration) {
        let soonest = self.last_ask.map_or(now, |last| now.max(last + FAST));
        self.due = self.due.min(soonest);
    }

    /// It was asked. Short delays of the prober do not add up.
    pub(super) fn asked(&mut self, now: Duration, nonce: u64, interval: Duration) {
        self.asks.push_back(Sent { nonce, at: now, fate: Fate::Waiting });
        self.last_ask = Some(now);
        self.due = if self.due + interval > now { self.due + interval } else { now + interval };
    }

    /// `lag`: how late the prober itself is, which is no part of the round trip.
    pub(super) fn answered(&mut self, now: Duration, nonce: u64, lag: Duration) -> Heard {
        let Some(at) = self.asks.iter().position(|ask| ask.nonce == nonce) else { return Heard::Unasked };
        let Some(ask) = self.asks.remove(at) else { return Heard::Unasked };
        if ask.fate == Fate::Void {
            return Heard::Void;
        }
        let sample = now.saturating_sub(ask.at + lag).min(LONGEST_RTT);
        self.rtt = Some(match self.rtt {
            // Late: the way has become longer, and the next answers should not be late as well.
            Some(rtt) if ask.fate == Fate::Lost => rtt.max(sample),
            Some(rtt) => (rtt * 7 + sample) / 8,
            None => sample,
        });
        self.heard = self.heard.max(Some(ask.at));
        self.lost = 0;
        match self.life {
            Life::Up => {}
            Life::New => self.turn(Life::Up, now),
            // A tunnel that hung answers all that waited in it at once, and still has more waiting.
            Life::Down if ask.fate == Fate::Lost => {}
            Life::Down => {
                if self.good == 0 {
                    self.good_since = now;
                }
                self.good += 1;
                if self.good >= GOOD && now >= self.good_since + self.hold(now) {
                    self.turn(Life::Up, now);
                }
            }
        }
        Heard::Good
    }

    /// Takes note of what did not come in time. Returns whether the target went down.
    pub(super) fn expire(&mut self, now: Duration) -> bool {
        let patience = self.patience();
        let mut lost = 0;
        for ask in &mut self.asks {
            if ask.fate == Fate::Waiting && ask.at + patience <= now {
                ask.fate = Fate::Lost;
                lost += 1;
            }
        }
        while self.asks.front().is_some_and(|ask| ask.at + FORGET <= now) {
            self.asks.pop_front();
        }
        if lost == 0 {
            return false;
        }
        self.lost = self.lost.saturating_add(lost);
        self.good = 0;
        if self.life != Life::Up || self.lost < LOST {
            return false;
        }
        self.cut(now);
        true
    }

    /// Nothing can come from it: it need not be waited for.
    pub(super) fn cut(&mut self, now: Duration) {
        if self.life == Life::Up {
            self.flaps = if now >= self.changed + CALM { 1 } else { self.flaps + 1 };
            self.turn(Life::Down, now);
        }
    }

    /// The prober was away: everything is judged anew.
    pub(super) fn void(&mut self) {
        for ask in &mut self.asks {
            ask.fate = Fate::Void;
        }
        self.lost = 0;
        self.good = 0;
    }

    /// Whether it answers and only the hold-down keeps it out.
    pub(super) fn held(&self) -> bool {
        self.life == Life::Down && self.good >= GOOD
    }

    /// Ends the hold-down.
    pub(super) fn release(&mut self, now: Duration) {
        self.turn(Life::Up, now);
    }

    #[cfg(test)]
    pub(super) fn waiting(&self) -> usize {
        self.asks.len()
    }

    fn turn(&mut self, life: Life, now: Duration) {
        self.life = life;
        self.changed = now;
        self.good = 0;
        self.lost = 0;
    }

    /// How long it has to answer without a loss before it is believed: nothing, then 1, 2, 4, ... 30 s.
    fn hold(&self, now: Duration) -> Duration {
        if self.flaps < 2 || now >= self.changed + CALM {
            return Duration::ZERO;
        }
        Duration::from_secs(1 << (self.flaps - 2).min(5)).min(LONGEST_HOLD)
    }
}
