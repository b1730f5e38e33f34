//! The lab's own BPF programs: what a network plugin with eBPF host routing attaches, as instructions.
//!
//! They are this short because helpers do the work; so no compiler for BPF is needed to run the lab.

use std::{collections::BTreeMap, net::IpAddr};

use ipnetwork::IpNetwork;

use crate::sys::Instruction;

// Registers, and the frame pointer.
const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
const R5: u8 = 5;
/// The packet (`struct __sk_buff`), in every program here.
const PACKET: u8 = 6;
/// 4 or 6: the packet's IP version.
const VERSION: u8 = 7;
const FP: u8 = 10;

// Sizes of memory accesses.
const BYTE: u8 = 0x10;
const HALF: u8 = 0x08;
const WORD: u8 = 0x00;
const DOUBLE: u8 = 0x18;

// Helper functions (bpf-helpers(7)).
const SKB_STORE_BYTES: i32 = 9;
const L3_CSUM_REPLACE: i32 = 10;
const SKB_LOAD_BYTES: i32 = 26;
const FIB_LOOKUP: i32 = 69;
const REDIRECT_NEIGH: i32 = 152;

// Fields of `struct __sk_buff`.
const SKB_PROTOCOL: i16 = 16;
const SKB_IFINDEX: i16 = 40;

/// `struct bpf_fib_lookup`, 64 bytes, and what it says.
const FIB: i16 = -64;
const FIB_PROTOCOL: i16 = FIB + 1;
const FIB_IFINDEX: i16 = FIB + 8;
const FIB_SOURCE: i16 = FIB + 16;
const FIB_DESTINATION: i16 = FIB + 32;
const FIB_SUCCESS: i32 = 0;
/// Blackhole, unreachable and prohibit are 1 to 3.
const FIB_PROHIBIT: i32 = 3;
const FIB_NO_NEIGHBOUR: i32 = 7;
/// `struct bpf_redir_neigh`, 20 bytes: family, next hop.
const NEXT_HOP: i16 = -88;
/// The packet's IP header: 20 or 40 bytes.
const HEADER: i16 = -128;

// Offsets in the IP header, by version.
const TTL: [i16; 2] = [8, 7];
const NEXT_PROTOCOL: [i16; 2] = [9, 6];
const SOURCE: [i16; 2] = [12, 8];
const DESTINATION: [i16; 2] = [16, 24];
const ETHERNET: i32 = 14;

// Verdicts of tc and tcx programs. PASS ends the chain.
const PASS: i32 = 0;
const DROP: i32 = 2;

/// For what a pod sends and what comes from the network: forwarded where the FIB says, rules included, past the stack.
/// What is for this node, and what the FIB does not know how to forward, goes to the stack.
pub(super) fn forward_by_fib() -> Vec<Instruction> {
    let mut asm = Assembler::default();
    asm.parse();
    (0..8).for_each(|i| asm.store_immediate(DOUBLE, FIB + 8 * i, 0));
    asm.jump_equal(VERSION, 6, "v6");
    for (version, family, words) in [(0, libc::AF_INET, 1), (1, libc::AF_INET6, 4)] {
        if version == 1 {
            asm.label("v6");
        }
        asm.store_immediate(BYTE, FIB, family);
        asm.copy(BYTE, HEADER + NEXT_PROTOCOL[version], FIB_PROTOCOL);
        for word in 0..words {
            asm.copy(WORD, HEADER + SOURCE[version] + 4 * word, FIB_SOURCE + 4 * word);
            asm.copy(WORD, HEADER + DESTINATION[version] + 4 * word, FIB_DESTINATION + 4 * word);
        }
        if version == 0 {
            asm.jump("lookup");
        }
    }
    asm.label("lookup");
    asm.load(WORD, R1, PACKET, SKB_IFINDEX);
    asm.store(WORD, FIB_IFINDEX, R1);
    asm.set(R1, PACKET);
    asm.set_stack(R2, FIB);
    asm.set_immediate(R3, 64);
    asm.set_immediate(R4, 0);
    asm.call(FIB_LOOKUP);
    asm.jump_equal(R0, FIB_SUCCESS, "forward");
    asm.jump_equal(R0, FIB_NO_NEIGHBOUR, "forward");
    asm.jump_at_most(R0, FIB_PROHIBIT, "drop");
    asm.jump("pass");
    asm.label("forward");
    asm.count_hop();
    // The lookup has put the gateway, of whatever family, in the destination's place.
    asm.load(BYTE, R1, FP, FIB);
    asm.store(WORD, NEXT_HOP, R1);
    (0..4).for_each(|word| asm.copy(WORD, FIB_DESTINATION + 4 * word, NEXT_HOP + 4 + 4 * word));
    asm.load(WORD, R1, FP, FIB_IFINDEX);
    asm.set_stack(R2, NEXT_HOP);
    asm.set_immediate(R3, 20);
    asm.set_immediate(R4, 0);
    asm.call(REDIRECT_NEIGH);
    asm.exit();
    asm.verdicts()
}

