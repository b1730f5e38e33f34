//! The data plane beside the same tunnels with plain routes: throughput and round trips, in turns; and what a packet
//! costs in `steer`.
//!
//! Both stand side by side and take short turns in each round, round trips on one processor, so that a slow second of the
//! machine hits both. After a few rounds both are built anew. What is compared are the medians of the rounds' own ratios and
//! differences.

use std::{path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{
    Cni, Member, Pod,
    traffic::tcp::{Throughput, throughput},
};

use super::{
    joined::Joined,
    plain,
    processor::OnOne,
    report::{self, Budget, Measured, Output},
    saved::{self, Machine},
    statistics::median,
    steer, traffic, vxlan,
    way::{self, Way},
};
use crate::process::check_interrupted;

const PORT: u16 = 5201;
/// Linux's own choice, whatever this machine prefers: what paces its packets by timers, as BBR does, measures those too.
const CONGESTION_CONTROL: &str = "cubic";
/// How long the streams of one run before those of the other: the speed of a virtual machine changes within seconds.
const TURN: Duration = Duration::from_millis(500);
/// Rounds before both are built anew: where a build's memory and threads happened to come to lie is in all of its rounds, and
/// moves their ratio by 0.03.
const BUILD: usize = 5;
/// Round trips of each kind in each round, after as many again / 10 that are not counted.
const ROUND_TRIPS: usize = 2000;
/// Of the traffic that shows the way: how long, and how many packets at least.
const LOOK: (Duration, u64) = (Duration::from_millis(500), 50);

/// At least so much of the throughput with plain routes.
const THROUGHPUT: Budget = Budget::AtLeast(0.95);
/// Microseconds that hop and programs may add to a round trip.
const ADDED: Budget = Budget::AtMost(12.0);

/// From which pods to which.
struct Shape {
    name: &'static str,
    nodes: u8,
    gateways: u8,
}

/// With one gateway there is one way: from its pods to those of the other.
const SHAPES: [Shape; 2] = [
    Shape { name: "worker to worker", nodes: 3, gateways: 2 },
    Shape { name: "gateway to gateway", nodes: 1, gateways: 1 },
];

#[derive(Debug, clap::Args)]
pub struct Args {
    /// How often each is measured.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// How long the streams of each run in a round.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// Only what a packet costs in `steer`; nothing is saved.
    #[arg(long)]
    steer: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

/// Measures, saves and prints; true if every budget holds.
pub fn run(args: &Args, carrick: &Path) -> Result<bool> {
    let mut results = Vec::new();
    if !args.steer {
        for (shape, kinds) in SHAPES.iter().flat_map(|shape| KINDS.map(|kinds| (shape, kinds))) {
            results.extend(measure(shape, kinds, args, carrick).context(shape.name)?);
        }
        results.push(vxlan::measure(args.rounds, ROUND_TRIPS)?);
    }
    results.extend(steer::measure()?);
    if !args.steer {
        saved::write_datapath(&saved::Datapath {
            machine: Machine::read()?,
            rounds: args.rounds,
            results: results.clone(),
        })?;
    }
    report::print(&results, args.output);
    Ok(report::ok(&results))
}

/// What is measured, in a round: of ours, then of plain routes.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Tcp { streams: usize },
    RoundTrip,
}

/// Each with both data planes built for it: programs that begin on one processor are not those that begin on all.
const KINDS: [&[Kind]; 2] = [&[Kind::Tcp { streams: 1 }, Kind::Tcp { streams: 4 }], &[Kind::RoundTrip]];

/// All rounds of one kind: what ours did, and plain routes, in bits per second or microseconds.
#[derive(Debug)]
struct Rounds {
    kind: Kind,
    pairs: Vec<[f64; 2]>,
}

fn measure(shape: &Shape, kinds: &[Kind], args: &Args, carrick: &Path) -> Result<Vec<Measured>> {
    let _one = matches!(kinds, [Kind::RoundTrip]).then(OnOne::new).transpose()?;
    let mut all: Vec<Rounds> = kinds.iter().map(|&kind| Rounds { kind, pairs: Vec::new() }).collect();
    for first in (1..=args.rounds).step_by(BUILD) {
        build(shape, carrick, |ours, plain| {
            all.iter_mut().try_for_each(|rounds| take_turns(shape, first, args, [ours, plain], rounds))
        })?;
    }
    Ok(all.iter().flat_map(|rounds| results(shape.name, rounds)).collect())
}

/// Both, while `work` is at it.
fn build(shape: &Shape, carrick: &Path, work: impl FnOnce(&Joined, &Joined) -> Result<()>) -> Result<()> {
    let members = Member::pair_of_three(Cni::Bridge).map(|member| Member {
        nodes: shape.nodes,
        gateways: shape.gateways,
        behind_nat: false,
        ..member
    });
    eprintln!("{}: starting both ...", shape.name);
    let ours = Joined::new("datapath", &members, carrick)?;
    let plain = Joined::new("plain", &members, carrick)?;
    for joined in [&ours, &plain] {
        joined.wait_connected()?;
        let [from, to] = pods(joined)?;
        for pod in [from, to] {
            pod.host.sysctl("net/ipv4/tcp_congestion_control", CONGESTION_CONTROL)?;
        }
        joined.wait_reached(from, to)?;
    }
    plain::strip(&plain)?;
    let result = work(&ours, &plain);
    if result.is_err() {
        ours.lab.show_logs();
    }
    result
}

/// The rounds of one build, from `first` on.
fn take_turns(shape: &Shape, first: u32, args: &Args, joined: [&Joined; 2], rounds: &mut Rounds) -> Result<()> {
    let [ours, other] = joined;
    let kind = rounds.kind;
    plain::lead(other, ways(ours, kind)?)?;
    let [from, to] = pods(other)?;
    other.wait_reached(from, to)?;
    for round in (first..=args.rounds).take(BUILD) {
        // Who comes first changes, lest it matter.
        let time = Duration::from_secs(args.seconds);
        let pair = if round % 2 == 1 {
            both([ours, other], kind, time)?
        } else {
            let [plain, ours] = both([other, ours], kind, time)?;
            [ours, plain]
        };
        eprintln!("{}, round {round} of {}: {}", shape.name, args.rounds, kind.show(pair));
        rounds.pairs.push(pair);
    }
    Ok(())
}

/// The first pods of the last nodes.
fn pods(joined: &Joined) -> Result<[&Pod; 2]> {
    let first = |member| joined.last(member)?.pods.first().context("a node has a pod");
    Ok([first(0)?, first(1)?])
}

fn ends(pods: [&Pod; 2]) -> traffic::Ends<'_> {
    pods.map(|pod| (&pod.host, pod.ip()))
}

