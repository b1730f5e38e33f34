//! What happens to a packet, as a table to read. The programs run, and their model agrees with each row.

use std::net::{IpAddr, Ipv6Addr};

use agent::state::Program;
use ebpf::{Addr, NO_SLOT, Reach, probe};
use expect_test::{Expect, expect};

use super::{
    cases::{self, HOP_MAC, HOP_PORT, MAC, PROBE_PORT, VNI, WIREGUARD_PORT, whole},
    check::{differs, read},
    model::{Context, Key, Verdict, World},
    packet::{ACK, Eth, Fragment, Harm, Ip, L4, Packet, Probe, SYN, TcpOption, pseudo_checksum},
    run::{DROP, Loaded, model_of},
};

/// The rows that one program gives, each a node and packets.
struct Table {
    program: Program,
    loaded: Loaded,
    text: String,
}

/// A packet from a pod to another, and what is special about it.
struct Row {
    what: &'static str,
    packet: Packet,
    context: Context,
}

fn row(what: &'static str, src: &str, dst: &str) -> Row {
    let ip = Ip {
        src: cases::text(src),
        dst: cases::text(dst),
        ttl: 64,
        tos: 0,
        dont_fragment: true,
        options: 0,
        extensions: vec![],
        fragment: None,
    };
    let eth = Eth { dst: MAC[0], src: HOP_MAC, vlan: None, ethertype: None };
    let l4 = L4::Tcp { ports: [40_000, 443], flags: ACK, options: vec![], payload: 10 };
    let context = Context { ingress_ifindex: 5, gso_size: 0, gso_segs: 0, mark: 0, key: None };
    Row { what, packet: Packet { eth, ip, l4, harm: Harm::None }, context }
}

impl Row {
    fn with(mut self, change: impl FnOnce(&mut Packet)) -> Row {
        change(&mut self.packet);
        self
    }

    /// Sent by this node itself.
    fn local(mut self) -> Row {
        self.context.ingress_ifindex = 0;
        self
    }

    fn udp(self, ports: [u16; 2]) -> Row {
        self.with(|packet| packet.l4 = L4::Udp { ports, checksum: true, payload: 10 })
    }

    fn probe(self, kind: u8) -> Row {
        let probe = Probe { magic: probe::MAGIC, kind, flags: 0, mtu: 0, nonce: 7, len: probe::LEN };
        self.with(|packet| packet.l4 = L4::Probe { ports: [PROBE_PORT; 2], probe })
    }

    fn large(self, payload: usize) -> Row {
        self.with(|packet| packet.l4 = L4::Tcp { ports: [40_000, 443], flags: ACK, options: vec![], payload })
    }

    fn segmented(mut self, gso_size: u32) -> Row {
        self.context.gso_size = gso_size;
        self.context.gso_segs = 2;
        self.large(gso_size as usize + 1)
    }

    /// Through the hop, from that node.
    fn from(mut self, node: &str) -> Row {
        self.context.key = Some(Key { vni: VNI[0], remote: cases::text(node), local: Addr::NONE });
        self
    }
}

impl Table {
    fn new(program: Program) -> Table {
        Table { program, loaded: Loaded::new(program).expect("the kernel takes the program"), text: String::new() }
    }

    fn node(&mut self, name: &str, world: &World, rows: Vec<Row>) {
        self.text += &format!("{name}\n");
        self.loaded.maps.write(world).expect("the maps can be written");
        for Row { what, packet, context } in rows {
            let frame = packet.bytes();
            let ran = self.loaded.run(&frame, &context).expect("a test run");
            let expected = model_of(self.program)(world, &frame, &context);
            assert_eq!(differs(&expected, &ran), None, "{what}");
            let (verdict, dropped) = read(&ran.seen).expect("a verdict");
            let told = dropped.filter(|_| verdict != Verdict::Drop).map_or("", |_| ", ICMP \"too big\" about it");
            let verdict = match (verdict, dropped) {
                (Verdict::Drop, Some(reason)) => format!("dropped, {}", reason.as_str()),
                (verdict, _) => describe(verdict),
            };
            let (src, dst) = (show(packet.ip.src), show(packet.ip.dst));
            self.text += &format!("  {what:<34} {src} > {dst}: {verdict}{told}\n");
        }
    }

