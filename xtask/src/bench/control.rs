//! What a mesh of many members costs a worker and a gateway whose objects come from a real API server, as the benchmark of the
//! package `tests` measures it, for one number of members after the other.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    report::{self, Budget, Measured, Output},
    saved::{self, Machine},
    statistics::{median, percentile},
};
use crate::{process, test::name_programs, workspace};

/// Up to so many members and nodes budgets hold.
pub const BUDGETED: [u16; 2] = [100, 1000];
/// Where it is measured what comes next; the page has it where it was.
pub const LARGE: u16 = 1000;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Members beside the own one; several numbers are measured one after the other.
    #[arg(long, value_delimiter = ',', default_values_t = [BUDGETED[0], LARGE], value_parser = clap::value_parser!(u16).range(1..=1000))]
    members: Vec<u16>,
    /// Nodes of the own cluster; two of them run agents.
    #[arg(long, default_value_t = BUDGETED[1], value_parser = clap::value_parser!(u16).range(2..=1000))]
    nodes: u16,
    /// How often both agents are started with nothing in the kernel.
    #[arg(long, default_value_t = 3)]
    starts: usize,
    /// How many RouteAdvertisements are changed.
    #[arg(long, default_value_t = 250)]
    changes: usize,
    /// How long requests are counted while nothing changes, in seconds. A watch is asked for again after 290 s.
    #[arg(long, default_value_t = 580)]
    steady: u64,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// One number of members, measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    pub machine: Machine,
    /// Programs that wanted a processor when it began, over the minute before (`/proc/loadavg`).
    pub load: f64,
    pub members: u16,
    pub nodes: u16,
    pub found: Found,
}

/// What the benchmark prints in one line. By node, `worker` or `gateway`; or by process, and `tunnel`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Found {
    starts: Vec<BTreeMap<String, Start>>,
    pub changes: Vec<Change>,
    change_bytes: BTreeMap<String, f64>,
    memory: BTreeMap<String, Memory>,
    steady: Steady,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Start {
    milliseconds: f64,
    bytes: f64,
}

/// Milliseconds since a change was sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Change {
    pub answer: f64,
    pub watch: f64,
    pub worker: f64,
    pub gateway: f64,
}

/// In KiB.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Memory {
    resident: f64,
    peak: f64,
    proportional: f64,
}

/// Requests, and each process's share of one processor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Steady {
    seconds: f64,
    worker: f64,
    gateway: f64,
    lease: f64,
    processor: BTreeMap<String, f64>,
}

/// Measures, keeps and prints each number of members; true if every budget holds.
pub fn run(args: &Args, carrick: &Path) -> Result<bool> {
    let mut results = Vec::new();
    for members in &args.members {
        let run = measure(args, *members, carrick)?;
        saved::write(&file(*members), &run)?;
        let named = |result: Measured| Measured { name: format!("{members} members: {}", result.name), ..result };
        results.extend(run.results().into_iter().map(named));
    }
    report::print(&results, args.output);
    Ok(report::ok(&results))
}

/// What was found last with so many members.
pub fn read(members: u16) -> Result<Run> {
    saved::read(&file(members), &format!("control --members {members}"))
}

/// [`read`], if there is anything.
pub fn find(members: u16) -> Result<Option<Run>> {
    if saved::path(&file(members))?.exists() { read(members).map(Some) } else { Ok(None) }
}

fn file(members: u16) -> String {
    format!("control-{members}.json")
}

fn measure(args: &Args, members: u16, carrick: &Path) -> Result<Run> {
    let Args { nodes, starts, changes, steady, .. } = *args;
    let load = fs::read_to_string("/proc/loadavg").context("/proc/loadavg")?;
    let load = load.split(' ').next().unwrap_or_default().parse().with_context(|| load.clone())?;
    let wanted = json!({"members": members, "nodes": nodes, "starts": starts, "changes": changes, "steady": steady});
    let mut command = workspace::cargo();
    command.args(["bench", "--locked", "--package", "tests", "--bench", "control", "--", &wanted.to_string()]);
    // cargo runs it in its package's folder.
    let carrick = carrick.canonicalize().with_context(|| carrick.display().to_string())?;
    name_programs(&mut command, &carrick)?;
    let ended = process::run(&format!("control, {members} members"), &mut command)?;
    if !ended.success {
        bail!("{}\nthe benchmark of the control plane failed", ended.output);
    }
    let line = ended.output.lines().find(|line| line.starts_with('{')).context("the benchmark printed no result")?;
    let found = serde_json::from_str(line).with_context(|| line.to_owned())?;
    Ok(Run { machine: Machine::read()?, load, members, nodes, found })
}