/// For what a pod sends: what goes to none of the `local` networks leaves by the interface `uplink`, whatever rules say.
pub(super) fn forward_out(uplink: u32, local: &[IpNetwork]) -> Vec<Instruction> {
    let mut asm = Assembler::default();
    asm.parse();
    asm.jump_equal(VERSION, 6, "v6");
    local.iter().filter(|network| network.is_ipv4()).for_each(|network| asm.pass_if_to(network));
    asm.jump("out");
    asm.label("v6");
    local.iter().filter(|network| network.is_ipv6()).for_each(|network| asm.pass_if_to(network));
    asm.label("out");
    asm.count_hop();
    asm.set_immediate(R1, uplink.cast_signed());
    asm.set_immediate(R2, 0);
    asm.set_immediate(R3, 0);
    asm.set_immediate(R4, 0);
    asm.call(REDIRECT_NEIGH);
    asm.exit();
    asm.verdicts()
}

/// Ends the chain: no program behind it sees a packet.
pub(super) fn pass() -> Vec<Instruction> {
    say(PASS)
}

/// The same verdict for everything.
pub(super) fn say(verdict: i32) -> Vec<Instruction> {
    let mut asm = Assembler::default();
    asm.set_immediate(R0, verdict);
    asm.exit();
    asm.code
}

#[derive(Default)]
struct Assembler {
    code: Vec<Instruction>,
    labels: BTreeMap<String, usize>,
    /// Places of jumps, and where they lead.
    jumps: Vec<(usize, String)>,
}

impl Assembler {
    /// Loads the header; what is not IP, is multicast or link-local, or has no hop left goes to the stack.
    fn parse(&mut self) {
        self.set(PACKET, R1);
        self.load(WORD, R1, PACKET, SKB_PROTOCOL);
        for (version, ether_type, bytes, first_not_forwarded) in [(0, 0x0800_u16, 20, 224), (1, 0x86dd, 40, 0xfe)] {
            let next = format!("not {version}");
            self.jump_unequal(R1, u16::from_be(ether_type).into(), &next);
            self.set(R1, PACKET);
            self.set_immediate(R2, ETHERNET);
            self.set_stack(R3, HEADER);
            self.set_immediate(R4, bytes);
            self.call(SKB_LOAD_BYTES);
            self.jump_unequal(R0, 0, "pass");
            self.load(BYTE, R1, FP, HEADER + DESTINATION[version]);
            self.jump_at_least(R1, first_not_forwarded, "pass");
            self.load(BYTE, R1, FP, HEADER + TTL[version]);
            self.jump_at_most(R1, 1, "pass");
            self.set_immediate(VERSION, if version == 0 { 4 } else { 6 });
            self.jump("parsed");
            self.label(&next);
        }
        self.jump("pass");
        self.label("parsed");
    }

