//! Offloads of a link, by ethtool's ioctl (include/uapi/linux/ethtool.h), which every kernel has.
//!
//! Invariant: a feature is told by its name, since the bit that it has differs between kernels.
#![allow(unsafe_code)]

use std::{io, sync::OnceLock};

use super::ifreq;

/// What is received is merged.
pub(super) const GRO: &str = "rx-gro";
/// The device itself cuts what is inside of VXLAN.
pub(super) const TUNNEL_SEGMENTATION: &str = "tx-udp_tnl-segmentation";

/// include/uapi/linux/sockios.h
const SIOCETHTOOL: libc::Ioctl = 0x8946;
const ETHTOOL_GSTRINGS: u32 = 0x1b;
const ETHTOOL_GSSET_INFO: u32 = 0x37;
const ETHTOOL_GFEATURES: u32 = 0x3a;
const ETHTOOL_SFEATURES: u32 = 0x3b;
const ETH_SS_FEATURES: u32 = 4;
/// Bytes of a name: `ETH_GSTRING_LEN`.
const NAME: usize = 32;
/// Words of a block of 32 features, as read (available, requested, active, never changed) and as set (valid, requested).
const READ: usize = 4;
const SET: usize = 2;
const ACTIVE: usize = 2;

/// Whether the feature works on that device; on a kernel that does not know it, it does not.
pub(super) fn is_on(device: &str, feature: &str) -> io::Result<bool> {
    let names = names(device)?;
    let Some(bit) = names.iter().position(|name| name == feature) else { return Ok(false) };
    let blocks = names.len().div_ceil(32);
    let mut words = vec![0; 2 + blocks * READ];
    words[0] = ETHTOOL_GFEATURES;
    words[1] = u32::try_from(blocks).map_err(io::Error::other)?;
    call(device, &mut words)?;
    Ok(words[2 + bit / 32 * READ + ACTIVE] >> (bit % 32) & 1 == 1)
}

/// `Unsupported` on a kernel that does not know the feature, or for a device that cannot have it; off, all have it.
pub(super) fn turn(device: &str, feature: &str, on: bool) -> io::Result<()> {
    if is_on(device, feature)? == on {
        return Ok(());
    }
    let unsupported = || io::Error::new(io::ErrorKind::Unsupported, format!("{device} has no {feature}"));
    let names = names(device)?;
    let bit = names.iter().position(|name| name == feature).ok_or_else(unsupported)?;
    let blocks = names.len().div_ceil(32);
    let mut words = vec![0; 2 + blocks * SET];
    words[0] = ETHTOOL_SFEATURES;
    words[1] = u32::try_from(blocks).map_err(io::Error::other)?;
    let block = 2 + bit / 32 * SET;
    words[block] = 1 << (bit % 32);
    words[block + 1] = u32::from(on) << (bit % 32);
    call(device, &mut words)?;
    // What cannot be set is left out without an error.
    if is_on(device, feature)? == on { Ok(()) } else { Err(unsupported()) }
}

/// The names of all features, by bit: the same for every device of a kernel.
fn names(device: &str) -> io::Result<&'static [String]> {
    static NAMES: OnceLock<Vec<String>> = OnceLock::new();
    if let Some(names) = NAMES.get() {
        return Ok(names);
    }
    // Command, a reserved word, the mask of sets in two words, and the one length that was asked for.
    let mut info = [ETHTOOL_GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0, 0];
    call(device, &mut info)?;
    let count = info[4];
    let names = usize::try_from(count).map_err(io::Error::other)?;
    let mut words = vec![0; 3 + names * NAME / 4];
    (words[0], words[1], words[2]) = (ETHTOOL_GSTRINGS, ETH_SS_FEATURES, count);
    call(device, &mut words)?;
    let bytes: Vec<u8> = words[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let name = |bytes: &[u8]| bytes.iter().take_while(|byte| **byte != 0).map(|byte| char::from(*byte)).collect();
    Ok(NAMES.get_or_init(|| bytes.chunks(NAME).map(name).collect()))
}

/// One request: the kernel writes its answer over it, and never more than the lengths in it say.
fn call(device: &str, words: &mut [u32]) -> io::Result<()> {
    let value = ifreq::Union { ifru_data: words.as_mut_ptr().cast() };
    // SAFETY: it points to words whose number is in them.
    unsafe { ifreq::ask(device, SIOCETHTOOL, value) }.map(drop)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernel::tests::{in_netns, sh};

    #[test]
    fn a_feature_is_what_was_set() {
        in_netns(|| async {
            sh("ip link add veth0 type veth peer name veth1");
            let ethtool = |on: bool| sh(&format!("ethtool -K veth0 gro {}", if on { "on" } else { "off" }));
            let other = is_on("veth1", GRO).unwrap();
            for on in [true, false] {
                turn("veth0", GRO, on).unwrap();
                assert_eq!(is_on("veth0", GRO).unwrap(), on);
                assert_eq!(is_on("veth1", GRO).unwrap(), other);
                ethtool(!on);
                assert_eq!(is_on("veth0", GRO).unwrap(), !on);
            }
        });
    }

    #[test]
    fn what_cannot_be_had_is_an_error() {
        in_netns(|| async {
            sh("ip link add veth0 type veth peer name veth1");
            let kind = |result: io::Result<()>| result.unwrap_err().kind();
            assert_eq!(kind(turn("veth0", "no-such-feature", true)), io::ErrorKind::Unsupported);
            assert_eq!(kind(turn("veth0", "tx-gso-robust", true)), io::ErrorKind::Unsupported);
            assert!(!is_on("veth0", "no-such-feature").unwrap());
            assert_eq!(is_on("none", GRO).unwrap_err().raw_os_error(), Some(libc::ENODEV));
            assert_eq!(kind(turn("a-name-that-is-too-long", TUNNEL_SEGMENTATION, true)), io::ErrorKind::InvalidInput);
        });
    }
}
