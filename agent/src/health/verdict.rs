//! What the health of the targets comes to: a set of ways for each member, and what this gateway tells of itself.
//!
//! The rule, for each member, is a function of what is known and of the set before:
//!
//! 1. `links` are the remote slots that this gateway reaches; `via` the own slots, on other nodes, that answer and say
//!    that they reach the member. Draining ones count only where no other is left.
//! 2. Where both are empty, or the one that is used holds only what is draining, whatever only its hold-down keeps out
//!    comes back at once.
//! 3. If both still are, no way is known, and the last set stays, with what went out within the second before: dropping
//!    everything helps nobody, and it may be the prober that is at fault. Otherwise the set is what is known, also
//!    where `links` becomes 0: then `steer` takes `via`, and what others still send here goes by the last `links`, `kept`.
//! 4. A gateway claims a member exactly if it has a link to it that works. A claim is never kept: whoever reads it keeps
//!    its own last set, so false modesty of all gateways changes nothing, while a false claim would hold traffic that
//!    another gateway could carry.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use ebpf::{Answer, Reach};

use super::{Target, Targets, Watched, pulse::Life};
use crate::{
    names::{MemberId, Ordinal},
    state::MIN_MTU_V6,
};

/// What dies within this, dies at once.
const AT_ONCE: Duration = Duration::from_secs(1);

/// What the maps should hold, and what somebody should look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Every member of the plan.
    pub reach: BTreeMap<MemberId, Reach>,
    pub answer: Answer,
    pub alarms: BTreeSet<Alarm>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Alarm {
    /// The prober was away for more than a second within the last minute; nothing was concluded from it.
    Late,
    /// Of this cluster's other gateways, not one answers.
    NoGatewayAnswers,
    /// Of all other members' gateways, not one answers this gateway.
    NoLinkAnswers,
    /// No way to the member is known. The last one that was is still in use, if there was one.
    NoWay(MemberId),
    /// The way to the member carries less than IPv6 asks of every link, and no host sends less for being told.
    Narrow(MemberId),
}

/// The members of an answer's bitmap.
pub type Members = [u8; 512];

pub const NO_ANSWER: Answer = Answer { flags: 0, zero: 0, mtu: [0; 2], members: [0; 512] };

pub fn claims(members: &Members, member: MemberId) -> bool {
    members[usize::from(member.get() / 8)] & (1 << (member.get() % 8)) != 0
}

pub(super) fn claim(members: &mut Members, member: MemberId) {
    members[usize::from(member.get() / 8)] |= 1 << (member.get() % 8);
}

/// The candidates for one of the two sets of a member, one bit for each slot.
#[derive(Clone, Copy, Debug, Default)]
struct Ways {
    known: u8,
    up: u8,
    draining: u8,
    /// Went out just now.
    fell: u8,
}

impl Ways {
    /// Up, and not about to stop.
    fn staying(self) -> u8 {
        self.up & !self.draining
    }

    fn best(self) -> u8 {
        if self.staying() == 0 { self.up } else { self.staying() }
    }

    /// What stays of a set where nothing better is known.
    fn kept(self, last: u8) -> u8 {
        (last | self.fell) & self.known
    }
}

/// All that a verdict is made from.
pub(super) struct Scene<'a> {
    pub(super) now: Duration,
    pub(super) targets: &'a Targets,
    pub(super) watched: &'a BTreeMap<Target, Watched>,
    pub(super) last: &'a BTreeMap<MemberId, Reach>,
    pub(super) draining: bool,
    /// Drained: what this node itself sends should leave by others as well.
    pub(super) drained: bool,
    pub(super) late: bool,
}

