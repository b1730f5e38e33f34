//! What happens to a gateway's programs, and what somebody does to a node by hand, while several nodes carry traffic.

use std::{fs, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{Cni, Member, Node, wait_for, watch::sum};
use nix::sys::signal::Signal;

use crate::{
    joined::{CONNECT_LIMIT, SOON},
    mesh::{Meshed, TUNNELS, lost, meshed, stop},
};

#[test]
fn programs_of_a_gateway_that_die_or_hang_are_gone_around() {
    meshed(Member::pair_of_three(Cni::Bridge), |meshed| {
        // Where both die nobody is left to say what is wrong: the gateway's word lapses.
        dies_and_comes_back_later(meshed, "va", 1, true)?;
        dies_and_comes_back_later(meshed, "va", 0, false)?;
        the_tunnel_hangs(meshed, "mn", 1)?;
        both_die_and_come_back_at_once(meshed, "mn", 0)
    });
}

/// The tunnel, and the agent with it or not. Once others know, its return costs nothing.
fn dies_and_comes_back_later(meshed: &mut Meshed<'_>, member: &str, number: usize, agent: bool) -> Result<()> {
    let what = format!("{} of {member}-{number}", if agent { "agent and tunnel" } else { "tunnel" });
    let (flows, stream) = meshed.traffic()?;
    kill(meshed, member, number, agent)?;
    meshed.goes_on(&flows, &stream)?;
    stop(&format!("{what} dead"), flows, stream)?;
    let (flows, stream) = meshed.traffic()?;
    start(meshed, member, number, agent)?;
    meshed.connected()?;
    let reports = stop(&format!("{what} back"), flows, stream)?;
    ensure!(lost(&reports) == 0, "{reports:?}");
    Ok(())
}

/// Its sessions stand only once the other side notices, after 15 s: traffic does not wait for that.
fn both_die_and_come_back_at_once(meshed: &mut Meshed<'_>, member: &str, number: usize) -> Result<()> {
    let (flows, stream) = meshed.traffic()?;
    kill(meshed, member, number, true)?;
    start(meshed, member, number, true)?;
    meshed.goes_on(&flows, &stream)?;
    stop(&format!("agent and tunnel of {member}-{number} killed and started"), flows, stream)?;
    meshed.connected()
}

fn the_tunnel_hangs(meshed: &mut Meshed<'_>, member: &str, number: usize) -> Result<()> {
    let name = format!("{member}-{number}");
    let (flows, stream) = meshed.traffic()?;
    meshed.running[&name].tunnel()?.signal(Signal::SIGSTOP)?;
    meshed.goes_on(&flows, &stream)?;
    stop(&format!("tunnel of {name} stopped"), flows, stream)?;
    let (flows, stream) = meshed.traffic()?;
    sleep(Duration::from_secs(4));
    meshed.running[&name].tunnel()?.signal(Signal::SIGCONT)?;
    meshed.connected()?;
    let reports = stop("and continued", flows, stream)?;
    ensure!(lost(&reports) == 0, "{reports:?}");
    Ok(())
}

/// Kills the tunnel of a gateway, and its agent.
fn kill(meshed: &mut Meshed<'_>, member: &str, number: usize, agent: bool) -> Result<()> {
    let running = meshed.running.get_mut(&format!("{member}-{number}")).context("it runs")?;
    running.tunnel()?.signal(Signal::SIGKILL)?;
    if agent {
        running.agent.signal(Signal::SIGKILL)?;
        running.agent.wait()?;
    }
    running.tunnel.take().context("a gateway")?.wait()?;
    Ok(())
}

fn start(meshed: &mut Meshed<'_>, member: &str, number: usize, agent: bool) -> Result<()> {
    let node = meshed.node(member, number)?;
    let tunnel = meshed.carrick.start_tunnel(node)?;
    let agent =
        if agent { Some(meshed.carrick.start_agent(meshed.lab.member_of(node)?, node, &meshed.mesh)?) } else { None };
    let running = meshed.running.get_mut(&format!("{member}-{number}")).context("it runs")?;
    running.tunnel = Some(tunnel);
    if let Some(agent) = agent {
        running.agent = agent;
    }
    Ok(())
}

/// Where something is done.
const WORKER: (&str, usize) = ("va", 2);
const GATEWAY: (&str, usize) = ("mn", 1);
const BOTH: &[(&str, usize)] = &[WORKER, GATEWAY];

const ROUTES: &str =
    "for family in 4 6; do ip -$family route flush table 7473; ip -$family route flush table 7474; done";
const RULES: &str = "for family in 4 6; do ip -$family rule del priority 11; ip -$family rule del priority 12; done";

/// Costs no packet of those that pass: connections keep their mapping, and gateways forward past the stack.
const FREE: &[(&str, &[(&str, usize)])] = &[
    (ROUTES, &[GATEWAY]),
    (RULES, &[GATEWAY]),
    ("lab=$(nft -s list table inet flannel); nft flush ruleset; echo \"$lab\" | nft -f -", BOTH),
    ("for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 1 > $file; done", BOTH),
];

/// Costs what passes until it is repaired, or gone around.
const DEAR: &[(&str, &[(&str, usize)])] = &[
    (ROUTES, &[WORKER]),
    (RULES, &[WORKER]),
    ("for family in 4 6; do ip -$family rule flush; ip -$family rule add lookup main priority 32766; done", BOTH),
    // The kernel drops a packet whose new entry is flushed before it is confirmed.
    ("conntrack -F", BOTH),
    ("ip link del carrick-hop", BOTH),
    ("ip link del carrick-wg1", &[GATEWAY]),
    ("for link in /sys/fs/bpf/carrick/v*/links/*; do bpftool link detach pinned $link; done", BOTH),
    ("rm -r /sys/fs/bpf/carrick", BOTH),
];

#[test]
fn damage_under_traffic_is_repaired_and_nothing_leaves_in_the_clear() {
    meshed(Member::pair_of_three(Cni::Bridge), |meshed| {
        let watch = meshed.lab.watch()?;
        let free = FREE.iter().map(|damage| (damage, true));
        for ((damage, nodes), free) in free.chain(DEAR.iter().map(|damage| (damage, false))) {
            for (member, number) in *nodes {
                let node = meshed.node(member, *number)?;
                let what = format!("{}: {damage}", node.host.name());
                let (flows, stream) = meshed.traffic()?;
                node.host.output("sh", &["-c", damage])?;
                meshed.goes_on(&flows, &stream)?;
                wait_for("its repair", SOON, || match meshed.carrick.status(node) {
                    Ok(status) if status.ready && status.connected => Ok(()),
                    other => Err(format!("{other:?}")),
                })?;
                let reports = stop(&what, flows, stream)?;
                // What ends on the gateway itself goes by its stack.
                let through: Vec<_> = (0..).zip(&reports).filter(|(n, _)| *member == WORKER.0 || n != number).collect();
                ensure!(!free || through.iter().all(|(_, report)| report.back.lost == 0), "{what}: {reports:?}");
                meshed.connected()?;
            }
        }
        let seen = watch.stop()?;
        ensure!(sum(&seen).clear == 0 && sum(&seen).missed == 0, "{seen:#?}");
        Ok(())
    });
}

/// Go on to the next program, or pass without the others, as tcx says it.
const NEXT: i32 = -1;
const PASS: i32 = 0;

/// Programs of somebody else that see packets before and after ours, or keep them from ours. Those stay, behind ours.
#[test]
fn foreign_programs_take_nothing_away() {
    meshed(Member::pair_of_three(Cni::Bridge), |meshed| {
        let watch = meshed.lab.watch()?;
        for (member, number) in BOTH {
            let node = meshed.node(member, *number)?;
            for (link, egress) in [("carrick-hop", true), ("carrick-hop", false), ("eth0", true)] {
                let (flows, stream) = meshed.traffic()?;
                node.host.attach_foreign(link, egress, true, NEXT)?;
                node.host.attach_foreign(link, egress, false, NEXT)?;
                meshed.goes_on(&flows, &stream)?;
                let reports = stop(&format!("programs around ours at {link} of {member}-{number}"), flows, stream)?;
                ensure!(lost(&reports) == 0, "{reports:?}");

                let (flows, stream) = meshed.traffic()?;
                node.host.attach_foreign(link, egress, true, PASS)?;
                // On the hop nothing passes without ours.
                meshed.goes_on(&flows, &stream)?;
                let what = format!("a program that keeps all from ours at {link} of {member}-{number}");
                let reports = stop(&what, flows, stream)?;
                ensure!(
                    link == "eth0" || (member, number) != (&WORKER.0, &WORKER.1) || lost(&reports) > 0,
                    "{what}: it kept nothing"
                );
            }
            meshed.connected()?;
        }
        let seen = watch.stop()?;
        ensure!(sum(&seen).clear == 0 && sum(&seen).missed == 0, "{seen:#?}");
        Ok(())
    });
}

/// What one link between gateways loses is gone around once it is known.
#[test]
fn a_link_that_loses_one_way_or_half_is_left() {
    meshed(Member::pair_of_three(Cni::Bridge), |meshed| {
        for (from, to, percent) in [("va", "mn", 100), ("mn", "va", 100), ("va", "mn", 50)] {
            let (flows, stream) = meshed.traffic()?;
            let fault = meshed.lab.drop_packets(meshed.node(from, 1)?, meshed.node(to, 1)?, &TUNNELS, percent)?;
            meshed.goes_on(&flows, &stream)?;
            let ends = [meshed.node("va", 1)?, meshed.node("mn", 1)?];
            wait_for("both ends to leave the link", CONNECT_LIMIT, || {
                let links = ends.map(|node| meshed.carrick.status(node).map(|status| status.members[0].links.clone()));
                let left = links.iter().all(|links| links.as_ref().is_ok_and(|links| *links == [0]));
                if left { Ok(()) } else { Err(format!("{links:?}")) }
            })?;
            stop(&format!("{percent} % lost from {from}-1 to {to}-1"), flows, stream)?;
            if percent == 100 {
                let (flows, stream) = meshed.traffic()?;
                let reports = stop("once that is known", flows, stream)?;
                ensure!(lost(&reports) == 0, "{reports:?}");
            }
            fault.mend()?;
            let all = |node: &Node| Ok::<_, anyhow::Error>(meshed.carrick.status(node)?.members[0].links.len() == 2);
            wait_for("the link to be taken again", CONNECT_LIMIT, || match (all(ends[0]), all(ends[1])) {
                (Ok(true), Ok(true)) => Ok(()),
                other => Err(format!("{other:?}")),
            })?;
        }
        Ok(())
    });
}

/// Routes of nobody's business, as a routing daemon writes them by the thousand.
#[test]
fn a_storm_of_route_events_costs_nothing() {
    meshed(Member::pair_of_three(Cni::Bridge), |meshed| {
        let node = meshed.node("va", 2)?;
        let agent = meshed.running["va-2"].agent.pid().context("it runs")?;
        let (flows, stream) = meshed.traffic()?;
        let before = resident(agent)?;
        let routes = |what: &str| -> String {
            (0..50_000)
                .map(|n| format!("route {what} 100.{}.{}.0/24 dev eth0 table 9999\n", 64 + n / 256 % 64, n % 256))
                .collect()
        };
        for _ in 0..3 {
            // There are 16384 different ones.
            node.host.ip(&routes("replace"))?;
            node.host.ip("route flush table 9999")?;
        }
        let va = meshed.lab.member_of(node)?;
        meshed.mesh.write_routes(va, &va.pod_ranges()[..1])?;
        wait_for("a change of the folder to be taken over", SOON, || {
            let other = meshed.node("mn", 2).map_err(|error| format!("{error:#}"))?;
            let shown = other.host.output("ip", &["-6", "route", "show", "table", "7473"]);
            let shown = shown.map_err(|error| format!("{error:#}"))?;
            if shown.contains("fd00:10:2::/48") { Err(shown) } else { Ok(()) }
        })?;
        let grown = resident(agent)?.saturating_sub(before);
        eprintln!("a storm of 150,000 route events: the agent grew by {} KiB", grown);
        ensure!(grown < 20 << 10, "the agent grew by {grown} KiB");
        let reports = stop("a storm of route events", flows, stream)?;
        ensure!(lost(&reports) == 0, "{reports:?}");
        Ok(())
    });
}

/// KiB of memory.
fn resident(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
