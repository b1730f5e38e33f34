//! What is asked and said, step by step; and laws over random troubles.

use std::fmt::Write;

use expect_test::{Expect, expect};
use k8s_openapi::{ByteString, api::core::v1::Secret, apimachinery::pkg::apis::meta::v1::MicroTime, jiff::Timestamp};
use proptest::{collection::vec, prelude::*};

use super::{
    api::{ENTRY, applied, heard, keys_of, leased},
    known::pinned,
    *,
};
use crate::keyring::KeyFault;

const SECOND: Duration = Duration::from_secs(1);

fn slot(n: i64) -> Ordinal {
    Ordinal::new(n).unwrap()
}

fn node(name: &str) -> NodeName {
    name.parse().unwrap()
}

fn key(n: u8) -> PrivateKey {
    PrivateKey::new([n; 32])
}

fn spec(n: i64, node: &str, public: PublicKey) -> MeshGatewaySpec {
    MeshGatewaySpec {
        ordinal: n,
        node: node.to_owned(),
        hop_addresses: vec!["192.0.2.1".to_owned()],
        public_key: public.to_string(),
    }
}

/// A node `n1` that is labelled so, in a mesh that names key 1 for slot 0.
fn labelled(label: &str) -> Known {
    Known {
        label: (!label.is_empty()).then(|| label.to_owned()),
        hop: ["192.0.2.1".parse().unwrap()].into(),
        named: Some([(slot(0), key(1).public())].into()),
        ..Known::default()
    }
}

fn shown(ask: &Ask) -> String {
    match ask {
        Ask::Leases => "list Leases".to_owned(),
        Ask::Write(write) => {
            let holder = write.holder.as_ref().map_or("nobody", NodeName::as_str);
            format!("Lease {} to {holder} over {}", write.ordinal, write.over.as_deref().unwrap_or("none"))
        }
        Ask::Key(slot) => format!("key of slot {slot}"),
        Ask::Apply(spec) => format!("MeshGateway {} {} {:?}", spec.ordinal, spec.node, spec.hop_addresses),
        Ask::Remove(slot) => format!("delete MeshGateway {slot}"),
        Ask::Report(slot, _) => format!("status of MeshGateway {slot}"),
        Ask::Say(subject, _) => format!("status of {}", subject.name),
    }
}

fn stands(standing: &Standing) -> String {
    match standing {
        Standing::Unknown => "unknown".to_owned(),
        Standing::Worker => "worker".to_owned(),
        Standing::Gateway(held) => format!("gateway {} of {} keys", held.spec.ordinal, held.keys.len()),
    }
}

/// An API server that knows one cluster, and how many requests came to it.
#[derive(Debug, Default)]
struct World {
    leases: BTreeMap<Ordinal, Lease>,
    gateways: BTreeMap<Ordinal, MeshGatewaySpec>,
    version: u64,
    /// A key that somebody has put into every Secret, below the first.
    added: Option<u8>,
}

impl World {
    fn answer(&mut self, ask: &Ask) -> Answer {
        match ask {
            Ask::Leases => Answer::Leases(self.leases.clone()),
            Ask::Write(write) if self.leases.get(&write.ordinal).map(|lease| &lease.version) != write.over.as_ref() => {
                Answer::Refused
            }
            Ask::Write(write) => {
                self.version += 1;
                let lease = Lease { holder: write.holder.clone(), version: self.version.to_string() };
                self.leases.insert(write.ordinal, lease.clone());
                Answer::Written(lease)
            }
            Ask::Key(slot) => Answer::Keys([slot.get() + 1].into_iter().chain(self.added).map(key).collect()),
            Ask::Apply(spec) => {
                self.gateways.insert(slot(spec.ordinal), spec.clone());
                Answer::Done
            }
            Ask::Remove(slot) => {
                self.gateways.remove(slot);
                Answer::Done
            }
            Ask::Report(slot, _) if !self.gateways.contains_key(slot) => Answer::Gone,
            Ask::Report(..) | Ask::Say(..) => Answer::Done,
        }
    }
}

