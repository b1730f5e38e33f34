//! What each network plugin of the lab does, and does not, without Carrick.

use std::{net::IpAddr, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    Cni, Families, Host, Lab, Member, Node, Pod,
    capture::{Capture, Expected, Seen},
    traffic::{http, ping::ping, tcp},
};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::{PORT, answers};

/// Somewhere in the internet.
const OUTSIDE: [&str; 2] = ["192.0.2.1", "2001:db8:ffff::1"];
/// Nobody's.
const FOREIGN: &str = "198.18.0.9";

/// A member of two nodes, the first with two pods, and an address outside.
fn with(cni: Cni, families: Families, test: impl FnOnce(&mut Lab) -> Result<()>) {
    let [mn, _] = Member::pair();
    let member = Member { nodes: 2, cni, families, ..mn };
    let result = Lab::with(cni.word(), &[member], |lab| {
        let guard = lab.guard().clone();
        lab.clusters[0].nodes[0].add_pod(&guard)?;
        lab.internet.ip(&OUTSIDE.map(|ip| format!("addr add {ip} dev lo\n")).concat())?;
        test(lab)
    });
    result.unwrap_or_else(|error| panic!("{cni:?}, {families:?}: {error:?}"));
}

/// Pods and nodes, all that each must reach; and what a pod's client looks like from afar.
#[test]
fn pods_reach_what_their_plugin_gives_them() {
    for cni in Cni::ALL {
        with(cni, Families::Dual, |lab| reach(lab, cni));
    }
}

fn reach(lab: &mut Lab, cni: Cni) -> Result<()> {
    lab.add_pod_at("mn", 1, &["10.42.200.5".parse()?])?;
    let [first, second] = &lab.clusters[0].nodes[..] else { panic!("two nodes") };
    let (pod, beside, afar, outside_ranges) = (&first.pods[0], &first.pods[1], &second.pods[0], &second.pods[1]);
    for family in [0, 1] {
        let expect = |what: &str, from: &Host, to: IpAddr, reached: bool| -> Result<()> {
            ensure!(answers(from, to)? == reached, "{what}, {to}: expected {reached}");
            Ok(())
        };
        expect("pod to pod, same node", &pod.host, beside.addresses[family], true)?;
        expect("pod to pod, other node", &pod.host, afar.addresses[family], true)?;
        expect("pod to pod, other way", &afar.host, pod.addresses[family], true)?;
        expect("pod to its node", &pod.host, first.addresses[family], true)?;
        expect("node to its pod", &first.host, pod.addresses[family], true)?;
        expect("node to node", &first.host, second.addresses[family], true)?;
        expect("node to the internet", &first.host, OUTSIDE[family].parse()?, true)?;
        expect("pod to the internet", &pod.host, OUTSIDE[family].parse()?, cni.masquerades())?;
    }
    ensure!(
        answers(&pod.host, outside_ranges.ip())? && answers(&outside_ranges.host, pod.ip())?,
        "a pod outside ranges"
    );
    for server in [beside, afar, outside_ranges] {
        let seen = page(&pod.host, &server.host, server.ip())?;
        ensure!(seen == pod.ip(), "{} saw {seen}", server.host.name());
    }
    if cni.masquerades() {
        let seen = page(&pod.host, &lab.internet, OUTSIDE[0].parse()?)?;
        ensure!(seen == first.addresses[0], "the internet saw {seen}");
    }
    Ok(())
}

fn page(client: &Host, server: &Host, address: IpAddr) -> Result<IpAddr> {
    let _server = http::Server::start(server, (address, PORT).into())?;
    http::get(client, (address, PORT).into())
}

#[test]
fn families_are_what_they_say() {
    for families in Families::ALL {
        for cni in [Cni::Bridge, Cni::HostRouting, Cni::Fabric] {
            with(cni, families, |lab| {
                let [first, second] = &lab.clusters[0].nodes[..] else { panic!("two nodes") };
                let expected = match families {
                    Families::Dual => [2, 2],
                    Families::V4 => [1, 2],
                    Families::V6Pods => [2, 1],
                    Families::V6Underlay => [1, 2],
                };
                let pods4 = families != Families::V6Pods;
                ensure!(first.addresses.len() == expected[0] && first.pods[0].addresses[0].is_ipv4() == pods4);
                for address in &second.pods[0].addresses {
                    ensure!(answers(&first.pods[0].host, *address)?, "pod to pod, {address}");
                }
                for address in &second.addresses {
                    ensure!(answers(&first.host, *address)?, "node to node, {address}");
                }
                Ok(())
            });
        }
    }
}

/// A rule that leads to another interface is obeyed by every plugin but the one that skips the FIB.
#[test]
fn a_rule_is_obeyed_by_who_asks_the_fib() {
    for cni in Cni::ALL {
        with(cni, Families::Dual, |lab| {
            let node = &lab.clusters[0].nodes[0];
            node.host.ip(&format!(
                "link add decoy type bridge
                 link set decoy up
                 neigh add {FOREIGN} lladdr 02:00:00:00:00:09 dev decoy nud permanent
                 route add {FOREIGN} dev decoy table 7473
                 rule add priority 11 lookup 7473"
            ))?;
            let (decoy, uplink) = (foreign(&node.host, "decoy")?, foreign(&lab.internet, &node.port)?);
            ensure!(ping(&node.pods[0].host, FOREIGN.parse()?, 2)?.none_answered());
            let seen = [decoy.stop()?, uplink.stop()?];
            ensure!(seen.iter().all(|seen| seen.missed == 0), "{seen:?}");
            let left_by = seen.each_ref().map(|seen| seen.clear > 0);
            ensure!(left_by == [cni != Cni::SkipFib, cni == Cni::SkipFib], "{seen:?}");
            Ok(())
        });
    }
}

