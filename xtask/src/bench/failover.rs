//! How long traffic stands still when a gateway node, or a link between two gateways, goes away; and that a planned drain
//! and an agent's restart lose nothing.
//!
//! Each event hits the way that a flow of numbered UDP between pods of two workers takes at that time; the next event waits
//! until what was broken is whole and the flow takes its old way again. Events are kept, so a run that was ended goes on.

mod log;

use std::{
    path::Path,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::{
    Cni, Member, Node, Pod,
    carrick::{DEVICES, TUNNEL_PORT, WHOLE_LIMIT},
    faults::{Fault, Traffic},
    traffic::udp::{Count, Flow},
    wait_for,
};

pub use self::log::{Event, Kind, Log, Subject};
use self::log::{LogFile, Mended};
use super::{
    joined::Joined,
    report::{self, Output},
    way::{self, Way},
};
use crate::process::check_interrupted;

/// On each worker: with other addresses a flow takes another way.
const PODS: usize = 3;
/// How long a flow runs before an event, and at least after it.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(3);
/// Packets in each direction that show which way a flow takes, of a thousand in that time.
const LOOK: (Duration, u64) = (Duration::from_millis(500), 200);
/// After an event: so many show that traffic is back.
const ANSWERS: u64 = 100;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many gateway nodes are switched off.
    #[arg(long, default_value_t = 50)]
    kills: usize,
    /// How many links between two gateways are cut.
    #[arg(long, default_value_t = 50)]
    cuts: usize,
    /// How many gateways are drained, and then stopped.
    #[arg(long, default_value_t = 10)]
    drains: usize,
    /// How many agents are ended and started again.
    #[arg(long, default_value_t = 10)]
    restarts: usize,
    /// Network plugin of both members: bridge, host-routing, skip-fib, fabric or strict. The page of results is of the bridge.
    #[arg(long, default_value = "bridge")]
    cni: Cni,
    /// Forgets the events so far.
    #[arg(long)]
    fresh: bool,
    #[arg(short, long, value_enum, default_value_t)]
    output: Output,
}

impl Args {
    fn wanted(&self) -> [(Kind, usize); 4] {
        [(Kind::Kill, self.kills), (Kind::Cut, self.cuts), (Kind::Drain, self.drains), (Kind::Restart, self.restarts)]
    }
}

/// Lets the events that are still wanted happen, and prints what all did; true if every budget holds.
pub fn run(args: &Args, carrick: &Path) -> Result<bool> {
    let mut file = LogFile::open(args.cni, Subject::of(carrick)?, args.fresh)?;
    let wanted = args.wanted();
    if file.log.next(&wanted).is_some() {
        let bench = Bench::new(args.cni, carrick)?;
        while let Some((kind, number)) = file.log.next(&wanted) {
            check_interrupted()?;
            let event = bench.event(kind, number).inspect_err(|_| bench.joined.lab.show_logs());
            let event = event.with_context(|| format!("{} {}", kind.name(), number + 1))?;
            eprintln!("{} {} of {}: {}", kind.name(), number + 1, wanted_of(&wanted, kind), show(&event));
            file.add(event)?;
        }
    }
    let results = file.log.results();
    report::print(&results, args.output);
    Ok(report::ok(&results))
}

fn wanted_of(wanted: &[(Kind, usize)], kind: Kind) -> usize {
    wanted.iter().filter(|(one, _)| *one == kind).map(|(_, wanted)| wanted).sum()
}

fn show(Event { to, gap_ms, lost, mended, .. }: &Event) -> String {
    let mut text = format!("{to}: gap {gap_ms} ms, {lost} lost");
    if let Some(Mended { gap_ms, lost, after_ms }) = mended {
        let seconds = *after_ms as f64 / 1e3;
        text += &format!("; mended: gap {gap_ms} ms, {lost} lost, old way after {seconds:.1} s");
    }
    text
}

/// Two members of three nodes, two of them gateways, the second behind NAT.
struct Bench {
    joined: Joined,
}

/// Whom an event happens to.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    /// A slot of a member, 0 or 1.
    Gateway(usize, u8),
    /// The worker of a member.
    Worker(usize),
    /// Slots of both members.
    Link([u8; 2]),
}

/// The target of an event with that number among its kind: all parts of the ways take turns. A gateway or link is one that
/// the flow uses; there and back it may use different ones.
fn target(kind: Kind, number: usize, [there, back]: [Way; 2]) -> Target {
    let gateways = [Target::Gateway(0, there.from), Target::Gateway(1, there.to)];
    let [first, second] = gateways;
    match (kind, number % 4) {
        (Kind::Kill | Kind::Drain, 0 | 2) => first,
        (Kind::Kill | Kind::Drain, _) => second,
        (Kind::Cut, 0 | 2) => Target::Link([there.from, there.to]),
        (Kind::Cut, _) => Target::Link([back.to, back.from]),
        (Kind::Restart, 0) => Target::Worker(0),
        (Kind::Restart, 1) => first,
        (Kind::Restart, 2) => second,
        (Kind::Restart, _) => Target::Worker(1),
    }
}

/// Which pods of the two workers an event's flow runs between: all pairs take turns, each for four events.
fn pair(number: usize) -> [usize; 2] {
    let turn = number / 4;
    [turn % PODS, turn / PODS % PODS]
}

impl Bench {
    fn new(cni: Cni, carrick: &Path) -> Result<Bench> {
        eprintln!("two members of three nodes, two gateways each ...");
        let mut joined = Joined::new("failover", &Member::pair_of_three(cni), carrick)?;
        let guard = joined.lab.guard().clone();
        for cluster in &mut joined.lab.clusters {
            let worker = cluster.nodes.last_mut().context("a member has nodes")?;
            for _ in 1..PODS {
                worker.add_pod(&guard)?;
            }
        }
        joined.wait_connected()?;
        let bench = Bench { joined };
        for number in (0..PODS * PODS).map(|turn| 4 * turn) {
            let [from, to] = bench.pods(number)?;
            bench.joined.wait_reached(from, to)?;
        }
        Ok(bench)
    }

