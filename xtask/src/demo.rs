//! `cargo xtask demo`: two members talk, on one machine, with nothing mocked.
//!
//! The table, or the JSON, goes to standard output; progress to standard error.

mod gateways;

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    thread::sleep,
    time::{Duration, Instant},
};

use ::lab::{
    Carrick, Cni, Lab, Member, Mesh, Node,
    capture::{Capture, Expected, Seen},
    carrick::{DEVICES, HOP_PORT, Running, TUNNEL_PORT, difference, snapshot},
    guard::Guard,
    traffic::{http, ping::ping, tcp, udp::Flow},
    wait_for,
};
use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{lab::end_on_interrupt, process};

/// Whether `carrick` steers between nodes and gateways: with false the members have one node each, and the demo shows
/// what such members can.
const DATA_PLANE: bool = true;

const PORT: u16 = 8080;
/// Between packets of numbered UDP.
const INTERVAL: Duration = Duration::from_millis(1);
const CONNECT_LIMIT: Duration = Duration::from_secs(60);
const THROUGHPUT_TIME: Duration = Duration::from_secs(5);
/// The range that `mn` offers later, and an address in it.
const LATER_RANGE: &str = "10.43.0.0/16";
const LATER_ADDRESS: &str = "10.43.0.2";

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Leave everything up, and print how to enter each node.
    #[arg(long)]
    keep: bool,
    /// Run this carrick instead of building one.
    #[arg(long, value_name = "PATH")]
    carrick: Option<PathBuf>,
    /// Upgrade the agents to this carrick, instead of a copy of the first.
    #[arg(long, value_name = "PATH")]
    upgrade: Option<PathBuf>,
    /// Network plugin of both members: bridge, host-routing, skip-fib, fabric or strict.
    #[arg(long, default_value = "bridge")]
    cni: Cni,
    #[arg(short, long, value_enum, default_value_t = Output::Table)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    /// A number or a text.
    pub value: Value,
    /// Of the value; empty for a text.
    pub unit: &'static str,
}

/// Runs the demo, with the `carrick` that `build` returns the path of. True if every check holds.
pub fn run(args: &Args, build: impl FnOnce() -> Result<PathBuf>) -> Result<bool> {
    let carrick = Carrick::new(&args.carrick.clone().map_or_else(build, Ok)?)?;
    let guard = Guard::unique("demo")?;
    end_on_interrupt(&guard);
    let checks = checks(args, &carrick, guard.clone());
    // It has ended, was kept, or is being ended by an interrupt: then this waits.
    guard.end()?;
    // What failed after an interrupt says nothing.
    process::check_interrupted()?;
    let checks = checks?;
    let ok = checks.iter().all(|check| check.ok);
    match args.output {
        Output::Table => print!("{}", table(&checks)),
        Output::Json => println!("{}", json!({ "ok": ok, "checks": checks })),
    }
    Ok(ok)
}

fn checks(args: &Args, carrick: &Carrick, guard: Arc<Guard>) -> Result<Vec<Check>> {
    let [mn, va] = if DATA_PLANE { Member::pair_of_three(args.cni) } else { Member::pair() };
    let (nodes, gateways) = (mn.nodes, mn.gateways);
    say(&format!(
        "from network namespaces: an internet, a NAT router, two members; of each nodes: {nodes}, gateways: {gateways}"
    ));
    let mn = Member { allowed: vec![LATER_RANGE.parse()?], ..mn };
    let lab = Lab::build(guard, &[mn, va])?;
    let upgrade = args.upgrade.as_deref();
    let mut demo = Demo { carrick, upgrade, lab: &lab, keep: args.keep, step: "start", checks: Vec::new() };
    let running = demo.all().unwrap_or_else(|error| {
        let value = format!("{error:#}").into();
        demo.checks.push(Check { name: demo.step.to_owned(), ok: false, value, unit: "" });
        Vec::new()
    });
    let checks = demo.checks;
    process::check_interrupted()?;
    if !checks.iter().all(|check| check.ok) {
        lab.show_logs();
    }
    if args.keep {
        running.into_iter().for_each(Running::detach);
        let name = lab.name().to_owned();
        for (_, node) in lab.nodes() {
            for host in [&node.host, &node.pods[0].host] {
                say(&format!("cargo xtask lab enter {name} {}", host.name()));
            }
        }
        say(&format!("when done: cargo xtask lab down {name}"));
        lab.keep()?;
    }
    Ok(checks)
}

/// The demo as it runs.
struct Demo<'a> {
    carrick: &'a Carrick,
    upgrade: Option<&'a Path>,
    lab: &'a Lab,
    keep: bool,
    /// What is being tried: the name of the failed check, should it fail with an error.
    step: &'static str,
    checks: Vec<Check>,
}

/// The two ends, in both directions.
type Ends<'a> = [(&'a Member, &'a Node, &'a Member, &'a Node); 2];