/// What the two plugins with eBPF host routing forward is not seen by the node's stack, also at full speed.
#[test]
fn host_routing_passes_the_stack_by() {
    for cni in Cni::ALL {
        with(cni, Families::Dual, |lab| {
            let [first, second] = &lab.clusters[0].nodes[..] else { panic!("two nodes") };
            let (from, to) = (&first.pods[0], &second.pods[0]);
            for node in [first, second] {
                node.host
                    .nft("table inet count { chain forward { type filter hook forward priority 0; counter; }; }")?;
            }
            let tcp = tcp::throughput(&from.host, &to.host, (to.ip(), PORT).into(), 1, Duration::from_millis(300))?;
            ensure!(tcp.bytes > 1 << 20, "{tcp:?}");
            for node in [first, second] {
                let listing = node.host.output("nft", &["list", "table", "inet", "count"])?;
                let past = matches!(cni, Cni::HostRouting | Cni::SkipFib);
                ensure!(listing.contains("counter packets 0 ") == past, "{listing}");
            }
            Ok(())
        });
    }
}

/// Counts what has the foreign address on an interface.
fn foreign(host: &Host, interface: &str) -> Result<Capture> {
    let private = vec![FOREIGN.parse()?];
    Capture::start(host, interface, Expected { tunnel: 1..=1, hop: 2, private })
}

/// What a node sends with an address that is not its own arrives, except where the switch looks.
#[test]
fn a_fabric_drops_a_foreign_source() {
    for cni in [Cni::Bridge, Cni::SkipFib, Cni::Fabric] {
        with(cni, Families::Dual, |lab| {
            let node = &lab.clusters[0].nodes[0];
            node.host.ip(&format!("addr add {FOREIGN}/32 dev lo"))?;
            let (sent, arrived) = (foreign(&lab.internet, &node.port)?, foreign(&lab.internet, "site1")?);
            node.host.run(|| {
                let socket = std::net::UdpSocket::bind((FOREIGN, 0))?;
                socket.send_to(&[0], (OUTSIDE[0], PORT))?;
                Ok(())
            })?;
            // What was sent before has arrived when this has.
            ensure!(answers(&node.host, OUTSIDE[0].parse()?)?);
            let [sent, arrived] = [sent.stop()?.clear, arrived.stop()?.clear];
            ensure!(sent > 0 && (arrived > 0) == (cni != Cni::Fabric), "{sent} sent, {arrived} arrived");
            Ok(())
        });
    }
}

#[test]
fn a_strict_node_drops_what_is_invalid_and_what_came_the_wrong_way() {
    for cni in [Cni::Bridge, Cni::Strict] {
        with(cni, Families::Dual, |lab| {
            let [first, second] = &lab.clusters[0].nodes[..] else { panic!("two nodes") };
            let strict = cni == Cni::Strict;
            let (from, to) = (&first.pods[0], &second.pods[0]);
            let seen = unasked_reply(from, to)?;
            ensure!((seen.clear > 0) != strict, "a reply that nobody asked for: {seen:?}");
            ensure!(answers(&from.host, to.ip())?);
            let effective = effective_rp_filter(first)?;
            ensure!(effective.iter().all(|mode| *mode == if strict { 1 } else { 2 }), "{effective:?}");
            // Forwarding for who is neither a pod nor asks for one.
            let gateway = lab.clusters[0].nodes[1].addresses[0];
            lab.internet.ip(&format!("route add {FOREIGN} via {gateway}"))?;
            second.host.ip(&format!("route add {FOREIGN} via {}", first.addresses[0]))?;
            let through = foreign(&lab.internet, &first.port)?;
            ensure!(ping(&lab.internet, FOREIGN.parse()?, 2)?.none_answered());
            let through = through.stop()?;
            ensure!((through.clear > 0) != strict, "forwarded for a stranger: {through:?}");
            Ok(())
        });
    }
}

/// Of each interface the stricter one of its own mode and that of all.
fn effective_rp_filter(node: &Node) -> Result<Vec<u8>> {
    let mode = |name: &str| -> Result<u8> {
        let text = node.host.output("cat", &[&format!("/proc/sys/net/ipv4/conf/{name}/rp_filter")])?;
        text.trim().parse().context("a mode")
    };
    let all = mode("all")?;
    ["eth0", "cni0", "pod0", "pod1"].iter().map(|name| Ok(mode(name)?.max(all))).collect()
}

/// Sends an ICMP echo reply without a request; returns what the other pod's link saw of it.
fn unasked_reply(from: &Pod, to: &Pod) -> Result<Seen> {
    let expected = Expected { tunnel: 1..=1, hop: 2, private: vec![from.ip().into()] };
    let capture = Capture::start(&to.host, "eth0", expected)?;
    // Type 0, code 0, checksum of that and zeroes.
    let packet = [0, 0, 0xff, 0xff, 0, 0, 0, 0];
    let raw = || Ok(socket(AddressFamily::Inet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Icmp)?);
    let socket = std::net::UdpSocket::from(from.host.run(raw)?);
    for _ in 0..3 {
        socket.send_to(&packet, (to.ip(), 0))?;
        std::thread::sleep(Duration::from_millis(20));
    }
    capture.stop()
}
