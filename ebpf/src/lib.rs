//! The numbers that the BPF programs, their maps and the agent must agree on.
//!
//! The programs come later; these bounds are already part of the wire formats (a probe carries one bit per member id).

#![no_std]

/// Largest member id. Ids 0 to this, one bit each, fill a probe's 512-byte bitmap.
pub const MAX_MEMBER_ID: u16 = 4095;
const _: () = assert!((MAX_MEMBER_ID as usize + 1) / 8 == 512);

/// Gateway slots of a member: ordinals 0 to 7.
pub const SLOTS: u8 = 8;
