//! What a pod, a node without the secret, and the gateway of another member send that they should not: each packet is
//! dropped, and counted where it is.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};

use agent::{
    names::{MemberId, NodeName, Ordinal},
    overlay::Overlay,
};
use anyhow::{Context, Result, ensure};
use lab::{
    Cni, Member, Mesh, Node,
    carrick::HOP_PORT,
    traffic::forged::{self, udp, vxlan},
    wait_for,
};
use nix::sys::signal::Signal;

use crate::{
    joined::{PORT, SOON},
    mesh::{Meshed, meshed},
};

/// Of each packet.
const TIMES: u64 = 20;
const PROBE_PORT: u16 = 27455;

/// Overlay addresses as everybody computes them.
fn slot(member: i64, slot: i64) -> Result<Ipv6Addr> {
    let id = MemberId::new(member).context("an id")?;
    Ok(Overlay::new("mesh.internal").slot(id, Ordinal::new(slot).context("a slot")?))
}

fn overlay(member: i64, node: &Node) -> Result<Ipv6Addr> {
    let id = MemberId::new(member).context("an id")?;
    Ok(Overlay::new("mesh.internal").node(id, &NodeName::nearest(node.host.name())))
}

fn to(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    (address.into(), port).into()
}

/// A probe answer that says that no member is reached, or with another magic.
fn answer(magic: &[u8; 4]) -> Vec<u8> {
    let mut answer = vec![0; ebpf::probe::LEN];
    answer[..4].copy_from_slice(magic);
    answer[ebpf::probe::TYPE] = ebpf::probe::ANSWER;
    answer
}

impl Meshed<'_> {
    /// Runs `send` and waits until these nodes together have counted exactly as many packets more.
    fn counted(&self, what: &str, nodes: &[&Node], reason: &str, send: impl FnOnce() -> Result<()>) -> Result<()> {
        let count = || -> Result<u64> {
            let of = |node: &&Node| Ok(self.carrick.status(node)?.dropped(reason));
            nodes.iter().map(of).sum()
        };
        let before = count()?;
        send()?;
        let now = wait_for(&format!("{reason} to count {what}"), SOON, || match count() {
            Ok(now) if now >= before + TIMES => Ok(now),
            other => Err(format!("{before} before, now {other:?}")),
        })?;
        ensure!(now == before + TIMES, "{what}: {reason} counts {}, not {TIMES}", now - before);
        Ok(())
    }
}

/// Packets that the hop's chain has dropped on that node.
fn dropped_by_nft(node: &Node) -> Result<u64> {
    let listing = node.host.output("nft", &["list", "chain", "inet", "carrick", "hop_guard"])?;
    let words: Vec<&str> = listing.split_whitespace().collect();
    Ok(words.windows(2).filter(|pair| pair[0] == "packets").filter_map(|pair| pair[1].parse::<u64>().ok()).sum())
}

#[test]
fn what_is_forged_arrives_nowhere_and_is_counted() {
    meshed(Member::pair_of_three(Cni::Bridge), |meshed| {
        a_pod_forges_the_hop(meshed)?;
        a_pod_forges_sources(meshed)?;
        a_pod_forges_probes(meshed)?;
        a_peer_sends_to_what_it_was_not_offered(meshed)?;
        ensure!(meshed.unreached()?.is_empty(), "{:?}", meshed.unreached()?);
        Ok(())
    });
}

