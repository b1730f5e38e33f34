//! The page of results, with its plots, of what the other benchmarks found last.
//!
//! Invariant: the page is a function of the saved results alone: no date, no measuring.

mod svg;

use std::{fs, path::Path};

use anyhow::{Context, Result};
use lab::Cni;

use self::svg::{Bar, Line, Panel};
use super::{
    control::{self, Run},
    failover::{Kind, Log},
    report::{Measured, digits},
    saved::{self, Datapath},
    statistics::sorted,
};
use crate::workspace;

/// Of the workspace.
const FOLDER: &str = "docs/bench";
/// What the gap of a failover must stay below, in milliseconds.
const GAP: f64 = 1000.0;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Writes docs/bench instead of printing the page.
    #[arg(long)]
    write: bool,
}

/// True: what was not measured yet is an error.
pub fn run(args: &Args) -> Result<bool> {
    let (datapath, failover) = (saved::read_datapath()?, Log::read(Cni::Bridge)?);
    let control = (control::read(control::BUDGETED[0])?, control::find(control::LARGE)?);
    let page = page(&datapath, &failover, &control);
    if !args.write {
        print!("{page}");
        return Ok(true);
    }
    let folder = workspace::root().join(FOLDER);
    fs::create_dir_all(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
    let plots = [
        ("datapath.svg", bars(&datapath.results)),
        ("failover.svg", gaps(&failover)),
        ("control.svg", times(&control.0)),
    ];
    for (file, text) in [("README.md", page)].into_iter().chain(plots) {
        write(&folder.join(file), &text)?;
    }
    Ok(true)
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))?;
    eprintln!("{}", path.display());
    Ok(())
}

fn page(datapath: &Datapath, failover: &Log, control: &(Run, Option<Run>)) -> String {
    let Datapath { machine, rounds, results } = datapath;
    let events = failover.results();
    let on = &failover.subject.machine;
    let (cost, compared): (Vec<_>, Vec<_>) = results.iter().cloned().partition(|result| result.unit == "ns");
    format!(
        "# Benchmarks

Made by `cargo xtask bench plot --write` from the last runs of the commands below. Members, nodes and pods are network
namespaces of one machine, the tunnels are Carrick's userspace WireGuard. What has a budget is in bold where it is missed.

## Data plane

`cargo xtask bench datapath`, {rounds} rounds, on {machine}.

The same pods, nodes and tunnels twice: once with Carrick's hop and programs, once with its agents gone, its programs
detached, and kernel routes (`ip route`) leading packets the same way. Both stand side by side and are measured in short
turns, TCP (cubic) on all processors, round trips on one; now and then both are built anew. All are medians of rounds, and
ratio and added time are those of the rounds' own; beside them, between what the middle half of the rounds lie. *Worker to
worker* is pod, worker, gateway, tunnel, gateway, worker, pod: two hops each way, and each is VXLAN, whose own share of a
round trip is measured beside them.

![Ratios, added time and cost](datapath.svg)

{}
A packet in the BPF programs, by `BPF_PROG_TEST_RUN`, which itself costs what an empty program does. The middle of several
destinations, each asked again and again, so the tables are in the processor's caches.

{}
## Failover

`cargo xtask bench failover`, on {on}.

A flow of 1000 numbered packets a second between pods of two workers, there and back. Members have two gateways each; each
event hits a part of the way that the flow takes. The gap is the longest time without an answer. *Mended* is the time when
what was broken becomes whole again.

![How long traffic stands still](failover.svg)

{}
{}",
        table(&compared),
        table(&cost),
        table(&events),
        control_section(control)
    )
}

fn control_section((small, large): &(Run, Option<Run>)) -> String {
    let on = |run: &Run| format!("{}, whose load was {} when it began", run.machine, digits(run.load));
    let large = large.as_ref().map_or_else(String::new, |run| {
        format!(
            "\nWith {} members, on {}: no budget, and what grows.\n\n{}",
            run.members,
            on(run),
            table(&run.results())
        )
    });
    format!(
        "## Control plane

`cargo xtask bench control`, on {}.

A real API server on etcd with the chart in it, on the same machine as everything that asks it. One worker and one
gateway run as in pods, each on a node of its own; {} other members, of two gateways and two RouteAdvertisements each, and
{} nodes are objects alone, so every link of the gateway is down. A *change* gives a RouteAdvertisement another range. Its time
begins when its request is sent and ends when the kernel tells (rtnetlink) that the new range is routed, which a pass makes
last, and the old one is not. The *plain watch* reads the same events, by the same network, and does nothing with them. A *start* has
nothing kept and nothing in the kernel. Requests are counted by the API server while nothing changes. Bytes are those of IP packets,
both ways.

![How long a change takes](control.svg)

{}{large}",
        on(small),
        small.members,
        small.nodes,
        table(&small.results()),
    )
}

