//! A naive network to try [`Health`] in, and the laws that must hold there.
//!
//! Time is simulated: each node's prober comes exactly when it asked to, unless the test stops it.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;

use proptest::{collection::vec, prelude::*};

use super::{pulse::LOST, *};

const HOP_MTU: u16 = 1430;
const TUNNEL_MTU: u16 = 1420;
/// The node number of the worker; gateways are numbered by slot.
const WORKER: u8 = 9;

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

fn slot(n: u8) -> Ordinal {
    Ordinal::new(n.into()).unwrap()
}

fn member(n: u8) -> MemberId {
    MemberId::new(n.into()).unwrap()
}

fn address(target: Target) -> Ipv6Addr {
    match target {
        Target::Own(slot) => Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, u16::from(slot.get()) + 1),
        Target::Remote(of, slot) => Ipv6Addr::new(0xfd00, 0, 0, of.get(), 0, 0, 0, u16::from(slot.get()) + 1),
    }
}

fn own(n: u8) -> Target {
    Target::Own(slot(n))
}

fn remote(of: u8, n: u8) -> Target {
    Target::Remote(member(of), slot(n))
}

/// The way between a node and a target.
#[derive(Clone, Copy, Debug)]
struct Way {
    up: bool,
    rtt: Duration,
    /// Largest inner packet that passes, bytes.
    path: u16,
    /// Of a hundred packets, each way.
    loss: u64,
}

const GOOD_WAY: Way = Way { up: true, rtt: Duration::from_millis(20), path: 9000, loss: 0 };

#[derive(Debug)]
enum Event {
    Ask { node: u8, ask: Ask },
    Answer { node: u8, from: Ipv6Addr, nonce: u64, len: usize, said: Box<Answer> },
}

struct Node {
    health: Health,
    targets: Targets,
    /// Until when its prober does not run.
    stopped: Duration,
    asks: Vec<(Duration, Ask)>,
    /// Every verdict that differed from the one before, and when.
    history: Vec<(Duration, Verdict)>,
}

struct Sim {
    now: Duration,
    seed: u64,
    nodes: BTreeMap<u8, Node>,
    ways: BTreeMap<(u8, Target), Way>,
    /// What targets say that are no nodes here.
    says: BTreeMap<Target, Answer>,
    dead: BTreeSet<Target>,
    queue: BTreeMap<(Duration, u64), Event>,
    events: u64,
    /// Whether every member has traffic.
    busy: bool,
    looked: Duration,
}

