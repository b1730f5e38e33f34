//! Labels; and a cluster whose nodes claim slots under random troubles.

use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn labels_say_which_slot() {
    let ordinal = |n| Wish::Pinned(Ordinal::new(n).unwrap());
    assert_eq!(Wish::of(None), Ok(Wish::Worker));
    assert_eq!(Wish::of(Some("auto")), Ok(Wish::Any));
    assert_eq!(
        (0..8).map(|n| Wish::of(Some(&n.to_string()))).collect::<Vec<_>>(),
        (0..8).map(|n| Ok(ordinal(n))).collect::<Vec<_>>()
    );
    for bad in ["", "8", "-1", "00", "+1", "true", "Auto", "0 "] {
        assert_eq!(Wish::of(Some(bad)), Err(BadLabel(bad.to_owned())));
    }
}

/// A cluster: one API server, nodes with clocks of their own, and a hop between each two.
#[derive(Debug)]
struct World {
    now: Duration,
    nodes: Vec<Node>,
    /// What the API server holds.
    leases: BTreeMap<Ordinal, Lease>,
    version: u64,
    free: BTreeSet<Ordinal>,
}

#[derive(Debug)]
struct Node {
    name: NodeName,
    claims: Claims,
    /// This node's clock began so long before the world's.
    ahead: Duration,
    api: bool,
    /// Whether its hop works: to all others whose hop works too.
    hop: bool,
    runs: bool,
    /// In its kernel, whether its agent runs or not.
    holds: Option<Ordinal>,
}

/// What befalls a node, or the slot of its number.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Api(bool),
    Hop(bool),
    Runs(bool),
    /// The agent starts anew, and remembers nothing.
    Restarts,
    LeaseDeleted,
}

impl World {
    fn new(nodes: usize, slots: usize) -> World {
        let node = |n: usize| {
            let name: NodeName = format!("n{n}").parse().unwrap();
            let ahead = SECOND * u32::try_from(n * 1000).unwrap();
            Node { claims: Claims::new(name.clone()), name, ahead, api: true, hop: true, runs: true, holds: None }
        };
        World {
            now: Duration::ZERO,
            nodes: (0..nodes).map(node).collect(),
            leases: BTreeMap::new(),
            version: 0,
            free: Ordinal::all().take(slots).collect(),
        }
    }

    /// Whether another node that has the slot in its kernel answers, whatever a Lease says.
    fn answers(&self, from: usize, ordinal: Ordinal) -> bool {
        let holds = |(to, node): (usize, &Node)| to != from && node.holds == Some(ordinal) && node.hop;
        self.nodes[from].hop && self.nodes.iter().enumerate().any(holds)
    }

    fn is_isolated(&self, at: usize) -> bool {
        let others = || self.nodes.iter().enumerate().filter(|(n, node)| *n != at && node.holds.is_some());
        others().next().is_some() && others().all(|(_, other)| !(self.nodes[at].hop && other.hop))
    }

    /// One node hears, decides, and writes.
    fn turn(&mut self, at: usize) {
        if !self.nodes[at].runs {
            return;
        }
        let now = self.now + self.nodes[at].ahead;
        if self.nodes[at].api {
            for ordinal in Ordinal::all() {
                self.nodes[at].claims.hear(now, ordinal, self.leases.get(&ordinal).cloned());
            }
            self.nodes[at].claims.synced();
        }
        let isolated = self.is_isolated(at);
        let answering = Ordinal::all().filter(|ordinal| self.answers(at, *ordinal)).collect();
        let view = View { free: &self.free, answering: &answering, isolated };
        let decision = self.nodes[at].claims.decide(now, &view);
        if let Some(write) = decision.write.filter(|_| self.nodes[at].api) {
            let stands = self.leases.get(&write.ordinal).map(|lease| lease.version.clone());
            assert_eq!(stands, write.over, "it has just heard what stands");
            let renews = self.nodes[at].holds == Some(write.ordinal);
            let claims = write.holder.is_some() && !renews;
            assert!(!claims || !self.answers(at, write.ordinal), "taken from a node that answers");
            self.version += 1;
            let lease = Lease { holder: write.holder, version: self.version.to_string() };
            self.leases.insert(write.ordinal, lease.clone());
            self.nodes[at].claims.wrote(now, write.ordinal, lease);
        }
        // An agent that has heard nothing yet leaves the kernel as it is.
        if self.nodes[at].claims.synced {
            self.nodes[at].holds = decision.hold;
        }
    }