fn table(results: &[Measured]) -> String {
    let spread = results.iter().any(|result| result.middle_half.is_some());
    let [head, rule] = if spread { [" middle half |", "---|"] } else { [""; 2] };
    let mut text = format!("| what | value | |{head} budget | |\n|---|--:|---|{rule}---|---|\n");
    for result in results {
        let bold = if result.ok() { "" } else { "**" };
        let budget = result.budget.map_or_else(String::new, |budget| budget.to_string());
        let Measured { name, value, unit, .. } = result;
        text += &format!(
            "| {bold}{name}{bold} | {bold}{}{bold} | {unit} |{} {budget} | {} |\n",
            digits(*value),
            if spread { format!(" {} |", result.spread()) } else { String::new() },
            result.verdict()
        );
    }
    text
}

/// Everything that is compared with something, by unit; and every cost of a packet.
fn bars(results: &[Measured]) -> String {
    let panel = |title: &str, unit: &str, wanted: fn(&Measured) -> bool| {
        let bars = results.iter().filter(|result| result.unit == unit && wanted(result));
        Panel { title: title.to_owned(), bars: bars.map(bar).collect() }
    };
    let compared = |result: &Measured| result.budget.is_some();
    svg::bars(&[
        panel("Throughput over that with plain routes", "x", compared),
        panel("Added to a round trip (us)", "us", compared),
        panel("One packet in the BPF programs (ns)", "ns", |_| true),
    ])
}

fn bar(result: &Measured) -> Bar {
    Bar {
        name: result.name.clone(),
        value: result.value,
        text: format!("{} {}", digits(result.value), result.unit),
        limit: result.budget.map(super::report::Budget::limit),
        ok: result.ok(),
    }
}

fn times(run: &Run) -> String {
    let line = |(name, time): &(&str, fn(&control::Change) -> f64)| Line {
        name: (*name).to_owned(),
        values: sorted(run.found.changes.iter().map(time)),
    };
    let lines: Vec<Line> = control::SEEN.iter().map(line).collect();
    let title = format!("Share of changes that are there within, {} members", run.members);
    svg::distribution(&title, "ms", &lines, control::HALF)
}

fn gaps(log: &Log) -> String {
    let line = |kind: &Kind| Line {
        name: format!("{}, {} events", kind.name(), log.of(*kind).count()),
        values: sorted(log.of(*kind).map(|event| event.gap_ms as f64)),
    };
    let failures: Vec<Line> = Kind::ALL.iter().filter(|kind| kind.is_failure()).map(line).collect();
    svg::distribution("Share of failures after which traffic stood still for at most", "ms", &failures, GAP)
}

#[cfg(test)]
mod tests {
    use expect_test::expect_file;

    use super::*;
    use crate::bench::{
        control::tests::example,
        failover::{Event, Subject},
        report::Budget,
        saved::Machine,
    };

    fn machine() -> Machine {
        Machine { processor: "Some CPU".to_owned(), cores: 2, kernel: "6.18.0".to_owned() }
    }

    fn datapath() -> Datapath {
        let one = |name: &str, value, unit, budget| Measured { budget, ..Measured::new(name, value, unit) };
        let results = vec![
            one("tcp 1 stream, carrick", 2.3456, "Gb/s", None),
            Measured {
                middle_half: Some([0.931, 1.02]),
                ..one("tcp 1 stream, ratio", 0.97, "x", Some(Budget::AtLeast(0.95)))
            },
            one("round trip, added", 13.2, "us", Some(Budget::AtMost(12.0))),
            one("steer, 4096 prefixes", 120.0, "ns", Some(Budget::AtMost(150.0))),
        ];
        Datapath { machine: machine(), rounds: 7, results }
    }

    fn failover() -> Log {
        let event = |kind, gap_ms, lost| Event { kind, to: "mn-0".to_owned(), gap_ms, lost, mended: None };
        let events = vec![event(Kind::Kill, 600, 590), event(Kind::Cut, 640, 620), event(Kind::Drain, 3, 0)];
        Log { subject: Subject { machine: machine(), build: "0".to_owned() }, events }
    }

    #[test]
    fn the_page_shows_every_value_and_what_is_missed() {
        expect_file!["plot/page.txt"].assert_eq(&page(&datapath(), &failover(), &(example(100), Some(example(1000)))));
    }

    #[test]
    fn every_value_with_a_budget_has_a_bar_and_every_failure_a_line() {
        let text = bars(&datapath().results);
        assert!(
            ["tcp 1 stream, ratio", "round trip, added", "steer, 4096 prefixes"].iter().all(|name| text.contains(name))
        );
        assert!(!text.contains("Gb/s"));
        assert_eq!(gaps(&failover()).matches("<polyline").count(), 2);
        assert_eq!(times(&example(100)).matches("<polyline").count(), 3);
    }
}