/// The pod's is stopped on its own node, by nft; that of a node, or of any other host of its network, by the gateway.
fn a_pod_forges_the_hop(meshed: &Meshed<'_>) -> Result<()> {
    let (worker, gateway) = (meshed.node("mn", 2)?, meshed.node("mn", 0)?);
    let (pod, victim) = (&worker.pods[0], &gateway.pods[0]);
    let inner = udp(to(meshed.node("va", 2)?.pods[0].ip(), 9), to(victim.ip(), PORT), b"forged")?;
    let receiver = gateway_receiver(gateway)?;
    let send = |host: &lab::Host, node: &Node, source: SocketAddr| {
        let outer = udp(source, to(node.addresses[0], HOP_PORT), &vxlan(0x0012_3456, [2, 0, 0, 0, 0, 9], &inner))?;
        forged::send(host, &outer, TIMES)
    };
    for node in [gateway, worker] {
        let before = dropped_by_nft(worker)?;
        send(&pod.host, node, to(pod.ip(), 27456))?;
        wait_for("nft to count what the pod sent", SOON, || match dropped_by_nft(worker) {
            Ok(now) if now == before + TIMES => Ok(()),
            other => Err(format!("{before} before, now {other:?}")),
        })?;
    }
    meshed.counted("a guessed VNI", &[gateway], "hop_unauthenticated", || {
        send(&worker.host, gateway, to(worker.addresses[0], 27456))
    })?;
    ensure!(receiver.recv(&mut [0; 64]).is_err(), "something arrived");
    Ok(())
}

