//! WireGuard keys: parsed once, never printed when private, wiped when dropped.

use std::{fmt, str::FromStr};

use base64::{Engine, engine::general_purpose::STANDARD};
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// An X25519 public key (RFC 7748) that is neither zero nor of low order. `Display` is base64.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PublicKey([u8; 32]);

/// An X25519 private key. `Debug` is `PrivateKey(..)`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PrivateKey([u8; 32]);

/// A WireGuard preshared key. `Debug` is `PresharedKey(..)`.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct PresharedKey([u8; 32]);

/// Tells one preshared key from another without being one: SHA-256 of a label and the key, its first 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PskId([u8; 8]);

/// Why a text is no key. Never holds the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadKey {
    #[error("is not base64")]
    NotBase64,
    #[error("is {0} bytes long, a key has 32")]
    Length(usize),
    #[error("is all zeros")]
    Zero,
    #[error("is a point of low order: anybody could read what is sent to it")]
    LowOrder,
}

fn decode(text: &str) -> Result<Zeroizing<[u8; 32]>, BadKey> {
    let bytes = Zeroizing::new(STANDARD.decode(text).map_err(|_| BadKey::NotBase64)?);
    let mut key = Zeroizing::new([0; 32]);
    if bytes.len() != key.len() {
        return Err(BadKey::Length(bytes.len()));
    }
    key.copy_from_slice(&bytes);
    if *key == [0; 32] { Err(BadKey::Zero) } else { Ok(key) }
}

/// Every encoding, without its highest bit, of a point of low order: 0, 1, two points of order 8 and p - 1, where p is
/// 2^255 - 19; and p and p + 1, which are 0 and 1 again. A multiplication would tell them, too, and a mesh of hundreds of gateways
/// would be made of little else at each of its changes.
const LOW_ORDER: [[u8; 32]; 7] = [
    [
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    ],
    [
        0x01, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
        0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00, 0x00,
    ],
    [
        0xe0, 0xeb, 0x7a, 0x7c, 0x3b, 0x41, 0xb8, 0xae, 0x16, 0x56, 0xe3, 0xfa, 0xf1, 0x9f, 0xc4, 0x6a, 0xda, 0x09,
        0x8d, 0xeb, 0x9c, 0x32, 0xb1, 0xfd, 0x86, 0x62, 0x05, 0x16, 0x5f, 0x49, 0xb8, 0x00,
    ],
    [
        0x5f, 0x9c, 0x95, 0xbc, 0xa3, 0x50, 0x8c, 0x24, 0xb1, 0xd0, 0xb1, 0x55, 0x9c, 0x83, 0xef, 0x5b, 0x04, 0x44,
        0x5c, 0xc4, 0x58, 0x1c, 0x8e, 0x86, 0xd8, 0x22, 0x4e, 0xdd, 0xd0, 0x9f, 0x11, 0x57,
    ],
    [
        0xec, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ],
    [
        0xed, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ],
    [
        0xee, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
        0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f,
    ],
];

impl PublicKey {
    /// Refuses zero and the points of low order (RFC 7748 §6.1: they give a shared secret of zero).
    pub fn new(bytes: [u8; 32]) -> Result<PublicKey, BadKey> {
        if bytes == [0; 32] {
            return Err(BadKey::Zero);
        }
        // X25519 does not look at the highest bit (RFC 7748 §5).
        let mut point = bytes;
        point[31] &= 0x7f;
        if LOW_ORDER.contains(&point) { Err(BadKey::LowOrder) } else { Ok(PublicKey(bytes)) }
    }

