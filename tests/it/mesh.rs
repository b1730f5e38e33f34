//! Members of three nodes, two of them gateways, under every network plugin: who reaches whom, what carries it, and what
//! each fault costs.

use std::{collections::BTreeMap, net::IpAddr, thread::sleep, time::Duration};

use anyhow::{Context, Result, bail, ensure};
use lab::{
    Carrick, Cni, Families, Lab, Member, Mesh, Node,
    carrick::{DEVICES, Running, TUNNEL_PORT},
    faults::{Fault, Traffic},
    traffic::{
        http,
        path::told_mtu,
        ping::ping,
        stream::Stream,
        udp::{Flow, Report},
    },
    wait_for,
    watch::sum,
};
use nix::sys::signal::Signal;

use crate::joined::{CONNECT_LIMIT, PORT, SOON, carrick};

/// Makes a test of each function, in the network plugin that is its module.
macro_rules! under {
    ($plugin:ident, $cni:expr, $($test:ident,)*) => {
        mod $plugin {
            $(#[test]
            fn $test() {
                super::meshed(super::Member::pair_of_three($cni), super::$test);
            })*
        }
    };
}

under! {
    bridge, super::Cni::Bridge,
    every_pod_reaches_every_remote_pod_with_its_own_address,
    each_router_on_the_way_says_where_a_ttl_ran_out,
    both_gateways_carry_traffic_and_workers_none,
    a_gateway_that_goes_off_is_replaced_and_comes_back,
    a_cut_link_is_gone_around,
    a_drained_gateway_loses_nothing,
    agents_that_restart_or_hang_lose_nothing,
    without_tunnels_nothing_leaves_in_the_clear,
    a_narrow_underlay_swallows_no_stream,
    a_pod_outside_the_ranges_of_nodes_is_found,
}
under! { host_routing, super::Cni::HostRouting, every_fault_in_turn, }
under! { skip_fib, super::Cni::SkipFib, every_fault_in_turn, }
under! { fabric, super::Cni::Fabric, every_fault_in_turn, }
under! { strict, super::Cni::Strict, every_fault_in_turn, }

/// What the bridge has a lab each for, in one lab, each fault once. Gateways of `va`: they dial, so they are back at once.
fn every_fault_in_turn(meshed: &mut Meshed<'_>) -> Result<()> {
    every_pod_reaches_every_remote_pod_with_its_own_address(meshed)?;
    both_gateways_carry_traffic_and_workers_none(meshed)?;
    a_pod_outside_the_ranges_of_nodes_is_found(meshed)?;
    let watch = meshed.lab.watch()?;
    agents_that_restart_or_hang_lose_nothing(meshed)?;
    drained(meshed, "va-1")?;
    cut(meshed, 0, 0, 0)?.into_iter().try_for_each(Fault::mend)?;
    meshed.connected()?;
    off_and_back(meshed, "va-0")?;
    let seen = sum(&watch.stop()?);
    ensure!(seen.clear == 0 && seen.missed == 0, "{seen:?}");
    // The last: it leaves nothing that runs.
    without_tunnels_nothing_leaves_in_the_clear(meshed)
}

/// What passes between gateways.
pub(crate) const TUNNELS: Traffic = Traffic::Udp(TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1);

/// Every node's programs run.
pub(crate) struct Meshed<'a> {
    pub(crate) lab: &'a mut Lab,
    pub(crate) carrick: Carrick,
    pub(crate) mesh: Mesh,
    /// By node.
    pub(crate) running: BTreeMap<String, Running>,
}

