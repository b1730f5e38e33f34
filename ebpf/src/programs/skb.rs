//! The packet as the kernel lends it: fields of `__sk_buff`, and the helpers that take one.
//!
//! Invariant: every helper's failure is an [`Err`]; nothing here decides.

use core::mem::MaybeUninit;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_INGRESS, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC},
    helpers,
};

/// A helper refused.
#[derive(Clone, Copy, Debug)]
pub struct Refused;

#[derive(Clone, Copy)]
pub struct Skb(pub *mut __sk_buff);

#[inline(always)]
fn ok(code: i64) -> Result<(), Refused> {
    if code == 0 { Ok(()) } else { Err(Refused) }
}

macro_rules! fields {
    ($($field:ident)*) => {
        $(#[inline(always)]
        pub fn $field(self) -> u32 {
            // SAFETY: the context is valid while the program runs.
            unsafe { (*self.0).$field }
        })*
    };
}

impl Skb {
    fields!(len ingress_ifindex ifindex gso_size);

    /// The Ethernet type, in host order.
    #[inline(always)]
    pub fn protocol(self) -> u16 {
        // SAFETY: as above.
        u16::from_be(unsafe { (*self.0).protocol } as u16)
    }

    #[inline(always)]
    pub fn clear_mark(self) {
        // SAFETY: as above.
        unsafe { (*self.0).mark = 0 };
    }

    /// `T` must be valid for any bytes. `None` beyond the packet's end.
    #[inline(always)]
    pub fn load<T: Copy>(self, offset: u32) -> Option<T> {
        let mut value = MaybeUninit::<T>::uninit();
        // SAFETY: the helper writes all of `value` or fails.
        let code = unsafe {
            helpers::bpf_skb_load_bytes(self.0.cast(), offset, value.as_mut_ptr().cast(), size_of::<T>() as u32)
        };
        // SAFETY: written, and every `T` that is loaded is made of integers.
        if code == 0 { Some(unsafe { value.assume_init() }) } else { None }
    }

    /// For bytes that no checksum covers, or whose checksum is replaced too.
    #[inline(always)]
    pub fn store<T>(self, offset: u32, value: &T) -> Result<(), Refused> {
        self.store_flags(offset, value, 0)
    }

    /// For bytes whose change no checksum in the packet makes up for.
    #[inline(always)]
    pub fn store_recomputed<T>(self, offset: u32, value: &T) -> Result<(), Refused> {
        self.store_flags(offset, value, u64::from(BPF_F_RECOMPUTE_CSUM))
    }

    #[inline(always)]
    fn store_flags<T>(self, offset: u32, value: &T, flags: u64) -> Result<(), Refused> {
        let value = core::ptr::from_ref(value).cast();
        // SAFETY: the helper reads a whole `T`.
        ok(unsafe { helpers::bpf_skb_store_bytes(self.0.cast(), offset, value, size_of::<T>() as u32, flags) })
    }

    /// Replaces what the transport checksum at `offset` covers. `size` 0: `to` is the difference of two sums. One that the
    /// kernel has still to fill in (CHECKSUM_PARTIAL) stays as it is.
    #[inline(always)]
    pub fn replace_l4(self, offset: u32, from: u64, to: u64, flags: u32) -> Result<(), Refused> {
        // SAFETY: takes no memory.
        ok(unsafe { helpers::bpf_l4_csum_replace(self.0.cast(), offset, from, to, u64::from(flags)) })
    }

    #[inline(always)]
    pub fn change_type(self, kind: u32) -> Result<(), Refused> {
        // SAFETY: takes no memory.
        ok(unsafe { helpers::bpf_skb_change_type(self.0, kind) })
    }

    #[inline(always)]
    pub fn change_tail(self, len: u32) -> Result<(), Refused> {
        // SAFETY: takes no memory.
        ok(unsafe { helpers::bpf_skb_change_tail(self.0, len, 0) })
    }

    /// Room before the first byte, for a link header where there is none.
    #[inline(always)]
    pub fn change_head(self, len: u32) -> Result<(), Refused> {
        // SAFETY: takes no memory.
        ok(unsafe { helpers::bpf_skb_change_head(self.0, len, 0) })
    }

    /// Room between the link header, if any, and the network header; the latter then begins in the new room.
    #[inline(always)]
    pub fn insert_network(self, len: u32) -> Result<(), Refused> {
        // SAFETY: takes no memory.
        ok(unsafe { helpers::bpf_skb_adjust_room(self.0, len as i32, BPF_ADJ_ROOM_MAC, 0) })
    }

    #[inline(always)]
    pub fn pull(self, len: u32) -> Result<(), Refused> {
        // SAFETY: takes no memory.
        ok(unsafe { helpers::bpf_skb_pull_data(self.0, len) })
    }

    /// The bytes from `offset`, if `N` of them lie in one piece.
    #[inline(always)]
    pub fn bytes<const N: usize>(self, offset: u32) -> Option<*const [u8; N]> {
        // SAFETY: the context is valid while the program runs.
        let (data, end) = unsafe { ((*self.0).data as usize, (*self.0).data_end as usize) };
        let start = data + offset as usize;
        if start + N > end { None } else { Some(start as *const [u8; N]) }
    }
}

/// The sum of `add` less that of `subtract` (null: none), on top of `seed`.
#[inline(always)]
pub fn sum<const N: usize>(subtract: *const [u8; N], add: *const [u8; N], seed: u32) -> Result<u32, Refused> {
    let size = |bytes: *const [u8; N]| if bytes.is_null() { 0 } else { N as u32 };
    // SAFETY: each is null with size 0, or N readable bytes.
    let sum = unsafe {
        helpers::bpf_csum_diff(subtract.cast_mut().cast(), size(subtract), add.cast_mut().cast(), size(add), seed)
    };
    u32::try_from(sum).map_err(|_| Refused)
}

/// `value`, known to fit `mask`: the compiler removes a mask that it finds superfluous, the verifier cannot find that.
#[inline(always)]
pub fn bounded(value: u32, mask: u32) -> u32 {
    core::hint::black_box(value) & mask
}

#[inline(always)]
pub fn redirect(ifindex: u32) -> i32 {
    // SAFETY: takes no memory.
    unsafe { helpers::bpf_redirect(ifindex, 0) as i32 }
}

#[inline(always)]
pub fn redirect_ingress(ifindex: u32) -> i32 {
    // SAFETY: takes no memory.
    unsafe { helpers::bpf_redirect(ifindex, u64::from(BPF_F_INGRESS)) as i32 }
}