fn random(seed: &mut u64) -> u64 {
    *seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *seed;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn saying(mtu: u16, draining: bool, members: &[u8]) -> Answer {
    let mut answer = Answer { flags: u8::from(draining), mtu: mtu.to_be_bytes(), ..NO_ANSWER };
    members.iter().for_each(|n| claim(&mut answer.members, member(*n)));
    answer
}

impl Sim {
    /// Own slots 0 to `gateways - 1`, members 2 to `members + 1` with `slots` each.
    fn new(seed: u64, nodes: &[u8], gateways: u8, members: u8, slots: u8) -> Sim {
        let mut sim = Sim {
            now: seconds(100),
            seed,
            nodes: BTreeMap::new(),
            ways: BTreeMap::new(),
            says: BTreeMap::new(),
            dead: BTreeSet::new(),
            queue: BTreeMap::new(),
            events: 0,
            busy: true,
            looked: Duration::ZERO,
        };
        let ids: Vec<u8> = (2..members + 2).collect();
        for &node in nodes {
            let targets = Targets {
                gateway: node != WORKER,
                probing: true,
                own: (0..gateways).filter(|n| *n != node).map(|n| (slot(n), address(own(n)))).collect(),
                members: ids
                    .iter()
                    .map(|id| (member(*id), (0..slots).map(|n| (slot(n), address(remote(*id, n)))).collect()))
                    .collect(),
                severed: BTreeSet::new(),
                hop_mtu: HOP_MTU,
                tunnel_mtu: TUNNEL_MTU,
            };
            let adopted = Adopted { reach: BTreeMap::new(), answer: NO_ANSWER };
            let (health, stopped) = (Health::new(sim.now, adopted), Duration::ZERO);
            sim.nodes.insert(node, Node { health, targets, stopped, asks: Vec::new(), history: Vec::new() });
            sim.plan(node);
        }
        for n in 0..gateways {
            sim.says.insert(own(n), saying(HOP_MTU, false, &ids));
        }
        for id in ids {
            for n in 0..slots {
                sim.says.insert(remote(id, n), saying(HOP_MTU, false, &[]));
            }
        }
        sim
    }

    fn node(&mut self, node: u8) -> &mut Node {
        self.nodes.get_mut(&node).unwrap()
    }

    fn health(&self, node: u8) -> &Health {
        &self.nodes[&node].health
    }

    fn reach(&self, node: u8, of: u8) -> Reach {
        self.health(node).verdict().reach[&member(of)]
    }

    fn plan(&mut self, node: u8) {
        let now = self.now;
        let node = self.node(node);
        node.health.targets(now, &node.targets.clone());
    }

    fn way(&mut self, node: u8, target: Target) -> &mut Way {
        self.ways.entry((node, target)).or_insert(GOOD_WAY)
    }

    fn push(&mut self, at: Duration, event: Event) {
        self.events += 1;
        self.queue.insert((at, self.events), event);
    }

    fn lost(&mut self, way: Way) -> bool {
        !way.up || random(&mut self.seed) % 100 < way.loss
    }

    /// What a target would answer now; `None` if it is dead.
    fn said(&self, target: Target) -> Option<Answer> {
        if self.dead.contains(&target) {
            return None;
        }
        let node = match target {
            Target::Own(slot) => self.nodes.get(&slot.get()),
            Target::Remote(..) => None,
        };
        node.map_or_else(|| self.says.get(&target).copied(), |node| Some(node.health.verdict().answer))
    }

    fn run(&mut self, length: Duration) {
        let until = self.now + length;
        loop {
            let prober = |node: &Node| node.health.next().max(node.stopped);
            let probers = self.nodes.iter().map(|(n, node)| (prober(node), *n)).min();
            let (prober, node) = probers.unwrap();
            let packet = self.queue.keys().next().map_or(until, |(at, _)| *at);
            let look = self.looked + seconds(1);
            let at = prober.min(packet).min(look).max(self.now);
            if at >= until {
                self.now = until;
                return;
            }
            self.now = at;
            if look <= at {
                self.look();
            } else if packet <= at {
                self.deliver();
            } else {
                self.probe(node);
            }
        }
    }

    fn look(&mut self) {
        self.looked = self.now;
        let now = self.now;
        for node in self.nodes.values_mut().filter(|node| self.busy && now >= node.stopped) {
            let members: Vec<_> = node.targets.members.keys().copied().collect();
            members.into_iter().for_each(|member| node.health.steered(now, now, member));
        }
    }

    fn deliver(&mut self) {
        let ((at, _), event) = self.queue.pop_first().unwrap();
        match event {
            Event::Ask { node, ask } => {
                let way = *self.way(node, ask.target);
                let fits = ask.len + 48 <= usize::from(way.path);
                if let (Some(said), true, false) = (self.said(ask.target), fits, self.lost(way)) {
                    let from = address(ask.target);
                    let said = Box::new(said);
                    self.push(at + way.rtt / 2, Event::Answer { node, from, nonce: ask.nonce, len: ask.len, said });
                }
            }
            Event::Answer { node, from, nonce, len, said } => {
                let stopped = self.nodes[&node].stopped;
                if stopped > at {
                    // It waits in the socket.
                    return self.push(stopped, Event::Answer { node, from, nonce, len, said });
                }
                self.node(node).health.answered(at, from, nonce, len, &said);
            }
        }
    }

    fn probe(&mut self, number: u8) {
        let now = self.now;
        let mut seed = self.seed;
        let node = self.node(number);
        node.health.tick(now);
        let asks = node.health.due(now, || random(&mut seed));
        assert!(node.health.next() >= now + GRAIN, "the loop would spin");
        node.asks.extend(asks.iter().map(|ask| (now, *ask)));
        let verdict = node.health.verdict();
        if node.history.last().is_none_or(|(_, last)| last != verdict) {
            node.history.push((now, verdict.clone()));
        }
        self.seed = seed;
        for ask in asks {
            let way = *self.way(number, ask.target);
            if !self.lost(way) {
                self.push(now + way.rtt / 2, Event::Ask { node: number, ask });
            }
        }
    }

    /// A new prober takes over the maps as they are.
    fn restart(&mut self, node: u8) {
        let now = self.now;
        let node = self.node(node);
        let verdict = node.health.verdict().clone();
        let adopted = Adopted { reach: verdict.reach, answer: verdict.answer };
        node.health = Health::new(now, adopted);
        node.health.targets(now, &node.targets.clone());
    }
}

/// The slots of a set that are not draining, unless no other is left.
fn best(set: u8, draining: u8) -> u8 {
    if set & !draining == 0 { set } else { set & !draining }
}

/// Small asks of one target, as they were sent.
fn small(node: &Node, target: Target) -> Vec<Duration> {
    let of = node.asks.iter().filter(|(_, ask)| ask.target == target && !ask.sizing);
    of.map(|(at, _)| *at).collect()
}

fn bit(n: u8) -> u8 {
    1 << n
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// 600 ms to the third ask that is lost, 200 ms of patience (or two round trips), and the prober's own step.
    #[test]
    fn what_dies_under_traffic_is_out_within_800_ms(
        seed: u64, phase in 0..2000u64, rtt in 0..300u64, gateway: bool, slots in 2..9u8, dies in 0..8u8,
    ) {
        let dies = dies % slots;
        let node = if gateway { 8 } else { WORKER };
        let target = if gateway { remote(2, dies) } else { own(dies) };
        let mut sim = Sim::new(seed, &[node], slots, 1, slots);
        sim.way(node, target).rtt = ms(rtt);
        sim.run(seconds(20) + ms(phase));
        let set = |sim: &Sim| if gateway { sim.reach(node, 2).links } else { sim.reach(node, 2).via };
        prop_assert_eq!(set(&sim), u8::MAX >> (8 - slots));
        sim.dead.insert(target);
        sim.run(FAST * u32::from(LOST) + FAST.max(2 * ms(rtt)) + 2 * GRAIN);
        prop_assert_eq!(set(&sim), (u8::MAX >> (8 - slots)) & !bit(dies));
    }

    /// However long before it died, as long as nobody sent.
    #[test]
    fn what_died_while_idle_is_out_within_800_ms_of_the_first_packet(
        seed: u64, phase in 0..20_000u64, idle in 0..20_000u64, gateway: bool,
    ) {
        let node = if gateway { 8 } else { WORKER };
        let target = if gateway { remote(2, 1) } else { own(1) };
        let mut sim = Sim::new(seed, &[node], 3, 1, 3);
        sim.busy = false;
        sim.run(seconds(20) + ms(phase));
        sim.dead.insert(target);
        sim.run(ms(idle));
        let now = sim.now;
        sim.node(node).health.woken(now, member(2));
        sim.run(FAST * 4 + 2 * GRAIN);
        let set = if gateway { sim.reach(node, 2).links } else { sim.reach(node, 2).via };
        prop_assert_eq!(set, 0b101);
    }

    /// Whatever a link does, short of dying with all others, no other slot leaves or enters a set.
    #[test]
    fn nothing_healthy_moves_when_something_else_dies(
        seed: u64, gateway: bool, flips in vec((0..5000u64, 0..2u8), 1..12), loss in 0..100u64,
    ) {
        let node = if gateway { 8 } else { WORKER };
        let target = |n| if gateway { remote(2, n) } else { own(n) };
        let mut sim = Sim::new(seed, &[node], 4, 1, 4);
        sim.run(seconds(10));
        let from = sim.now;
        for (after, n) in flips {
            sim.run(ms(after));
            if !sim.dead.remove(&target(n)) {
                sim.dead.insert(target(n));
            }
            sim.way(node, target(n)).loss = loss;
        }
        for (_, verdict) in sim.nodes[&node].history.iter().filter(|(at, _)| *at >= from) {
            let reach = verdict.reach[&member(2)];
            prop_assert_eq!(if gateway { reach.links } else { reach.via } & 0b1100, 0b1100);
        }
    }

    /// Of a world that stands still, the sets are what a naive reading of it says.
    #[test]
    fn what_is_known_is_what_is_the_case(
        seed: u64, gateway: bool, dead in 0..256u32, draining in 0..256u32, claimed in vec(0..4u8, 4), told in 576..1500u16,
    ) {
        let node = if gateway { 0 } else { WORKER };
        let mut sim = Sim::new(seed, &[node], 4, 2, 2);
        sim.run(seconds(10));
        let mut all: Vec<Target> = (0..4).map(own).collect();
        all.extend([remote(2, 0), remote(2, 1), remote(3, 0), remote(3, 1)]);
        for (n, target) in all.iter().enumerate() {
            let claimed: Vec<u8> = (2..4).filter(|id| claimed[n % 4] & bit(*id - 2) != 0).collect();
            sim.says.insert(*target, saying(told, draining & (1 << n) != 0, &claimed));
            if dead & (1 << n) != 0 {
                sim.dead.insert(*target);
            }
        }
        sim.run(seconds(5));
        for id in 2..4 {
            let alive = |target: Target| !sim.dead.contains(&target) && (!gateway || target != own(0));
            let drains = |target: Target| sim.says[&target].flags != 0;
            let set = |targets: Vec<Target>, good: &dyn Fn(Target) -> bool| {
                targets.iter().enumerate().filter(|(_, target)| good(**target)).fold(0, |set, (n, _)| set | 1 << n)
            };
            let owns: Vec<Target> = (0..4).map(own).collect();
            let links = if gateway { set(vec![remote(id, 0), remote(id, 1)], &alive) } else { 0 };
            let via = set(owns.clone(), &|t| alive(t) && claims(&sim.says[&t].members, member(id)));
            let reach = sim.reach(node, id);
            if links | via != 0 {
                prop_assert_eq!(reach.links, best(links, set(vec![remote(id, 0), remote(id, 1)], &drains)));
                prop_assert_eq!(reach.via, best(via, set(owns, &drains)));
                prop_assert_eq!(reach.mtu, told.min(TUNNEL_MTU));
                let narrow = sim.health(node).verdict().alarms.contains(&Alarm::Narrow(member(id)));
                prop_assert_eq!(narrow, told < 1280, "IPv6 has no room, and somebody is told");
            } else {
                prop_assert_ne!(reach.links | reach.via, 0, "the last set stays");
                prop_assert!(sim.health(node).verdict().alarms.contains(&Alarm::NoWay(member(id))));
            }
            prop_assert_eq!(claims(&sim.health(node).verdict().answer.members, member(id)), links != 0);
        }
    }

    /// Three gateways and a worker, two members of two gateways each, and everything between them may fail. Whatever
    /// failed, three seconds later every flow that has a way takes one that works.
    #[test]
    fn if_a_path_exists_traffic_takes_it(seed: u64, faults in vec((0..4000u64, 0..22usize), 1..30)) {
        let nodes = [0, 1, 2, WORKER];
        let mut sim = Sim::new(seed, &nodes, 3, 2, 2);
        let mut faulty = Vec::new();
        for n in 0..3u8 {
            faulty.extend([remote(2, 0), remote(2, 1), remote(3, 0), remote(3, 1)].map(|target| (n, target)));
            faulty.extend((0..3).filter(|to| *to != n).map(|to| (n, own(to))));
            faulty.push((WORKER, own(n)));
        }
        faulty.push((WORKER, own(2)));
        sim.run(seconds(10));
        for (after, which) in faults {
            sim.run(ms(after));
            let (node, target) = faulty[which];
            sim.way(node, target).up ^= true;
        }
        sim.run(seconds(3));
        for id in 2..4 {
            for node in nodes {
                let up = |from: u8, to: Target| sim.ways.get(&(from, to)).is_none_or(|way| way.up);
                let link = |gateway: u8, n: u8| up(gateway, remote(id, n));
                let serves = |gateway: u8| link(gateway, 0) || link(gateway, 1);
                let any_via = (0..3).any(|to| to != node && up(node, own(to)) && serves(to));
                if !(node != WORKER && serves(node) || any_via) {
                    continue;
                }
                let reach = sim.reach(node, id);
                let forwards = |gateway: u8| {
                    let links = sim.reach(gateway, id).links;
                    links != 0 && (0..2).all(|n| links & bit(n) == 0 || link(gateway, n))
                };
                if reach.links != 0 {
                    prop_assert!(forwards(node), "{node} towards {id}: {reach:?}");
                } else {
                    prop_assert_ne!(reach.via, 0);
                    for to in (0..3).filter(|to| reach.via & bit(*to) != 0) {
                        prop_assert!(up(node, own(to)) && forwards(to), "{node} towards {id}: {reach:?}");
                    }
                }
            }
        }
    }

    /// After anything, also in the middle of it, and whatever passes: the new prober changes nothing that stands still.
    #[test]
    fn a_restart_changes_nothing(
        seed: u64, gateway: bool, dead in 0..256u32, draining in 0..256u32, paths in vec(1200..1500u16, 8), told in 1280..1500u16,
    ) {
        let node = if gateway { 0 } else { WORKER };
        let mut sim = Sim::new(seed, &[node], 4, 2, 2);
        sim.run(seconds(10));
        let mut all: Vec<Target> = (0..4).map(own).collect();
        all.extend([remote(2, 0), remote(2, 1), remote(3, 0), remote(3, 1)]);
        for (n, target) in all.iter().enumerate() {
            sim.says.insert(*target, saying(told, draining & (1 << n) != 0, &[2, 3]));
            sim.way(node, *target).path = paths[n];
            if dead & (1 << n) != 0 {
                sim.dead.insert(*target);
            }
        }
        sim.run(seconds(30));
        let before = sim.health(node).verdict().clone();
        let from = sim.now;
        sim.restart(node);
        sim.run(seconds(30));
        for (_, verdict) in sim.nodes[&node].history.iter().filter(|(at, _)| *at >= from) {
            prop_assert_eq!(&verdict.reach, &before.reach);
            prop_assert_eq!(&verdict.answer, &before.answer);
        }
    }

    /// A tunnel that is gone or empty, for the prober that saw it and for one that starts only now.
    #[test]
    fn a_link_without_a_session_is_out_at_once_and_back_when_it_answers(
        seed: u64, slots in 1..9u8, chosen: u8, restarts: bool, phase in 0..2000u64,
    ) {
        let all = u8::MAX >> (8 - slots);
        let cut = if chosen & all == 0 { all } else { chosen & all };
        let links: BTreeSet<_> = (0..slots).filter(|n| cut & bit(*n) != 0).collect();
        let mut sim = Sim::new(seed, &[8], slots, 1, slots);
        sim.run(seconds(20) + ms(phase));
        prop_assert_eq!(sim.reach(8, 2).links, all);
        sim.dead = links.iter().map(|n| remote(2, *n)).collect();
        sim.node(8).targets.severed = links.iter().map(|n| (member(2), slot(*n))).collect();
        if restarts { sim.restart(8) } else { sim.plan(8) }
        sim.run(2 * GRAIN);
        let reach = sim.reach(8, 2);
        // Without any, those of the other gateways are left: without those, too, the last set would stay.
        prop_assert_eq!(reach.links, all & !cut);
        prop_assert_ne!(reach.via, 0);
        // Others send here until they know.
        prop_assert_eq!(reach.kept, if cut == all { all } else { 0 });
        prop_assert_eq!(claims(&sim.health(8).verdict().answer.members, member(2)), all != cut);

        sim.dead.clear();
        sim.node(8).targets.severed.clear();
        sim.plan(8);
        // A prober that began meanwhile hears of traffic within a second.
        sim.run(seconds(2));
        prop_assert_eq!(sim.reach(8, 2).links, all);
    }

    #[test]
    fn if_everything_dies_at_once_nothing_changes_but_the_alarm(seed: u64, gateway: bool, phase in 0..2000u64, busy: bool) {
        let node = if gateway { 8 } else { WORKER };
        let mut sim = Sim::new(seed, &[node], 3, 2, 2);
        sim.run(seconds(10) + ms(phase));
        sim.busy = busy;
        let before = sim.health(node).verdict().clone();
        sim.dead = sim.says.keys().copied().collect();
        sim.run(seconds(60));
        let verdict = sim.health(node).verdict();
        if busy {
            prop_assert_eq!(&verdict.reach, &before.reach);
        }
        prop_assert!(verdict.reach.values().all(|reach| reach.via | reach.links != 0));
        prop_assert!(verdict.alarms.contains(&Alarm::NoGatewayAnswers));
        prop_assert_eq!(verdict.alarms.contains(&Alarm::NoLinkAnswers), gateway);
        sim.dead.clear();
        sim.busy = true;
        sim.run(seconds(40));
        prop_assert_eq!(sim.health(node).verdict(), &before);
    }

    /// A prober that was stopped, however often and long, finds what it left.
    #[test]
    fn a_stopped_prober_changes_nothing(seed: u64, gateway: bool, stops in vec((0..5000u64, 1200..60_000u64), 1..6)) {
        let node = if gateway { 8 } else { WORKER };
        let mut sim = Sim::new(seed, &[node], 3, 2, 2);
        sim.run(seconds(10));
        let before = sim.health(node).verdict().clone();
        let from = sim.now;
        for (after, length) in stops {
            sim.run(ms(after));
            let now = sim.now;
            sim.node(node).stopped = now + ms(length);
            // Until then it sleeps for at most 200 ms: it comes more than a second late, or it was not late at all.
            sim.run(ms(length) + ms(1));
        }
        for (_, verdict) in sim.nodes[&node].history.iter().filter(|(at, _)| *at >= from) {
            prop_assert_eq!(&verdict.reach, &before.reach);
        }
        prop_assert!(sim.health(node).verdict().alarms.contains(&Alarm::Late));
        sim.run(seconds(70));
        prop_assert_eq!(sim.health(node).verdict(), &before);
    }

    /// Guessed nonces, and right nonces from a wrong address, in any number: nothing but a counter sees them.
    #[test]
    fn forged_answers_change_nothing(seed: u64, gateway: bool, forged in vec((0..500u64, any::<u64>(), any::<bool>()), 1..40)) {
        let node = if gateway { 8 } else { WORKER };
        let target = |n| if gateway { remote(2, n) } else { own(n) };
        let world = || {
            let mut sim = Sim::new(seed, &[node], 3, 1, 3);
            sim.way(node, target(0)).loss = 30;
            sim
        };
        let (mut honest, mut attacked) = (world(), world());
        let lie = saying(600, true, &[]);
        for (after, guess, knows) in &forged {
            honest.run(ms(*after));
            attacked.run(ms(*after));
            let now = attacked.now;
            let asked = attacked.nodes[&node].asks.iter().rev().find(|(_, ask)| ask.target == target(0));
            let nonce = asked.filter(|_| *knows).map_or(*guess, |(_, ask)| ask.nonce);
            let from = if *knows { address(target(1)) } else { address(target(0)) };
            attacked.node(node).health.answered(now, from, nonce, ebpf::probe::LEN, &lie);
        }
        let history = |sim: &Sim| sim.nodes[&node].history.clone();
        prop_assert_eq!(history(&honest), history(&attacked));
        prop_assert_eq!(attacked.health(node).forged(), forged.len() as u64);
        prop_assert_eq!(honest.health(node).forged(), 0);
    }

    /// Hold-downs of 0, 1, 2, 4, 8 and 16 s fit into a minute, and a little of the next.
    #[test]
    fn damping_bounds_how_often_a_slot_comes_and_goes(
        seed: u64, gateway: bool, toggles in vec(100..6000u64, 1..150), loss in 0..60u64,
    ) {
        let node = if gateway { 8 } else { WORKER };
        let target = if gateway { remote(2, 0) } else { own(0) };
        let mut sim = Sim::new(seed, &[node], 2, 1, 2);
        sim.run(seconds(5));
        sim.way(node, target).loss = loss;
        for after in toggles {
            sim.run(ms(after));
            if !sim.dead.remove(&target) {
                sim.dead.insert(target);
            }
        }
        let set = |verdict: &Verdict| {
            let reach = verdict.reach[&member(2)];
            bit(0) & if gateway { reach.links } else { reach.via }
        };
        let history = &sim.nodes[&node].history;
        let changed = history.windows(2).filter(|pair| set(&pair[0].1) != set(&pair[1].1));
        let at: Vec<Duration> = changed.map(|pair| pair[1].0).collect();
        for from in &at {
            let within = at.iter().filter(|at| *at >= from && **at < *from + seconds(60)).count();
            prop_assert!(within <= 14, "{within} changes in a minute from {from:?}");
        }
    }

    /// However often that one came and went before.
    #[test]
    fn whoever_drains_is_left_for_any_other_that_answers(seed: u64, gateway: bool, toggles in vec(100..6000u64, 1..40)) {
        let node = if gateway { 8 } else { WORKER };
        let target = |n| if gateway { remote(2, n) } else { own(n) };
        let mut sim = Sim::new(seed, &[node], 2, 1, 2);
        sim.run(seconds(5));
        for after in toggles {
            sim.run(ms(after));
            if !sim.dead.remove(&target(0)) {
                sim.dead.insert(target(0));
            }
        }
        sim.dead.remove(&target(0));
        sim.says.insert(target(1), saying(TUNNEL_MTU, true, &[2]));
        sim.run(seconds(3));
        let reach = sim.reach(node, 2);
        prop_assert_eq!(if gateway { reach.links } else { reach.via }, bit(0));
    }

    /// And so what it costs: 5 small asks a second under traffic, one in 4 to 6 s without; large ones only under
    /// traffic or until one was answered.
    #[test]
    fn no_target_is_asked_more_often_than_promised(
        seed: u64, gateway: bool, busy in vec((any::<bool>(), 0..15_000u64), 1..8), loss in 0..100u64, path in 576..1500u16,
    ) {
        let node = if gateway { 8 } else { WORKER };
        let target = if gateway { remote(2, 0) } else { own(0) };
        let mut sim = Sim::new(seed, &[node], 2, 2, 2);
        *sim.way(node, target) = Way { loss, path, ..GOOD_WAY };
        let (mut idle, from) = (Vec::new(), sim.now);
        for (busy, length) in busy {
            sim.busy = busy;
            sim.run(ms(length));
            // The traffic of before counts for ten seconds, and a look at it may be a second old.
            let quiet = if busy { sim.now } else { sim.now.saturating_sub(ms(length)) + seconds(11) };
            idle.push((quiet, sim.now));
        }
        let until = sim.now;
        let node = &sim.nodes[&node];
        let asks = small(node, target);
        for pair in asks.windows(2) {
            prop_assert!(pair[1] - pair[0] >= FAST - GRAIN - GRAIN, "{pair:?}");
            let quiet = idle.iter().any(|(since, end)| pair[0] >= *since && pair[1] < *end && since > &from);
            prop_assert!(!quiet || pair[1] - pair[0] >= ms(4000), "{pair:?}");
        }
        let allowed = until.saturating_sub(from).as_millis() / 195 + 1;
        prop_assert!(asks.len() as u128 <= allowed);
        let sizing = node.asks.iter().filter(|(_, ask)| ask.target == target && ask.sizing).count();
        // Confirmations are at most as many as small asks; a search of five rounds at most every second and a half.
        prop_assert!(sizing <= asks.len() + 90 * (until - from).as_millis() as usize / 1500 + 90);
    }

    /// ICMP plays no part in this: nothing here ever sends it.
    #[test]
    fn a_path_that_shrinks_is_known_within_four_seconds_of_traffic_and_one_that_grows_within_twelve(
        seed: u64, gateway: bool, rtt in 0..100u64, phase in 0..3000u64, paths in vec(576..1500u16, 1..4),
    ) {
        let node = if gateway { 8 } else { WORKER };
        let target = if gateway { remote(2, 0) } else { own(0) };
        let mut sim = Sim::new(seed, &[node], 1, 1, 1);
        sim.way(node, target).rtt = ms(rtt);
        sim.run(seconds(10) + ms(phase));
        prop_assert_eq!(sim.reach(node, 2).mtu, TUNNEL_MTU);
        let mut last = TUNNEL_MTU;
        for path in paths {
            sim.way(node, target).path = path;
            sim.run(if path < last { seconds(4) } else { seconds(12) });
            last = path.min(TUNNEL_MTU);
            prop_assert_eq!(sim.reach(node, 2).mtu, last);
            prop_assert_eq!(sim.health(node).seen()[&target].life, Life::Up);
        }
    }

    /// Nobody's link is shrunk by mere loss of packets, however bad, as long as it is no more than a search can tell.
    #[test]
    fn losing_packets_is_no_black_hole(seed: u64, gateway: bool, loss in 0..8u64) {
        let node = if gateway { 8 } else { WORKER };
        let target = if gateway { remote(2, 0) } else { own(0) };
        let mut sim = Sim::new(seed, &[node], 1, 1, 1);
        sim.run(seconds(5));
        sim.way(node, target).loss = loss;
        sim.run(seconds(120));
        let least = sim.nodes[&node].history.iter().filter(|(at, _)| *at > seconds(105));
        let least = least.map(|(_, verdict)| verdict.reach[&member(2)].mtu).min();
        prop_assert!(least.is_none_or(|mtu| mtu >= 1280), "{least:?}");
    }

    /// What the plan no longer names is in no set any more; what it newly names is in none before it has answered.
    #[test]
    fn the_plan_decides_who_may_be_in_a_set(
        seed: u64, gateway: bool, plans in vec((vec(0..8u8, 0..5), vec(0..8u8, 0..5), 0..3000u64), 1..8),
    ) {
        let node = if gateway { 8 } else { WORKER };
        let mut sim = Sim::new(seed, &[node], 8, 1, 8);
        for (owns, remotes, length) in plans {
            let targets = &mut sim.node(node).targets;
            let before = targets.clone();
            targets.own = owns.iter().map(|n| (slot(*n), address(own(*n)))).collect();
            let slots = remotes.iter().map(|n| (slot(*n), address(remote(2, *n)))).collect();
            targets.members = [(member(2), slots)].into();
            let after = targets.clone();
            sim.plan(node);
            sim.run(GRAIN * 2);
            let mask = |slots: &BTreeMap<Ordinal, Ipv6Addr>| slots.keys().fold(0, |set, slot| set | 1 << slot.get());
            let reach = sim.reach(node, 2);
            prop_assert_eq!(reach.via & !(mask(&before.own) & mask(&after.own)), 0);
            let links = mask(&before.members[&member(2)]) & mask(&after.members[&member(2)]);
            prop_assert_eq!(reach.links & !links, 0);
            sim.run(ms(length));
            prop_assert_eq!(sim.reach(node, 2).via & !mask(&after.own), 0);
        }
    }

    /// It ends: quiet, if nobody has sent for two seconds and everybody has been told; else after half a minute.
    #[test]
    fn a_drain_ends_when_nobody_sends(seed: u64, sends in vec(0..4000u64, 0..12), counted: bool) {
        let mut sim = Sim::new(seed, &[0], 2, 1, 1);
        sim.run(seconds(10));
        let began = sim.now;
        sim.node(0).health.drain(began, true);
        let mut last = began;
        let (mut packets, mut at) = (0, began);
        let sends: Vec<Duration> = sends.into_iter().map(|after| { at += ms(after); at }).collect();
        while sim.health(0).draining() == Drain::Waiting {
            sim.run(FAST);
            let now = sim.now;
            let sent = sends.iter().filter(|at| **at > last && **at <= now).count() as u64;
            packets += sent;
            if counted {
                sim.node(0).health.passed_on(now, packets);
            }
            if sent > 0 && sim.health(0).draining() == Drain::Waiting {
                last = now;
            }
            prop_assert!(sim.health(0).verdict().answer.flags != 0);
        }
        let took = sim.now - began;
        match sim.health(0).draining() {
            Drain::Quiet => {
                prop_assert!(counted && took >= seconds(7) && sim.now - last >= seconds(2), "{took:?}");
                sim.run(seconds(1));
                prop_assert_eq!(sim.reach(0, 2), Reach { via: 0b10, links: 0, mtu: TUNNEL_MTU, kept: 1, zero: [0; 3] });
            }
            state => prop_assert!(state == Drain::GaveUp && took >= seconds(30) && took < seconds(31), "{took:?}"),
        }
        let now = sim.now;
        sim.node(0).health.drain(now, false);
        sim.run(seconds(1));
        prop_assert_eq!(sim.health(0).verdict().answer.flags, 0);
        prop_assert_eq!(sim.reach(0, 2).links, 1);
    }
}

/// The limit of the law above: a node that cannot probe uses every slot that the plan names.
#[test]
fn a_worker_without_ipv6_uses_every_slot() {
    let mut sim = Sim::new(1, &[WORKER], 3, 1, 1);
    sim.node(WORKER).targets.probing = false;
    sim.plan(WORKER);
    sim.run(seconds(10));
    assert_eq!(sim.reach(WORKER, 2), Reach { via: 0b111, ..Reach::default() });
    assert_eq!(sim.node(WORKER).asks, vec![]);
    assert_eq!(sim.health(WORKER).verdict().alarms, BTreeSet::new());
}

/// Nothing queues up for ever: a target that never answers holds a bounded number of asks.
#[test]
fn a_silent_target_costs_bounded_memory() {
    let mut pulse = Pulse::new(Life::Up, Duration::ZERO, Duration::ZERO);
    let mut most = VecDeque::new();
    for n in 0..10_000u64 {
        let now = FAST * u32::try_from(n).unwrap();
        pulse.expire(now);
        pulse.asked(now, n, FAST);
        most.push_back(pulse.waiting());
    }
    assert_eq!(most.iter().max(), Some(&25));
}
