//! Which gateways and links are alive, decided from probes and the time alone: no I/O, and every `now` is an argument.
//!
//! A gateway probes every slot of every other member, through its tunnels, and its own cluster's other gateways, through
//! the hop; a worker probes its own cluster's gateways. Targets of members that carried traffic within 10 s are asked
//! every 200 ms, others every 5 s. What is asked is answered by the other side's kernel.
//!
//! | module | owns |
//! |---|---|
//! | `pulse` | one target's life: losses, round trips, damping |
//! | `size` | the largest packet that reaches one target |
//! | `verdict` | the rule that makes the sets of each member |
//! | `drain` | taking this gateway out of service |
//!
//! Invariants: only an answer whose nonce was asked of the very address that it comes from has any effect. A new
//! [`Health`] says what it adopted until probes say otherwise. A prober that was away for more than a second concludes
//! nothing from what it missed. [`Health::next`] lies ahead of the last [`Health::due`] by at least [`GRAIN`].

mod drain;
mod pulse;
mod size;
#[cfg(test)]
mod tests;
mod verdict;

use std::{
    collections::{BTreeMap, BTreeSet},
    net::Ipv6Addr,
    time::Duration,
};

use ebpf::{Answer, Reach};

pub use drain::Drain;
pub use pulse::{FAST, LOST, Life, SLOW};
pub use verdict::{Alarm, Members, NO_ANSWER, Verdict, claims};

use crate::names::{MemberId, Ordinal};
use drain::Drainer;
use pulse::{Heard, Pulse};
use size::PathSize;
use verdict::{Scene, claim};

/// A member is active for so long after its last packet.
pub const ACTIVE: Duration = Duration::from_secs(10);
/// What is due within this is done together.
pub const GRAIN: Duration = Duration::from_millis(5);
/// A prober that comes later than this has been away.
const AWAY: Duration = Duration::from_secs(1);
/// How long status shows it.
const AWAY_SHOWN: Duration = Duration::from_secs(60);
/// When there is nothing to do.
const FAR: Duration = Duration::from_secs(3600);

/// Whom to probe, as the plan says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Targets {
    /// Whether this node holds a slot. A worker reaches other members through its own gateways alone.
    pub gateway: bool,
    /// Whether this node can probe at all: without IPv6 a worker uses every slot of its cluster.
    pub probing: bool,
    /// This cluster's slots on other nodes, by overlay address.
    pub own: BTreeMap<Ordinal, Ipv6Addr>,
    /// Every other member, with its slots by overlay address.
    pub members: BTreeMap<MemberId, BTreeMap<Ordinal, Ipv6Addr>>,
    /// Slots of other members that WireGuard has no session with, and so no way to.
    pub severed: BTreeSet<(MemberId, Ordinal)>,
    /// Bytes of an inner packet that the hop's device carries.
    pub hop_mtu: u16,
    /// Bytes of an inner packet that the WireGuard devices carry; on a worker, that those of its gateways should.
    pub tunnel_mtu: u16,
}

/// Somebody who is probed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A slot of this cluster, on another node.
    Own(Ordinal),
    /// A slot of another member.
    Remote(MemberId, Ordinal),
}

/// A probe to send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ask {
    pub target: Target,
    pub to: Ipv6Addr,
    pub nonce: u64,
    /// UDP payload, bytes, at least [`ebpf::probe::LEN`].
    pub len: usize,
    /// Whether it asks what passes, rather than who lives.
    pub sizing: bool,
}

/// What status says of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub life: Life,
    pub draining: bool,
    /// Smoothed round trip.
    pub rtt: Option<Duration>,
    /// Bytes of an inner packet.
    pub mtu: u16,
}

/// What the maps held when this prober began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Adopted {
    pub reach: BTreeMap<MemberId, Reach>,
    pub answer: Answer,
}

#[derive(Debug)]
struct Watched {
    address: Ipv6Addr,
    pulse: Pulse,
    size: PathSize,
    /// What its cluster's hop carries, as it says; 0: not said yet.
    told: u16,
    draining: bool,
    /// Whom it reaches, as it says; kept of own slots only.
    members: Option<Box<Members>>,
}

impl Watched {
    fn claims(&self, member: MemberId) -> bool {
        self.members.as_ref().is_some_and(|members| claims(members, member))
    }

