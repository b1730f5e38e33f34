//! Our userspace tunnel beside the others: throughput, small packets, cost, and memory.
//!
//! The implementations take turns, so that a slow minute of the machine hits them all; what is compared are medians.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::{Context, Result};
use lab::wait_for;

use super::{
    ends::Ends,
    implementation::{IMPLEMENTATIONS, Implementation, start_ours},
    report::{self, Budget, Measured, Output},
    statistics::median,
    traffic::{self, Tcp, Udp},
};
use crate::process::check_interrupted;

const OURS: &str = "carrick";
/// At least so many times as fast as that one.
const BUDGETS: [(&str, f64); 3] = [("gotatun", 2.0), ("boringtun", 2.0), ("wireguard-go", 1.0)];
/// Members in the mesh, hence peers of each of the two devices, and what the tunnel's memory may peak at, in MiB.
const MEMORY: [(usize, Option<f64>); 3] = [(1, None), (100, Some(40.0)), (1000, None)];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// How often each implementation is measured.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long each stream runs.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Only these, and no memory.
    #[arg(long, value_parser = clap::builder::PossibleValuesParser::new(IMPLEMENTATIONS.iter().map(|one| one.name)))]
    only: Vec<String>,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Measures and prints; true if every budget holds.
pub fn run(args: &Args, carrick: &Path) -> Result<bool> {
    let duration = Duration::from_secs(args.seconds);
    let mut samples: BTreeMap<&str, Samples> = BTreeMap::new();
    for round in 1..=args.rounds {
        for implementation in chosen(args) {
            let sample = measure(implementation, carrick, duration).with_context(|| implementation.name)?;
            eprintln!("round {round} of {}: {:<12} {sample}", args.rounds, implementation.name);
            samples.entry(implementation.name).or_default().0.push(sample);
        }
    }
    let mut results = Vec::new();
    for (name, samples) in &samples {
        results.extend(samples.results(name));
    }
    results.extend(ratios(&samples));
    if args.only.is_empty() {
        for (peers, limit) in MEMORY {
            results.push(memory(carrick, peers, limit)?);
        }
    }
    report::print(&results, args.output);
    Ok(report::ok(&results))
}

fn chosen(args: &Args) -> impl Iterator<Item = &'static Implementation> {
    IMPLEMENTATIONS.iter().filter(|one| args.only.is_empty() || args.only.iter().any(|name| name == one.name))
}

/// One turn of one implementation.
struct Sample {
    tcp: [Tcp; 2],
    udp: Udp,
}

impl std::fmt::Display for Sample {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [there, back] = self.tcp.map(|tcp| tcp.bits_per_second / 1e9);
        let retransmits: u64 = self.tcp.iter().map(|tcp| tcp.retransmits).sum();
        write!(f, "{there:.2} and {back:.2} Gb/s, {retransmits} retransmits, ")?;
        write!(f, "{:.0} k packets/s", self.udp.packets_per_second / 1e3)
    }
}

/// On two new nodes: nothing of the one before is left there.
fn measure(implementation: &Implementation, carrick: &Path, duration: Duration) -> Result<Sample> {
    check_interrupted()?;
    let ends = Ends::new()?;
    let running = implementation.start(&ends, carrick)?;
    let pids = running.pids();
    let [there, back] = ends.both_ways().map(|(from, to)| {
        check_interrupted()?;
        traffic::tcp(from, to, duration, &pids)
    });
    let tcp = [there?, back?];
    check_interrupted()?;
    let [a, b] = &ends.ends;
    let udp = traffic::udp(a, b, duration)?;
    Ok(Sample { tcp, udp })
}

#[derive(Default)]
struct Samples(Vec<Sample>);

impl Samples {
    /// Of both directions, in bits per second.
    fn throughput(&self) -> f64 {
        median(self.0.iter().flat_map(|sample| sample.tcp).map(|tcp| tcp.bits_per_second))
    }

    fn packet_rate(&self) -> f64 {
        median(self.0.iter().map(|sample| sample.udp.packets_per_second))
    }