pub(crate) fn meshed(members: [Member; 2], test: impl FnOnce(&mut Meshed<'_>) -> Result<()>) {
    let name = format!("mesh-{}", members[0].cni.word());
    let result = Lab::with(&name, &members, |lab| {
        let carrick = carrick()?;
        let mesh = carrick.write_mesh(lab)?;
        let mut meshed = Meshed { lab, carrick, mesh, running: BTreeMap::new() };
        for (member, node) in meshed.lab.nodes() {
            let running = meshed.carrick.start(member, node, &meshed.mesh)?;
            meshed.running.insert(node.host.name().to_owned(), running);
        }
        meshed.connected()?;
        test(&mut meshed)
    });
    result.unwrap_or_else(|error| panic!("{members:?}: {error:?}"));
}

impl Meshed<'_> {
    pub(crate) fn node(&self, member: &str, number: usize) -> Result<&Node> {
        self.lab.cluster(member)?.nodes.get(number).with_context(|| format!("node {number} of {member}"))
    }

    fn named(&self, name: &str) -> Result<&Node> {
        let found = self.lab.nodes().find(|(_, node)| node.host.name() == name);
        Ok(found.with_context(|| format!("no node {name}"))?.1)
    }

    /// A gateway whose programs ended, until everything is as before.
    fn start_again(&mut self, name: &str) -> Result<()> {
        self.running.get_mut(name).map_or(Ok(()), Running::wait_gone)?;
        let node = self.named(name)?;
        let running = self.carrick.start(self.lab.member_of(node)?, node, &self.mesh)?;
        self.running.insert(name.to_owned(), running);
        self.connected()
    }

    pub(crate) fn connected(&self) -> Result<()> {
        self.carrick.wait_whole(&self.lab.clusters)?;
        wait_for("every pod to reach every remote pod", SOON, || match self.unreached() {
            Ok(unreached) if unreached.is_empty() => Ok(()),
            Ok(unreached) => Err(unreached.join(", ")),
            Err(error) => Err(format!("{error:#}")),
        })
    }

    /// Who does not reach whom, of the first pods of all nodes, both ways and in every family.
    pub(crate) fn unreached(&self) -> Result<Vec<String>> {
        let mut unreached = Vec::new();
        for (member, node) in self.lab.nodes() {
            let remote = self.lab.nodes().filter(|(other, _)| other.name != member.name);
            for address in remote.flat_map(|(_, node)| &node.pods[0].addresses) {
                if !ping(&node.pods[0].host, *address, 1)?.all_answered() {
                    unreached.push(format!("{} to {address}", node.host.name()));
                }
            }
        }
        Ok(unreached)
    }

    /// 1 kHz UDP from a worker's pod to one of each remote node, and one stream between workers; all of them run.
    pub(crate) fn traffic(&self) -> Result<(Vec<Flow>, Stream)> {
        let from = &self.node("va", 2)?.pods[0];
        let flows = (0..3).map(|n| Flow::between(from, &self.node("mn", n)?.pods[0])).collect::<Result<Vec<_>>>()?;
        let stream = Stream::between(from, &self.node("mn", 2)?.pods[0])?;
        self.goes_on(&flows, &stream)?;
        Ok((flows, stream))
    }

    /// Waits until each has gone on for half a second's worth.
    pub(crate) fn goes_on(&self, flows: &[Flow], stream: &Stream) -> Result<()> {
        let now = || (flows.iter().map(Flow::answered).collect::<Vec<_>>(), stream.arrived());
        let (before, arrived) = now();
        wait_for("traffic to go on", CONNECT_LIMIT, || {
            let (flows, bytes) = now();
            let on = flows.iter().zip(&before).all(|(now, before)| *now > before + 500) && bytes > arrived;
            if on { Ok(()) } else { Err(format!("from {before:?}, {arrived} to {flows:?}, {bytes}")) }
        })
    }

    /// Waits until what the workers' pods are told of the path to each other, with their addresses of these families, is this.
    fn is_told(&self, mtu: u16, families: &[&str]) -> Result<()> {
        let (va, mn) = (&self.node("va", 2)?.pods[0], &self.node("mn", 2)?.pods[0]);
        for (from, to) in [(va, mn), (mn, va)] {
            for address in to.addresses.iter().filter(|address| is_of(**address, families)) {
                wait_for(&format!("{} to be told {mtu}", from.host.name()), SOON, || {
                    match told_mtu(&from.host, &to.host, *address) {
                        Ok(told) if told == mtu => Ok(()),
                        Ok(told) => Err(format!("{told} to {address}")),
                        Err(error) => Err(format!("{error:#}")),
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Whether a gateway says so of the way from `va` to `mn`.
    fn is_too_narrow_for_ipv6(&self) -> Result<bool> {
        let gateways = self.lab.cluster("va")?.gateways();
        let said = gateways.map(|(node, _)| Ok(self.carrick.status(node)?.problems)).collect::<Result<Vec<_>>>()?;
        Ok(said.iter().flatten().any(|problem| problem.starts_with("the way to mn carries less than the 1280 bytes")))
    }

    /// One after the other, as a rollout does.
    fn restart_agents(&mut self) -> Result<()> {
        for (member, node) in self.lab.nodes() {
            let running = self.running.get_mut(node.host.name()).context("it runs")?;
            running.agent.signal(Signal::SIGKILL)?;
            running.agent.wait()?;
            running.agent = self.carrick.start_agent(member, node, &self.mesh)?;
            let other = if member.name == "mn" { "va" } else { "mn" };
            self.carrick.wait_connected(node, &[other], CONNECT_LIMIT)?;
        }
        Ok(())
    }
}

/// Ends the traffic; says what it cost.
pub(crate) fn stop(what: &str, flows: Vec<Flow>, stream: Stream) -> Result<Vec<Report>> {
    let reports = flows.into_iter().map(Flow::stop).collect::<Result<Vec<_>>>()?;
    let stream = stream.stop();
    for report in &reports {
        eprintln!("{what}: {} of {} lost, gap {} ms", report.back.lost, report.sent, report.back.longest_gap_ms);
    }
    eprintln!("{what}: {} bytes of TCP, stall {} ms", stream.bytes, stream.longest_stall_ms);
    ensure!(stream.survived(), "{what}: {stream:?}");
    Ok(reports)
}

pub(crate) fn lost(reports: &[Report]) -> u64 {
    reports.iter().map(|report| report.back.lost).sum()
}

fn every_pod_reaches_every_remote_pod_with_its_own_address(meshed: &mut Meshed<'_>) -> Result<()> {
    for (member, node) in meshed.lab.nodes() {
        let client = &node.pods[0];
        for (_, remote) in meshed.lab.nodes().filter(|(other, _)| other.name != member.name) {
            let server = &remote.pods[0];
            for address in &server.addresses {
                let _server = http::Server::start(&server.host, (*address, PORT).into())?;
                let seen = http::get(&client.host, (*address, PORT).into())?;
                ensure!(client.addresses.contains(&seen), "{address} saw {seen}, not {:?}", client.addresses);
            }
        }
    }
    Ok(())
}

/// From a worker's pod to a remote worker's: their nodes, and a gateway of each.
fn each_router_on_the_way_says_where_a_ttl_ran_out(meshed: &mut Meshed<'_>) -> Result<()> {
    let (from, to) = (&meshed.node("mn", 2)?.pods[0], &meshed.node("va", 2)?.pods[0]);
    for address in &to.addresses {
        let who_says = |ttl: u8| {
            // An answer from a router is a failure to ping.
            let command = format!("ping -n -c 1 -W 1 -t {ttl} {address} || true");
            let said = from.host.output("sh", &["-c", &command])?;
            let router = said.split_whitespace().skip_while(|word| *word != "From").nth(1);
            let Some(router) = router.filter(|_| said.contains("exceeded")) else { return Ok(said) };
            for (_, node) in meshed.lab.nodes() {
                let here = node.host.output("ip", &["-o", "address"])?;
                if here.split_whitespace().any(|word| word.split_once('/').is_some_and(|(own, _)| own == router)) {
                    return Ok(node.host.name().to_owned());
                }
            }
            Ok(router.to_owned())
        };
        let way = (1..=4).map(who_says).collect::<Result<Vec<_>>>()?;
        let [own, near, far, remote] = way.as_slice() else { bail!("{way:?}") };
        let right = own == "mn-2" && near.starts_with("mn-") && far.starts_with("va-") && remote == "va-2";
        ensure!(right && near != own && far != remote, "the way to {address}: {way:?}");
        ensure!(who_says(5)?.contains("bytes from"), "{address} is not behind the fourth router");
    }
    Ok(())
}

/// A gateway takes itself first: so the pods of both give each something to carry.
fn both_gateways_carry_traffic_and_workers_none(meshed: &mut Meshed<'_>) -> Result<()> {
    let watch = meshed.lab.watch()?;
    let mut flows = Vec::new();
    for from in 0..3 {
        let (from, to) = (&meshed.node("mn", from)?.pods[0], &meshed.node("va", 2 - from)?.pods[0]);
        flows.push(Flow::between(from, to)?);
    }
    sleep(Duration::from_secs(1));
    // Every pair of pods is a flow of its own, and in each protocol another.
    let unreached = meshed.unreached()?;
    let reports = flows.into_iter().map(Flow::stop).collect::<Result<Vec<_>>>()?;
    ensure!(lost(&reports) == 0 && unreached.is_empty(), "{reports:?}, {unreached:?}");
    let seen = watch.stop()?;
    for (member, node) in meshed.lab.nodes() {
        let name = format!("{} of {}", node.host.name(), member.name);
        let (seen, status) = (&seen[node.host.name()], meshed.carrick.status(node)?);
        ensure!(seen.clear == 0 && seen.missed == 0, "{name}: {seen:?}");
        let ways = match node.slot {
            Some(_) => ["carrick-wg0", "carrick-wg1", "from peers"].map(|way| status.sent_by(way)).to_vec(),
            None => ["slot 0", "slot 1"].map(|way| status.sent_by(way)).to_vec(),
        };
        ensure!(ways.iter().all(|packets| *packets > 0), "{name}: {:?}", status.sent);
        ensure!((seen.tunnel > 0) == node.slot.is_some(), "{name}: {seen:?}");
        let plugin = if member.cni == Cni::SkipFib { "native" } else { "routes" };
        ensure!(status.network_plugin == plugin, "{name}: the network plugin is {}", status.network_plugin);
    }
    Ok(())
}

fn a_gateway_that_goes_off_is_replaced_and_comes_back(meshed: &mut Meshed<'_>) -> Result<()> {
    let watch = meshed.lab.watch()?;
    ["mn-1", "va-0", "mn-0"].into_iter().try_for_each(|name| off_and_back(meshed, name))?;
    let seen = sum(&watch.stop()?);
    ensure!(seen.clear == 0 && seen.missed == 0, "{seen:?}");
    Ok(())
}

fn off_and_back(meshed: &mut Meshed<'_>, name: &str) -> Result<()> {
    let from = &meshed.node("va", 2)?.pods[0];
    let to = &meshed.node("mn", 2)?.pods[0];
    let (flows, stream) = (vec![Flow::between(from, to)?, Flow::between(to, from)?], Stream::between(from, to)?);
    meshed.goes_on(&flows, &stream)?;
    let node = meshed.named(name)?;
    meshed.lab.power_off(node)?;
    meshed.goes_on(&flows, &stream)?;
    stop(&format!("{name} off"), flows, stream)?;
    meshed.lab.power_on(node)?;
    meshed.start_again(name)
}

/// Every link between two gateways, one after the other; then all but one.
fn a_cut_link_is_gone_around(meshed: &mut Meshed<'_>) -> Result<()> {
    let mut cuts = Vec::new();
    for (ours, theirs) in [(0, 0), (0, 1), (1, 0)] {
        cuts.extend(cut(meshed, ours, theirs, cuts.len())?);
    }
    ensure!(meshed.unreached()?.is_empty(), "one link is left: {:?}", meshed.unreached()?);
    cuts.into_iter().try_for_each(Fault::mend)?;
    meshed.connected()?;
    // One way: the pair is as good as cut.
    let (flows, stream) = meshed.traffic()?;
    let one_way = meshed.lab.drop_packets(meshed.node("va", 1)?, meshed.node("mn", 1)?, &TUNNELS, 100)?;
    let half = meshed.lab.drop_packets(meshed.node("va", 0)?, meshed.node("mn", 0)?, &TUNNELS, 50)?;
    meshed.goes_on(&flows, &stream)?;
    stop("one link one way, one with half of the packets lost", flows, stream)?;
    half.mend()?;
    one_way.mend()
}

/// Cuts the link between a gateway of `mn` and one of `va` under traffic, beside so many ways that are cut already.
fn cut<'a>(meshed: &'a Meshed<'_>, ours: usize, theirs: usize, before: usize) -> Result<[Fault<'a>; 2]> {
    let (flows, stream) = meshed.traffic()?;
    let cut = meshed.lab.cut(meshed.node("mn", ours)?, meshed.node("va", theirs)?, &TUNNELS)?;
    meshed.goes_on(&flows, &stream)?;
    stop(&format!("link of mn-{ours} and va-{theirs} cut, beside {before} ways cut before"), flows, stream)?;
    Ok(cut)
}

fn a_drained_gateway_loses_nothing(meshed: &mut Meshed<'_>) -> Result<()> {
    ["mn-0", "va-1"].into_iter().try_for_each(|name| drained(meshed, name))
}

fn drained(meshed: &mut Meshed<'_>, name: &str) -> Result<()> {
    let (flows, stream) = meshed.traffic()?;
    let node = meshed.named(name)?;
    let (of_mn, number) = (name.starts_with("mn"), usize::from(node.number));
    meshed.carrick.drain(node)?;
    meshed.running.remove(name).context("it runs")?.terminate()?;
    meshed.goes_on(&flows, &stream)?;
    let reports = stop(&format!("{name} drained"), flows, stream)?;
    // What lives on the gateway itself still goes through it: only the others are promised.
    let promised: Vec<_> = reports.into_iter().enumerate().filter(|(n, _)| *n != number || !of_mn).collect();
    ensure!(promised.iter().all(|(_, report)| report.back.lost == 0), "{promised:?}");
    meshed.start_again(name)
}

fn agents_that_restart_or_hang_lose_nothing(meshed: &mut Meshed<'_>) -> Result<()> {
    let (flows, stream) = meshed.traffic()?;
    meshed.restart_agents()?;
    meshed.connected()?;
    meshed.goes_on(&flows, &stream)?;
    let signal = |signal| meshed.running.values().try_for_each(|running| running.agent.signal(signal));
    signal(Signal::SIGSTOP)?;
    sleep(Duration::from_secs(3));
    meshed.goes_on(&flows, &stream)?;
    signal(Signal::SIGCONT)?;
    sleep(Duration::from_secs(3));
    let reports = stop("agents restarted, then stopped for 3 s", flows, stream)?;
    ensure!(lost(&reports) == 0, "{reports:?}");
    Ok(())
}

/// The links first, then the tunnels; nobody repairs them. Without Carrick, what is looked for is there.
fn without_tunnels_nothing_leaves_in_the_clear(meshed: &mut Meshed<'_>) -> Result<()> {
    let watch = meshed.lab.watch()?;
    let (flows, stream) = meshed.traffic()?;
    for (ours, theirs) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        // Never mended.
        let _cut = meshed.lab.cut(meshed.node("mn", ours)?, meshed.node("va", theirs)?, &TUNNELS)?;
    }
    sleep(Duration::from_secs(3));
    for running in meshed.running.values() {
        running.agent.signal(Signal::SIGSTOP)?;
        running.tunnel.as_ref().map_or(Ok(()), |tunnel| tunnel.signal(Signal::SIGKILL))?;
    }
    let answered: Vec<u64> = flows.iter().map(Flow::answered).collect();
    sleep(Duration::from_secs(1));
    ensure!(flows.iter().map(Flow::answered).eq(answered), "something carries it still");
    // The stream cannot survive this; that its packets stay inside is what counts.
    flows.into_iter().try_for_each(|flow| flow.stop().map(drop))?;
    stream.abandon()?;
    let seen = watch.stop()?;
    let total = sum(&seen);
    ensure!(total.tunnel > 0 && total.clear == 0 && total.missed == 0, "{seen:#?}");

    let watch = meshed.lab.watch()?;
    let worker = meshed.node("va", 2)?;
    let agent = &meshed.running[worker.host.name()].agent;
    agent.signal(Signal::SIGKILL)?;
    wait_for("the agent to be gone", SOON, || match meshed.carrick.cleanup(worker) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{error:#}")),
    })?;
    ensure!(ping(&worker.pods[0].host, meshed.node("mn", 2)?.pods[0].ip(), 2)?.none_answered());
    let seen = watch.stop()?;
    ensure!(seen[worker.host.name()].clear > 0, "the watch sees nothing: {seen:#?}");
    Ok(())
}

/// No ICMP of the underlay tells anybody: the probes have to find it. Both ways, in both families; the smallest path has
/// no room for IPv6, and only the agents' words for it.
fn a_narrow_underlay_swallows_no_stream(meshed: &mut Meshed<'_>) -> Result<()> {
    let (va, mn) = (&meshed.node("va", 2)?.pods[0], &meshed.node("mn", 2)?.pods[0]);
    // As a device of 1420 bytes has it; less 60 for IPv4, UDP and WireGuard, which pads to 16; what IPv6 needs, in
    // fragments; the same without fragments.
    meshed.is_told(1420, &["10.", "fd00:"])?;
    for (bytes, fragments, told) in [(1400, true, 1328), (1280, true, 1280), (1280, false, 1216)] {
        let families: &[&str] = if fragments { &["10.", "fd00:"] } else { &["10."] };
        let what = format!("an underlay of {bytes} bytes, fragments pass: {fragments}");
        let streams = || -> Result<Vec<Stream>> {
            let pairs = [(va, mn), (mn, va)].into_iter();
            let to = pairs.flat_map(|(from, to)| to.addresses.iter().map(move |address| (from, to, *address)));
            let to = to.filter(|(_, _, address)| is_of(*address, families));
            to.map(|(from, to, address)| Stream::start(&from.host, &to.host, (address, 0).into())).collect()
        };
        let mut running = streams()?;
        go_on(&running)?;
        let narrow = meshed.lab.limit_mtu("va", bytes, fragments)?;
        go_on(&running)?;
        running.extend(streams()?);
        go_on(&running)?;
        meshed.is_told(told, families)?;
        let too_narrow = meshed.is_too_narrow_for_ipv6()?;
        ensure!(too_narrow != fragments, "{what}: what do the gateways say?");
        narrow.mend()?;
        go_on(&running)?;
        for stream in running {
            let report = stream.stop();
            eprintln!("{what}: {} bytes of TCP, stall {} ms", report.bytes, report.longest_stall_ms);
            ensure!(report.survived(), "{what}: {report:?}");
        }
    }
    Ok(())
}

fn is_of(address: IpAddr, families: &[&str]) -> bool {
    families.iter().any(|family| address.to_string().starts_with(family))
}

/// Waits until some more has arrived by each: what a buffer holds is not enough.
fn go_on(streams: &[Stream]) -> Result<()> {
    let before: Vec<u64> = streams.iter().map(Stream::arrived).collect();
    wait_for("streams to go on", CONNECT_LIMIT, || {
        let now: Vec<u64> = streams.iter().map(Stream::arrived).collect();
        let on = now.iter().zip(&before).all(|(now, before)| *now > before + 2_000_000);
        if on { Ok(()) } else { Err(format!("from {before:?} to {now:?}")) }
    })
}

fn a_pod_outside_the_ranges_of_nodes_is_found(meshed: &mut Meshed<'_>) -> Result<()> {
    let address: IpAddr = "10.42.200.5".parse()?;
    meshed.lab.add_pod_at("mn", 2, &[address])?;
    meshed.mesh.write_pod("mn", "moved", meshed.node("mn", 2)?, &[address])?;
    let (pod, remote) = (&meshed.node("mn", 2)?.pods[1], &meshed.node("va", 2)?.pods[0]);
    wait_for("the pod to be found", SOON, || match ping(&remote.host, address, 1) {
        Ok(pings) if pings.all_answered() => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    let _server = http::Server::start(&remote.host, (remote.ip(), PORT).into())?;
    ensure!(http::get(&pod.host, (remote.ip(), PORT).into())? == address);
    Ok(())
}

/// [`meshed`] waits until every pod reaches every remote pod, in every family that both have.
#[test]
fn families() {
    let under_bridge = [Families::V4, Families::V6Pods, Families::V6Underlay].map(|families| (Cni::Bridge, families));
    let elsewhere = [Cni::SkipFib, Cni::Fabric].map(|cni| (cni, Families::V6Underlay));
    // Every other test has both families.
    for (cni, families) in under_bridge.into_iter().chain(elsewhere) {
        let members = Member::pair_of_three(cni).map(|member| Member { families, ..member });
        meshed(members, every_pod_reaches_every_remote_pod_with_its_own_address);
    }
}