    fn held(&self) -> Vec<Option<Ordinal>> {
        self.nodes.iter().map(|node| node.holds).collect()
    }

    fn pass(&mut self, seconds: u32) {
        for _ in 0..seconds {
            self.now += SECOND;
            (0..self.nodes.len()).for_each(|at| self.turn(at));
        }
    }

    fn befalls(&mut self, at: usize, fault: Fault) {
        let node = &mut self.nodes[at];
        match fault {
            Fault::Api(on) => node.api = on,
            Fault::Hop(on) => node.hop = on,
            Fault::Runs(on) => node.runs = on,
            Fault::Restarts => node.claims = Claims::new(node.name.clone()),
            Fault::LeaseDeleted => {
                let slot = Ordinal::all().nth(at).unwrap();
                self.leases.remove(&slot);
            }
        }
    }

    /// Of two nodes that hold one slot, one hears nothing of the Leases.
    fn assert_no_slot_is_held_twice_by_who_hears(&self) {
        let hears = |node: &&Node| node.api && node.runs && node.holds.is_some();
        let held: Vec<_> = self.nodes.iter().filter(hears).map(|node| node.holds).collect();
        assert_eq!(held.iter().collect::<BTreeSet<_>>().len(), held.len(), "{held:?}");
    }
}

fn faults(nodes: usize) -> impl Strategy<Value = Vec<(usize, Fault, u32)>> {
    let fault = prop_oneof![
        any::<bool>().prop_map(Fault::Api),
        any::<bool>().prop_map(Fault::Hop),
        any::<bool>().prop_map(Fault::Runs),
        Just(Fault::Restarts),
        Just(Fault::LeaseDeleted),
    ];
    proptest::collection::vec((0..nodes, fault, 0_u32..100), 0..20)
}

/// It had taken the slot while it was cut off from a holder that lived on.
#[test]
fn a_slot_that_was_lost_is_not_taken_back_from_who_answers() {
    let mut world = World::new(4, 2);
    world.befalls(0, Fault::Runs(false));
    world.pass(1);
    world.befalls(0, Fault::Hop(false));
    world.befalls(0, Fault::Runs(true));
    world.befalls(1, Fault::Api(false));
    world.pass(70);
    let [zero, one] = [0, 1].map(Ordinal::new);
    assert_eq!(world.held(), [zero, zero, one, None]);
    world.befalls(0, Fault::Api(false));
    world.pass(70);
    assert_eq!(world.held(), [None, zero, one, None]);
    for fault in [Fault::Api(true), Fault::Hop(true)] {
        [0, 1].into_iter().for_each(|at| world.befalls(at, fault));
    }
    world.pass(130);
    world.assert_no_slot_is_held_twice_by_who_hears();
}