    fn mtu(&self) -> u16 {
        let told = if self.told == 0 { u16::MAX } else { self.told.max(size::FLOOR) };
        self.size.get().min(told)
    }

    /// Returns whether anything changed.
    fn hear(&mut self, target: Target, said: &Answer) -> bool {
        let told = u16::from_be_bytes(said.mtu);
        let draining = said.flags & ebpf::probe::DRAINING != 0;
        let mut changed = (self.told, self.draining) != (told, draining);
        if self.told != told {
            self.size.raise_again();
        }
        (self.told, self.draining) = (told, draining);
        if let Target::Own(_) = target {
            let members = self.members.get_or_insert_with(|| Box::new([0; 512]));
            changed |= **members != said.members;
            **members = said.members;
        }
        changed
    }
}

#[derive(Debug)]
pub struct Health {
    adopted: Adopted,
    targets: Targets,
    watched: BTreeMap<Target, Watched>,
    by_address: BTreeMap<Ipv6Addr, Target>,
    /// When a packet towards a member was last steered.
    traffic: BTreeMap<MemberId, Duration>,
    verdict: Verdict,
    /// Whether the verdict is to be made again.
    stale: bool,
    drainer: Drainer,
    /// When the prober was last found to have been away.
    away: Option<Duration>,
    /// The last time that it did anything, and when it should again.
    last: Duration,
    wake: Duration,
    forged: u64,
}

impl Health {
    pub fn new(now: Duration, adopted: Adopted) -> Health {
        let targets = Targets {
            gateway: false,
            probing: true,
            own: BTreeMap::new(),
            members: BTreeMap::new(),
            severed: BTreeSet::new(),
            hop_mtu: 0,
            tunnel_mtu: 0,
        };
        let verdict = Verdict { reach: adopted.reach.clone(), answer: adopted.answer, alarms: BTreeSet::new() };
        Health {
            adopted,
            targets,
            watched: BTreeMap::new(),
            by_address: BTreeMap::new(),
            traffic: BTreeMap::new(),
            verdict,
            stale: false,
            drainer: Drainer::default(),
            away: None,
            last: now,
            wake: now + FAR,
            forged: 0,
        }
    }

    /// Takes over what the plan says. Whom it no longer names is forgotten; whom it newly names is in no set before the
    /// first answer, unless it was adopted. What is newly severed is out at once.
    pub fn targets(&mut self, now: Duration, targets: &Targets) {
        self.catch_up(now);
        if *targets == self.targets {
            return;
        }
        let severed: Vec<_> = targets.severed.difference(&self.targets.severed).copied().collect();
        self.targets = targets.clone();
        let own = targets.own.iter().map(|(slot, address)| (Target::Own(*slot), *address));
        let remote = targets.members.iter().filter(|_| targets.gateway).flat_map(|(member, slots)| {
            slots.iter().map(move |(slot, address)| (Target::Remote(*member, *slot), *address))
        });
        let wanted: BTreeMap<Target, Ipv6Addr> = own.chain(remote).filter(|_| targets.probing).collect();
        self.watched.retain(|target, watched| wanted.get(target) == Some(&watched.address));
        self.by_address = wanted.iter().map(|(target, address)| (*address, *target)).collect();
        self.traffic.retain(|member, _| targets.members.contains_key(member));
        for (at, (target, address)) in wanted.into_iter().enumerate() {
            let limit = match target {
                Target::Own(_) => targets.hop_mtu,
                Target::Remote(..) => targets.tunnel_mtu.min(targets.hop_mtu),
            };
            if let Some(watched) = self.watched.get_mut(&target) {
                watched.size.limit(limit);
            } else {
                // They do not all begin at once.
                let due = now + GRAIN * u32::try_from(at % 40).unwrap_or_default();
                let watched = self.adopt(now, target, address, limit, due);
                self.watched.insert(target, watched);
            }
        }
        for (member, slot) in severed {
            if let Some(watched) = self.watched.get_mut(&Target::Remote(member, slot)) {
                watched.pulse.cut(now);
                watched.size.void();
            }
        }
        for member in targets.members.keys() {
            if let Some(reach) = self.adopted.reach.remove(member) {
                self.verdict.reach.insert(*member, reach);
            }
        }
        self.change(now);
    }

