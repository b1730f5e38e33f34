//! Every program agrees with its model on generated packets: what it returns, what it did to the packet, the tunnel key,
//! and every counter.
//!
//! `CARRICK_BPF_CASES` says how many packets in all, 10^6 where it is not set.

use std::{cell::RefCell, collections::BTreeMap, env};

use agent::state::Program;
use ebpf::{IDLE_NS, Reason, TRAFFIC_NS, sent};
use nix::time::{ClockId, clock_gettime};
use proptest::{
    collection::vec,
    prelude::*,
    sample::select,
    test_runner::{Config, TestCaseError, TestError, TestRunner},
};

use super::{
    cases::{Case, MEMBERS, Way, case, world},
    check::{differs, hex},
    maps::Counters,
    model::{Outcome, Sent, Verdict, World},
    run::{Loaded, model_of},
};

/// Packets in each world, on average.
const IN_A_WORLD: usize = 100;

/// How long ago something was last steered, in nanoseconds, at the start; `None`: never.
type Age = Option<u64>;
const AGES: [Age; 4] = [None, Some(10_000_000_000), Some(1_000_000_000), Some(0)];

fn wanted() -> usize {
    let all =
        env::var("CARRICK_BPF_CASES").map_or(1_000_000, |text| text.parse().expect("CARRICK_BPF_CASES is a number"));
    all / Program::ALL.len()
}

fn agrees(program: Program, way: Way) {
    let loaded = RefCell::new(Loaded::new(program).expect("the kernel takes the program"));
    let (ran, kinds) = (RefCell::new(0), RefCell::new(BTreeMap::<String, usize>::new()));
    while *ran.borrow() < wanted() {
        let worlds = ((wanted() - *ran.borrow()) / IN_A_WORLD + 1) as u32;
        let ages = vec(select(AGES.to_vec()), MEMBERS.len());
        let strategy = (world(), ages, vec(case(way), 1..2 * IN_A_WORLD));
        let config = Config { cases: worlds, failure_persistence: None, max_shrink_iters: 4096, ..Config::default() };
        let result = TestRunner::new(config).run(&strategy, |(world, ages, cases)| {
            *ran.borrow_mut() += cases.len();
            let outcomes = one_world(program, &mut loaded.borrow_mut(), &world, &ages, &cases)?;
            for outcome in outcomes {
                *kinds.borrow_mut().entry(kind(&outcome)).or_default() += 1;
            }
            Ok(())
        });
        match result {
            Ok(()) => {}
            Err(TestError::Abort(reason)) => panic!("{}: {reason}", program.name()),
            Err(TestError::Fail(reason, (world, ages, cases))) => {
                panic!("{}: {reason}\nafter {} others, ages {ages:?}\n{world:x?}", program.name(), cases.len() - 1)
            }
        }
    }
    println!("{}: {} packets", program.name(), ran.borrow());
    for (kind, count) in kinds.borrow().iter() {
        println!("  {count:>8}  {kind}");
    }
}

/// What the generated packets came to, for the reader: a kind that is missing was not tested.
fn kind(outcome: &Outcome) -> String {
    match (outcome.verdict, outcome.dropped) {
        (Verdict::Drop, Some(reason)) => format!("drop {}", reason.as_str()),
        (verdict, reason) => {
            let verdict = match verdict {
                Verdict::Next => "next",
                Verdict::Stack => "stack",
                Verdict::Hop(..) => "hop",
                Verdict::Device(_) => "device",
                Verdict::Ingress(_) => "ingress",
                Verdict::Drop => "drop",
            };
            format!("{verdict} {}", reason.map_or("", Reason::as_str))
        }
    }
}

fn now() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).expect("the clock is there");
    now.tv_sec().cast_unsigned() * 1_000_000_000 + now.tv_nsec().cast_unsigned()
}

