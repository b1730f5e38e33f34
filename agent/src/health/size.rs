//! The largest inner packet that reaches one target: a search that trusts answers, never ICMP.
//!
//! The size that is believed is confirmed by an ask as large, always beside a small one: small answered and large lost,
//! three times in a row, is a black hole. Then, and now and then to see whether the path has grown, a ladder of sizes is
//! asked at once; each round narrows the gap to an eighth.
//!
//! Invariant: a size is only ever raised to one that was answered, or that nothing has spoken against yet.

use std::{collections::BTreeSet, time::Duration};

use super::pulse::FORGET;

/// IPv6 and UDP headers, bytes.
const HEADERS: u16 = 40 + 8;
/// The inner packet that the smallest probe is: proved by any answer.
pub(super) const FLOOR: u16 = ebpf::probe::LEN as u16 + HEADERS;
/// Between two confirmations under traffic.
const CONFIRM: Duration = Duration::from_secs(1);
/// Between two attempts at more, under traffic.
const RAISE: Duration = Duration::from_secs(10);
/// As above, where something about the path has just changed.
const RAISE_AGAIN: Duration = Duration::from_secs(1);
/// Confirmations lost in a row, each beside a small ask that was answered, that make a black hole.
const BLACK_HOLE: u8 = 3;
const RUNGS: u16 = 8;
/// Each rung is asked so often, so that one lost packet says nothing.
const COPIES: usize = 2;

#[derive(Debug)]
pub(super) struct PathSize {
    size: u16,
    max: u16,
    /// Whether `size` itself was ever answered.
    proven: bool,
    /// Confirmations lost in a row.
    misses: u8,
    asks: Vec<Sent>,
    search: Option<Search>,
    confirm: Duration,
    raise: Duration,
    raised: Duration,
}

#[derive(Debug)]
struct Sent {
    nonce: u64,
    size: u16,
    at: Duration,
    /// Too late to count.
    over: bool,
}

/// `low` passes and the answer lies in `low..=high`.
#[derive(Debug)]
struct Search {
    low: u16,
    high: u16,
    answered: BTreeSet<u16>,
}

/// The UDP payload that makes an inner packet of this size, bytes.
pub(super) fn payload(size: u16) -> usize {
    usize::from(size - HEADERS)
}

impl PathSize {
    /// `size`: believed until something speaks against it; at most `max`, at least [`FLOOR`].
    pub(super) fn new(size: u16, max: u16) -> PathSize {
        let max = max.max(FLOOR);
        PathSize {
            size: size.clamp(FLOOR, max),
            max,
            proven: false,
            misses: 0,
            asks: Vec::new(),
            search: None,
            confirm: Duration::ZERO,
            raise: Duration::ZERO,
            raised: Duration::ZERO,
        }
    }

    pub(super) fn get(&self) -> u16 {
        self.size
    }

    /// What the devices allow: never exceeded. Returns whether the size changed.
    pub(super) fn limit(&mut self, max: u16) -> bool {
        let (max, before) = (max.max(FLOOR), self.size);
        if max == self.max {
            return false;
        }
        if max > self.max {
            self.raise_again();
        }
        self.max = max;
        self.search = None;
        self.size = self.size.min(max);
        self.size != before
    }

    /// Something about the path has changed: more may pass than before.
    pub(super) fn raise_again(&mut self) {
        self.raise = self.raise.min(self.raised + RAISE_AGAIN);
    }

    /// What to ask now. `beside`: a small ask goes out right now; `active`: traffic depends on the target.
    pub(super) fn due(
        &mut self,
        now: Duration,
        beside: bool,
        active: bool,
        random: &mut impl FnMut() -> u64,
    ) -> Vec<(u64, u16)> {
        if self.asks.iter().any(|ask| !ask.over) {
            return Vec::new();
        }
        if self.search.is_none() && self.proven && active && self.size < self.max && now >= self.raise {
            (self.raised, self.raise) = (now, now + RAISE);
            self.search = Some(Search::new(self.size, self.max));
        }
        let sizes = match &self.search {
            Some(search) => search.rungs(),
            None if beside && (!self.proven || self.misses > 0 || active && now >= self.confirm) => vec![self.size],
            None => Vec::new(),
        };
        if !sizes.is_empty() {
            self.confirm = now + CONFIRM;
        }
        let asks: Vec<_> = sizes.into_iter().map(|size| (random(), size)).collect();
        self.asks.extend(asks.iter().map(|&(nonce, size)| Sent { nonce, size, at: now, over: false }));
        asks
    }