    fn is(self, expected: Expect) {
        expected.assert_eq(&self.text);
    }
}

fn describe(verdict: Verdict) -> String {
    match verdict {
        Verdict::Next => "on".to_owned(),
        Verdict::Stack => "to the stack".to_owned(),
        Verdict::Hop(_, key) => format!("by the hop to {}", show(key.remote)),
        Verdict::Device(ifindex @ 80..88) => format!("by carrick-wg{}", ifindex - 80),
        Verdict::Device(_) => "back by its device".to_owned(),
        Verdict::Ingress(_) => "to the stack by carrick-hop".to_owned(),
        Verdict::Drop => "dropped".to_owned(),
    }
}

fn show(addr: Addr) -> String {
    IpAddr::V6(Ipv6Addr::from(addr.0)).to_canonical().to_string()
}

/// Slot 0, which reaches slot 1 of member 2; slot 1 of its own cluster reaches members 2 and 3.
fn gateway() -> World {
    let mut world = whole(0);
    world.health.insert(2, Reach { via: 0b10, links: 0b10, mtu: 1380, ..Reach::default() });
    world.health.insert(3, Reach { via: 0b10, links: 0, mtu: 0, ..Reach::default() });
    world
}

fn worker() -> World {
    World { config: whole(NO_SLOT).config, homes: whole(NO_SLOT).homes, ..gateway() }
}

const POD: &str = "10.42.0.2";
const POD6: &str = "2001:db8:42::2";
const FAR: &str = "10.44.0.5";
const FAR6: &str = "2001:db8:44::5";

fn ways_out() -> Vec<Row> {
    vec![
        row("a pod to a remote pod", POD, FAR),
        row("the same by IPv6", POD6, FAR6),
        row("another member, by another gateway", POD, "10.45.1.1"),
        row("a member that nobody reaches", POD, "10.46.7.3"),
        row("a range not offered to it", "10.43.0.8", FAR),
        row("a fragment, not the first", POD, FAR)
            .with(|packet| packet.ip.fragment = Some(Fragment { offset: 100, more: false })),
        row("as large as fits", POD, FAR).large(1340),
        row("larger", POD, FAR).large(1341),
        row("larger, and may be fragmented", POD, FAR).large(1341).with(|packet| packet.ip.dont_fragment = false),
        row("segments that fit", POD, FAR).segmented(1340),
        row("segments that do not", POD6, FAR6).segmented(1321),
        row("an endpoint carved out of it", POD, "10.44.9.9"),
        row("our own WireGuard's", "192.0.2.10", FAR).local().udp([WIREGUARD_PORT + 1, 27_473]),
    ]
}

