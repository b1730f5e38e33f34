//! Which slot this node holds: by its label, or by a Lease (DESIGN: several gateways at once, no election among them).
//!
//! Invariant: a slot is taken over only from a holder whose Lease stood still for [`DURATION`] and who does not answer
//! the claimant's own probes, and of two that hold one slot at most one hears the API server: the other gives it up as
//! soon as it does. Two nodes with one key would make every peer roam between them. Leases are compared with
//! what was heard before and timed by this node's own clock: no other node's clock is ever believed.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::names::{NodeName, Ordinal};

/// The label of a Node that makes it a gateway.
pub const LABEL: &str = "carrick.dev/gateway";
/// How long a Lease stands without being renewed.
pub const DURATION: Duration = Duration::from_secs(60);
/// How often its holder renews it: three times a minute, so that two renewals may be lost.
pub const RENEW: Duration = Duration::from_secs(20);

/// What a Node's label asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// No label: a worker.
    Worker,
    /// This slot and no other, without a Lease.
    Pinned(Ordinal),
    /// Any slot that is free, by Lease.
    Any,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("label {LABEL}={0:?} is neither a slot from 0 to 7 nor \"auto\": this node stays a worker")]
pub struct BadLabel(pub String);

impl Wish {
    pub fn of(label: Option<&str>) -> Result<Wish, BadLabel> {
        let bad = |label: &str| BadLabel(label.to_owned());
        match label {
            None => Ok(Wish::Worker),
            Some("auto") => Ok(Wish::Any),
            // One digit, as it is written everywhere else.
            Some(label) if label.len() == 1 => {
                let ordinal = label.parse().ok().and_then(Ordinal::new);
                ordinal.map(Wish::Pinned).ok_or_else(|| bad(label))
            }
            Some(label) => Err(bad(label)),
        }
    }
}

/// What a Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// `None`: it was given back.
    pub holder: Option<NodeName>,
    /// Its resource version: another after every write.
    pub version: String,
}

/// What to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Write {
    pub ordinal: Ordinal,
    /// `None` gives the slot back.
    pub holder: Option<NodeName>,
    /// Only over this version; `None`: only if there is no Lease. Who comes second is refused.
    pub over: Option<String>,
}

/// What is known from elsewhere.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// Slots that may be held by Lease: none that a label pins.
    pub free: &'a BTreeSet<Ordinal>,
    /// Slots whose holders have answered this node's latest probes.
    pub answering: &'a BTreeSet<Ordinal>,
    /// This node probes other gateways of its cluster, and none of them answers.
    pub isolated: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decision {
    /// The slot whose key this node may use now.
    pub hold: Option<Ordinal>,
    pub write: Option<Write>,
}

/// A Lease, and when this node heard of it.
#[derive(Clone, Debug)]
struct Heard {
    lease: Lease,
    since: Duration,
}

/// What this node knows of its cluster's Leases. Every `now` is of one monotonic clock of its own.
#[derive(Clone, Debug)]
pub struct Claims {
    me: NodeName,
    heard: BTreeMap<Ordinal, Heard>,
    /// When the write was sent that made the Lease what it is; not heard of from a run before.
    sent: Option<Duration>,
    /// Its Lease had lapsed while nobody answered it: somebody else may have the slot, until a renewal is taken.
    lost: bool,
    synced: bool,
}

impl Claims {
    pub fn new(me: NodeName) -> Claims {
        Claims { me, heard: BTreeMap::new(), sent: None, lost: false, synced: false }
    }

    /// Each Lease has been told of, or is not there. Before, nothing is claimed.
    pub fn synced(&mut self) {
        self.synced = true;
    }

    /// What the API server says of a Lease; `None`: there is none.
    pub fn hear(&mut self, now: Duration, ordinal: Ordinal, lease: Option<Lease>) {
        let Some(lease) = lease else {
            self.heard.remove(&ordinal);
            return;
        };
        if self.heard.get(&ordinal).is_none_or(|heard| heard.lease != lease) {
            self.heard.insert(ordinal, Heard { lease, since: now });
        }
    }

    /// A write of ours was taken: what the Lease is now, and when the write was sent.
    pub fn wrote(&mut self, sent: Duration, ordinal: Ordinal, lease: Lease) {
        self.sent = Some(sent);
        self.lost = false;
        self.hear(sent, ordinal, Some(lease));
    }

    pub fn decide(&mut self, now: Duration, view: &View<'_>) -> Decision {
        let (kept, back) = self.held(view);
        let back = back.map(|ordinal| self.write(ordinal, None));
        let Some(ordinal) = kept else {
            self.lost = false;
            return Decision { hold: None, write: back.or_else(|| self.claim(now, view)) };
        };
        let lapsed = self.sent.or(self.heard.get(&ordinal).map(|heard| heard.since));
        let lapsed = lapsed.is_some_and(|since| now.saturating_sub(since) >= DURATION);
        self.lost |= lapsed && view.isolated;
        let due = self.sent.is_none_or(|sent| now.saturating_sub(sent) >= RENEW);
        let renewal = || due.then(|| self.write(ordinal, Some(self.me.clone())));
        Decision { hold: (!self.lost).then_some(ordinal), write: back.or_else(renewal) }
    }

    /// The slot of this node, and one to give back: what it holds beyond one, or what has become somebody's by label.
    fn held(&self, view: &View<'_>) -> (Option<Ordinal>, Option<Ordinal>) {
        let is_mine = |heard: &Heard| heard.lease.holder.as_ref() == Some(&self.me);
        let mine = || self.heard.iter().filter(|(_, heard)| is_mine(heard)).map(|(ordinal, _)| *ordinal);
        let kept = mine().find(|ordinal| view.free.contains(ordinal));
        (kept, mine().find(|ordinal| Some(*ordinal) != kept))
    }

    /// The lowest slot that is nobody's, or whose holder is gone.
    fn claim(&self, now: Duration, view: &View<'_>) -> Option<Write> {
        let is_nobodys = |ordinal: &Ordinal| match self.heard.get(ordinal) {
            Some(Heard { lease: Lease { holder: Some(_), .. }, since }) => {
                now.saturating_sub(*since) >= DURATION && !view.answering.contains(ordinal)
            }
            _ => true,
        };
        let ordinal = view.free.iter().find(|ordinal| is_nobodys(ordinal)).filter(|_| self.synced)?;
        Some(self.write(*ordinal, Some(self.me.clone())))
    }

    fn write(&self, ordinal: Ordinal, holder: Option<NodeName>) -> Write {
        Write { ordinal, holder, over: self.heard.get(&ordinal).map(|heard| heard.lease.version.clone()) }
    }
}

#[cfg(test)]
mod tests;
