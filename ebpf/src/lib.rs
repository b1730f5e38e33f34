//! The bytes that the BPF programs and the agent share: map keys and values, wire formats, reasons; and the one choice
//! that both must make alike, [`choose`].
//!
//! Everything is `repr(C)` with explicit widths and no padding, sizes asserted here. Numbers are in the machine's order
//! unless said otherwise; addresses, ports on the wire and MACs are bytes in network order.

#![no_std]

/// Version of everything in this file that is pinned. Maps live in bpffs under `carrick/v<ABI>`. Health and counters go
/// over from one version to the next by name, as long as their sizes are the same.
pub const ABI: u32 = 2;

/// Largest member id. Ids 0 to this, one bit each, fill a probe's 512-byte bitmap.
pub const MAX_MEMBER_ID: u16 = 4095;
const _: () = assert!((MAX_MEMBER_ID as usize + 1) / 8 == 512);

/// Gateway slots of a member: ordinals 0 to 7.
pub const SLOTS: u8 = 8;

/// In place of a slot: none.
pub const NO_SLOT: u8 = 255;

/// Secrets that a hop may be authenticated by at one time: the first sends, both are accepted.
pub const HOP_SECRETS: usize = 2;

/// Entries that each map can hold.
pub mod capacity {
    pub const REMOTE: u32 = 65_536;
    pub const OWN: u32 = 256;
    pub const HOMES: u32 = 131_072;
    pub const NODES: u32 = 16_384;
    /// Of each processor; a power of two.
    pub const KNOWN: u32 = 1024;
    /// Bytes.
    pub const WAKE: u32 = 65_536;
    /// More than there are reasons, so that a new one fits into a map that is pinned.
    pub const DROPS: u32 = 64;
}

/// An IPv6 address, or an IPv4 address as `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2). All zeros: none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Addr(pub [u8; 16]);

impl Addr {
    pub const NONE: Addr = Addr([0; 16]);

    pub const fn v4(a: [u8; 4]) -> Addr {
        Addr([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]])
    }
}

/// The length of an IPv4 prefix as one of [`Addr`]s is this plus its own.
pub const V4_PREFIX: u32 = 96;

/// Value of `REMOTE`, the longest-prefix map of remote prefixes and of every member's overlay prefix, the own included.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remote {
    pub member: u16,
    /// One of [`remote`].
    pub kind: u8,
    pub zero: u8,
}

/// What a remote prefix is.
pub mod remote {
    /// Offered to this member: steered to one of the member's gateways.
    pub const RANGE: u8 = 1;
    /// An overlay /64: host parts 1 to 8 are slots, others nodes.
    pub const OVERLAY: u8 = 2;
    /// An endpoint inside a range: the member is known by it, but it is not steered.
    pub const CARVED: u8 = 3;
}

/// Value of `OWN`, the longest-prefix map of what this member advertises: the members that it is offered to, bit
/// `id % 64` of word `id / 64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offered {
    pub members: [u64; 64],
}

/// Value of `KNOWN`, what a processor last found in the tables (`REMOTE`, `OWN`, `HOMES`, `NODES`, `CONFIG`) for a pair of
/// addresses that is admitted. It counts for as long as `VERSION` is what it was before they were asked: who changes one of
/// them adds one to that afterwards.
/// An entry of zeros never counts: `CONFIG` was written, or no program reads this, and that made a version of 1.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    pub version: u64,
    pub source: Addr,
    pub destination: Addr,
    /// Of [`known::TO_MEMBER`] and [`known::TO_HERE`] the node that it comes from by the hop, or [`Addr::NONE`]: from this
    /// one. Of [`known::FROM_PEER`] its home.
    pub node: Addr,
    /// Of [`known::TO_MEMBER`]; or 0, which no member is.
    pub member: u16,
    /// One of [`known`].
    pub kind: u8,
    pub zero: [u8; 5],
}

/// What is known of a pair of addresses.
pub mod known {
    /// The destination is in a range of a member that the source is offered to.
    pub const TO_MEMBER: u8 = 1;
    /// From the hop to what lives here.
    pub const TO_HERE: u8 = 2;
    /// From a peer to what is offered to it.
    pub const FROM_PEER: u8 = 3;
}

