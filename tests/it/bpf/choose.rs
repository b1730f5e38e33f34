//! The laws of [`ebpf::choose`] and [`ebpf::flow`], on which both the programs and the model rely.

use ebpf::{Addr, SLOTS, choose, flow};
use proptest::prelude::*;

use super::cases::text;

/// No slot carries this much more or less than its part.
const UNEVEN: f64 = 0.05;

fn words(addr: Addr) -> [u32; 4] {
    let word = |at: usize| u32::from_ne_bytes([addr.0[at], addr.0[at + 1], addr.0[at + 2], addr.0[at + 3]]);
    [word(0), word(4), word(8), word(12)]
}

/// Between `count` pods each way: addresses that differ in their last bytes alone, as they do.
fn flows(from: &str, to: &str, count: u16) -> Vec<u32> {
    let pod = |range: &str, number: u16| {
        let mut addr = text(range);
        addr.0[14..].copy_from_slice(&number.to_be_bytes());
        words(addr)
    };
    (1..=count).flat_map(|a| (1..=count).map(move |b| flow(&pod(from, a), &pod(to, b), 6))).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_healthy_slot_is_chosen_wherever_there_is_one(flow: u32, healthy: u8) {
        match choose(flow, healthy) {
            None => prop_assert_eq!(healthy, 0),
            Some(slot) => prop_assert!(slot < SLOTS && healthy & (1 << slot) != 0),
        }
    }

    #[test]
    fn nothing_healthy_moves_when_another_slot_dies(flow: u32, healthy: u8, dies in 0..SLOTS) {
        let before = choose(flow, healthy);
        if before != Some(dies) {
            prop_assert_eq!(choose(flow, healthy & !(1 << dies)), before);
        }
    }

    #[test]
    fn a_slot_that_comes_takes_only_what_it_keeps(flow: u32, healthy: u8, comes in 0..SLOTS) {
        let after = choose(flow, healthy | 1 << comes);
        prop_assert!(after == Some(comes) || after == choose(flow, healthy));
    }
}

#[test]
fn every_healthy_slot_has_its_part() {
    for (from, to) in [("10.42.0.0", "10.44.0.0"), ("2001:db8:42::", "2001:db8:44::")] {
        let flows = flows(from, to, 400);
        for healthy in 1..=u8::MAX {
            let mut parts = [0_u32; SLOTS as usize];
            for flow in &flows {
                parts[usize::from(choose(*flow, healthy).expect("one is healthy"))] += 1;
            }
            let even = flows.len() as f64 / f64::from(healthy.count_ones());
            for (slot, part) in parts.into_iter().enumerate().filter(|(slot, _)| healthy & (1 << slot) != 0) {
                let ratio = f64::from(part) / even;
                assert!((ratio - 1.0).abs() < UNEVEN, "{from}: slot {slot} of {healthy:08b} has {ratio} of its part");
            }
        }
    }
}

/// Slots of a dead one are spread over all others, not handed to one.
#[test]
fn the_flows_of_a_dead_slot_are_spread() {
    let flows = flows("10.42.0.0", "10.44.0.0", 400);
    for dead in 0..SLOTS {
        let moved: Vec<u8> = flows
            .iter()
            .filter(|flow| choose(**flow, u8::MAX) == Some(dead))
            .map(|flow| choose(*flow, !(1 << dead)).expect("seven are healthy"))
            .collect();
        let even = moved.len() as f64 / f64::from(SLOTS - 1);
        for slot in (0..SLOTS).filter(|slot| *slot != dead) {
            let ratio = moved.iter().filter(|other| **other == slot).count() as f64 / even;
            // A seventh of an eighth of the flows: fewer, so less even.
            assert!((ratio - 1.0).abs() < 2.0 * UNEVEN, "slot {slot} takes {ratio} of its part of slot {dead}");
        }
    }
}
