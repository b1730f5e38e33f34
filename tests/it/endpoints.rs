//! How a pair finds its way: names, several addresses, an endpoint inside a remote range, a NAT that changes its mind.

use anyhow::{Context, Result, ensure};
use lab::{Member, mesh::Gateway, traffic::udp::Flow, wait_for};

use crate::joined::{Joined, MILLISECOND, SOON, joined, prepared};

/// Gives `mn`'s gateway these endpoints.
fn set_endpoints(joined: &Joined<'_>, endpoints: &[&str]) -> Result<()> {
    let keys = joined.node("mn")?.host.dir().join("keys");
    let key =
        joined.shell("mn", &format!("{} keys show --keys-dir {}", joined.carrick.path().display(), keys.display()))?;
    let endpoints = endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect();
    let gateway = Gateway { public_key: key.trim().to_owned(), endpoints };
    joined.mesh.write_cluster(joined.member("mn")?, &[gateway])
}

/// The first name is dead and the second silent; the third answers. `dead` delays neither it nor the agent.
#[test]
fn endpoints_are_tried_in_order_until_one_answers() {
    prepared("names", &Member::pair(), |joined| {
        let address = joined.node("mn")?.addresses[0];
        joined.node("va")?.host.set_hosts(&format!("203.0.113.14 silent.example.net\n{address} gw.example.net"))?;
        set_endpoints(joined, &["dead.invalid:27473", "silent.example.net:27473", "gw.example.net:27473"])?;
        joined.start()?;
        let status = joined.wait_status("va", "which name is dead", |status| {
            status["problems"].to_string().contains("endpoint dead.invalid does not resolve")
        })?;
        ensure!(status["ready"] == true, "a dead name is no failure of this node: {status}");
        joined.connected()?;
        joined.wait_reaches("va", "mn")
    });
}

/// As in clouds whose pods and nodes share a range: the endpoint is inside what the tunnel carries.
#[test]
fn an_endpoint_inside_a_remote_range_does_not_go_through_the_tunnel() {
    let [mn, va] = Member::pair();
    let mn = Member { allowed: vec!["203.0.113.0/28".parse().expect("a range")], ..mn };
    prepared("vpc", &[mn, va], |joined| {
        let member = joined.member("mn")?;
        joined.mesh.write_routes(member, &member.allowed_ranges())?;
        joined.start()?;
        joined.connected()?;
        joined.wait_reaches("va", "mn")?;
        let endpoint = joined.node("mn")?.addresses[0];
        let routes = joined.shell("va", "ip route show table 7473; ip route show table 7474")?;
        let thrown = routes.lines().filter(|line| line.starts_with(&format!("throw {endpoint} ")));
        ensure!(thrown.count() == 2, "a throw route in each table: {routes}");
        let way = joined.shell("va", &format!("ip route get {endpoint}; ip route get 203.0.113.9"))?;
        ensure!(way.contains(&format!("{endpoint} via 192.168.2.1")), "{way}");
        ensure!(way.contains("203.0.113.9 dev carrick-hop table 7473"), "{way}");
        Ok(())
    });
}

/// The name moves on and a restarted agent cannot resolve it, but the pair stays where it is: its packets must not
/// begin to go through the tunnel that they carry.
#[test]
fn an_endpoint_in_use_stays_carved_out() {
    let [mn, va] = Member::pair();
    let mn = Member { allowed: vec!["203.0.113.0/28".parse().expect("a range")], ..mn };
    prepared("moved", &[mn, va], |joined| {
        let member = joined.member("mn")?;
        joined.mesh.write_routes(member, &member.allowed_ranges())?;
        let endpoint = joined.node("mn")?.addresses[0];
        joined.node("va")?.host.set_hosts(&format!("{endpoint} gw.example.net"))?;
        set_endpoints(joined, &["gw.example.net:27473"])?;
        joined.start()?;
        joined.connected()?;
        joined.wait_reaches("va", "mn")?;

        let (from, to) = (&joined.node("va")?.pods[0].host, &joined.node("mn")?.pods[0].host);
        let flow = Flow::start(from, to, joined.pod_address("mn")?, MILLISECOND)?;
        wait_for("an answer", SOON, || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        joined.node("va")?.host.set_hosts("")?;
        joined.kill_agent("va")?;
        let _agent = joined.start_agent("va")?;
        joined.wait_status("va", "that the name is dead", |status| {
            status["problems"].to_string().contains("gw.example.net does not resolve")
        })?;
        let report = flow.stop()?;
        ensure!(report.back.lost == 0, "{report:?}");
        let way = joined.shell("va", &format!("ip route get {endpoint}"))?;
        ensure!(way.contains("via 192.168.2.1"), "{way}");
        Ok(())
    });
}

/// The NAT gives the flow another port; WireGuard follows, and the agent does not drag it back.
#[test]
fn a_peer_that_roams_keeps_its_session() {
    joined("roam", |joined| {
        let (from, to) = (&joined.node("va")?.pods[0].host, &joined.node("mn")?.pods[0].host);
        let flow = Flow::start(from, to, joined.pod_address("mn")?, MILLISECOND)?;
        wait_for("an answer", SOON, || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        let router = joined.lab.cluster("va")?.router.as_ref().context("va has a router")?;
        router.nft("insert rule ip nat postrouting oifname \"wan0\" udp sport 27473 masquerade to :31000-31999")?;
        router.output("conntrack", &["-D", "-p", "udp", "--orig-port-src", "27473"])?;
        let roamed = |status: &serde_json::Value| {
            status["peers"][0]["endpoint"].as_str().is_some_and(|endpoint| endpoint.contains(":31"))
        };
        joined.wait_status("mn", "that its peer has roamed", roamed)?;
        joined.shell("mn", "ip route flush table 7473")?;
        joined.wait_reaches("mn", "va")?;
        let status = joined.status("mn")?;
        ensure!(roamed(&status), "a pass wrote the endpoint: {status}");
        let report = flow.stop()?;
        ensure!(report.back.lost < report.sent / 2, "the pair did not follow: {report:?}");
        Ok(())
    });
}