/// Value of `HOMES`, the longest-prefix map of where this cluster's pods (and nodes' advertised and overlay addresses)
/// live: the node's first hop address (IPv4 if it has one); [`Addr::NONE`] is this node.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Home {
    pub node: Addr,
}

/// Value of `NODES`, keyed by every hop address of every other node of this cluster.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its slot, or [`NO_SLOT`]: a worker.
    pub slot: u8,
    pub zero: [u8; 3],
    /// The address by which `HOMES` knows it: a node may have one of each family.
    pub home: Addr,
}

/// The one value of `CONFIG`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    /// Hop addresses of this cluster's slots, by family (IPv4, IPv6); [`Addr::NONE`]: no such slot, or no address of the
    /// family. This node's own slot has none.
    pub gateways: [[Addr; SLOTS as usize]; 2],
    /// This node's hop addresses, by family: the outer source.
    pub hop: [Addr; 2],
    /// This node's overlay address: its slot's on a gateway, its own on a worker.
    pub overlay: Addr,
    /// Index of `carrick-hop`.
    pub hop_ifindex: u32,
    /// Indexes of `carrick-wg0` to `carrick-wg7`; 0: no such device.
    pub wireguard: [u32; SLOTS as usize],
    /// VNI of each hop secret, 24 bits.
    pub vni: [u32; HOP_SECRETS],
    /// Inner destination MAC of each hop secret.
    pub mac: [[u8; 6]; HOP_SECRETS],
    /// The MAC of `carrick-hop` on this node.
    pub hop_mac: [u8; 6],
    /// This member's id.
    pub member: u16,
    /// Bytes of an inner packet towards a member whose path MTU is not known.
    pub mtu: u16,
    /// Bytes of an inner packet that the hop carries.
    pub hop_mtu: u16,
    /// UDP port of WireGuard device 0.
    pub wireguard_port: u16,
    /// UDP port of the hop.
    pub hop_port: u16,
    /// UDP port of probes, both source and destination.
    pub probe_port: u16,
    /// This node's slot, or [`NO_SLOT`].
    pub slot: u8,
    /// Hop secrets in use, 0 to 2.
    pub secrets: u8,
}

/// Value of `HEALTH`, by member id. The prober alone writes it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reach {
    /// Bit s: this cluster's slot s, on another node, reaches the member.
    pub via: u8,
    /// Bit s: this gateway reaches the member's slot s.
    pub links: u8,
    /// Bytes of an inner packet that reach the member's pods whatever the way; on a worker, that reach its own gateways,
    /// which know the rest; 0: not known.
    pub mtu: u16,
    /// Where `links` is 0: those that were the last. What other nodes sent here, not knowing yet, goes by these; it cannot
    /// go by the hop again.
    pub kept: u8,
    pub zero: [u8; 3],
}

/// The first value of `ANSWER`: what this node's probe answers say. The prober alone writes it. The second is never
/// written: it is who is reached where nobody has measured it, see [`CLAIM_NS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// [`probe::DRAINING`] or 0.
    pub flags: u8,
    pub zero: u8,
    /// Bytes, network order.
    pub mtu: [u8; 2],
    /// Members that this gateway reaches: bit `id % 8` of byte `id / 8`.
    pub members: [u8; 512],
}

/// A probe: a UDP payload of at least [`probe::LEN`] bytes; what is beyond only fills, to try a packet size. An ask is as
/// long as its answer, so that it is answered in place.
pub mod probe {
    pub const MAGIC: [u8; 4] = *b"CRK1";
    pub const ASK: u8 = 1;
    pub const ANSWER: u8 = 2;
    /// Flag: this gateway is being drained.
    pub const DRAINING: u8 = 1;

    // Offsets in the payload.
    pub const TYPE: usize = 4;
    pub const FLAGS: usize = 5;
    /// u16, network order.
    pub const MTU: usize = 6;
    /// u64, chosen by the asker.
    pub const NONCE: usize = 8;
    pub const MEMBERS: usize = 16;
    pub const LEN: usize = 528;
}

/// The one value of `PROBED` is when the prober last stood behind its word (CLOCK_MONOTONIC, nanoseconds). So long after,
/// this gateway says that it reaches nobody, and sends its own packets by other gateways where it knows some: its
/// tunnels may have died together with the prober. Where nobody knows better this changes nothing.
pub const CLAIM_NS: u64 = 2_000_000_000;