impl Demo<'_> {
    /// Everything, in order. Returns what still runs.
    fn all(&mut self) -> Result<Vec<Running>> {
        let lab = self.lab;
        let (mn, va) = (lab.cluster("mn")?, lab.cluster("va")?);
        let ends = [
            (&va.member, &va.nodes[0], &mn.member, &mn.nodes[0]),
            (&mn.member, &mn.nodes[0], &va.member, &va.nodes[0]),
        ];
        mn.nodes[0].add_address(LATER_ADDRESS.parse()?)?;
        let before = lab.nodes().map(|(_, node)| snapshot(node)).collect::<Result<Vec<_>>>()?;

        self.begin("connected");
        let mesh = self.carrick.write_mesh(lab)?;
        if mesh.own("mn").is_some() {
            mesh.write_pod("mn", "later", &mn.nodes[0], &[LATER_ADDRESS.parse()?])?;
        }
        let start = Instant::now();
        let mut running = Vec::new();
        for (member, node) in lab.nodes() {
            running.push(self.carrick.start(member, node, &mesh)?);
        }
        self.connected(start)?;

        let captures = self.capture()?;
        self.pings(&ends)?;
        self.pages(&ends)?;
        self.throughput(&ends)?;
        let mut seen = stop(captures)?;
        self.added_route(&mesh, &ends)?;
        let captures = self.capture()?;
        let mut running = self.killed_agents(&mesh, running, &ends)?;
        seen.add(stop(captures)?);
        self.underlay(&seen);
        if DATA_PLANE {
            self.gateways(&mesh, &mut running)?;
        }

        if self.keep {
            return Ok(running);
        }
        self.cleanup(running, &before)?;
        Ok(Vec::new())
    }

    fn connected(&mut self, start: Instant) -> Result<()> {
        let [mn, va] = ["mn", "va"];
        for (member, node) in self.lab.nodes() {
            let remote = if member.name == mn { va } else { mn };
            self.carrick.wait_connected(node, &[remote], CONNECT_LIMIT)?;
            let seconds = tenths(start.elapsed().as_secs_f64());
            let what = if node.slot.is_some() { format!("connected to {remote}") } else { "ready".to_owned() };
            self.hold(format!("{} {what}", node.host.name()), true, seconds, "s");
        }
        Ok(())
    }

    fn pings(&mut self, ends: &Ends) -> Result<()> {
        self.begin("ping");
        for (member, node, remote, remote_node) in ends {
            let pings = ping(&node.pods[0].host, remote_node.pods[0].ip(), 5)?;
            let median = pings.median_ms().map_or(Value::Null, |ms| json!((ms * 1e3).round() / 1e3));
            let name = format!("ping, pod of {} to pod of {}", member.name, remote.name);
            self.hold(name, pings.all_answered(), median, "ms");
        }
        Ok(())
    }

    /// The page of a pod by its own address; the server must have seen the client pod's own address.
    fn pages(&mut self, ends: &Ends) -> Result<()> {
        self.begin("http");
        for (member, node, remote, remote_node) in ends {
            let (client, server) = (&node.pods[0], &remote_node.pods[0]);
            let address: SocketAddr = (server.ip(), PORT).into();
            let _server = http::Server::start(&server.host, address)?;
            let seen = http::get(&client.host, address)?;
            let name = format!("http, pod of {} to pod of {}: client seen", member.name, remote.name);
            self.hold(name, seen == client.ip(), seen.to_string(), "");
        }
        Ok(())
    }

    fn throughput(&mut self, ends: &Ends) -> Result<()> {
        self.begin("tcp");
        for (member, node, remote, remote_node) in ends {
            say(&format!("tcp throughput, {} to {}, 5 s", member.name, remote.name));
            let (from, to) = (&node.pods[0], &remote_node.pods[0]);
            let tcp = tcp::throughput(&from.host, &to.host, (to.ip(), PORT).into(), 1, THROUGHPUT_TIME)?;
            say(&format!("retransmits: {}", tcp.retransmits));
            let name = format!("tcp, pod of {} to pod of {}", member.name, remote.name);
            self.hold(name, tcp.bytes > 0, tcp.megabits_per_second().round() as u64, "Mb/s");
        }
        Ok(())
    }

    /// From the change of a file to the first answer over the route that it adds.
    fn added_route(&mut self, mesh: &Mesh, ends: &Ends) -> Result<()> {
        self.begin("route added to the folder: answered after");
        let [(_, va, mn, mn_node), _] = ends;
        let address: SocketAddr = (LATER_ADDRESS.parse::<IpAddr>()?, PORT).into();
        let flow = Flow::start(&va.pods[0].host, &mn_node.pods[0].host, address, INTERVAL)?;
        sleep(Duration::from_millis(300));
        ensure!(flow.first_answer().is_none(), "{address} answered before there was a route to it");
        let changed = Instant::now();
        mesh.write_routes(mn, &mn.allowed_ranges())?;
        let answered = wait_for("an answer over the new route", CONNECT_LIMIT, || {
            flow.first_answer().ok_or_else(|| "no answer".to_owned())
        })?;
        flow.stop()?;
        let milliseconds = tenths(answered.duration_since(changed).as_secs_f64() * 1e3);
        self.hold(self.step.to_owned(), true, milliseconds, "ms");
        Ok(())
    }

    fn killed_agents(&mut self, mesh: &Mesh, running: Vec<Running>, ends: &Ends) -> Result<Vec<Running>> {
        self.begin("agents killed and restarted: lost of 1 kHz UDP, there and back");
        let [(_, va, _, mn), _] = ends;
        let (from, to) = (&va.pods[0], &mn.pods[0]);
        let flow = Flow::start(&from.host, &to.host, (to.ip(), PORT).into(), INTERVAL)?;
        sleep(Duration::from_secs(1));
        let mut restarted = Vec::new();
        for (Running { tunnel, agent }, (member, node)) in running.into_iter().zip(self.lab.nodes()) {
            agent.kill()?;
            sleep(Duration::from_secs(1));
            restarted.push(Running { tunnel, agent: self.carrick.start_agent(member, node, mesh)? });
        }
        self.all_connected()?;
        sleep(Duration::from_secs(1));
        let report = flow.stop()?;
        say(&format!("{} packets sent, longest gap {} ms", report.sent, report.back.longest_gap_ms));
        self.hold(self.step.to_owned(), report.back.lost == 0, report.back.lost, "packets");
        Ok(restarted)
    }

    /// On the internet's end of both uplinks.
    fn capture(&self) -> Result<Vec<Capture>> {
        let expected = Expected {
            tunnel: TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1,
            hop: HOP_PORT,
            private: self.lab.clusters.iter().flat_map(|cluster| cluster.member.allowed_ranges()).collect(),
        };
        let start = |uplink: &str| Capture::start(&self.lab.internet, uplink, expected.clone());
        self.lab.clusters.iter().map(|cluster| start(&cluster.uplink)).collect()
    }

    fn underlay(&mut self, seen: &Seen) {
        let Seen { tunnel, clear, other, missed, described, .. } = seen;
        describe(described);
        let told = *tunnel > 0 && *missed == 0;
        if !told {
            say(&format!("the capture saw {tunnel} packets of the tunnel and missed {missed}: it proves nothing"));
        }
        say(&format!("underlay: {tunnel} packets of the tunnel"));
        self.hold("underlay: packets other than the tunnel's UDP".into(), told && *other == 0, *other, "packets");
        self.hold("underlay: clear text between pod ranges".into(), told && *clear == 0, *clear, "packets");
    }

    fn cleanup(&mut self, running: Vec<Running>, before: &[BTreeSet<String>]) -> Result<()> {
        self.begin("cleanup");
        running.into_iter().try_for_each(Running::terminate)?;
        for ((_, node), before) in self.lab.nodes().zip(before) {
            self.carrick.cleanup(node)?;
            let left = difference(before, &snapshot(node)?);
            describe(&left);
            self.hold(format!("after cleanup: left on {}", node.host.name()), left.is_empty(), left.len(), "things");
        }
        Ok(())
    }

    fn begin(&mut self, step: &'static str) {
        self.step = step;
        say(step);
    }

    fn hold(&mut self, name: String, ok: bool, value: impl Into<Value>, unit: &'static str) {
        self.checks.push(Check { name, ok, value: value.into(), unit });
    }
}