fn one_world(
    program: Program,
    loaded: &mut Loaded,
    world: &World,
    ages: &[Age],
    cases: &[Case],
) -> Result<Vec<Outcome>, TestCaseError> {
    let failed = |error: anyhow::Error| TestCaseError::fail(format!("{error:#}"));
    let model = model_of(program);
    loaded.maps.write(world).map_err(failed)?;
    let started = now();
    let steered: BTreeMap<u16, u64> =
        MEMBERS.into_iter().zip(ages.iter().map(|age| age.map_or(0, |age| started.saturating_sub(age)))).collect();
    for (member, at) in &steered {
        loaded.maps.set_traffic(*member, *at).map_err(failed)?;
    }
    loaded.maps.woken();
    let before = loaded.maps.counters().map_err(failed)?;
    let mut expected = Counters::default();
    let mut outcomes = Vec::with_capacity(cases.len());
    for case in cases {
        let frame = case.packet.bytes();
        let outcome = model(world, &frame, &case.context);
        let ran = loaded.run(&frame, &case.context).map_err(|error| failed(error.context(hex(&frame))))?;
        if let Some(wrong) = differs(&outcome, &ran) {
            return Err(TestCaseError::fail(format!(
                "{wrong}\nof the packet\n{}{case:x?}\nthe model says {:x?} {:?}",
                hex(&frame),
                outcome.verdict,
                outcome.dropped
            )));
        }
        expected.outcome(&outcome);
        if program == Program::SteerNative && case.context.ingress_ifindex != 0 {
            outcome.sent.iter().for_each(|sent| expected.send(sent::PAST_ROUTES, sent.packets, sent.bytes));
        }
        outcomes.push(outcome);
    }
    let counted = loaded.maps.counters().map_err(failed)?.since(&before);
    prop_assert_eq!(counted, expected);
    traffic(loaded, &steered, started, &outcomes)?;
    Ok(outcomes)
}

/// `TRAFFIC` and `WAKE` tell exactly of the members that packets were steered to.
fn traffic(
    loaded: &mut Loaded,
    before: &BTreeMap<u16, u64>,
    started: u64,
    outcomes: &[Outcome],
) -> Result<(), TestCaseError> {
    let after = loaded.maps.traffic().map_err(|error| TestCaseError::fail(format!("{error:#}")))?;
    let ended = now();
    let mut wakes = Vec::new();
    for (member, &before) in before {
        let after = after[member];
        let steered = outcomes.iter().any(|outcome| outcome.towards == Some(*member));
        let updated = after >= started && after <= ended;
        let old = started - before >= TRAFFIC_NS;
        // A run that took long may have made the youngest old.
        let may_be_kept = !steered || !old;
        let may_be_updated = steered && (old || ended - before >= TRAFFIC_NS);
        prop_assert!(
            may_be_kept && after == before || may_be_updated && updated,
            "TRAFFIC of {member}: {before} became {after}, from {started} to {ended}, steered: {steered}"
        );
        if steered && started - before >= IDLE_NS {
            wakes.push(u32::from(*member));
        }
    }
    let mut woken = loaded.maps.woken();
    woken.sort_unstable();
    prop_assert_eq!(woken, wakes);
    Ok(())
}

impl Counters {
    fn outcome(&mut self, outcome: &Outcome) {
        if let Some(reason) = outcome.dropped {
            self.drop(reason);
        }
        if let Some(Sent { index, packets, bytes }) = outcome.sent {
            self.send(index, packets, bytes);
        }
    }
}

#[test]
fn steer_agrees_with_its_model() {
    agrees(Program::Steer, Way::Out);
}

#[test]
fn steer_native_agrees_with_its_model() {
    agrees(Program::SteerNative, Way::Out);
}

#[test]
fn from_hop_agrees_with_its_model() {
    agrees(Program::FromHop, Way::Hop);
}

#[test]
fn to_peer_agrees_with_its_model() {
    agrees(Program::ToPeer, Way::Out);
}

#[test]
fn from_peer_agrees_with_its_model() {
    agrees(Program::FromPeer, Way::In);
}