    fn results(&self, name: &str) -> Vec<Measured> {
        let tcp = || self.0.iter().flat_map(|sample| sample.tcp);
        let retransmits: u64 = tcp().map(|tcp| tcp.retransmits).sum();
        let one = |what: &str, value, unit| Measured::new(&format!("{name} {what}"), value, unit);
        vec![
            one("tcp", self.throughput() / 1e9, "Gb/s"),
            Measured {
                budget: (name == OURS).then_some(Budget::AtMost(0.0)),
                ..one("tcp retransmits", retransmits as f64, "segments")
            },
            one("tcp cpu", median(tcp().map(|tcp| tcp.cpu_seconds_per_gib)), "s/GiB"),
            one("udp small", self.packet_rate() / 1e3, "k packets/s"),
            one("udp small delivered", median(self.0.iter().map(|sample| sample.udp.delivered)) * 100.0, "%"),
        ]
    }
}

/// Ours over each of the others; empty where one was not measured.
fn ratios(samples: &BTreeMap<&str, Samples>) -> Vec<Measured> {
    let Some(ours) = samples.get(OURS) else { return Vec::new() };
    let mut results = Vec::new();
    for (name, limit) in BUDGETS {
        let Some(theirs) = samples.get(name) else { continue };
        let ratio = |what: &str, value| Measured {
            budget: Some(Budget::AtLeast(limit)),
            ..Measured::new(&format!("{OURS} over {name}, {what}"), value, "x")
        };
        results.push(ratio("tcp", ours.throughput() / theirs.throughput()));
        results.push(ratio("udp small", ours.packet_rate() / theirs.packet_rate()));
    }
    results
}

/// The peak memory of a tunnel whose two devices have so many peers each, of which one carries a second of traffic.
fn memory(carrick: &Path, peers: usize, limit: Option<f64>) -> Result<Measured> {
    check_interrupted()?;
    eprintln!("memory with two devices of {peers} peers ...");
    let ends = Ends::new()?;
    let running = start_ours(&ends, carrick, peers + 1)?;
    let [a, b] = &ends.ends;
    for device in ["carrick-wg0", "carrick-wg1"] {
        wait_for(&format!("{peers} peers on {device}"), Duration::from_secs(60), || {
            check_interrupted().map_err(|error| error.to_string())?;
            let shown = a.host.output("wg", &["show", device, "peers"]).map_err(|error| format!("{error:#}"))?;
            let count = shown.lines().count();
            if count == peers { Ok(()) } else { Err(format!("{count} peers")) }
        })?;
    }
    wait_for("a packet", Duration::from_secs(20), || traffic::reaches(a, b).map_err(|error| format!("{error:#}")))?;
    traffic::tcp(a, b, Duration::from_secs(1), &[])?;
    let pid = running.pids().first().copied().context("the tunnel does not run")?;
    let mebibytes = traffic::peak_memory(pid)? as f64 / f64::from(1 << 20);
    Ok(Measured {
        budget: limit.map(Budget::AtMost),
        ..Measured::new(&format!("memory, 2 devices of {peers} peers"), mebibytes, "MiB")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_of_medians_meet_the_budgets_or_not() {
        let samples = |bits_per_second, packets_per_second| {
            let tcp = Tcp { bits_per_second, retransmits: 0, cpu_seconds_per_gib: 1.0 };
            Samples(vec![Sample { tcp: [tcp; 2], udp: Udp { packets_per_second, delivered: 1.0 } }])
        };
        let all = BTreeMap::from([
            (OURS, samples(2e9, 9e4)),
            ("gotatun", samples(1e9, 3e4)),
            ("wireguard-go", samples(1.9e9, 1e5)),
        ]);
        let found: Vec<_> = ratios(&all).into_iter().map(|ratio| (ratio.name.clone(), ratio.ok())).collect();
        let expected = [
            ("carrick over gotatun, tcp", true),
            ("carrick over gotatun, udp small", true),
            ("carrick over wireguard-go, tcp", true),
            ("carrick over wireguard-go, udp small", false),
        ];
        assert_eq!(found, expected.map(|(name, ok)| (name.to_owned(), ok)));
    }

    #[test]
    fn every_budget_names_an_implementation() {
        for (name, _) in BUDGETS {
            assert!(IMPLEMENTATIONS.iter().any(|one| one.name == name));
        }
    }
}
