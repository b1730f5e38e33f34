//! The bytes of a probe.

use ebpf::{
    Answer,
    probe::{ANSWER, ASK, FLAGS, LEN, MAGIC, MEMBERS, MTU, NONCE, TYPE},
};

/// An ask of `len` bytes, at least [`LEN`]: zeros where its answer says something.
pub(super) fn ask(nonce: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len.max(LEN)];
    bytes[..MAGIC.len()].copy_from_slice(&MAGIC);
    bytes[TYPE] = ASK;
    bytes[NONCE..NONCE + 8].copy_from_slice(&nonce.to_be_bytes());
    bytes
}

/// The nonce and what is said; `None` for whatever is no answer.
pub(super) fn answer(bytes: &[u8]) -> Option<(u64, Answer)> {
    if bytes.len() < LEN || !bytes.starts_with(&MAGIC) || bytes[TYPE] != ANSWER {
        return None;
    }
    let nonce = u64::from_be_bytes(bytes[NONCE..NONCE + 8].try_into().ok()?);
    let mtu = bytes[MTU..MTU + 2].try_into().ok()?;
    let members = bytes[MEMBERS..LEN].try_into().ok()?;
    Some((nonce, Answer { flags: bytes[FLAGS], zero: 0, mtu, members }))
}

/// What the kernel of the other side does to an ask.
#[cfg(test)]
pub(super) fn answer_in_place(bytes: &mut [u8], said: &Answer) {
    bytes[TYPE] = ANSWER;
    bytes[FLAGS] = said.flags;
    bytes[MTU..MTU + 2].copy_from_slice(&said.mtu);
    bytes[MEMBERS..LEN].copy_from_slice(&said.members);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_is_answered_in_place_is_read_back(
            nonce: u64, flags: u8, mtu: [u8; 2], byte in 0..512usize, bits: u8, len in 0..2000usize,
        ) {
            let mut said = Answer { flags, zero: 0, mtu, members: [0; 512] };
            said.members[byte] = bits;
            let mut bytes = ask(nonce, len);
            prop_assert_eq!(bytes.len(), len.max(LEN));
            prop_assert_eq!(answer(&bytes), None);
            answer_in_place(&mut bytes, &said);
            prop_assert_eq!(answer(&bytes), Some((nonce, said)));
            prop_assert_eq!(answer(&bytes[..LEN - 1]), None);
        }

        #[test]
        fn nothing_that_comes_can_panic(bytes: Vec<u8>) {
            prop_assert_eq!(answer(&bytes), None);
        }
    }
}
