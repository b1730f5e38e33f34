//! The entry points for test runs: the key comes from `TEST_KEY`, what became of the packet goes into `TEST_SEEN`.
#![allow(unsafe_code)]

use aya_ebpf::{
    macros::{classifier, map},
    maps::Array,
    programs::TcContext,
};
use ebpf::{Addr, TestKey, TestSeen};

use crate::programs::{
    self, Entry,
    act::NEXT,
    decide::Key,
    maps::{Words, words},
    skb::Skb,
};

#[map]
static TEST_KEY: Array<TestKey> = Array::with_max_entries(1, 0);
#[map]
static TEST_SEEN: Array<TestSeen> = Array::with_max_entries(1, 0);

struct Test;

impl Entry for Test {
    #[inline(always)]
    fn key(_: Skb) -> Option<Key> {
        let key = TEST_KEY.get(0).filter(|key| key.remote != Addr::NONE)?;
        Some(Key { vni: key.vni, remote: words(&key.remote) })
    }

    #[inline(always)]
    fn saw(kind: u32, ifindex: u32, reason: u32) {
        if let Some(seen) = TEST_SEEN.get_ptr_mut(0) {
            // SAFETY: the runs of a test follow each other.
            unsafe { ((*seen).kind, (*seen).ifindex, (*seen).reason) = (kind, ifindex, reason) };
        }
    }

    #[inline(always)]
    fn keyed(vni: u32, remote: &Words, local: &Words) {
        if let Some(seen) = TEST_SEEN.get_ptr_mut(0) {
            // SAFETY: as above; the addresses lie at multiples of four, like all in map values.
            unsafe {
                (*seen).vni = vni;
                (&raw mut (*seen).remote).cast::<Words>().write(*remote);
                (&raw mut (*seen).local).cast::<Words>().write(*local);
            }
        }
    }
}

#[classifier]
pub fn test_steer(context: TcContext) -> i32 {
    programs::steer::<Test>(Skb(context.skb.skb))
}

#[classifier]
pub fn test_steer_native(context: TcContext) -> i32 {
    programs::steer_native::<Test>(Skb(context.skb.skb))
}

#[classifier]
pub fn test_from_hop(context: TcContext) -> i32 {
    programs::from_hop::<Test>(Skb(context.skb.skb))
}

#[classifier]
pub fn test_to_peer(context: TcContext) -> i32 {
    programs::to_peer::<Test>(Skb(context.skb.skb))
}

#[classifier]
pub fn test_from_peer(context: TcContext) -> i32 {
    programs::from_peer::<Test>(Skb(context.skb.skb))
}

/// What a test run costs by itself.
#[classifier]
pub fn test_nothing(_: TcContext) -> i32 {
    NEXT
}