    /// A target as the maps left it: in a set, it is taken for healthy; in one that was merely kept, for dead.
    fn adopt(&self, now: Duration, target: Target, address: Ipv6Addr, limit: u16, due: Duration) -> Watched {
        let Adopted { reach, answer } = &self.adopted;
        let known = |mtu: u16| if mtu == 0 { limit } else { mtu };
        let mut watched = Watched {
            address,
            pulse: Pulse::new(Life::New, now, due),
            size: PathSize::new(limit, limit),
            told: 0,
            draining: false,
            members: None,
        };
        match target {
            Target::Own(slot) => {
                let mut members = Box::new([0; 512]);
                for (member, reach) in reach {
                    // Links without a claim, and what stands beside them, were merely kept.
                    let kept = reach.links != 0 && !claims(&answer.members, *member);
                    if kept || reach.via & (1 << slot.get()) == 0 {
                        continue;
                    }
                    claim(&mut members, *member);
                    if reach.links == 0 {
                        watched.told = watched.told.max(reach.mtu);
                    }
                    watched.pulse = Pulse::new(Life::Up, now, due);
                }
                watched.members = Some(members);
                let measured = known(u16::from_be_bytes(answer.mtu));
                watched.size = PathSize::new(measured.max(watched.told), limit);
            }
            Target::Remote(member, slot) => {
                let reach = reach.get(&member).copied().unwrap_or_default();
                if reach.links & (1 << slot.get()) != 0 {
                    let life = if claims(&answer.members, member) { Life::Up } else { Life::Down };
                    watched.pulse = Pulse::new(life, now, due);
                    watched.size = PathSize::new(known(reach.mtu), limit);
                }
            }
        }
        watched
    }

    /// A packet towards the member was steered just now, after a while without.
    pub fn woken(&mut self, now: Duration, member: MemberId) {
        self.steered(now, now, member);
    }

    /// A packet towards the member was last steered at `at`.
    pub fn steered(&mut self, now: Duration, at: Duration, member: MemberId) {
        self.catch_up(now);
        if !self.targets.members.contains_key(&member) {
            return;
        }
        let was = self.active(now, member);
        let last = self.traffic.entry(member).or_insert(at);
        *last = at.max(*last);
        if was || !self.active(now, member) {
            return;
        }
        for (target, watched) in &mut self.watched {
            if matches!(target, Target::Own(_)) || matches!(target, Target::Remote(of, _) if *of == member) {
                watched.pulse.hurry(now);
            }
        }
        self.wake = self.wake.min(self.soonest(now));
    }

    /// An answer has come. `len`: its UDP payload, bytes.
    pub fn answered(&mut self, now: Duration, from: Ipv6Addr, nonce: u64, len: usize, said: &Answer) {
        self.catch_up(now);
        let lag = now.saturating_sub(self.wake);
        let target = self.by_address.get(&from);
        let Some((target, watched)) = target.and_then(|target| Some((*target, self.watched.get_mut(target)?))) else {
            self.forged += 1;
            return;
        };
        let mut changed = false;
        if let Some(resized) = watched.size.answered(nonce, len) {
            changed = resized;
        } else if len == ebpf::probe::LEN {
            let before = watched.pulse.life();
            match watched.pulse.answered(now, nonce, lag) {
                Heard::Unasked => self.forged += 1,
                Heard::Void => {}
                // One that is held down may be all that a member has left.
                Heard::Good => {
                    changed = watched.hear(target, said) || watched.pulse.life() != before || watched.pulse.held();
                }
            }
        } else {
            self.forged += 1;
        }
        if changed {
            self.change(now);
        }
    }

    /// Concludes from what has not come. To be called when [`Health::next`] has come, after everything that has arrived
    /// was told.
    pub fn tick(&mut self, now: Duration) {
        self.catch_up(now);
        let mut changed = self.drainer.tick(now);
        for watched in self.watched.values_mut() {
            if watched.pulse.expire(now) {
                watched.size.void();
                changed = true;
            }
            let (patience, heard) = (watched.pulse.patience(), watched.pulse.heard());
            changed |= watched.size.expire(now, patience, heard);
        }
        if self.away.is_some_and(|away| now >= away + AWAY_SHOWN) {
            self.away = None;
            changed = true;
        }
        if changed || self.stale {
            self.judge(now);
        }
        self.last = now;
    }