/// One node for so long; each step that asks or changes anything is a line.
fn run(gateway: &mut Gateway, world: &mut World, known: &Known, (from, to): (u64, u64), text: &mut String) {
    let mut before = gateway.said();
    for second in from..to {
        let now = SECOND * u32::try_from(second).unwrap();
        gateway.know(now, Known { gateways: world.gateways.clone(), ..known.clone() });
        loop {
            let ask = gateway.next(now);
            let said = gateway.said();
            if said != before {
                writeln!(text, "{second} s: {}", stands(&said.standing)).unwrap();
                said.problems.iter().for_each(|problem| writeln!(text, "    {problem}").unwrap());
                before = said;
            }
            let Some(ask) = ask else { break };
            writeln!(text, "{second} s: {}", shown(&ask)).unwrap();
            let answer = world.answer(&ask);
            gateway.answered(now, now, &ask, answer);
            gateway.know(now, Known { gateways: world.gateways.clone(), ..known.clone() });
        }
    }
}

fn one() -> Gateway {
    Gateway::new(node("n1"), "mn".parse().unwrap(), 2)
}

fn check(known: &Known, mut world: World, seconds: u64, expected: Expect) {
    let mut text = String::new();
    run(&mut one(), &mut world, known, (0, seconds), &mut text);
    expected.assert_eq(&text);
}

