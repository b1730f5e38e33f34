//! Which slot this node holds: by its label, or by a Lease (DESIGN: several gateways at once, no election among them).
//!
//! Invariant: a slot is taken over only where no holder answers the claimant's own probes, and where the Lease that named
//! one, if any was heard of, stood still for [`DURATION`]; and of two that hold one slot at most one hears the API server:
//! the other gives it up as soon as it does. Two nodes with one key would make every peer roam between them. A Lease that
//! somebody deletes changes nothing: its holder writes it anew, and to others it stands still. Leases are compared with
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
    /// Only over this version; `None`: only if there is no Lease. Who comes second is refused (409, or 404 where the Lease
    /// is gone), and must [hear](Claims::hear) what stands now before it writes again.
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

/// A Lease, and how this node knows of it.
#[derive(Clone, Debug)]
struct Heard {
    lease: Lease,
    /// When it became what it is: when this node heard of it, or sent the write.
    since: Duration,
    /// A write of this node's made it what it is. Of what was written in a run before, it only hears.
    written: bool,
    /// It names a holder, and somebody has deleted it since.
    deleted: bool,
}

/// What this node knows of its cluster's Leases. Every `now` is of one monotonic clock of its own.
#[derive(Clone, Debug)]
pub struct Claims {
    me: NodeName,
    heard: BTreeMap<Ordinal, Heard>,
    /// Its Lease had lapsed while nobody answered it: somebody else may have the slot, until a renewal is taken.
    lost: bool,
    synced: bool,
}

impl Claims {
    pub fn new(me: NodeName) -> Claims {
        Claims { me, heard: BTreeMap::new(), lost: false, synced: false }
    }

    /// Each Lease has been told of, or is not there. Before, nothing is claimed.
    pub fn synced(&mut self) {
        self.synced = true;
    }

    /// What the API server says of a Lease; `None`: there is none.
    pub fn hear(&mut self, now: Duration, ordinal: Ordinal, lease: Option<Lease>) {
        let known = self.heard.get_mut(&ordinal);
        match (lease, known) {
            (Some(lease), Some(known)) if known.lease == lease && !known.deleted => {}
            (Some(lease), _) => {
                self.heard.insert(ordinal, Heard { lease, since: now, written: false, deleted: false });
            }
            // Whoever deletes a Lease takes no slot from who holds it. Who hears of that first, may have heard nothing of
            // the Lease for long: its holder has the time of a Lease to write it anew.
            (None, Some(known)) if known.lease.holder.is_some() => {
                if !std::mem::replace(&mut known.deleted, true) && known.lease.holder.as_ref() != Some(&self.me) {
                    known.since = now;
                }
            }
            (None, _) => _ = self.heard.remove(&ordinal),
        }
    }

    /// A write of ours was taken: what the Lease is now, and when the write was sent.
    pub fn wrote(&mut self, sent: Duration, ordinal: Ordinal, lease: Lease) {
        if lease.holder.as_ref() == Some(&self.me) {
            self.lost = false;
        }
        self.heard.insert(ordinal, Heard { lease, since: sent, written: true, deleted: false });
    }

    pub fn decide(&mut self, now: Duration, view: &View<'_>) -> Decision {
        let (kept, back) = self.held(view);
        let back = back.and_then(|ordinal| self.give_back(ordinal));
        let Some((ordinal, heard)) = kept.and_then(|ordinal| self.heard.get_key_value(&ordinal)) else {
            self.lost = false;
            return Decision { hold: None, write: back.or_else(|| self.claim(now, view)) };
        };
        let age = now.saturating_sub(heard.since);
        let due = !heard.written || heard.deleted || age >= RENEW;
        self.lost |= age >= DURATION && view.isolated;
        // What it has lost it does not take back from whoever answers for it.
        let taken = self.lost && view.answering.contains(ordinal);
        let renewal = || (due && !taken).then(|| self.write(*ordinal, Some(self.me.clone())));
        Decision { hold: (!self.lost).then_some(*ordinal), write: back.or_else(renewal) }
    }

    /// The slot of this node, and one to give back: what it holds beyond one, or what has become somebody's by label.
    fn held(&self, view: &View<'_>) -> (Option<Ordinal>, Option<Ordinal>) {
        let is_mine = |heard: &Heard| heard.lease.holder.as_ref() == Some(&self.me);
        let mine = || self.heard.iter().filter(|(_, heard)| is_mine(heard)).map(|(ordinal, _)| *ordinal);
        let kept = mine().find(|ordinal| view.free.contains(ordinal));
        (kept, mine().find(|ordinal| Some(*ordinal) != kept))
    }

    /// `None`: it is nobody's already.
    fn give_back(&mut self, ordinal: Ordinal) -> Option<Write> {
        if self.heard.get(&ordinal).is_some_and(|heard| heard.deleted) {
            self.heard.remove(&ordinal);
            return None;
        }
        Some(self.write(ordinal, None))
    }

    /// The lowest slot that is nobody's, or whose holder is gone. Whoever has given a slot up, or has lost its Lease, may
    /// not have let it go yet: then it answers.
    fn claim(&self, now: Duration, view: &View<'_>) -> Option<Write> {
        let stands = |heard: &Heard| heard.lease.holder.is_some() && now.saturating_sub(heard.since) < DURATION;
        let is_free =
            |ordinal: &&Ordinal| !view.answering.contains(ordinal) && !self.heard.get(ordinal).is_some_and(stands);
        let ordinal = view.free.iter().find(is_free).filter(|_| self.synced)?;
        Some(self.write(*ordinal, Some(self.me.clone())))
    }

    fn write(&self, ordinal: Ordinal, holder: Option<NodeName>) -> Write {
        let stands = self.heard.get(&ordinal).filter(|heard| !heard.deleted);
        Write { ordinal, holder, over: stands.map(|heard| heard.lease.version.clone()) }
    }
}

#[cfg(test)]
mod tests;