/// Which way packets of that kind go through our data plane.
fn ways(ours: &Joined, kind: Kind) -> Result<[Way; 2]> {
    let [from, to] = pods(ours)?;
    let (time, packets) = LOOK;
    std::thread::scope(|scope| {
        let sending = scope.spawn(|| match kind {
            Kind::Tcp { .. } => throughput(&from.host, &to.host, (to.ip(), PORT).into(), 1, 2 * time).map(drop),
            Kind::RoundTrip => traffic::round_trips(&[ends([from, to])], ROUND_TRIPS).map(drop),
        });
        let ways = way::taken(ours.clusters(), time, packets);
        sending.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ways
    })
}

/// A round: bits per second or microseconds, in turns.
fn both(joined: [&Joined; 2], kind: Kind, time: Duration) -> Result<[f64; 2]> {
    check_interrupted()?;
    let [first, second] = joined.map(pods);
    let pairs = [first?, second?];
    match kind {
        Kind::Tcp { streams } => {
            let mut flows = [Flow::default(); 2];
            // There and back again, lest it matter who comes first.
            for at in [0, 1, 1, 0].into_iter().cycle().take(2 * turns(time)) {
                check_interrupted()?;
                let [from, to] = pairs[at];
                flows[at].add(&throughput(&from.host, &to.host, (to.ip(), PORT).into(), streams, TURN)?);
            }
            let [first, second] = flows.map(Flow::bits_per_second);
            Ok([first?, second?])
        }
        Kind::RoundTrip => {
            let pairs = pairs.map(ends);
            traffic::round_trips(&pairs, ROUND_TRIPS / 10)?;
            let times = traffic::round_trips(&pairs, ROUND_TRIPS)?;
            let typical = |at: usize| median(times[at].iter().map(|time| time.as_secs_f64() * 1e6));
            Ok([typical(0), typical(1)])
        }
    }
}