    fn judge(&mut self, now: Duration) {
        for target in self.scene(now).held_in_vain() {
            if let Some(watched) = self.watched.get_mut(&target) {
                watched.pulse.release(now);
            }
        }
        self.verdict = self.scene(now).verdict();
        self.stale = false;
    }

    fn scene(&self, now: Duration) -> Scene<'_> {
        Scene {
            now,
            targets: &self.targets,
            watched: &self.watched,
            last: &self.verdict.reach,
            draining: self.drainer.state() != Drain::No,
            drained: self.drainer.state() == Drain::Quiet,
            late: self.away.is_some(),
        }
    }

    /// The probes to send now. `random`: numbers that nobody can guess.
    pub fn due(&mut self, now: Duration, mut random: impl FnMut() -> u64) -> Vec<Ask> {
        let active: BTreeSet<MemberId> =
            self.targets.members.keys().copied().filter(|member| self.active(now, *member)).collect();
        let (mut asks, mut wake) = (Vec::new(), now + FAR);
        for (target, watched) in &mut self.watched {
            let active = match target {
                Target::Own(_) => !active.is_empty(),
                Target::Remote(member, _) => active.contains(member),
            };
            let to = watched.address;
            let mut ask = |nonce, len, sizing| asks.push(Ask { target: *target, to, nonce, len, sizing });
            let beside = watched.pulse.is_due(now);
            if beside {
                let nonce = random();
                watched.pulse.asked(now, nonce, if active { FAST } else { jittered(random()) });
                ask(nonce, ebpf::probe::LEN, false);
            }
            if watched.pulse.life() == Life::Up {
                for (nonce, size) in watched.size.due(now, beside, active, &mut random) {
                    ask(nonce, size::payload(size), true);
                }
            }
            wake = wake.min(watched.pulse.deadline());
            wake = watched.size.deadline(watched.pulse.patience()).map_or(wake, |at| wake.min(at));
        }
        self.last = now;
        self.wake = wake.max(now + GRAIN);
        asks
    }

    /// When to call [`Health::tick`] and [`Health::due`] again, if nothing comes before.
    pub fn next(&self) -> Duration {
        self.wake
    }

    pub fn verdict(&self) -> &Verdict {
        &self.verdict
    }

    /// Every target, for status.
    pub fn seen(&self) -> BTreeMap<Target, Seen> {
        let seen = |watched: &Watched| Seen {
            life: watched.pulse.life(),
            draining: watched.draining,
            rtt: watched.pulse.rtt(),
            mtu: watched.mtu(),
        };
        self.watched.iter().map(|(target, watched)| (*target, seen(watched))).collect()
    }

    /// Answers to nothing that was asked of their sender within 5 s: forged, doubled, or very late.
    pub fn forged(&self) -> u64 {
        self.forged
    }

    /// Begins or ends taking this gateway out of service.
    pub fn drain(&mut self, now: Duration, on: bool) {
        self.catch_up(now);
        if self.drainer.set(now, on) {
            self.change(now);
        }
    }

    pub fn draining(&self) -> Drain {
        self.drainer.state()
    }

    /// `packets`: how many packets this gateway has passed on for peers and for other nodes so far, probes and what this
    /// node's own pods send left out. To be called about every 200 ms while it drains: two seconds without a change are
    /// quiet.
    pub fn passed_on(&mut self, now: Duration, packets: u64) {
        self.drainer.count(now, packets);
    }

    fn active(&self, now: Duration, member: MemberId) -> bool {
        self.traffic.get(&member).is_some_and(|last| now < *last + ACTIVE)
    }

    fn soonest(&self, now: Duration) -> Duration {
        now.max(self.last + GRAIN)
    }

    fn change(&mut self, now: Duration) {
        self.stale = true;
        self.wake = self.wake.min(self.soonest(now));
    }

    /// Where the prober itself comes much too late, what it missed says nothing of anybody else.
    fn catch_up(&mut self, now: Duration) {
        if now <= self.wake + AWAY {
            return;
        }
        for watched in self.watched.values_mut() {
            watched.pulse.void();
            watched.size.void();
        }
        self.away = Some(now);
        self.wake = now;
        self.change(now);
    }
}

/// [`SLOW`], give or take a fifth.
fn jittered(random: u64) -> Duration {
    SLOW * 4 / 5 + Duration::from_millis(random % 2001)
}