impl Run {
    /// Times, memory, requests; then what a start and a change cost. With budgets where there are any for this size.
    pub fn results(&self) -> Vec<Measured> {
        let budgeted = [self.members, self.nodes].into_iter().zip(BUDGETED).all(|(is, most)| is <= most);
        let mut results = self.found.times();
        results.extend(self.found.memory());
        results.extend(self.found.requests());
        results.extend(self.found.starts());
        if !budgeted {
            results.iter_mut().for_each(|result| result.budget = None);
        }
        results
    }
}

fn at_most(limit: f64, measured: Measured) -> Measured {
    Measured { budget: Some(Budget::AtMost(limit)), ..measured }
}

/// Half of all changes may take so long, in milliseconds,
pub const HALF: f64 = 50.0;
/// and one in a hundred longer than this.
const MOST: f64 = 500.0;

/// When somebody has seen a change, in milliseconds.
type Seen = fn(&Change) -> f64;
/// By whom a change is seen.
pub const SEEN: [(&str, Seen); 3] =
    [("plain watch", |change| change.watch), ("worker", |change| change.worker), ("gateway", |change| change.gateway)];

impl Found {
    fn times(&self) -> Vec<Measured> {
        let mut results = Vec::new();
        for (name, time) in SEEN {
            let times = || self.changes.iter().map(time);
            let one = |what: &str, value| Measured::new(&format!("change, {name}, {what}"), value, "ms");
            let own = |limit, measured| if name == "plain watch" { measured } else { at_most(limit, measured) };
            results.push(own(HALF, one("p50", median(times()))));
            results.push(own(MOST, one("p99", percentile(99, times()))));
            results.push(one("max", percentile(100, times())));
        }
        for (name, time) in &SEEN[1..] {
            let ratio = median(self.changes.iter().map(|change| time(change) / change.watch));
            results.push(Measured::new(&format!("change, {name}, over the plain watch, p50"), ratio, "x"));
        }
        results
    }

    fn memory(&self) -> Vec<Measured> {
        let budget = |name: &str| [("worker", 25.0), ("gateway", 40.0)].into_iter().find(|(of, _)| *of == name);
        let mut results = Vec::new();
        for (name, memory) in &self.memory {
            let one = |what: &str, kib: f64| Measured::new(&format!("memory, {name}, {what}"), kib / 1024.0, "MiB");
            let resident = one("resident", memory.resident);
            results.push(budget(name).map_or(resident.clone(), |(_, limit)| at_most(limit, resident)));
            results.push(one("most ever resident", memory.peak));
            results.push(one("proportional", memory.proportional));
        }
        results
    }

    fn requests(&self) -> Vec<Measured> {
        let Steady { seconds, worker, gateway, lease, processor } = &self.steady;
        let one = |what: &str, count: f64, limit| {
            at_most(limit, Measured::new(&format!("requests, {what}"), count * 60.0 / seconds, "a minute"))
        };
        let mut results = vec![
            one("worker", *worker, 2.0),
            one("gateway", *gateway, 4.0),
            one("gateway, for its Lease", *lease, 4.0),
        ];
        let used = processor.iter();
        results.extend(used.map(|(name, share)| Measured::new(&format!("processor, {name}"), share * 100.0, "%")));
        results
    }

    fn starts(&self) -> Vec<Measured> {
        let mut results = Vec::new();
        for name in ["worker", "gateway"] {
            let of =
                |value: fn(&Start) -> f64| median(self.starts.iter().filter_map(|start| start.get(name)).map(value));
            let one = |what: &str, value, unit| Measured::new(&format!("{what}, {name}"), value, unit);
            results.push(one("start until routed", of(|start| start.milliseconds), "ms"));
            results.push(one("bytes of a start", of(|start| start.bytes / 1024.0), "KiB"));
            let bytes = self.change_bytes.get(name).copied().unwrap_or(f64::NAN);
            results.push(one("bytes of a change", bytes / 1024.0, "KiB"));
        }
        results
    }
}

#[cfg(test)]
pub mod tests {
    use expect_test::expect;

