//! The maps, pinned by name, and how the programs look into them.
//!
//! Invariant: an [`Addr`] in a map value lies at a multiple of four bytes, so it is read as four words ([`words`]).

use aya_ebpf::{
    helpers::bpf_ktime_get_coarse_ns,
    macros::map,
    maps::{Array, HashMap, LpmTrie, PerCpuArray, RingBuf, lpm_trie},
};
use ebpf::{
    Addr, Answer, CLAIM_NS, Config, Count, Home, Known, MAX_MEMBER_ID, Node, Offered, Reach, Reason, Remote, Wake,
    capacity, sent,
};

/// An address as four words, each as it lies in memory: comparing and copying bytes costs four times the instructions.
pub type Words = [u32; 4];

/// [`Addr::NONE`].
pub const NONE: Words = [0; 4];
/// The third word of an IPv4 address.
pub const V4_MARK: u32 = 0xffff_u32.to_be();

/// Members, the own id included.
const MEMBERS: u32 = MAX_MEMBER_ID as u32 + 1;

#[map]
static REMOTE: LpmTrie<Words, Remote> = LpmTrie::pinned(capacity::REMOTE, 0);
#[map]
static OWN: LpmTrie<Words, Offered> = LpmTrie::pinned(capacity::OWN, 0);
#[map]
static VERSION: Array<u64> = Array::pinned(1, 0);
#[map]
static KNOWN: PerCpuArray<Known> = PerCpuArray::pinned(capacity::KNOWN, 0);
#[map]
static HOMES: LpmTrie<Words, Home> = LpmTrie::pinned(capacity::HOMES, 0);
#[map]
static NODES: HashMap<Words, Node> = HashMap::pinned(capacity::NODES, 0);
#[map]
static CONFIG: Array<Config> = Array::pinned(1, 0);
#[map]
static HEALTH: Array<Reach> = Array::pinned(MEMBERS, 0);
#[map]
static TRAFFIC: Array<u64> = Array::pinned(MEMBERS, 0);
#[map]
static WAKE: RingBuf = RingBuf::pinned(capacity::WAKE, 0);
#[map]
static ANSWER: Array<Answer> = Array::pinned(2, 0);
#[map]
static PROBED: Array<u64> = Array::pinned(1, 0);
#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::pinned(capacity::DROPS, 0);
#[map]
static SENT: PerCpuArray<Count> = PerCpuArray::pinned(sent::LEN, 0);

/// A whole address as the key of a longest-prefix map.
#[repr(C)]
struct Key {
    bits: u32,
    addr: Words,
}

#[inline(always)]
fn longest<'a, V>(map: &'a LpmTrie<Words, V>, addr: &Words) -> Option<&'a V> {
    let key = Key { bits: 128, addr: *addr };
    // SAFETY: the same fields in the same order, and aya's key is packed, so any alignment will do.
    map.get(unsafe { &*(&raw const key).cast::<lpm_trie::Key<Words>>() })
}

#[inline(always)]
pub fn remote(addr: &Words) -> Option<&Remote> {
    longest(&REMOTE, addr)
}

#[inline(always)]
pub fn home(addr: &Words) -> Option<Words> {
    longest(&HOMES, addr).map(|home| words(&home.node))
}

#[inline(always)]
pub fn node(addr: &Words) -> Option<&Node> {
    // SAFETY: the agent alone writes the map, and an entry that is replaced while we read it is one or the other.
    unsafe { NODES.get(addr) }
}

/// Whether `addr` is what this member offers to `member`.
#[inline(always)]
pub fn is_offered(addr: &Words, member: u16) -> bool {
    let Some(offered) = longest(&OWN, addr) else { return false };
    offered.members[usize::from(member >> 6) & 63] & (1 << (member & 63)) != 0
}

/// The place in `KNOWN` of a flow's addresses, or null, and the tables' version as of now. All of it is always set, as in
/// [`Verdict`](super::decide::Verdict).
#[derive(Clone, Copy)]
pub struct Place {
    version: u64,
    entry: *mut Known,
}

#[inline(always)]
pub fn place(flow: u32) -> Place {
    let version = VERSION.get(0).copied().unwrap_or(0);
    let entry = KNOWN.get_ptr_mut(flow & (capacity::KNOWN - 1));
    Place { version, entry: entry.unwrap_or(core::ptr::null_mut()) }
}

impl Place {
    #[inline(always)]
    pub fn known(&self, source: &Words, destination: &Words) -> Option<&Known> {
        if self.entry.is_null() {
            return None;
        }
        // SAFETY: an entry of an array; it is this processor's, and a program is not interrupted by itself.
        let known = unsafe { &*self.entry };
        let right = known.version == self.version
            && words(&known.source) == *source
            && words(&known.destination) == *destination;
        right.then_some(known)
    }

    #[inline(always)]
    pub fn learn(self, source: &Words, destination: &Words, kind: u8, member: u16, node: &Words) {
        if self.entry.is_null() {
            return;
        }
        let addr = |words: &Words| {
            // SAFETY: 16 bytes.
            Addr(unsafe { core::mem::transmute::<Words, [u8; 16]>(*words) })
        };
        let (source, destination, node) = (addr(source), addr(destination), addr(node));
        let known = Known { version: self.version, source, destination, node, member, kind, zero: [0; 5] };
        // SAFETY: as above.
        unsafe { self.entry.write(known) };
    }
}

/// `None` until the agent has written it.
#[inline(always)]
pub fn config() -> Option<&'static Config> {
    CONFIG.get(0).filter(|config| config.hop_ifindex != 0)
}

#[inline(always)]
pub fn health(member: u16) -> Reach {
    HEALTH.get(u32::from(member)).copied().unwrap_or_default()
}

#[inline(always)]
pub fn traffic(member: u16) -> Option<*mut u64> {
    TRAFFIC.get_ptr_mut(u32::from(member))
}

#[inline(always)]
pub fn answer() -> Option<&'static Answer> {
    ANSWER.get(0)
}

/// Whom this gateway reaches, as far as somebody stands behind it.
#[inline(always)]
pub fn reached() -> Option<&'static [u8; 512]> {
    ANSWER.get(u32::from(!is_probed())).map(|answer| &answer.members)
}

/// Whether the prober is there.
#[inline(always)]
pub fn is_probed() -> bool {
    // It may be written meanwhile, to a later time than now.
    PROBED.get(0).is_some_and(|last| now().saturating_sub(*last) <= CLAIM_NS)
}

/// CLOCK_MONOTONIC, coarse, nanoseconds.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: takes nothing.
    unsafe { bpf_ktime_get_coarse_ns() }
}

#[inline(always)]
pub fn wake(member: u16) {
    // Where the ring is full the agent is behind anyway, and finds the time in TRAFFIC.
    let _full = WAKE.output::<Wake>(Wake { member: u32::from(member) }, 0);
}

#[inline(always)]
pub fn count_drop(reason: Reason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: per CPU, and a program is not interrupted by itself.
        unsafe { *count += 1 };
    }
}

/// Counts what leaves by index `way` of `SENT`.
#[inline(always)]
pub fn count_sent(way: u32, packets: u32, bytes: u32) {
    if let Some(count) = SENT.get_ptr_mut(way) {
        // SAFETY: as above.
        unsafe {
            (*count).packets += u64::from(packets);
            (*count).bytes += u64::from(bytes);
        }
    }
}

/// The address as words.
#[inline(always)]
pub fn words(addr: &Addr) -> Words {
    // SAFETY: 16 bytes that are valid as words, at a multiple of four (the invariant of this module).
    unsafe { core::ptr::from_ref(addr).cast::<Words>().read() }
}
