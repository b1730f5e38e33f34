//! Address ranges: what a well-formed claim is, and which of many ranges overlaps one.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnetwork::IpNetwork;

use super::{Reason, Refusal, quoted, refusal};
use crate::api::limits::{CIDR_CHARS, WIDEST_V4, WIDEST_V6};

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(first: u16, sixth: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(first, 0, 0, 0, 0, sixth, 0, last))
}

/// What no claim may touch and no endpoint may be (RFC 6890): first address, prefix length, reason, what it is.
const SPECIAL: [(IpAddr, u8, Reason, &str); 10] = [
    (v4(0, 0, 0, 0), 8, Reason::Unspecified, "the unspecified range 0.0.0.0/8"),
    (v4(127, 0, 0, 0), 8, Reason::Loopback, "the loopback range 127.0.0.0/8"),
    (v4(169, 254, 0, 0), 16, Reason::LinkLocal, "the link-local range 169.254.0.0/16"),
    (v4(224, 0, 0, 0), 4, Reason::Multicast, "the multicast range 224.0.0.0/4"),
    (v4(255, 255, 255, 255), 32, Reason::Broadcast, "the broadcast address 255.255.255.255"),
    (v6(0, 0, 0), 128, Reason::Unspecified, "the unspecified range ::/128"),
    (v6(0, 0, 1), 128, Reason::Loopback, "the loopback range ::1/128"),
    (v6(0, 0xffff, 0), 96, Reason::V4Mapped, "the IPv4-mapped range ::ffff:0:0/96"),
    (v6(0xfe80, 0, 0), 10, Reason::LinkLocal, "the link-local range fe80::/10"),
    (v6(0xff00, 0, 0), 8, Reason::Multicast, "the multicast range ff00::/8"),
];

/// Whether `ip` lies in the range that starts at `first`; false across families.
fn within(ip: IpAddr, first: IpAddr, prefix: u8) -> bool {
    IpNetwork::new(first, prefix).is_ok_and(|range| range.contains(ip))
}

/// Why the address can be no host of anybody's, and what it is.
pub(super) fn special(ip: IpAddr) -> Option<(Reason, &'static str)> {
    let found = SPECIAL.iter().find(|(first, prefix, ..)| within(ip, *first, *prefix));
    found.map(|(_, _, reason, what)| (*reason, *what))
}

/// Parses a claim: address and prefix length, canonical, not too wide, and holding nothing special.
pub(super) fn parse(text: &str) -> Result<IpNetwork, Refusal> {
    let given = syntax(text)?;
    let range = canonical(given);
    if let Some((reason, what)) = special(range.ip()) {
        return Err(refusal(reason, touching(given, reason, what)));
    }
    let widest = if range.is_ipv4() { WIDEST_V4 } else { WIDEST_V6 };
    if range.prefix() < widest {
        let message = format!("{given} is wider than /{widest}: name the ranges that are in use");
        return Err(refusal(Reason::TooWide, message));
    }
    // A range as wide as a /8 can hold special addresses without starting at one.
    if let Some((.., reason, what)) = SPECIAL.iter().find(|(first, ..)| range.contains(*first)) {
        return Err(refusal(*reason, touching(given, *reason, what)));
    }
    if given != range {
        return Err(refusal(Reason::HostBits, format!("{given} has host bits set: did you mean {range}?")));
    }
    Ok(range)
}

fn touching(range: IpNetwork, reason: Reason, what: &str) -> String {
    if range.prefix() == 0 {
        return format!("{range} is a default route, which no member may claim: name the ranges that pods use");
    }
    if let (Reason::V4Mapped, IpAddr::V6(ip), 96..) = (reason, range.network(), range.prefix()) {
        let plain = format!("{}/{}", Ipv4Addr::from_bits(ip.to_bits() as u32), range.prefix() - 96);
        if parse(&plain).is_ok() {
            return format!("{range} is an IPv4 range in IPv6 form: write {plain}");
        }
    }
    format!("{range} overlaps {what}, which cannot be routed: name the ranges that pods use")
}

/// What the range is without its host bits.
fn canonical(range: IpNetwork) -> IpNetwork {
    // The prefix comes from a range, so it fits the family.
    IpNetwork::new(range.network(), range.prefix()).unwrap_or(range)
}

/// `address/length`, the length in plain decimal: netmasks, signs and leading zeros mean different things elsewhere.
fn syntax(text: &str) -> Result<IpNetwork, Refusal> {
    let bad = |message| Err(refusal(Reason::InvalidCidr, message));
    let Some((ip, prefix)) = text.split_once('/').filter(|_| text.len() <= CIDR_CHARS) else {
        return bad(match text.parse::<IpAddr>() {
            Ok(ip) => format!("{ip} has no prefix length: did you mean {}?", IpNetwork::from(ip)),
            Err(_) => format!("{} is no address range: write it like 10.42.0.0/16 or fd00:42::/48", quoted(text)),
        });
    };
    let plain = prefix.bytes().all(|c| c.is_ascii_digit()) && (prefix == "0" || !prefix.starts_with('0'));
    let parsed = (ip.parse(), prefix.parse().ok().filter(|_| plain));
    let (Ok(ip), Some(prefix)) = parsed else {
        return bad(format!("{} is no address range: write it like 10.42.0.0/16 or fd00:42::/48", quoted(text)));
    };
    let longest = if IpAddr::is_ipv4(&ip) { 32 } else { 128 };
    let too_long = format!("{} has a prefix longer than /{longest}: shorten it", quoted(text));
    IpNetwork::new(ip, prefix).or_else(|_| bad(too_long))
}

/// Whether every address of `inner` is one of `outer`.
pub(super) fn covers(outer: IpNetwork, inner: IpNetwork) -> bool {
    outer.prefix() <= inner.prefix() && outer.contains(inner.network())
}

/// Ranges and what holds each. No range here overlaps another, so a neighbour by address is the only one to look at.
#[derive(Clone, Debug)]
pub(super) struct Ranges<T>(BTreeMap<IpAddr, (IpNetwork, T)>);

impl<T> Default for Ranges<T> {
    fn default() -> Ranges<T> {
        Ranges(BTreeMap::new())
    }
}

impl<T> Ranges<T> {
    /// The range that overlaps this one; the lowest, if several do.
    pub(super) fn overlapping(&self, range: IpNetwork) -> Option<&(IpNetwork, T)> {
        self.all_overlapping(range).next()
    }

    /// The ranges that overlap this one, the lowest first.
    pub(super) fn all_overlapping(&self, range: IpNetwork) -> impl Iterator<Item = &(IpNetwork, T)> {
        let (first, last) = (range.network(), range.broadcast());
        let before = self.0.range(..first).next_back().filter(|(_, (held, _))| held.contains(first));
        before.into_iter().chain(self.0.range(first..=last)).map(|(_, held)| held)
    }

    /// Adds a range. Where it overlaps others, one contains the other, and only the wider stays.
    pub(super) fn insert(&mut self, range: IpNetwork, holder: T) {
        if self.overlapping(range).is_some_and(|(held, _)| covers(*held, range)) {
            return;
        }
        let inside: Vec<IpAddr> = self.0.range(range.network()..=range.broadcast()).map(|(first, _)| *first).collect();
        for first in inside {
            self.0.remove(&first);
        }
        self.0.insert(range.network(), (range, holder));
    }
}