    use super::*;

    const FOUND: &str = r#"{
        "starts": [{"worker": {"milliseconds": 300.0, "bytes": 204800}, "gateway": {"milliseconds": 900.0, "bytes": 6144000}},
                   {"worker": {"milliseconds": 500.0, "bytes": 204800}, "gateway": {"milliseconds": 700.0, "bytes": 6144000}}],
        "changes": [{"answer": 5.0, "watch": 6.0, "worker": 30.0, "gateway": 51.0},
                    {"answer": 5.0, "watch": 10.0, "worker": 20.0, "gateway": 60.0},
                    {"answer": 5.0, "watch": 8.0, "worker": 24.0, "gateway": 480.0}],
        "change_bytes": {"worker": 1536, "gateway": 3072},
        "memory": {"gateway": {"resident": 45056, "peak": 51200, "proportional": 40960},
                   "tunnel": {"resident": 51200, "peak": 51200, "proportional": 51200},
                   "worker": {"resident": 20480, "peak": 22528, "proportional": 18432}},
        "steady": {"seconds": 300.0, "worker": 7, "gateway": 15, "lease": 20, "processor": {"gateway": 0.012, "worker": 0.003}}
    }"#;

    /// As small as it gets.
    pub fn example(members: u16) -> Run {
        let machine = Machine { processor: "Some CPU".to_owned(), cores: 2, kernel: "6.18.0".to_owned() };
        Run { machine, load: 1.5, members, nodes: 1000, found: serde_json::from_str(FOUND).unwrap() }
    }

    fn shown(run: &Run) -> String {
        let line =
            |result: &Measured| format!("{}: {:.2} {} {}", result.name, result.value, result.unit, result.verdict());
        run.results().iter().map(|result| line(result).trim_end().to_owned() + "\n").collect()
    }

    #[test]
    fn everything_that_is_measured_is_told() {
        expect![[r#"
            change, plain watch, p50: 8.00 ms
            change, plain watch, p99: 10.00 ms
            change, plain watch, max: 10.00 ms
            change, worker, p50: 24.00 ms ok
            change, worker, p99: 30.00 ms ok
            change, worker, max: 30.00 ms
            change, gateway, p50: 60.00 ms MISSED by 20.0 %
            change, gateway, p99: 480.00 ms ok
            change, gateway, max: 480.00 ms
            change, worker, over the plain watch, p50: 3.00 x
            change, gateway, over the plain watch, p50: 8.50 x
            memory, gateway, resident: 44.00 MiB MISSED by 10.0 %
            memory, gateway, most ever resident: 50.00 MiB
            memory, gateway, proportional: 40.00 MiB
            memory, tunnel, resident: 50.00 MiB
            memory, tunnel, most ever resident: 50.00 MiB
            memory, tunnel, proportional: 50.00 MiB
            memory, worker, resident: 20.00 MiB ok
            memory, worker, most ever resident: 22.00 MiB
            memory, worker, proportional: 18.00 MiB
            requests, worker: 1.40 a minute ok
            requests, gateway: 3.00 a minute ok
            requests, gateway, for its Lease: 4.00 a minute ok
            processor, gateway: 1.20 %
            processor, worker: 0.30 %
            start until routed, worker: 400.00 ms
            bytes of a start, worker: 200.00 KiB
            bytes of a change, worker: 1.50 KiB
            start until routed, gateway: 800.00 ms
            bytes of a start, gateway: 6000.00 KiB
            bytes of a change, gateway: 3.00 KiB
        "#]]
        .assert_eq(&shown(&example(100)));
    }

    #[test]
    fn budgets_are_those_of_a_hundred_members_and_a_thousand_nodes() {
        let budgets = |run: &Run| run.results().iter().filter(|result| result.budget.is_some()).count();
        assert_eq!(budgets(&example(100)), 4 + 2 + 3);
        assert_eq!(budgets(&example(101)), 0);
        assert_eq!(budgets(&Run { nodes: 1001, ..example(100) }), 0);
    }

    #[test]
    fn what_was_not_measured_meets_no_budget() {
        let run = example(100);
        let nothing = Run { found: Found { changes: Vec::new(), ..run.found.clone() }, ..run };
        assert!(
            nothing
                .results()
                .iter()
                .filter(|result| result.unit == "ms" && result.budget.is_some())
                .all(|result| !result.ok())
        );
    }
}