/// One record of the ring `WAKE`: traffic towards a member after [`IDLE_NS`] without.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wake {
    pub member: u32,
}

/// `TRAFFIC`, by member id, is when a packet towards it was last steered (CLOCK_MONOTONIC, coarse, nanoseconds), exact to
/// this.
pub const TRAFFIC_NS: u64 = 500_000_000;
/// After so long without traffic the next packet is told in `WAKE`.
pub const IDLE_NS: u64 = 4_000_000_000;

/// The indexes of `SENT`, per CPU: each packet that was steered is counted at one.
pub mod sent {
    use super::SLOTS;

    /// By a gateway of this cluster, over the hop: this plus its slot.
    pub const HOP: u32 = 0;
    /// By a WireGuard device, what this node sends: this plus the device's number.
    pub const DEVICE: u32 = SLOTS as u32;
    /// By a WireGuard device, what other nodes send through this gateway.
    pub const FOR_NODES: u32 = 2 * SLOTS as u32;
    /// What peers send through this gateway, to its own pods or on over the hop.
    pub const FROM_PEERS: u32 = 3 * SLOTS as u32;
    /// What was found on a native device: the network plugin had taken it past the node's routes. It is counted by the way
    /// that it left by as well.
    pub const PAST_ROUTES: u32 = FROM_PEERS + 1;
    pub const LEN: u32 = PAST_ROUTES + 1;
}

/// Value of `SENT`: probes are not counted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// As they are on the wire: a GSO packet counts its segments.
    pub packets: u64,
    pub bytes: u64,
}

/// Value of `TEST_KEY`, which only the object for test runs has: the tunnel key that the packet comes with. A test run cannot
/// give it one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TestKey {
    /// The other end. [`Addr::NONE`]: the packet has no tunnel key.
    pub remote: Addr,
    pub vni: u32,
}

/// Value of `TEST_SEEN`, which only the object for test runs has: what the last run decided. A test run shows neither a
/// redirect's device nor a tunnel key. The test zeroes it before.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TestSeen {
    /// One of [`seen`].
    pub kind: u32,
    /// Where it was redirected to, or 0.
    pub ifindex: u32,
    /// The index into `DROPS` that was counted, plus one; 0: none. A packet that was answered as too big was counted.
    pub reason: u32,
    /// The tunnel key that was set, or zeros.
    pub vni: u32,
    pub remote: Addr,
    pub local: Addr,
}

/// Where a test run's packet went.
pub mod seen {
    /// On, as it was: to the next program, the device or the stack.
    pub const NEXT: u32 = 1;
    /// Up the stack of this node, as a packet for this host.
    pub const STACK: u32 = 2;
    /// Out by the hop with a tunnel key: redirected to `carrick-hop`, or on where it is there already (no index).
    pub const HOP: u32 = 3;
    /// Redirected to a WireGuard device.
    pub const DEVICE: u32 = 4;
    /// Redirected into the ingress of `carrick-hop`.
    pub const INGRESS: u32 = 5;
    /// Dropped.
    pub const DROP: u32 = 6;
}

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident => $text:literal,)*) => {
        /// Why a packet was dropped: the index into `DROPS`, per CPU. A closed list; new reasons go to the end.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Reason {
            $($(#[$doc])* $reason,)*
        }

        impl Reason {
            pub const ALL: &[Reason] = &[$(Reason::$reason,)*];

            /// As metrics and status write it.
            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Reason::$reason => $text,)*
                }
            }
        }
    };
}