impl Scene<'_> {
    pub(super) fn verdict(&self) -> Verdict {
        let mut alarms = BTreeSet::new();
        let mut answer = Answer { mtu: self.hop_mtu().to_be_bytes(), ..NO_ANSWER };
        if self.draining {
            answer.flags |= ebpf::probe::DRAINING;
        }
        let mut reach = BTreeMap::new();
        for member in self.targets.members.keys() {
            let (links, via) = self.ways(*member);
            let last = self.last.get(member).copied().unwrap_or_default();
            let decided = self.decide(*member, links, via, last);
            if links.up | via.up == 0 && links.known | via.known != 0 && self.targets.probing {
                alarms.insert(Alarm::NoWay(*member));
            }
            if decided.mtu != 0 && decided.mtu < MIN_MTU_V6 {
                alarms.insert(Alarm::Narrow(*member));
            }
            if links.up != 0 && decided.links != 0 {
                claim(&mut answer.members, *member);
            }
            reach.insert(*member, decided);
        }
        if self.late {
            alarms.insert(Alarm::Late);
        }
        if self.silent(|target| matches!(target, Target::Own(_))) {
            alarms.insert(Alarm::NoGatewayAnswers);
        }
        if self.silent(|target| matches!(target, Target::Remote(..))) {
            alarms.insert(Alarm::NoLinkAnswers);
        }
        Verdict { reach, answer, alarms }
    }

    /// Targets that answer, are needed, and are held down: without them a member has no way, or none that stays.
    pub(super) fn held_in_vain(&self) -> BTreeSet<Target> {
        let mut found = BTreeSet::new();
        for member in self.targets.members.keys() {
            let (links, via) = self.ways(*member);
            // A gateway goes by its own links as long as one is up, also where that one is about to stop.
            let needs_links = links.staying() == 0 && (links.up != 0 || via.staying() == 0);
            let needs_via = links.staying() | via.staying() == 0;
            if needs_links {
                let none = links.up | via.up == 0;
                let needed = |target: &Target, watched: &Watched| match target {
                    Target::Own(_) => needs_via && watched.claims(*member),
                    Target::Remote(of, _) => of == member,
                };
                let held = self
                    .watched
                    .iter()
                    .filter(|(target, it)| it.pulse.held() && (none || !it.draining) && needed(target, it));
                found.extend(held.map(|(target, _)| *target));
            }
        }
        found
    }

    fn decide(&self, member: MemberId, links: Ways, via: Ways, last: Reach) -> Reach {
        if !self.targets.probing {
            return Reach { via: via.known, ..Reach::default() };
        }
        if links.up | via.up == 0 {
            let kept = last.kept & links.known;
            return Reach { via: via.kept(last.via), links: links.kept(last.links), kept, ..last };
        }
        let kept = links.kept(last.links | last.kept);
        let via = via.best();
        let links = if self.drained && via != 0 { 0 } else { links.best() };
        let kept = if links == 0 { kept } else { 0 };
        let sizes = bits(if links != 0 { links } else { via }).filter_map(|slot| {
            let target = if links != 0 { Target::Remote(member, slot) } else { Target::Own(slot) };
            self.watched.get(&target).map(|watched| watched.mtu())
        });
        // By whichever gateway it goes, it goes through a tunnel: what that one carries, the gateway itself sees to.
        let mtu = sizes.min().map_or(0, |mtu| mtu.min(self.targets.tunnel_mtu));
        Reach { via, links, mtu, kept, zero: [0; 3] }
    }

    /// The candidates for `links` and for `via`.
    fn ways(&self, member: MemberId) -> (Ways, Ways) {
        let (mut links, mut via) = (Ways::default(), Ways::default());
        let remote = self.targets.members.get(&member).into_iter().flat_map(BTreeMap::keys);
        for slot in remote {
            if let Some(watched) = self.watched.get(&Target::Remote(member, *slot)) {
                self.add(&mut links, *slot, watched, true);
            }
        }
        for slot in self.targets.own.keys() {
            match self.watched.get(&Target::Own(*slot)) {
                Some(watched) => self.add(&mut via, *slot, watched, watched.claims(member)),
                None => via.known |= 1 << slot.get(),
            }
        }
        (links, via)
    }

    fn add(&self, ways: &mut Ways, slot: Ordinal, watched: &Watched, serves: bool) {
        let bit = 1 << slot.get();
        ways.known |= bit;
        if serves && watched.pulse.life() == Life::Up {
            ways.up |= bit;
        }
        if watched.draining {
            ways.draining |= bit;
        }
        if serves && watched.pulse.fell_since(self.now.saturating_sub(AT_ONCE)) {
            ways.fell |= bit;
        }
    }

    /// Whether none of a kind answers any more, and one did.
    fn silent(&self, kind: impl Fn(&Target) -> bool) -> bool {
        let of_kind = self.watched.iter().filter(|(target, _)| kind(target));
        let lives: Vec<_> = of_kind.map(|(_, watched)| watched.pulse.life()).collect();
        !lives.contains(&Life::Up) && lives.contains(&Life::Down)
    }

    /// What this node can pass on inside its cluster: measured here alone, never told by others, so that no small path
    /// elsewhere comes back to where it is.
    fn hop_mtu(&self) -> u16 {
        let own = self.watched.iter().filter(|(target, _)| matches!(target, Target::Own(_)));
        let living = own.filter(|(_, watched)| watched.pulse.life() != Life::Down);
        living.map(|(_, it)| it.size.get()).fold(self.targets.hop_mtu, u16::min)
    }
}

fn bits(set: u8) -> impl Iterator<Item = Ordinal> {
    Ordinal::all().filter(move |slot| set & (1 << slot.get()) != 0)
}
