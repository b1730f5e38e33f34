//! The entry points that the agent attaches.
#![allow(unsafe_code)]

use core::mem::MaybeUninit;

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
        let mut key = MaybeUninit::<bpf_tunnel_key>::uninit();
        // SAFETY: the helper writes the whole key, zeros where it fails.
        let get = |key: &mut MaybeUninit<bpf_tunnel_key>, flags: u32| unsafe {
            helpers::bpf_skb_get_tunnel_key(skb.0, key.as_mut_ptr(), KEY_LEN, u64::from(flags)) as i32
        };
        match get(&mut key, 0) {
            0 => {}
            OTHER_FAMILY if get(&mut key, BPF_F_TUNINFO_IPV6) == 0 => {
                // SAFETY: written, and of this family.
                let (vni, remote) =
                    unsafe { (key.assume_init_ref().tunnel_id, key.assume_init_ref().__bindgen_anon_1.remote_ipv6) };
                return Some(Key { vni, remote });
            }
            _ => return None,
        }
        // SAFETY: as above.
        let (vni, remote) =
            unsafe { (key.assume_init_ref().tunnel_id, key.assume_init_ref().__bindgen_anon_1.remote_ipv4) };
        Some(Key { vni, remote: [0, 0, V4_MARK, remote.to_be()] })
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