    fn pass_if_to(&mut self, network: &IpNetwork) {
        let (octets, version) = match network.network() {
            IpAddr::V4(v4) => (v4.octets().to_vec(), 0),
            IpAddr::V6(v6) => (v6.octets().to_vec(), 1),
        };
        let mask = match network.mask() {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let other = format!("not {network}");
        let word = |bytes: &[u8], i: usize| i32::from_ne_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        for i in (0..octets.len()).step_by(4) {
            let offset = i16::try_from(i).expect("an address is short");
            self.load(WORD, R1, FP, HEADER + DESTINATION[version] + offset);
            self.and(R1, word(&mask, i));
            self.jump_unequal(R1, word(&octets, i), &other);
        }
        self.jump("pass");
        self.label(&other);
    }

    /// Takes one from the TTL or hop limit.
    fn count_hop(&mut self) {
        self.jump_equal(VERSION, 6, "count v6");
        self.load(HALF, R3, FP, HEADER + TTL[0]);
        self.decrement(HEADER + TTL[0]);
        self.load(HALF, R4, FP, HEADER + TTL[0]);
        self.set(R1, PACKET);
        self.set_immediate(R2, ETHERNET + 10);
        self.set_immediate(R5, 2);
        self.call(L3_CSUM_REPLACE);
        self.jump_unequal(R0, 0, "drop");
        self.write_back(TTL[0]);
        self.jump("counted");
        self.label("count v6");
        self.decrement(HEADER + TTL[1]);
        self.write_back(TTL[1]);
        self.label("counted");
        self.jump_unequal(R0, 0, "drop");
    }

    /// Only the low byte of R1 counts.
    fn decrement(&mut self, at: i16) {
        self.load(BYTE, R1, FP, at);
        self.push(0x07, R1, 0, 0, -1);
        self.store(BYTE, at, R1);
    }

    /// Stores one byte of the header in the packet.
    fn write_back(&mut self, offset: i16) {
        self.set(R1, PACKET);
        self.set_immediate(R2, ETHERNET + i32::from(offset));
        self.set_stack(R3, HEADER + offset);
        self.set_immediate(R4, 1);
        self.set_immediate(R5, 0);
        self.call(SKB_STORE_BYTES);
    }

    /// Ends the program with the places that jumps to `pass` and `drop` lead to.
    fn verdicts(mut self) -> Vec<Instruction> {
        for (label, verdict) in [("pass", PASS), ("drop", DROP)] {
            self.label(label);
            self.set_immediate(R0, verdict);
            self.exit();
        }
        for (at, label) in &self.jumps {
            let target = self.labels.get(label).unwrap_or_else(|| panic!("no label {label}"));
            // Forwards only: the verifier sees no loop.
            self.code[*at].offset = i16::try_from(target - at - 1).expect("a short program");
        }
        self.code
    }

    fn label(&mut self, label: &str) {
        self.labels.insert(label.to_owned(), self.code.len());
    }

    fn push(&mut self, code: u8, destination: u8, source: u8, offset: i16, immediate: i32) {
        let registers =
            if cfg!(target_endian = "little") { source << 4 | destination } else { destination << 4 | source };
        self.code.push(Instruction { code, registers, offset, immediate });
    }

    fn set(&mut self, to: u8, from: u8) {
        self.push(0xbf, to, from, 0, 0);
    }

    fn set_immediate(&mut self, to: u8, value: i32) {
        self.push(0xb7, to, 0, 0, value);
    }

    /// The address of a place on the stack.
    fn set_stack(&mut self, to: u8, at: i16) {
        self.set(to, FP);
        self.push(0x07, to, 0, 0, at.into());
    }

    fn and(&mut self, register: u8, mask: i32) {
        self.push(0x54, register, 0, 0, mask);
    }

    fn load(&mut self, size: u8, to: u8, base: u8, offset: i16) {
        self.push(0x61 | size, to, base, offset, 0);
    }

    fn store(&mut self, size: u8, at: i16, from: u8) {
        self.push(0x63 | size, FP, from, at, 0);
    }

    fn store_immediate(&mut self, size: u8, at: i16, value: i32) {
        self.push(0x62 | size, FP, 0, at, value);
    }

    fn copy(&mut self, size: u8, from: i16, to: i16) {
        self.load(size, R1, FP, from);
        self.store(size, to, R1);
    }

    fn call(&mut self, helper: i32) {
        self.push(0x85, 0, 0, 0, helper);
    }

    fn exit(&mut self) {
        self.push(0x95, 0, 0, 0, 0);
    }

    fn jump(&mut self, label: &str) {
        self.branch(0x05, 0, 0, label);
    }

    // Comparisons are of 32 bits: immediates of 64 would be extended by their sign.
    fn jump_equal(&mut self, register: u8, value: i32, label: &str) {
        self.branch(0x16, register, value, label);
    }

    fn jump_unequal(&mut self, register: u8, value: i32, label: &str) {
        self.branch(0x56, register, value, label);
    }

    fn jump_at_least(&mut self, register: u8, value: i32, label: &str) {
        self.branch(0x36, register, value, label);
    }

    fn jump_at_most(&mut self, register: u8, value: i32, label: &str) {
        self.branch(0xb6, register, value, label);
    }

    fn branch(&mut self, code: u8, register: u8, value: i32, label: &str) {
        self.jumps.push((self.code.len(), label.to_owned()));
        self.push(code, register, 0, 0, value);
    }
}