#[test]
fn steer() {
    let mut table = Table::new(Program::Steer);
    let mut rows = ways_out();
    let slot = "fdaa:bbbb:cccc:1::1";
    rows.extend([
        row("nobody's address", POD, "8.8.8.8"),
        row("a probe of this slot to a far one", slot, "fdaa:bbbb:cccc:2::8").local().probe(probe::ASK),
        row("a probe to another slot of ours", slot, "fdaa:bbbb:cccc:1::2").local().probe(probe::ASK),
        row("a probe that a pod made up", slot, "fdaa:bbbb:cccc:2::8").probe(probe::ASK),
        row("a probe to a node", slot, "fdaa:bbbb:cccc:2:8000::1").local().probe(probe::ASK),
        row("what is no probe, to a slot", slot, "fdaa:bbbb:cccc:2::8").local().udp([PROBE_PORT, 53]),
        row("what from_peer gave a key", FAR, "10.42.1.2").from("192.0.2.11"),
        row("not IP", POD, FAR).with(|packet| packet.eth.ethertype = Some(0x0806)),
        row("cut short", POD, FAR).with(|packet| packet.harm = Harm::Cut(40)),
    ]);
    table.node("a gateway", &gateway(), rows);
    table.node("a worker", &worker(), ways_out());
    let mut alone = World { probed: false, ..gateway() };
    alone.health.insert(4095, Reach { via: 0, links: 0b10, mtu: 1380, ..Reach::default() });
    let rows = vec![row("what others reach, too", POD, FAR), row("what nobody else reaches", POD, "10.46.7.3")];
    table.node("a gateway whose prober is away", &alone, rows);
    table.is(expect![[r#"
        a gateway
          a pod to a remote pod              10.42.0.2 > 10.44.0.5: by carrick-wg1
          the same by IPv6                   2001:db8:42::2 > 2001:db8:44::5: by carrick-wg1
          another member, by another gateway 10.42.0.2 > 10.45.1.1: by the hop to 192.0.2.11
          a member that nobody reaches       10.42.0.2 > 10.46.7.3: dropped, no_gateway
          a range not offered to it          10.43.0.8 > 10.44.0.5: dropped, source_not_offered
          a fragment, not the first          10.42.0.2 > 10.44.0.5: by carrick-wg1
          as large as fits                   10.42.0.2 > 10.44.0.5: by carrick-wg1
          larger                             10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          larger, and may be fragmented      10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          segments that fit                  10.42.0.2 > 10.44.0.5: by carrick-wg1
          segments that do not               2001:db8:42::2 > 2001:db8:44::5: to the stack by carrick-hop, ICMP "too big" about it
          an endpoint carved out of it       10.42.0.2 > 10.44.9.9: dropped, not_remote
          our own WireGuard's                192.0.2.10 > 10.44.0.5: dropped, loop
          nobody's address                   10.42.0.2 > 8.8.8.8: dropped, not_remote
          a probe of this slot to a far one  fdaa:bbbb:cccc:1::1 > fdaa:bbbb:cccc:2::8: by carrick-wg7
          a probe to another slot of ours    fdaa:bbbb:cccc:1::1 > fdaa:bbbb:cccc:1::2: by the hop to 192.0.2.11
          a probe that a pod made up         fdaa:bbbb:cccc:1::1 > fdaa:bbbb:cccc:2::8: dropped, not_for_overlay
          a probe to a node                  fdaa:bbbb:cccc:1::1 > fdaa:bbbb:cccc:2:8000::1: dropped, not_for_overlay
          what is no probe, to a slot        fdaa:bbbb:cccc:1::1 > fdaa:bbbb:cccc:2::8: dropped, not_for_overlay
          what from_peer gave a key          10.44.0.5 > 10.42.1.2: on
          not IP                             10.42.0.2 > 10.44.0.5: dropped, not_ip
          cut short                          10.42.0.2 > 10.44.0.5: dropped, truncated
        a worker
          a pod to a remote pod              10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          the same by IPv6                   2001:db8:42::2 > 2001:db8:44::5: by the hop to 192.0.2.11
          another member, by another gateway 10.42.0.2 > 10.45.1.1: by the hop to 192.0.2.11
          a member that nobody reaches       10.42.0.2 > 10.46.7.3: dropped, no_gateway
          a range not offered to it          10.43.0.8 > 10.44.0.5: dropped, source_not_offered
          a fragment, not the first          10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          as large as fits                   10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          larger                             10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          larger, and may be fragmented      10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          segments that fit                  10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          segments that do not               2001:db8:42::2 > 2001:db8:44::5: to the stack by carrick-hop, ICMP "too big" about it
          an endpoint carved out of it       10.42.0.2 > 10.44.9.9: dropped, not_remote
          our own WireGuard's                192.0.2.10 > 10.44.0.5: dropped, loop
        a gateway whose prober is away
          what others reach, too             10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          what nobody else reaches           10.42.0.2 > 10.46.7.3: by carrick-wg1
    "#]]);
}

/// What was found of two addresses is not asked for again, until there is a new version of the tables.
#[test]
fn what_is_known_lasts_for_a_version() {
    type Change = fn(World) -> World;
    let no_own = |world: World| World { own: [].into(), ..world };
    let no_homes = |world: World| World { homes: [].into(), ..world };
    let no_nodes = |world: World| World { nodes: [].into(), ..world };
    let no_remote = |world: World| World { remote: [].into(), ..world };
    let of_a_worker = || row("a worker's pod to a remote pod", "10.42.2.2", FAR).from("192.0.2.12");
    let to_here = || row("a remote pod by a gateway", FAR, POD).from("192.0.2.11");
    let to_other = || row("a remote pod to another node's", FAR, "10.42.1.2");
    let changed: [(Program, Row, Change); 12] = [
        (Program::Steer, row("a pod to a remote pod", POD, FAR), no_own),
        (Program::Steer, row("a pod to a remote pod", POD, FAR), no_remote),
        (Program::FromHop, of_a_worker(), no_own),
        (Program::FromHop, of_a_worker(), no_homes),
        (Program::FromHop, of_a_worker(), no_nodes),
        (Program::FromHop, of_a_worker(), no_remote),
        (Program::FromHop, to_here(), no_homes),
        (Program::FromHop, to_here(), no_nodes),
        (Program::FromHop, to_here(), no_remote),
        (Program::FromPeer, to_other(), no_own),
        (Program::FromPeer, to_other(), no_homes),
        (Program::FromPeer, to_other(), no_remote),
    ];
    for (program, Row { what, packet, context }, change) in changed {
        let mut loaded = Loaded::new(program).expect("the kernel takes the program");
        let passes = |loaded: &mut Loaded| loaded.run(&packet.bytes(), &context).unwrap().returned != DROP;
        loaded.maps.write(&gateway()).unwrap();
        let first = loaded.maps.version().unwrap();
        assert!(passes(&mut loaded), "{what}");
        loaded.maps.write(&change(gateway())).unwrap();
        let second = loaded.maps.version().unwrap();
        assert!(!passes(&mut loaded), "{what}: it was not asked for again");
        loaded.maps.set_version(first).unwrap();
        assert!(passes(&mut loaded), "{what}: it was asked for again");
        loaded.maps.set_version(second).unwrap();
        assert!(!passes(&mut loaded), "{what}: what is not admitted is not to be known");
    }
}

/// A program admits by what it asked itself, of the same node: the same addresses may come from elsewhere.
#[test]
fn what_is_known_of_one_way_is_not_of_another() {
    let mut hop = Loaded::new(Program::FromHop).expect("the kernel takes the program");
    hop.maps.write(&gateway()).unwrap();
    let mut passes = |from: &str| {
        let Row { packet, context, .. } = row("", "10.42.2.2", FAR).from(from);
        hop.run(&packet.bytes(), &context).unwrap().returned != DROP
    };
    assert!(passes("192.0.2.12"));
    assert!(!passes("192.0.2.11"), "another node's");
    assert!(passes("192.0.2.12"));
    assert!(!passes("192.0.2.99"), "nobody's");
}

#[test]
fn steer_native() {
    let mut table = Table::new(Program::SteerNative);
    let mut rows = ways_out();
    rows.extend([
        row("foreign traffic", POD, "8.8.8.8"),
        row("a forged hop packet of a pod", POD, "192.0.2.12").udp([9, HOP_PORT]),
        row("a real one, of this node", "192.0.2.10", "192.0.2.12").local().udp([27_456, HOP_PORT]),
        row("an overlay address", POD6, "fdaa:bbbb:cccc:2::1"),
        row("not IP", POD, FAR).with(|packet| packet.eth.ethertype = Some(0x0806)),
    ]);
    table.node("a gateway", &gateway(), rows);
    table.node("a worker", &worker(), ways_out());
    table.is(expect![[r#"
        a gateway
          a pod to a remote pod              10.42.0.2 > 10.44.0.5: by carrick-wg1
          the same by IPv6                   2001:db8:42::2 > 2001:db8:44::5: by carrick-wg1
          another member, by another gateway 10.42.0.2 > 10.45.1.1: by the hop to 192.0.2.11
          a member that nobody reaches       10.42.0.2 > 10.46.7.3: dropped, no_gateway
          a range not offered to it          10.43.0.8 > 10.44.0.5: dropped, source_not_offered
          a fragment, not the first          10.42.0.2 > 10.44.0.5: by carrick-wg1
          as large as fits                   10.42.0.2 > 10.44.0.5: by carrick-wg1
          larger                             10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          larger, and may be fragmented      10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          segments that fit                  10.42.0.2 > 10.44.0.5: by carrick-wg1
          segments that do not               2001:db8:42::2 > 2001:db8:44::5: to the stack by carrick-hop, ICMP "too big" about it
          an endpoint carved out of it       10.42.0.2 > 10.44.9.9: on
          our own WireGuard's                192.0.2.10 > 10.44.0.5: dropped, loop
          foreign traffic                    10.42.0.2 > 8.8.8.8: on
          a forged hop packet of a pod       10.42.0.2 > 192.0.2.12: dropped, hop_forged
          a real one, of this node           192.0.2.10 > 192.0.2.12: on
          an overlay address                 2001:db8:42::2 > fdaa:bbbb:cccc:2::1: dropped, not_for_overlay
          not IP                             10.42.0.2 > 10.44.0.5: on
        a worker
          a pod to a remote pod              10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          the same by IPv6                   2001:db8:42::2 > 2001:db8:44::5: by the hop to 192.0.2.11
          another member, by another gateway 10.42.0.2 > 10.45.1.1: by the hop to 192.0.2.11
          a member that nobody reaches       10.42.0.2 > 10.46.7.3: dropped, no_gateway
          a range not offered to it          10.43.0.8 > 10.44.0.5: dropped, source_not_offered
          a fragment, not the first          10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          as large as fits                   10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          larger                             10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          larger, and may be fragmented      10.42.0.2 > 10.44.0.5: to the stack by carrick-hop, ICMP "too big" about it
          segments that fit                  10.42.0.2 > 10.44.0.5: by the hop to 192.0.2.11
          segments that do not               2001:db8:42::2 > 2001:db8:44::5: to the stack by carrick-hop, ICMP "too big" about it
          an endpoint carved out of it       10.42.0.2 > 10.44.9.9: on
          our own WireGuard's                192.0.2.10 > 10.44.0.5: dropped, loop
    "#]]);
}

#[test]
fn from_hop() {
    let mut table = Table::new(Program::FromHop);
    let rows = || {
        let ask = ["fdaa:bbbb:cccc:1:8000::12", "fdaa:bbbb:cccc:1::1"];
        vec![
            row("without a key: injected", FAR, POD),
            row("a worker's pod to a remote pod", "10.42.2.2", FAR).from("192.0.2.12"),
            row("with its last TTL", "10.42.2.2", FAR).from("192.0.2.12").with(|packet| packet.ip.ttl = 1),
            row("too large", "10.42.2.2", FAR).from("192.0.2.12").large(1341),
            row("to a member only others reach", "10.42.2.2", "10.45.1.1").from("192.0.2.12"),
            row("a pod of another node", "10.42.1.2", FAR).from("192.0.2.12"),
            row("a remote pod by a gateway", FAR, POD).from("192.0.2.11"),
            row("the same, not for a pod here", FAR, "10.42.2.2").from("192.0.2.11"),
            row("a remote pod by a worker", FAR, POD).from("192.0.2.12"),
            row("a node of another cluster", "10.42.2.2", FAR).from("192.0.2.99"),
            row("a wrong MAC", "10.42.2.2", FAR).from("192.0.2.12").with(|packet| packet.eth.dst = HOP_MAC),
            row("the other secret's MAC", "10.42.2.2", FAR).from("192.0.2.12").with(|packet| packet.eth.dst = MAC[1]),
            row("a probe of a worker", ask[0], ask[1]).from("192.0.2.12").probe(probe::ASK),
            row("an answer", ask[0], ask[1]).from("192.0.2.12").probe(probe::ANSWER),
            row("what is neither", ask[0], ask[1]).from("192.0.2.12").probe(3),
            row("a SYN to an overlay address", ask[0], ask[1]).from("192.0.2.12"),
        ]
    };
    table.node("a gateway", &gateway(), rows());
    table.node("a worker", &worker(), rows());
    table.is(expect![[r#"
        a gateway
          without a key: injected            10.44.0.5 > 10.42.0.2: on
          a worker's pod to a remote pod     10.42.2.2 > 10.44.0.5: by carrick-wg1
          with its last TTL                  10.42.2.2 > 10.44.0.5: to the stack
          too large                          10.42.2.2 > 10.44.0.5: by the hop to 192.0.2.12, ICMP "too big" about it
          to a member only others reach      10.42.2.2 > 10.45.1.1: dropped, no_gateway
          a pod of another node              10.42.1.2 > 10.44.0.5: dropped, hop_foreign_source
          a remote pod by a gateway          10.44.0.5 > 10.42.0.2: to the stack
          the same, not for a pod here       10.44.0.5 > 10.42.2.2: dropped, hop_foreign_source
          a remote pod by a worker           10.44.0.5 > 10.42.0.2: dropped, hop_foreign_source
          a node of another cluster          10.42.2.2 > 10.44.0.5: dropped, hop_unknown_node
          a wrong MAC                        10.42.2.2 > 10.44.0.5: dropped, hop_unauthenticated
          the other secret's MAC             10.42.2.2 > 10.44.0.5: dropped, hop_unauthenticated
          a probe of a worker                fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: by the hop to 192.0.2.12
          an answer                          fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: to the stack
          what is neither                    fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: dropped, malformed_probe
          a SYN to an overlay address        fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: dropped, not_for_overlay
        a worker
          without a key: injected            10.44.0.5 > 10.42.0.2: on
          a worker's pod to a remote pod     10.42.2.2 > 10.44.0.5: dropped, hop_unknown_node
          with its last TTL                  10.42.2.2 > 10.44.0.5: dropped, hop_unknown_node
          too large                          10.42.2.2 > 10.44.0.5: dropped, hop_unknown_node
          to a member only others reach      10.42.2.2 > 10.45.1.1: dropped, hop_unknown_node
          a pod of another node              10.42.1.2 > 10.44.0.5: dropped, hop_unknown_node
          a remote pod by a gateway          10.44.0.5 > 10.42.0.2: to the stack
          the same, not for a pod here       10.44.0.5 > 10.42.2.2: dropped, hop_foreign_source
          a remote pod by a worker           10.44.0.5 > 10.42.0.2: dropped, hop_unknown_node
          a node of another cluster          10.42.2.2 > 10.44.0.5: dropped, hop_unknown_node
          a wrong MAC                        10.42.2.2 > 10.44.0.5: dropped, hop_unauthenticated
          the other secret's MAC             10.42.2.2 > 10.44.0.5: dropped, hop_unauthenticated
          a probe of a worker                fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: dropped, hop_unknown_node
          an answer                          fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: dropped, hop_unknown_node
          what is neither                    fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: dropped, hop_unknown_node
          a SYN to an overlay address        fdaa:bbbb:cccc:1:8000::12 > fdaa:bbbb:cccc:1::1: dropped, hop_unknown_node
    "#]]);
}

#[test]
fn from_peer() {
    let mut table = Table::new(Program::FromPeer);
    let ask = ["fdaa:bbbb:cccc:2::3", "fdaa:bbbb:cccc:1::1"];
    let rows = vec![
        row("to a pod here", FAR, POD),
        row("to a pod of another node", FAR, "10.42.1.2"),
        row("the same by IPv6", FAR6, "2001:db8:42:2::2"),
        row("to a pod of nobody", FAR, "10.42.200.9"),
        row("to another node, with its last TTL", FAR, "10.42.1.2").with(|packet| packet.ip.ttl = 1),
        row("to another node, too large", FAR, "10.42.1.2").large(1381),
        row("to what is not offered", FAR, "10.43.0.8"),
        row("to what is offered to others", "10.45.1.1", "10.42.70.3"),
        row("from no member", "8.8.8.8", POD),
        row("from ourselves", POD, "10.42.1.2"),
        row("an ask", ask[0], ask[1]).probe(probe::ASK),
        row("an answer", ask[0], ask[1]).probe(probe::ANSWER),
        row("a probe from a pod", FAR6, ask[1]).probe(probe::ASK),
        row("a probe to another slot of ours", ask[0], "fdaa:bbbb:cccc:1::2").probe(probe::ASK),
        row("a SYN to an overlay address", ask[0], ask[1]),
        row("from an overlay address to a pod", ask[0], POD6),
    ];
    table.node("a gateway", &gateway(), rows);
    table.is(expect![[r#"
        a gateway
          to a pod here                      10.44.0.5 > 10.42.0.2: to the stack by carrick-hop
          to a pod of another node           10.44.0.5 > 10.42.1.2: by the hop to 192.0.2.11
          the same by IPv6                   2001:db8:44::5 > 2001:db8:42:2::2: by the hop to 2001:db8:f::13
          to a pod of nobody                 10.44.0.5 > 10.42.200.9: dropped, no_home
          to another node, with its last TTL 10.44.0.5 > 10.42.1.2: to the stack by carrick-hop
          to another node, too large         10.44.0.5 > 10.42.1.2: back by its device, ICMP "too big" about it
          to what is not offered             10.44.0.5 > 10.43.0.8: dropped, not_offered
          to what is offered to others       10.45.1.1 > 10.42.70.3: dropped, not_offered
          from no member                     8.8.8.8 > 10.42.0.2: dropped, foreign_source
          from ourselves                     10.42.0.2 > 10.42.1.2: dropped, foreign_source
          an ask                             fdaa:bbbb:cccc:2::3 > fdaa:bbbb:cccc:1::1: back by its device
          an answer                          fdaa:bbbb:cccc:2::3 > fdaa:bbbb:cccc:1::1: to the stack by carrick-hop
          a probe from a pod                 2001:db8:44::5 > fdaa:bbbb:cccc:1::1: dropped, not_for_overlay
          a probe to another slot of ours    fdaa:bbbb:cccc:2::3 > fdaa:bbbb:cccc:1::2: dropped, not_for_overlay
          a SYN to an overlay address        fdaa:bbbb:cccc:2::3 > fdaa:bbbb:cccc:1::1: dropped, not_for_overlay
          from an overlay address to a pod   fdaa:bbbb:cccc:2::3 > 2001:db8:42::2: dropped, not_for_overlay
    "#]]);
}

/// What a SYN offers before and after: the largest segment, and whether the checksum is right.
#[test]
fn to_peer() {
    let mut loaded = Loaded::new(Program::ToPeer).expect("the kernel takes the program");
    loaded.maps.write(&gateway()).expect("the maps can be written");
    let mut text = String::new();
    for (src, dst, headers) in [(POD, FAR, 20), (POD6, FAR6, 40)] {
        for offered in [1460, 1341, 1340, 536] {
            for first in [None, Some(TcpOption::Nop)] {
                let options = first.into_iter().chain([TcpOption::Mss(offered)]).collect();
                let l4 = L4::Tcp { ports: [40_000, 443], flags: SYN, options, payload: 0 };
                let Row { packet, context, .. } = row("", src, dst).with(|packet| packet.l4 = l4);
                let ran = loaded.run(&packet.bytes(), &context).expect("a test run");
                let l3 = &ran.frame[14..];
                let tcp = &l3[headers..];
                let at = 22 + usize::from(first.is_some());
                let mss = u16::from_be_bytes([tcp[at], tcp[at + 1]]);
                let addresses = if headers == 20 { &l3[12..20] } else { &l3[8..40] };
                let (a, b) = addresses.split_at(addresses.len() / 2);
                assert_eq!(pseudo_checksum(a, b, 6, tcp), 0, "{src}: the checksum of {offered}");
                text += &format!("{src}, at {at}: {offered} becomes {mss}\n");
            }
        }
    }
    expect![[r#"
        10.42.0.2, at 22: 1460 becomes 1340
        10.42.0.2, at 23: 1460 becomes 1340
        10.42.0.2, at 22: 1341 becomes 1340
        10.42.0.2, at 23: 1341 becomes 1340
        10.42.0.2, at 22: 1340 becomes 1340
        10.42.0.2, at 23: 1340 becomes 1340
        10.42.0.2, at 22: 536 becomes 536
        10.42.0.2, at 23: 536 becomes 536
        2001:db8:42::2, at 22: 1460 becomes 1320
        2001:db8:42::2, at 23: 1460 becomes 1320
        2001:db8:42::2, at 22: 1341 becomes 1320
        2001:db8:42::2, at 23: 1341 becomes 1320
        2001:db8:42::2, at 22: 1340 becomes 1320
        2001:db8:42::2, at 23: 1340 becomes 1320
        2001:db8:42::2, at 22: 536 becomes 536
        2001:db8:42::2, at 23: 536 becomes 536
    "#]]
    .assert_eq(&text);
}

/// An answer to a right ask is right, as its receiver sees it.
#[test]
fn an_answer_is_received() {
    let mut loaded = Loaded::new(Program::FromPeer).expect("the kernel takes the program");
    let mut world = gateway();
    world.answer = ebpf::Answer { flags: probe::DRAINING, zero: 0, mtu: 1380_u16.to_be_bytes(), members: [0xa5; 512] };
    loaded.maps.write(&world).expect("the maps can be written");
    let ask = ["fdaa:bbbb:cccc:2::3", "fdaa:bbbb:cccc:1::1"];
    let Row { packet, context, .. } = row("", ask[0], ask[1]).probe(probe::ASK);
    let ran = loaded.run(&packet.bytes(), &context).expect("a test run");
    let l3 = &ran.frame[14..];
    assert_eq!(pseudo_checksum(&l3[8..24], &l3[24..40], 17, &l3[40..]), 0);
    assert_eq!((&l3[8..24], &l3[24..40]), (&cases::text(ask[1]).0[..], &cases::text(ask[0]).0[..]));
    let answer = &l3[48..];
    assert_eq!(answer[..8], [b'C', b'R', b'K', b'1', probe::ANSWER, probe::DRAINING, 5, 100]);
    assert_eq!(answer[8..16], 7_u64.to_be_bytes());
    assert!(answer[16..].iter().all(|byte| *byte == 0xa5));

    world.probed = false;
    loaded.maps.write(&world).expect("the maps can be written");
    let ran = loaded.run(&packet.bytes(), &context).expect("a test run");
    let l3 = &ran.frame[14..];
    assert_eq!(pseudo_checksum(&l3[8..24], &l3[24..40], 17, &l3[40..]), 0);
    assert_eq!(l3[48..56], answer[..8]);
    assert!(l3[64..].iter().all(|byte| *byte == 0), "nobody stands behind it");
}