proptest! {
    #[test]
    fn no_slot_is_held_twice_by_who_hears_and_all_are_held_in_the_end(faults in faults(4), slots in 1_usize..=4) {
        let mut world = World::new(4, slots);
        for (at, fault, seconds) in faults {
            world.befalls(at, fault);
            // What was decided before the fault is looked at again within a second.
            world.pass(1 + seconds);
            world.assert_no_slot_is_held_twice_by_who_hears();
        }
        for at in 0..4 {
            [Fault::Api(true), Fault::Hop(true), Fault::Runs(true)].into_iter().for_each(|fault| world.befalls(at, fault));
        }
        world.pass(130);
        world.assert_no_slot_is_held_twice_by_who_hears();
        let held: BTreeSet<_> = world.nodes.iter().filter_map(|node| node.holds).collect();
        prop_assert_eq!(held, world.free.clone());
    }

    /// With the API away, whoever held a slot holds it, as long as any other gateway answers.
    #[test]
    fn without_an_api_server_nothing_changes(seconds in 1_u32..1000, slots in 1_usize..=4) {
        let mut world = World::new(4, slots);
        world.pass(5);
        let held = world.held();
        (0..4).for_each(|at| world.befalls(at, Fault::Api(false)));
        world.pass(seconds);
        prop_assert_eq!(world.held(), held);
    }

    /// Nor does it where somebody deletes Leases: each is written anew by who holds the slot.
    #[test]
    fn a_lease_that_is_deleted_changes_nothing(deleted in proptest::collection::vec((0..2_usize, 1_u32..30), 1..8)) {
        let mut world = World::new(4, 2);
        world.pass(5);
        let held = world.held();
        for (at, seconds) in deleted {
            world.befalls(at, Fault::LeaseDeleted);
            for _ in 0..seconds {
                world.pass(1);
                prop_assert_eq!(world.held(), held.clone());
            }
            prop_assert_eq!(world.leases.keys().copied().collect::<BTreeSet<_>>(), world.free.clone());
        }
    }

    /// A slot that was given back is nobody's once its holder has let it go, which takes a pass.
    #[test]
    fn a_slot_without_a_holder_is_free_when_nobody_answers(released: bool, answers: bool) {
        let mut claims = Claims::new("me".parse().unwrap());
        let slot = Ordinal::new(0).unwrap();
        claims.hear(SECOND, slot, released.then(|| Lease { holder: None, version: "1".to_owned() }));
        claims.synced();
        let answering = [slot].into_iter().filter(|_| answers).collect();
        let decision = claims.decide(SECOND, &View { free: &[slot].into(), answering: &answering, isolated: false });
        prop_assert_eq!(decision.write.is_some(), !answers);
    }

    /// A holder that is off loses its slot within two Leases, and one that answers without its agent never does.
    #[test]
    fn only_the_slot_of_a_dead_node_is_taken(answers: bool) {
        let mut world = World::new(2, 1);
        world.pass(5);
        let holder = world.nodes.iter().position(|node| node.holds.is_some()).unwrap();
        world.befalls(holder, Fault::Runs(false));
        world.befalls(holder, Fault::Hop(answers));
        world.pass(130);
        prop_assert_eq!(world.nodes[1 - holder].holds.is_some(), !answers);
    }

    /// In a minute with nothing new: at most four requests.
    #[test]
    fn a_holder_renews_three_times_a_minute(minutes in 1_u32..10) {
        let mut world = World::new(1, 1);
        world.pass(1);
        let before = world.version;
        world.pass(60 * minutes);
        prop_assert_eq!(world.version - before, u64::from(3 * minutes));
    }

    /// What a label has pinned since, and what it holds beyond one, is given back.
    #[test]
    fn one_slot_is_enough(pinned in 0_i64..3) {
        let me: NodeName = "me".parse().unwrap();
        let mut claims = Claims::new(me.clone());
        let mine = || Some(Lease { holder: Some(me.clone()), version: "1".to_owned() });
        (0..3).filter_map(Ordinal::new).for_each(|ordinal| claims.hear(SECOND, ordinal, mine()));
        claims.synced();
        let free: BTreeSet<_> = (0..3).filter(|n| *n != pinned).filter_map(Ordinal::new).collect();
        let answering = Ordinal::all().collect();
        let view = View { free: &free, answering: &answering, isolated: false };
        let kept = *free.first().unwrap();
        for _ in 0..2 {
            let decision = claims.decide(2 * SECOND, &view);
            prop_assert_eq!(decision.hold, Some(kept));
            let back = decision.write.unwrap();
            prop_assert!(back.ordinal != kept && back.holder.is_none());
            claims.wrote(2 * SECOND, back.ordinal, Lease { holder: None, version: "2".to_owned() });
        }
        // What was given back is no renewal of the other.
        let renewal = claims.decide(2 * SECOND, &view).write;
        prop_assert_eq!(renewal, Some(Write { ordinal: kept, holder: Some(me.clone()), over: Some("1".to_owned()) }));
    }
}