reasons! {
    /// `CONFIG` is not written yet.
    NotConfigured => "not_configured",
    /// Neither IPv4 nor IPv6, on one of our own devices.
    NotIp => "not_ip",
    /// Shorter than its headers say.
    Truncated => "truncated",
    /// On `carrick-hop`, towards an address of no member.
    NotRemote => "not_remote",
    /// The own source is not offered to the member of the destination.
    SourceNotOffered => "source_not_offered",
    /// No gateway towards the member was ever healthy.
    NoGateway => "no_gateway",
    /// The chosen WireGuard device does not exist, or this cluster has no hop address for the chosen slot.
    NoDevice => "no_device",
    /// From a tunnel, with a source that no member was accepted with.
    ForeignSource => "foreign_source",
    /// From a tunnel, towards what was not offered to that member.
    NotOffered => "not_offered",
    /// Towards an overlay address, and not a probe.
    NotForOverlay => "not_for_overlay",
    /// A probe that does not look like one.
    MalformedProbe => "malformed_probe",
    /// Towards a pod that lives on no known node.
    NoHome => "no_home",
    /// From the hop, with a wrong VNI or inner MAC.
    HopUnauthenticated => "hop_unauthenticated",
    /// From the hop, from no node of this cluster, or from a worker to a worker.
    HopUnknownNode => "hop_unknown_node",
    /// From the hop, with an inner source that does not live where the outer one says, or towards what is not here.
    HopForeignSource => "hop_foreign_source",
    /// A pod's UDP to the hop port.
    HopForged => "hop_forged",
    /// Our own WireGuard's UDP towards a remote range: a loop.
    Loop => "loop",
    /// Larger than the way carries; the sender was told by ICMP where it could be.
    TooBig => "too_big",
    /// A kernel helper refused.
    HelperFailed => "helper_failed",
}

/// IPv6 extension headers that are looked behind: hop-by-hop, routing, destination and fragment ones. What follows a
/// fragment header is not looked behind at all.
pub const MAX_EXTENSIONS: usize = 4;

/// The slot that carries a flow: rendezvous hashing over the set bits of `healthy`, so that nothing healthy moves when
/// another slot dies, and both families of hashes spread evenly. `None` if no bit is set.
#[inline(always)]
pub const fn choose(flow: u32, healthy: u8) -> Option<u8> {
    let mut best = 0;
    let mut chosen = NO_SLOT;
    let mut slot = 0;
    while slot < SLOTS {
        if healthy & (1 << slot) != 0 {
            let weight = mix(flow ^ (slot as u32 + 1).wrapping_mul(0x9e37_79b9));
            if chosen == NO_SLOT || weight > best {
                best = weight;
                chosen = slot;
            }
        }
        slot += 1;
    }
    if chosen == NO_SLOT { None } else { Some(chosen) }
}

/// What a flow is to [`choose`]: its addresses, as [`Addr`]s of four words that are read as they lie in memory, and its
/// protocol (IPv4's, or IPv6's last next header that can be told without ports), the same for every fragment.
#[inline(always)]
pub const fn flow(source: &[u32; 4], destination: &[u32; 4], protocol: u8) -> u32 {
    let mut hash = protocol as u64;
    let mut i = 0;
    while i < 4 {
        let words = (source[i] as u64) << 32 | destination[i] as u64;
        hash = (hash ^ words).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash ^= hash >> 32;
        i += 1;
    }
    mix(hash as u32)
}

/// A 32-bit finalizer: every input bit flips every output bit with a probability near one half.
#[inline(always)]
const fn mix(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

const _: () = {
    assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 1);
    assert!(size_of::<Remote>() == 4);
    assert!(size_of::<Offered>() == 512);
    assert!(size_of::<Known>() == 64 && capacity::KNOWN.is_power_of_two());
    assert!(size_of::<Home>() == 16);
    assert!(size_of::<Node>() == 20);
    assert!(size_of::<Config>() == 380 && align_of::<Config>() == 4);
    assert!(size_of::<Reach>() == 8);
    assert!(size_of::<Answer>() == 516 && align_of::<Answer>() == 1);
    assert!(size_of::<Wake>() == 4);
    assert!(size_of::<Count>() == 16);
    assert!(size_of::<TestKey>() == 20);
    assert!(size_of::<TestSeen>() == 48);
    assert!(Reason::ALL.len() <= capacity::DROPS as usize);
};

#[cfg(not(target_arch = "bpf"))]
mod pod {
    #![allow(unsafe_code)]
    use super::{Addr, Answer, Config, Count, Home, Node, Offered, Reach, Remote, TestKey, TestSeen, Wake};

    // SAFETY: each is `repr(C)` of integers and byte arrays, without padding: the sizes asserted above are the sums of
    // their fields.
    unsafe impl aya::Pod for Addr {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Remote {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Offered {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Home {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Node {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Config {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Reach {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Answer {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Wake {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Count {}
    // SAFETY: as above.
    unsafe impl aya::Pod for TestKey {}
    // SAFETY: as above.
    unsafe impl aya::Pod for TestSeen {}
}