#[test]
fn a_worker_asks_for_nothing() {
    check(
        &labelled(""),
        World::default(),
        600,
        expect![[r#"
        0 s: worker
    "#]],
    );
    check(
        &labelled("8"),
        World::default(),
        600,
        expect![[r#"
        0 s: worker
            label carrick.dev/gateway="8" is neither a slot from 0 to 7 nor "auto": this node stays a worker
    "#]],
    );
}

#[test]
fn a_pinned_slot_has_no_lease() {
    let known = Known { pinned: [(slot(0), node("n1"))].into(), ..labelled("0") };
    check(
        &known,
        World::default(),
        600,
        expect![[r#"
            0 s: worker
            0 s: key of slot 0
            0 s: gateway 0 of 1 keys
            0 s: MeshGateway 0 n1 ["192.0.2.1"]
            0 s: status of MeshGateway 0
            60 s: status of MeshGateway 0
            120 s: status of MeshGateway 0
            180 s: status of MeshGateway 0
            240 s: status of MeshGateway 0
            300 s: key of slot 0
            300 s: status of MeshGateway 0
            360 s: status of MeshGateway 0
            420 s: status of MeshGateway 0
            480 s: status of MeshGateway 0
            540 s: status of MeshGateway 0
        "#]],
    );
}

#[test]
fn of_two_nodes_that_are_pinned_to_one_slot_the_other_is_a_worker() {
    let known = Known { pinned: [(slot(0), node("n0"))].into(), ..labelled("0") };
    check(
        &known,
        World::default(),
        60,
        expect![[r#"
        0 s: worker
            slot 0 is held by node n0, which has the same label carrick.dev/gateway: this node stays a worker until one of the two labels is changed
    "#]],
    );
}

#[test]
fn a_slot_by_lease() {
    check(
        &labelled("auto"),
        World::default(),
        61,
        expect![[r#"
            0 s: list Leases
            0 s: worker
            0 s: Lease 0 to n1 over none
            0 s: key of slot 0
            0 s: gateway 0 of 1 keys
            0 s: MeshGateway 0 n1 ["192.0.2.1"]
            0 s: status of MeshGateway 0
            20 s: Lease 0 to n1 over 1
            40 s: Lease 0 to n1 over 2
            60 s: Lease 0 to n1 over 3
            60 s: status of MeshGateway 0
        "#]],
    );
}

#[test]
fn every_slot_is_held() {
    let lease = |n: &str, version: &str| Lease { holder: Some(node(n)), version: version.to_owned() };
    let leases = [(slot(0), lease("n2", "1")), (slot(1), lease("n3", "2"))].into();
    let known = Known { others: [slot(0), slot(1)].into(), ..labelled("auto") };
    check(
        &known,
        World { leases, ..World::default() },
        61,
        expect![[r#"
        0 s: list Leases
        0 s: worker
            every slot is held: this node stays a worker until one is free; install with more slots, or take the label from a node
        20 s: list Leases
        40 s: list Leases
        60 s: list Leases
    "#]],
    );
}

#[test]
fn a_holder_that_is_silent_is_succeeded() {
    let lease = |n: &str, version: &str| Lease { holder: Some(node(n)), version: version.to_owned() };
    let leases = [(slot(0), lease("n2", "1")), (slot(1), lease("n3", "2"))].into();
    let known = Known { others: [slot(0), slot(1)].into(), silent: [slot(1)].into(), ..labelled("auto") };
    check(
        &known,
        World { leases, version: 2, ..World::default() },
        70,
        expect![[r#"
            0 s: list Leases
            0 s: worker
                every slot is held: this node stays a worker until one is free; install with more slots, or take the label from a node
            20 s: list Leases
            40 s: list Leases
            60 s: worker
            60 s: Lease 1 to n1 over 2
            60 s: key of slot 1
            60 s: gateway 1 of 1 keys
            60 s: MeshGateway 1 n1 ["192.0.2.1"]
            60 s: status of MeshGateway 1
        "#]],
    );
}

#[test]
fn another_slot_another_key() {
    let (mut gateway, mut world, mut text) = (one(), World::default(), String::new());
    let pinned = |n: i64| Known { pinned: [(slot(n), node("n1"))].into(), ..labelled(&n.to_string()) };
    run(&mut gateway, &mut world, &pinned(0), (0, 20), &mut text);
    run(&mut gateway, &mut world, &pinned(1), (20, 60), &mut text);
    run(&mut gateway, &mut world, &labelled("auto"), (60, 100), &mut text);
    run(&mut gateway, &mut world, &labelled(""), (100, 200), &mut text);
    expect![[r#"
        0 s: worker
        0 s: key of slot 0
        0 s: gateway 0 of 1 keys
        0 s: MeshGateway 0 n1 ["192.0.2.1"]
        0 s: status of MeshGateway 0
        20 s: worker
        20 s: key of slot 1
        20 s: gateway 1 of 1 keys
        20 s: delete MeshGateway 0
        20 s: MeshGateway 1 n1 ["192.0.2.1"]
        60 s: list Leases
        60 s: worker
        60 s: Lease 0 to n1 over none
        60 s: key of slot 0
        60 s: gateway 0 of 1 keys
        60 s: delete MeshGateway 1
        60 s: MeshGateway 0 n1 ["192.0.2.1"]
        60 s: status of MeshGateway 0
        80 s: Lease 0 to n1 over 1
        100 s: worker
        100 s: Lease 0 to nobody over 2
    "#]]
    .assert_eq(&text);
}

/// Somebody is about to add it, or has put a wrong one into the folder.
#[test]
fn a_key_that_the_folder_names_is_looked_for() {
    let named = Some([(slot(0), key(9).public())].into());
    let known = Known { pinned: [(slot(0), node("n1"))].into(), named, ..labelled("0") };
    let (mut gateway, mut world, mut text) = (one(), World::default(), String::new());
    run(&mut gateway, &mut world, &known, (0, 40), &mut text);
    world.added = Some(9);
    run(&mut gateway, &mut world, &known, (40, 120), &mut text);
    expect![[r#"
        0 s: worker
        0 s: key of slot 0
        0 s: gateway 0 of 1 keys
        0 s: MeshGateway 0 n1 ["192.0.2.1"]
        0 s: status of MeshGateway 0
        15 s: key of slot 0
        30 s: key of slot 0
        45 s: key of slot 0
        45 s: gateway 0 of 2 keys
        45 s: MeshGateway 0 n1 ["192.0.2.1"]
        60 s: status of MeshGateway 0
    "#]]
    .assert_eq(&text);
}

#[test]
fn without_its_mesh_cluster_the_key_is_told() {
    let known = Known { pinned: [(slot(0), node("n1"))].into(), named: None, ..labelled("0") };
    check(
        &known,
        World::default(),
        5,
        expect![[r#"
            0 s: worker
            0 s: key of slot 0
            0 s: gateway 0 of 1 keys
                NotInMesh: there is no MeshCluster mn: add it to the mesh's folder, with gateways: [{ordinal: 0, publicKey: pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk=}]
            0 s: MeshGateway 0 n1 ["192.0.2.1"]
            0 s: status of MeshGateway 0
        "#]],
    );
}

/// What a list lacks is believed after minutes; what is answered, at once.
#[test]
fn a_gateway_that_is_gone_is_written_again() {
    let (mut gateway, mut world, mut text) = (one(), World::default(), String::new());
    let known = Known { pinned: [(slot(0), node("n1"))].into(), ..labelled("0") };
    run(&mut gateway, &mut world, &known, (0, 2), &mut text);
    text.clear();
    let kept = std::mem::take(&mut world.gateways);
    for second in 2..130 {
        let now = SECOND * second;
        gateway.know(now, Known { gateways: kept.clone(), ..known.clone() });
        while let Some(ask) = gateway.next(now) {
            writeln!(text, "{second} s: {}", shown(&ask)).unwrap();
            let answer = world.answer(&ask);
            gateway.answered(now, now, &ask, answer);
        }
    }
    assert!(world.gateways == kept && kept.len() == 1);
    expect![[r#"
        60 s: status of MeshGateway 0
        60 s: MeshGateway 0 n1 ["192.0.2.1"]
        120 s: status of MeshGateway 0
    "#]]
    .assert_eq(&text);
}

#[test]
fn what_is_written() {
    let write = slot::Write { ordinal: slot(3), holder: Some(node("n1")), over: None };
    let now = || MicroTime(Timestamp::UNIX_EPOCH);
    let over = slot::Write { over: Some("7".to_owned()), ..write.clone() };
    let back = slot::Write { holder: None, ..over.clone() };
    let lines =
        [leased(&write, now()), leased(&over, now()), leased(&back, now()), applied(&spec(3, "n1", key(1).public()))];
    expect![[r#"
        {"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"carrick-gateway-3"},"spec":{"holderIdentity":"n1","leaseDurationSeconds":60,"renewTime":"1970-01-01T00:00:00.000000Z"}}
        {"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"carrick-gateway-3","resourceVersion":"7"},"spec":{"holderIdentity":"n1","leaseDurationSeconds":60,"renewTime":"1970-01-01T00:00:00.000000Z"}}
        {"apiVersion":"coordination.k8s.io/v1","kind":"Lease","metadata":{"name":"carrick-gateway-3","resourceVersion":"7"},"spec":{"holderIdentity":null,"leaseDurationSeconds":60,"renewTime":"1970-01-01T00:00:00.000000Z"}}
        {"apiVersion":"carrick.dev/v1alpha1","kind":"MeshGateway","metadata":{"name":"3"},"spec":{"hopAddresses":["192.0.2.1"],"node":"n1","ordinal":3,"publicKey":"pOCSkrZRwni5dyxWn1+puxPZBrRqtoyd+dwrRAn4ogk="}}
    "#]].assert_eq(&lines.map(|line| format!("{line}\n")).concat());
    let mut lease: k8s_openapi::api::coordination::v1::Lease = serde_json::from_value(leased(&over, now())).unwrap();
    assert_eq!(heard(&lease), Some((slot(3), Lease { holder: Some(node("n1")), version: "7".to_owned() })));
    lease.metadata.name = Some("carrick-gateway-8".to_owned());
    assert_eq!(heard(&lease), None);
}

#[test]
fn a_node_knows_its_own_slot_better_than_what_is_written() {
    let gateway = |n: i64, node: &str| MeshGateway::new(&n.to_string(), spec(n, node, key(1).public()));
    let objects = Objects { gateways: vec![gateway(0, "n1"), gateway(1, "n2")], ..Objects::default() };
    let named = |standing: &Standing| {
        let amended = standing.amend(&node("n1"), &objects);
        amended.map(|objects| objects.gateways.iter().map(|one| (one.spec.ordinal, one.spec.node.clone())).collect())
    };
    let at = |n: i64, node: &str| (n, node.to_owned());
    let held = |n| Standing::Gateway(Held { spec: spec(n, "n1", key(1).public()), keys: BTreeMap::new() });
    assert_eq!(named(&Standing::Unknown), None::<Vec<_>>);
    assert_eq!(named(&Standing::Worker), Some(vec![at(1, "n2")]));
    assert_eq!(named(&held(0)), Some(vec![at(0, "n1"), at(1, "n2")]));
    assert_eq!(named(&held(1)), Some(vec![at(1, "n1")]));
    assert_eq!(named(&held(2)), Some(vec![at(1, "n2"), at(2, "n1")]));
}

#[test]
fn who_holds_a_pinned_slot_keeps_it() {
    let labels = [("a", "0"), ("b", "0"), ("c", "1"), ("d", "auto"), ("e", "x")];
    let labels = labels.map(|(name, label)| (node(name), label.to_owned())).into();
    let gateways = |holder: &str| [(slot(0), spec(0, holder, key(1).public()))].into();
    let expected = |first: &str| BTreeMap::from([(slot(0), node(first)), (slot(1), node("c"))]);
    assert_eq!(pinned(&labels, &BTreeMap::new()), expected("a"));
    assert_eq!(pinned(&labels, &gateways("b")), expected("b"));
    assert_eq!(pinned(&labels, &gateways("c")), expected("a"));
}

fn secret(text: Option<&[u8]>) -> Secret {
    let data = text.map(|text| [(ENTRY.to_owned(), ByteString(text.to_vec()))].into());
    Secret { data, ..Secret::default() }
}

#[test]
fn a_secret_holds_what_a_key_file_holds() {
    assert!(matches!(keys_of(&secret(None)), Ok(None)));
    assert!(matches!(keys_of(&secret(Some(b"\n"))), Err(KeyFault::Empty)));
    let two = format!("{}\n{}\n", *key(1).to_base64(), *key(2).to_base64());
    let keys = keys_of(&secret(Some(two.as_bytes()))).unwrap().unwrap();
    let public = |n: u8| key(n).public();
    assert_eq!(keys.iter().map(PrivateKey::public).collect::<Vec<_>>(), [public(1), public(2)]);
    let keys: Vec<_> = keys.into_iter().map(|key| (key.public(), key)).collect();
    assert_eq!(told(&keys, None), Some(public(1)));
    assert_eq!(told(&keys, Some(&public(2))), Some(public(2)));
    assert_eq!(told(&keys, Some(&public(3))), Some(public(1)));
}

/// What befalls a node at a second: whether the API server is there for it, and the hop; and whether somebody deletes a
/// Lease then.
#[derive(Clone, Copy, Debug)]
struct Fault {
    at: u32,
    node: usize,
    api: bool,
    hop: bool,
    deleted: Option<i64>,
}

fn faults() -> impl Strategy<Value = Vec<Fault>> {
    let fault = (0..600u32, 0..4usize, any::<bool>(), any::<bool>(), proptest::option::of(0..2i64));
    vec(fault.prop_map(|(at, node, api, hop, deleted)| Fault { at, node, api, hop, deleted }), 0..16)
}

struct Node {
    gateway: Gateway,
    known: Known,
    api: bool,
    hop: bool,
    /// Since when the API server has been there for it.
    heard: u32,
    asked: Vec<(u32, Ask)>,
}

/// Four nodes with the label `auto` and two slots. `look` sees all of them after each second.
fn live(faults: &[Fault], seconds: u32, mut look: impl FnMut(u32, &[Node])) -> Vec<Node> {
    let gateway = |n: usize| Gateway::new(node(&format!("n{n}")), "mn".parse().unwrap(), 2);
    let born =
        |n| Node { gateway: gateway(n), known: labelled("auto"), api: true, hop: true, heard: 0, asked: Vec::new() };
    let (mut nodes, mut world): (Vec<Node>, _) = ((0..4).map(born).collect(), World::default());
    for second in 0..seconds {
        for fault in faults.iter().filter(|fault| fault.at == second) {
            (nodes[fault.node].api, nodes[fault.node].hop) = (fault.api, fault.hop);
            fault.deleted.and_then(|n| world.leases.remove(&slot(n)));
        }
        // Who answers for a slot over the hop: whoever has it in its kernel.
        let up = nodes.iter().filter(|one| one.hop);
        let answers: BTreeMap<String, Option<Ordinal>> =
            up.map(|one| (one.gateway.me.to_string(), one.gateway.hold)).collect();
        for one in &mut nodes {
            let now = SECOND * second;
            if one.api {
                one.known.gateways = world.gateways.clone();
            } else {
                one.heard = second + 1;
            }
            let others = one.known.gateways.iter().filter(|(_, spec)| spec.node != one.gateway.me.as_str());
            one.known.others = others.clone().map(|(slot, _)| *slot).collect();
            let is_silent = |(slot, spec): &(&Ordinal, &MeshGatewaySpec)| {
                !one.hop || answers.get(&spec.node) != Some(&Some(**slot))
            };
            one.known.silent = others.filter(is_silent).map(|(slot, _)| *slot).collect();
            one.gateway.know(now, one.known.clone());
            while let Some(ask) = one.gateway.next(now) {
                let answer = if one.api { world.answer(&ask) } else { Answer::Failed("away".to_owned()) };
                one.gateway.answered(now, now, &ask, answer);
                one.asked.push((second, ask));
                // What was written comes back by the watch.
                if one.api {
                    one.known.gateways = world.gateways.clone();
                    one.gateway.know(now, one.known.clone());
                }
            }
        }
        look(second, &nodes);
    }
    nodes
}

/// Whatever it asked last: a renewal that failed must not keep it from looking at the clock.
#[test]
fn who_is_cut_off_from_all_lets_its_slot_go() {
    let cut_off = |at| Fault { at, node: 0, api: false, hop: false, deleted: None };
    for at in 100..120 {
        let mut held = Vec::new();
        live(&[cut_off(at)], at + 61, |second, nodes| {
            held.extend((second + 1 >= at).then(|| nodes[0].gateway.hold));
        });
        assert_eq!((held[0], held[61]), (Some(slot(0)), None), "cut off at {at}: {held:?}");
    }
}

#[test]
fn a_lease_that_is_deleted_is_written_anew() {
    let (mut gateway, mut world, mut text) = (one(), World::default(), String::new());
    run(&mut gateway, &mut world, &labelled("auto"), (0, 30), &mut text);
    world.leases.clear();
    run(&mut gateway, &mut world, &labelled("auto"), (30, 70), &mut text);
    expect![[r#"
        0 s: list Leases
        0 s: worker
        0 s: Lease 0 to n1 over none
        0 s: key of slot 0
        0 s: gateway 0 of 1 keys
        0 s: MeshGateway 0 n1 ["192.0.2.1"]
        0 s: status of MeshGateway 0
        20 s: Lease 0 to n1 over 1
        40 s: Lease 0 to n1 over 2
        40 s: list Leases
        40 s: Lease 0 to n1 over none
        60 s: Lease 0 to n1 over 3
        60 s: status of MeshGateway 0
    "#]]
    .assert_eq(&text);
}

/// The second at which two nodes that hear the API server first hold one slot.
fn held_twice(faults: &[Fault]) -> Option<u32> {
    let mut twice = None;
    live(faults, 700, |second, nodes| {
        // A renewal, and another try after it.
        let hears = nodes.iter().filter(|one| second >= one.heard + 40);
        let mut held: Vec<Ordinal> = hears.filter_map(|one| one.gateway.hold).collect();
        let all = held.len();
        held.sort();
        held.dedup();
        twice = twice.or((held.len() < all).then_some(second));
    });
    twice
}

/// A holder does not look at others' Leases: when it has to look for another slot, what it knows of them is old.
#[test]
fn a_deleted_lease_that_was_last_heard_of_long_ago_stands() {
    let fault = |at, node, api, hop, deleted| Fault { at, node, api, hop, deleted };
    let loses_its_slot_to_one_that_comes_back =
        [fault(21, 0, false, true, None), fault(115, 2, true, false, None), fault(276, 0, false, false, Some(0))];
    let then = fault(281, 0, true, false, Some(1));
    assert_eq!(held_twice(&[&loses_its_slot_to_one_that_comes_back[..], &[then]].concat()), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn of_those_who_hear_the_api_server_no_two_hold_one_slot(faults in faults()) {
        prop_assert_eq!(held_twice(&faults), None);
    }

    #[test]
    fn a_minute_has_few_requests(mut faults in faults()) {
        // Whoever deletes a Lease every second makes its holder write it every second.
        faults.iter_mut().for_each(|fault| fault.deleted = None);
        for one in live(&faults, 700, |_, _| {}) {
            for minute in 0..640 {
                let within = |about: About| {
                    let asked = one.asked.iter().filter(|(at, _)| (minute..minute + 60).contains(at));
                    asked.filter(|(_, ask)| ask.about() == about).count()
                };
                prop_assert!(within(About::Key) <= 5, "key, from {}: {:?}", minute, one.asked);
                prop_assert!(within(About::Object) <= 6, "object, from {}: {:?}", minute, one.asked);
                prop_assert!(within(About::Lease) <= 8, "Lease, from {}: {:?}", minute, one.asked);
            }
        }
    }

    #[test]
    fn when_all_is_well_again_every_slot_is_held_once_and_written_so(faults in faults()) {
        let all_well = (0..4).map(|node| Fault { at: 600, node, api: true, hop: true, deleted: None });
        let faults: Vec<Fault> = faults.into_iter().chain(all_well).collect();
        let nodes = live(&faults, 800, |_, _| {});
        let held: BTreeSet<Ordinal> = nodes.iter().filter_map(|one| one.gateway.hold).collect();
        prop_assert_eq!(held, BTreeSet::from([slot(0), slot(1)]));
        for one in nodes.iter() {
            let said = one.gateway.said().standing;
            match one.gateway.hold {
                None => prop_assert_eq!(said, Standing::Worker),
                Some(slot) => {
                    let Standing::Gateway(held) = said else { return Err(TestCaseError::fail("no key")) };
                    prop_assert_eq!(one.known.gateways.get(&slot), Some(&held.spec));
                    let last_minute = one.asked.iter().filter(|(at, _)| *at >= 740).map(|(_, ask)| ask.about());
                    let leases = last_minute.filter(|about| *about == About::Lease).count();
                    prop_assert!(leases <= 3, "{} requests a minute for its Lease", leases);
                }
            }
        }
    }

    #[test]
    fn what_a_secret_holds_is_never_taken_for_nothing(text in vec(any::<u8>(), 0..80)) {
        prop_assert!(!matches!(keys_of(&secret(Some(&text))), Ok(None)));
    }
}