/// A socket of the pod that a forged packet is for. Nothing waits in it: receiving fails at once.
fn gateway_receiver(node: &Node) -> Result<UdpSocket> {
    let pod = &node.pods[0];
    let socket = pod.host.run(|| UdpSocket::bind(to(pod.ip(), PORT)).context("bind"))?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn a_pod_forges_sources(meshed: &Meshed<'_>) -> Result<()> {
    let worker = meshed.node("mn", 2)?;
    let (gateways, pod) = ([meshed.node("mn", 0)?, meshed.node("mn", 1)?], &worker.pods[0]);
    let far = meshed.node("va", 2)?;
    let receiver = gateway_receiver(far)?;
    let (another, remote) = (meshed.node("mn", 1)?.pods[0].ip(), meshed.node("va", 1)?.pods[0].ip());
    let from = |source: IpAddr| udp(to(source, 9), to(far.pods[0].ip(), PORT), b"forged");
    meshed.counted("another node's pod as source", &gateways, "hop_foreign_source", || {
        forged::send(&pod.host, &from(another)?, TIMES)
    })?;
    meshed.counted("a remote pod as source", &[worker], "source_not_offered", || {
        forged::send(&pod.host, &from(remote)?, TIMES)
    })?;
    ensure!(receiver.recv(&mut [0; 64]).is_err(), "something arrived");
    Ok(())
}

/// To the own node's prober they come like any packet to this node, and it has not asked: the nonce is 64 bits. To all
/// others only a node itself may send.
fn a_pod_forges_probes(meshed: &Meshed<'_>) -> Result<()> {
    let worker = meshed.node("mn", 2)?;
    let (pod, own) = (&worker.pods[0].host, overlay(1, worker)?);
    let claims = answer(b"CRK1");
    let before = meshed.carrick.status(worker)?;
    let lie = udp(to(slot(1, 0)?, PROBE_PORT), to(own, PROBE_PORT), &claims)?;
    forged::send(pod, &lie, TIMES)?;
    let after = wait_for("the prober to count them", SOON, || match meshed.carrick.status(worker) {
        Ok(status) if status.forged_answers >= before.forged_answers + TIMES => Ok(status),
        other => Err(format!("{other:?}")),
    })?;
    ensure!(after.forged_answers == before.forged_answers + TIMES && after.members == before.members, "{after:?}");
    for (what, target) in [("the own gateway", slot(1, 0)?), ("a far one", slot(2, 0)?)] {
        meshed.counted(&format!("a pod's probe answer to {what}"), &[worker], "not_for_overlay", || {
            forged::send(pod, &udp(to(own, PROBE_PORT), to(target, PROBE_PORT), &claims)?, TIMES)
        })?;
    }
    Ok(())
}

/// The gateway of a member whose folder says that it may: WireGuard over there takes what comes, and the programs judge.
fn a_peer_sends_to_what_it_was_not_offered(meshed: &mut Meshed<'_>) -> Result<()> {
    let forged_mesh = meshed.mesh.with_copy(meshed.lab.dir("forged-mesh"))?;
    let va = &meshed.lab.cluster("va")?.member;
    let more: Vec<ipnetwork::IpNetwork> = vec!["192.168.0.0/16".parse()?, "10.99.0.0/16".parse()?];
    let ranges = [va.pod_ranges(), more.clone()].concat();
    let text = std::fs::read_to_string(forged_mesh.folder().join("va-cluster.yaml"))?;
    let (head, _) = text.split_once("  allowedCIDRs:").context("allowedCIDRs")?;
    let allowed = ranges.iter().map(|range| format!("{:?}", range.to_string())).collect::<Vec<_>>().join(", ");
    forged_mesh.write("va-cluster.yaml", &format!("{head}  allowedCIDRs: [{allowed}]\n"))?;
    forged_mesh.write_routes(va, &ranges)?;
    restart_with(meshed, "mn-0", &forged_mesh)?;

    let (gateway, victim) = (meshed.node("mn", 0)?, meshed.node("va", 0)?);
    wait_for("the forged folder to be in the kernel", SOON, || {
        let shown = gateway.host.output("wg", &["show", "carrick-wg0", "allowed-ips"]).map_err(|e| format!("{e:#}"))?;
        if shown.contains("10.99.0.0/16") { Ok(()) } else { Err(shown) }
    })?;
    let (pod, far) = (&gateway.pods[0], &victim.pods[0]);
    let node_port = victim.host.run(|| Ok(UdpSocket::bind(to(victim.addresses[0], 30080))?))?;
    node_port.set_nonblocking(true)?;
    let overlays = [slot(1, 0)?, slot(2, 0)?];
    let (pod6, far6) = (pod.addresses[1], far.addresses[1]);
    let cases = [
        ("a node port", to(pod.ip(), 9), to(victim.addresses[0], 30080), b"forged".to_vec(), "not_offered"),
        (
            "a range that is not offered",
            to(pod.ip(), 9),
            to("10.99.0.1".parse::<IpAddr>()?, 80),
            vec![1],
            "not_offered",
        ),
        ("a pod that is nowhere", to(pod.ip(), 9), to("10.44.77.7".parse::<IpAddr>()?, 80), vec![1], "no_home"),
        ("a pod's to an overlay address", to(pod6, 9), to(overlays[1], 53), vec![1], "not_for_overlay"),
        ("an overlay address's to a pod", to(overlays[0], 9), to(far6, 80), vec![1], "not_for_overlay"),
        ("DNS to an overlay address", to(overlays[0], 9), to(overlays[1], 53), vec![1], "not_for_overlay"),
        (
            "a probe to another slot",
            to(overlays[0], PROBE_PORT),
            to(slot(2, 1)?, PROBE_PORT),
            answer(b"CRK1"),
            "not_for_overlay",
        ),
        (
            "a probe of another kind",
            to(overlays[0], PROBE_PORT),
            to(overlays[1], PROBE_PORT),
            answer(b"CRK9"),
            "malformed_probe",
        ),
    ];
    for (what, from, target, payload, reason) in cases {
        meshed.counted(what, &[victim], reason, || {
            forged::send_out_of(&gateway.host, "carrick-wg0", &udp(from, target, &payload)?, TIMES)
        })?;
    }
    ensure!(node_port.recv(&mut [0; 64]).is_err(), "a peer reached a node port");
    let mesh = meshed.mesh.clone();
    restart_with(meshed, "mn-0", &mesh)?;
    meshed.connected()
}

/// Another agent, which reads those folders.
fn restart_with(meshed: &mut Meshed<'_>, name: &str, mesh: &Mesh) -> Result<()> {
    let (member, node) = meshed.lab.nodes().find(|(_, node)| node.host.name() == name).context("a node")?;
    let running = meshed.running.get_mut(name).context("it runs")?;
    running.agent.signal(Signal::SIGKILL)?;
    running.agent.wait()?;
    running.agent = meshed.carrick.start_agent(member, node, mesh)?;
    meshed.carrick.wait_connected(node, &["va"], SOON)?;
    Ok(())
}