    /// `None`: nothing like it was asked; else whether the size changed.
    pub(super) fn answered(&mut self, nonce: u64, length: usize) -> Option<bool> {
        let at = self.asks.iter().position(|ask| ask.nonce == nonce && payload(ask.size) == length)?;
        let ask = self.asks.swap_remove(at);
        if ask.over {
            return Some(false);
        }
        let Some(search) = &mut self.search else {
            if ask.size == self.size {
                (self.proven, self.misses) = (true, 0);
            }
            return Some(false);
        };
        search.answered.insert(ask.size);
        // The top of the ladder says it all.
        Some(ask.size == search.high && self.found(ask.size))
    }

    /// Takes note of what did not come within `patience`. `heard`: when the latest small ask that was answered had been
    /// sent. Returns whether the size changed.
    pub(super) fn expire(&mut self, now: Duration, patience: Duration, heard: Option<Duration>) -> bool {
        self.asks.retain(|ask| now < ask.at + FORGET);
        // What waits was asked all at once.
        let Some(sent) = self.asks.iter().find(|ask| !ask.over).map(|ask| ask.at) else { return false };
        if now < sent + patience {
            return false;
        }
        self.asks.iter_mut().for_each(|ask| ask.over = true);
        let Some(search) = &mut self.search else {
            if heard.is_some_and(|heard| heard >= sent) {
                self.misses += 1;
            }
            if self.misses >= BLACK_HOLE {
                self.misses = 0;
                self.search = Some(Search::new(FLOOR, self.size));
            }
            return false;
        };
        match search.narrowed() {
            None => {
                self.search = None;
                false
            }
            Some((low, high)) if low < high => {
                self.search = Some(Search::new(low, high));
                false
            }
            Some((low, _)) => self.found(low),
        }
    }

    /// When something is to be done next, if nothing comes; `None`: not before the next small ask.
    pub(super) fn deadline(&self, patience: Duration) -> Option<Duration> {
        match self.asks.iter().filter(|ask| !ask.over).map(|ask| ask.at + patience).min() {
            None => self.search.as_ref().map(|_| Duration::ZERO),
            waiting => waiting,
        }
    }

    /// The target is dead, or the prober was away: nothing that was asked says anything.
    pub(super) fn void(&mut self) {
        self.asks.iter_mut().for_each(|ask| ask.over = true);
        self.search = None;
        self.misses = 0;
    }

    fn found(&mut self, size: u16) -> bool {
        self.asks.iter_mut().for_each(|ask| ask.over = true);
        self.search = None;
        (self.proven, self.misses) = (true, 0);
        std::mem::replace(&mut self.size, size) != size
    }
}

impl Search {
    fn new(low: u16, high: u16) -> Search {
        Search { low, high, answered: BTreeSet::new() }
    }

    fn ladder(&self) -> BTreeSet<u16> {
        let gap = u32::from(self.high - self.low);
        let rung = |n: u16| self.low + u16::try_from(gap * u32::from(n) / u32::from(RUNGS)).unwrap_or(u16::MAX);
        (1..=RUNGS).map(rung).filter(|size| *size > self.low).collect()
    }

    /// The ladder, and what is known to pass, as a control.
    fn rungs(&self) -> Vec<u16> {
        let once = std::iter::once(self.low).chain(self.ladder());
        once.flat_map(|size| [size; COPIES]).collect()
    }

    /// What a round leaves to ask; `None` if not even the control came back, which says nothing of sizes.
    fn narrowed(&self) -> Option<(u16, u16)> {
        let low = *self.answered.last()?;
        let above = self.ladder().into_iter().find(|size| *size > low);
        Some((low, above.map_or(self.high, |size| size - 1)))
    }
}
