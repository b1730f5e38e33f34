//! What somebody does to a node by hand, and what the agent makes of it.

use anyhow::ensure;
use lab::{
    Member,
    carrick::{Running, difference, snapshot},
    traffic::udp::Flow,
    wait_for,
};
use nix::sys::signal::Signal;

use crate::joined::{CONNECT_LIMIT, Joined, MILLISECOND, SOON, joined, prepared};

/// Each is undone by an event: the limit is below the timer's 30 s.
const DAMAGE: &[&str] = &[
    "ip -4 route flush table 7473",
    "ip -6 route flush table 7473",
    "ip -4 route flush table 7474",
    "ip -6 route flush table 7474",
    "ip -4 route replace 10.44.0.0/16 dev cni0 table 7473",
    "ip -4 route add 10.44.0.0/16 dev cni0 metric 7 table 7473",
    "ip -4 rule del priority 11 && ip -6 rule del priority 12",
    "ip -4 rule del priority 12 && ip -4 rule add priority 12 lookup 7474",
    "nft delete table inet carrick",
    "nft flush table inet carrick",
    "ip link set carrick-wg0 down",
    "ip link set carrick-wg0 mtu 1300",
    "ip address add 192.0.2.9/32 dev carrick-wg0",
    "ip link del carrick-wg0",
];

/// Not ours, though close to what is.
const FOREIGN: &str = "
    ip -4 rule add priority 11 lookup 7475
    ip -4 rule add priority 13 lookup 7473
    ip -4 route add 10.99.0.0/16 dev cni0 table 7475
    ip -4 route add 10.44.0.0/16 dev cni0 metric 4000
    ip link add carrick-wgx type veth peer name carrick-wg00
    nft add table inet carrick2
    nft add table ip carrick
";

#[test]
fn damage_is_repaired_and_nothing_foreign_is_touched() {
    joined("repair", |joined| {
        joined.shell("mn", &format!("set -e\n{FOREIGN}"))?;
        let before = joined.network("mn")?;
        ensure!(before.iter().any(|line| line.contains("carrick-wg00")), "the foreign link is seen: {before:#?}");
        for damage in DAMAGE {
            joined.shell("mn", damage)?;
            joined.wait_network("mn", &before, damage)?;
            joined.wait_reaches("mn", "va")?;
        }
        Ok(())
    });
}

#[test]
fn cleanup_leaves_what_is_foreign_and_nothing_else() {
    prepared("cleanup", &Member::pair(), |joined| {
        joined.shell("mn", &format!("set -e\n{FOREIGN}"))?;
        let before = joined.network("mn")?;
        joined.start()?;
        joined.connected()?;
        let carrick = joined.carrick.path().display();
        let dry = joined.shell("mn", &format!("{carrick} cleanup --dry-run"))?;
        let Running { agent, .. } = joined.running.remove("mn").expect("it runs");
        agent.terminate()?;
        ensure!(joined.network("mn")? != before, "the dry run removed something, or nothing was ever there");
        let done = joined.carrick.cleanup(joined.node("mn")?)?;
        ensure!(done == dry, "the dry run said\n{dry}and then\n{done}was done");
        ensure!(
            difference(&before, &joined.network("mn")?).is_empty(),
            "left or gone: {:#?}",
            difference(&before, &joined.network("mn")?)
        );
        let again = joined.carrick.cleanup(joined.node("mn")?)?;
        ensure!(again.is_empty(), "a second cleanup found {again}");
        Ok(())
    });
}