    /// Of bytes that came from a [`PublicKey`] before.
    pub(crate) fn assume_valid(bytes: [u8; 32]) -> PublicKey {
        PublicKey(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for PublicKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<PublicKey, BadKey> {
        PublicKey::new(*decode(text)?)
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&STANDARD.encode(self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl PrivateKey {
    pub fn new(bytes: [u8; 32]) -> PrivateKey {
        PrivateKey(bytes)
    }

    pub fn public(&self) -> PublicKey {
        PublicKey(x25519_dalek::x25519(self.0, x25519_dalek::X25519_BASEPOINT_BYTES))
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// For writing to a file that only its owner reads.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0))
    }
}

impl FromStr for PrivateKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<PrivateKey, BadKey> {
        decode(text).map(|key| PrivateKey(*key))
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PrivateKey(..)")
    }
}

impl PresharedKey {
    pub fn new(bytes: [u8; 32]) -> PresharedKey {
        PresharedKey(bytes)
    }

    pub fn id(&self) -> PskId {
        let hash = Sha256::new().chain_update(b"carrick psk 1\0").chain_update(self.0).finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&hash[..8]);
        PskId(id)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl FromStr for PresharedKey {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<PresharedKey, BadKey> {
        decode(text).map(|key| PresharedKey(*key))
    }
}

impl fmt::Debug for PresharedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PresharedKey(..)")
    }
}

/// What authenticates the hop between the nodes of one cluster. Never printed.
#[derive(Clone, PartialEq, Eq, Zeroize, ZeroizeOnDrop)]
pub struct HopSecret([u8; 32]);

/// What a hop secret is to the packets: it is derived from it and shows nothing else of it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct HopMark {
    /// 24 bits.
    pub vni: u32,
    /// Inner destination MAC: unicast, locally administered.
    pub mac: [u8; 6],
}

/// Tells one hop secret from another: SHA-256 of a label and its [`HopMark`], its first 8 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct HopId([u8; 8]);

impl HopSecret {
    pub fn new(bytes: [u8; 32]) -> HopSecret {
        HopSecret(bytes)
    }

    /// For writing to a file that only its owner reads.
    pub fn to_base64(&self) -> Zeroizing<String> {
        Zeroizing::new(STANDARD.encode(self.0))
    }

    /// The same on every node that has the secret: h = SHA-256 of a label and it; VNI = h\[0..3\], MAC = h\[3..9\].
    pub fn mark(&self) -> HopMark {
        let h = Sha256::new().chain_update(b"carrick hop 1\0").chain_update(self.0).finalize();
        let mac = [(h[3] & 0xfc) | 2, h[4], h[5], h[6], h[7], h[8]];
        HopMark { vni: u32::from_be_bytes([0, h[0], h[1], h[2]]), mac }
    }
}

impl HopMark {
    pub fn id(&self) -> HopId {
        let hash = Sha256::new().chain_update(b"carrick hop id 1\0").chain_update(self.vni.to_be_bytes());
        let hash = hash.chain_update(self.mac).finalize();
        let mut id = [0; 8];
        id.copy_from_slice(&hash[..8]);
        HopId(id)
    }
}

impl FromStr for HopSecret {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<HopSecret, BadKey> {
        decode(text).map(|key| HopSecret(*key))
    }
}

impl fmt::Debug for HopSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HopSecret(..)")
    }
}

impl fmt::Debug for HopMark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HopMark(..)")
    }
}

impl HopId {
    pub fn from_bytes(bytes: [u8; 8]) -> HopId {
        HopId(bytes)
    }
}

impl fmt::Display for HopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for HopId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HopId({self})")
    }
}

impl PskId {
    pub fn from_bytes(bytes: [u8; 8]) -> PskId {
        PskId(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 8] {
        &self.0
    }
}

impl fmt::Display for PskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PskId({self})")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Any clamped scalar is a multiple of 8, the order of the small subgroup, and takes a point of low order to zero.
    fn is_low(point: [u8; 32]) -> bool {
        x25519_dalek::x25519([0x55; 32], point) == [0; 32]
    }

    #[test]
    fn every_point_of_low_order_is_refused_with_either_highest_bit() {
        for point in LOW_ORDER {
            for bit in [0, 0x80] {
                let mut key = point;
                key[31] |= bit;
                assert!(is_low(key));
                assert!(matches!(PublicKey::new(key), Err(BadKey::Zero | BadKey::LowOrder)), "{key:?}");
            }
        }
    }

    proptest! {
        /// Also next to the seven, where a slip in a table would be.
        #[test]
        fn no_other_point_is_refused(any in any::<[u8; 32]>(), which in 0..LOW_ORDER.len(), byte in 0..32_usize, near: bool) {
            let mut key = any;
            if near {
                key = LOW_ORDER[which];
                key[byte] ^= any[0];
            }
            prop_assert_eq!(PublicKey::new(key).is_err(), is_low(key));
        }
    }
}