    fn pods(&self, number: usize) -> Result<[&Pod; 2]> {
        let [from, to] = pair(number);
        let pod = |member: usize, n: usize| self.joined.last(member)?.pods.get(n).context("a worker has its pods");
        Ok([pod(0, from)?, pod(1, to)?])
    }

    /// Lets it happen, and makes whole what it broke.
    fn event(&self, kind: Kind, number: usize) -> Result<Event> {
        let Joined { lab, carrick, .. } = &self.joined;
        let flow = self.flow(number)?;
        sleep(BEFORE);
        let ways = self.ways()?;
        let nodes = self.nodes(&target(kind, number, ways))?;
        let to = nodes.iter().map(|node| node.host.name()).collect::<Vec<_>>().join(" - ");
        let (done, mended) = match (kind, &nodes[..]) {
            (Kind::Kill, [node]) => {
                lab.power_off(node)?;
                self.joined.forget(&to);
                let done = finish(flow)?;
                // Its kernel has lost everything when it is back.
                carrick.cleanup(node)?;
                let on = || lab.power_on(node).and_then(|()| self.joined.start(&to));
                (done, Some(self.mend(number, ways, on)?))
            }
            (Kind::Cut, [one, other]) => {
                let faults = lab.cut(one, other, &Traffic::Udp(TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1))?;
                let done = finish(flow)?;
                (done, Some(self.mend(number, ways, || faults.into_iter().try_for_each(Fault::mend))?))
            }
            (Kind::Drain, [node]) => {
                carrick.drain(node)?;
                self.joined.stop(&to)?;
                let done = finish(flow)?;
                (done, Some(self.mend(number, ways, || self.joined.start(&to))?))
            }
            (Kind::Restart, [_]) => {
                self.joined.restart_agent(&to)?;
                self.joined.wait_connected()?;
                (finish(flow)?, None)
            }
            _ => unreachable!("a link has two ends, everything else is one node"),
        };
        Ok(Event { kind, to, gap_ms: done.longest_gap_ms, lost: done.lost, mended })
    }

    fn flow(&self, number: usize) -> Result<Flow> {
        let [from, to] = self.pods(number)?;
        Flow::between(from, to)
    }

    fn ways(&self) -> Result<[Way; 2]> {
        let (time, packets) = LOOK;
        way::taken(self.joined.clusters(), time, packets)
    }

    fn nodes(&self, target: &Target) -> Result<Vec<&Node>> {
        match *target {
            Target::Gateway(member, slot) => Ok(vec![self.joined.gateway(member, slot)?]),
            Target::Worker(member) => Ok(vec![self.joined.last(member)?]),
            Target::Link([one, other]) => Ok(vec![self.joined.gateway(0, one)?, self.joined.gateway(1, other)?]),
        }
    }

    /// Mends under a flow of its own, and waits until everything is connected and the flow takes these ways again.
    fn mend(&self, number: usize, ways: [Way; 2], mend: impl FnOnce() -> Result<()>) -> Result<Mended> {
        let flow = self.flow(number)?;
        sleep(BEFORE);
        let start = Instant::now();
        mend()?;
        self.joined.wait_connected()?;
        wait_for("the old way", WHOLE_LIMIT, || {
            check_interrupted().map_err(|error| error.to_string())?;
            let now = self.ways().map_err(|error| format!("{error:#}"))?;
            if now == ways { Ok(()) } else { Err(format!("{now:?}, before {ways:?}")) }
        })?;
        let after_ms = u64::try_from(start.elapsed().as_millis())?;
        let Count { longest_gap_ms: gap_ms, lost, .. } = flow.stop()?.back;
        Ok(Mended { gap_ms, lost, after_ms })
    }
}

/// Lets the flow run on until it is answered, and says what became of it, there and back again.
fn finish(flow: Flow) -> Result<Count> {
    sleep(AFTER);
    let before = flow.answered();
    wait_for("answers", WHOLE_LIMIT, || {
        check_interrupted().map_err(|error| error.to_string())?;
        let answered = flow.answered() - before;
        if answered >= ANSWERS { Ok(()) } else { Err(format!("{answered} answers")) }
    })?;
    Ok(flow.stop()?.back)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const WAYS: [Way; 2] = [Way { from: 0, to: 1 }, Way { from: 0, to: 0 }];

    #[test]
    fn every_part_of_the_ways_has_its_turn() {
        let targets = |kind| (0..4).map(|number| target(kind, number, WAYS)).collect::<Vec<_>>();
        let (sender, receiver) = (Target::Gateway(0, 0), Target::Gateway(1, 1));
        assert_eq!(targets(Kind::Restart), [Target::Worker(0), sender.clone(), receiver.clone(), Target::Worker(1)]);
        for kind in [Kind::Kill, Kind::Drain] {
            assert_eq!(targets(kind)[..2], [sender.clone(), receiver.clone()]);
        }
        // Back it goes from slot 0 of the second member to slot 0 of the first.
        assert_eq!(targets(Kind::Cut)[..2], [Target::Link([0, 1]), Target::Link([0, 0])]);
    }

    #[test]
    fn every_pair_of_pods_has_its_turn() {
        let pairs: BTreeSet<_> = (0..4 * PODS * PODS).map(pair).collect();
        assert_eq!(pairs.len(), PODS * PODS);
    }
}