/// How many turns make up that time: one at least.
fn turns(time: Duration) -> usize {
    (time.as_millis() / TURN.as_millis()).max(1) as usize
}

/// Of one data plane in one round.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    bytes: u64,
    seconds: f64,
}

impl Flow {
    fn add(&mut self, turn: &Throughput) {
        self.bytes += turn.bytes;
        self.seconds += turn.seconds;
    }

    fn bits_per_second(self) -> Result<f64> {
        ensure!(self.bytes > 0, "no byte arrived in {:.1} s", self.seconds);
        Ok(self.bytes as f64 * 8.0 / self.seconds)
    }
}

impl Kind {
    fn show(self, [ours, plain]: [f64; 2]) -> String {
        match self {
            Kind::Tcp { streams } => {
                let ratio = ours / plain;
                format!("tcp {streams}: {:.2} Gb/s, plain routes {:.2} Gb/s, ratio {ratio:.3}", ours / 1e9, plain / 1e9)
            }
            Kind::RoundTrip => format!("round trip: {ours:.1} us, plain routes {plain:.1} us"),
        }
    }
}

/// The medians of both, and of their ratios or differences, which have the budgets.
fn results(shape: &str, Rounds { kind, pairs }: &Rounds) -> Vec<Measured> {
    let what = match kind {
        Kind::Tcp { streams: 1 } => format!("{shape}, tcp 1 stream"),
        Kind::Tcp { streams } => format!("{shape}, tcp {streams} streams"),
        Kind::RoundTrip => format!("{shape}, round trip"),
    };
    let both = |scale: f64, unit| {
        [("carrick", 0), ("plain routes", 1)].map(|(name, at)| {
            Measured::of_rounds(&format!("{what}, {name}"), pairs.iter().map(|pair| pair[at] / scale), unit)
        })
    };
    let compared = |name: &str, unit, budget, compare: fn([f64; 2]) -> f64| Measured {
        budget: Some(budget),
        ..Measured::of_rounds(&format!("{what}, {name}"), pairs.iter().copied().map(compare), unit)
    };
    let (both, compared) = match kind {
        Kind::Tcp { .. } => (both(1e9, "Gb/s"), compared("ratio", "x", THROUGHPUT, |[ours, plain]| ours / plain)),
        Kind::RoundTrip => (both(1.0, "us"), compared("added", "us", ADDED, |[ours, plain]| ours - plain)),
    };
    both.into_iter().chain([compared]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_are_compared_one_by_one() {
        // The machine was three times as fast in the second round: the medians of each would tell nothing.
        let rounds = Rounds { kind: Kind::Tcp { streams: 1 }, pairs: vec![[0.9e9, 1e9], [2.7e9, 3e9], [1e9, 1e9]] };
        let found = results("a to b", &rounds);
        let names: Vec<&str> = found.iter().map(|result| result.name.as_str()).collect();
        assert_eq!(
            names,
            ["a to b, tcp 1 stream, carrick", "a to b, tcp 1 stream, plain routes", "a to b, tcp 1 stream, ratio"]
        );
        assert_eq!(found.iter().map(|result| result.value).collect::<Vec<_>>(), [1.0, 1.0, 0.9]);
        assert!(!found[2].ok());

        let rounds = Rounds { kind: Kind::RoundTrip, pairs: vec![[110.0, 100.0], [208.0, 200.0], [120.0, 111.0]] };
        let found = results("a to b", &rounds);
        let added = Measured::new("a to b, round trip, added", 9.0, "us");
        assert_eq!(found[2], Measured { budget: Some(ADDED), middle_half: Some([8.0, 10.0]), ..added });
        assert!(found[2].ok());
    }
}