fn stop(captures: Vec<Capture>) -> Result<Seen> {
    let mut sum = Seen::default();
    for capture in captures {
        sum.add(capture.stop()?);
    }
    Ok(sum)
}

fn say(line: &str) {
    eprintln!("demo: {line}");
}

fn describe(lines: &[String]) {
    lines.iter().for_each(|line| say(line));
}

fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
    let row = |Check { name, ok, value, unit }: &Check| {
        let result = if *ok { "ok    " } else { "FAILED" };
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("{result}  {name:width$}  {}\n", format!("{value} {unit}").trim_end())
    };
    checks.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_every_check() {
        let check = |name: &str, ok, value, unit| Check { name: name.to_owned(), ok, value, unit };
        let checks = [
            check("ping", true, json!(0.25), "ms"),
            check("client seen", false, json!("10.44.0.2"), ""),
            check("lost", true, json!(0), "packets"),
        ];
        assert_eq!(
            table(&checks),
            "ok      ping         0.25 ms\nFAILED  client seen  10.44.0.2\nok      lost         0 packets\n"
        );
        assert_eq!(
            json!({ "checks": checks }).to_string(),
            r#"{"checks":[{"name":"ping","ok":true,"unit":"ms","value":0.25},{"name":"client seen","ok":false,"unit":"","value":"10.44.0.2"},{"name":"lost","ok":true,"unit":"packets","value":0}]}"#
        );
    }
}