#[test]
fn a_restarted_agent_writes_nothing_and_loses_no_packet() {
    joined("restart", |joined| {
        let before = joined.network("mn")?;
        let (from, to) = (&joined.node("va")?.pods[0].host, &joined.node("mn")?.pods[0].host);
        let flow = Flow::start(from, to, joined.pod_address("mn")?, MILLISECOND)?;
        wait_for("an answer", SOON, || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        joined.kill_agent("mn")?;
        let agent = joined.start_agent("mn")?;
        joined.connected()?;
        let report = flow.stop()?;
        ensure!(report.back.lost == 0, "{report:?}");
        ensure!(difference(&before, &joined.network("mn")?).is_empty());
        let log = agent.log()?;
        let restarted = log.rsplit_once("started").expect("it says that it started").1;
        ensure!(!restarted.contains("wg set") && !restarted.contains("ip route"), "it wrote something: {restarted}");
        Ok(())
    });
}

#[test]
fn a_killed_tunnel_is_filled_again_and_nothing_leaves_in_the_clear_meanwhile() {
    joined("tunnel", |joined| {
        let capture = joined.capture("mn")?;
        let (from, to) = (&joined.node("mn")?.pods[0].host, &joined.node("va")?.pods[0].host);
        let flow = Flow::start(from, to, joined.pod_address("va")?, MILLISECOND)?;
        wait_for("an answer", SOON, || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        let Running { tunnel, agent } = joined.running.remove("mn").expect("it runs");
        tunnel.expect("a gateway").kill()?;
        joined.wait_status("mn", "that the tunnel is gone", |status| {
            status["failures"].to_string().contains("`carrick tunnel` does not run") && status["ready"] == false
        })?;
        let tunnel = Some(joined.carrick.start_tunnel(joined.node("mn")?)?);
        joined.running.insert("mn".to_owned(), Running { tunnel, agent });
        joined.carrick.wait_connected(joined.node("mn")?, &["va"], CONNECT_LIMIT)?;
        joined.wait_reaches("mn", "va")?;
        let report = flow.stop()?;
        let seen = capture.stop()?;
        eprintln!("a killed tunnel: {} ms without an answer, {} lost", report.back.longest_gap_ms, report.back.lost);
        ensure!(seen.tunnel > 0 && seen.clear == 0 && seen.missed == 0, "{seen:?}");
        Ok(())
    });
}

/// Both programs are killed; what they left behind goes, and the node is as it was before them.
#[test]
fn cleanup_after_a_crash_leaves_nothing() {
    prepared("crash", &Member::pair(), |joined| {
        let before = snapshot(joined.node("mn")?)?;
        joined.start()?;
        joined.connected()?;
        let Running { tunnel, agent } = joined.running.remove("mn").expect("it runs");
        agent.kill()?;
        tunnel.expect("a gateway").kill()?;
        joined.carrick.cleanup(joined.node("mn")?)?;
        let left = difference(&before, &snapshot(joined.node("mn")?)?);
        ensure!(left.is_empty(), "{left:#?}");
        Ok(())
    });
}

/// The agent is stopped, so that nobody repairs it.
#[test]
fn without_its_device_nothing_leaves_in_the_clear() {
    joined("closed", |joined| {
        joined.running["mn"].agent.signal(Signal::SIGSTOP)?;
        joined.shell("mn", "ip link del carrick-wg0")?;
        let capture = joined.capture("mn")?;
        ensure!(joined.reaches("mn", "va")? == [false, false]);
        let seen = capture.stop()?;
        ensure!(seen.clear == 0 && seen.missed == 0, "{seen:?}");
        joined.running["mn"].agent.signal(Signal::SIGCONT)?;
        joined.wait_reaches("mn", "va")
    });
}

/// The other way round: without Carrick, what the test above looks for is there.
#[test]
fn after_cleanup_packets_do_leave_in_the_clear() {
    joined("open", |joined: &mut Joined<'_>| {
        joined.running.remove("mn").expect("it runs").agent.terminate()?;
        joined.carrick.cleanup(joined.node("mn")?)?;
        let capture = joined.capture("mn")?;
        ensure!(joined.reaches("mn", "va")? == [false, false]);
        let seen = capture.stop()?;
        ensure!(seen.clear > 0, "{seen:?}");
        Ok(())
    });
}
