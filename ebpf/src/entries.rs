//! The entry points that the agent attaches.
#![allow(unsafe_code)]

use aya_ebpf::{
    bindings::{BPF_F_TUNINFO_IPV6, bpf_tunnel_key},
    helpers,
    macros::classifier,
    programs::TcContext,
};

use crate::programs::{
    self, Entry,
    act::KEY_LEN,
    decide::Key,
    maps::{V4_MARK, Words},
    skb::Skb,
};

/// `-EPROTO`: the key is of the other family.
const OTHER_FAMILY: i32 = -71;

struct Run;

impl Entry for Run {
    #[inline(always)]
    fn key(skb: Skb) -> Option<Key> {
        // SAFETY: integers, for which zeros are valid.
        let mut key: bpf_tunnel_key = unsafe { core::mem::zeroed() };
        // SAFETY: the helper writes the key.
        let code = unsafe { helpers::bpf_skb_get_tunnel_key(skb.0, &raw mut key, KEY_LEN, 0) };
        if code == 0 {
            // SAFETY: of a key of this family it is what the helper wrote.
            let remote = unsafe { key.__bindgen_anon_1.remote_ipv4 };
            return Some(Key { vni: key.tunnel_id, remote: [0, 0, V4_MARK, remote.to_be()] });
        }
        if code as i32 != OTHER_FAMILY {
            return None;
        }
        // SAFETY: as above.
        let code =
            unsafe { helpers::bpf_skb_get_tunnel_key(skb.0, &raw mut key, KEY_LEN, u64::from(BPF_F_TUNINFO_IPV6)) };
        // SAFETY: as above.
        let remote = unsafe { key.__bindgen_anon_1.remote_ipv6 };
        (code == 0).then_some(Key { vni: key.tunnel_id, remote })
    }

    #[inline(always)]
    fn saw(_: u32, _: u32, _: u32) {}

    #[inline(always)]
    fn keyed(_: u32, _: &Words, _: &Words) {}
}

#[classifier]
pub fn steer(context: TcContext) -> i32 {
    programs::steer::<Run>(Skb(context.skb.skb))
}

#[classifier]
pub fn steer_native(context: TcContext) -> i32 {
    programs::steer_native::<Run>(Skb(context.skb.skb))
}

#[classifier]
pub fn from_hop(context: TcContext) -> i32 {
    programs::from_hop::<Run>(Skb(context.skb.skb))
}

#[classifier]
pub fn to_peer(context: TcContext) -> i32 {
    programs::to_peer::<Run>(Skb(context.skb.skb))
}

#[classifier]
pub fn from_peer(context: TcContext) -> i32 {
    programs::from_peer::<Run>(Skb(context.skb.skb))
}
