//! Cryptokey routing: which peer a prefix belongs to.
//!
//! Invariant: a prefix has one owner, because it is one key of one map; inserting it again moves it
//! (`drivers/net/wireguard/allowedips.c`, `add`).

use std::{collections::BTreeMap, net::IpAddr};

use ipnetwork::IpNetwork;

/// A longest-prefix table. The outer key is the prefix length, so a lookup costs one search per length in use.
#[derive(Debug)]
pub(super) struct AllowedIps<T> {
    v4: BTreeMap<u8, BTreeMap<u32, T>>,
    v6: BTreeMap<u8, BTreeMap<u128, T>>,
}

impl<T> Default for AllowedIps<T> {
    fn default() -> Self {
        AllowedIps { v4: BTreeMap::new(), v6: BTreeMap::new() }
    }
}

fn mask4(bits: u32, len: u8) -> u32 {
    bits & u32::MAX.checked_shl(32 - u32::from(len)).unwrap_or(0)
}

fn mask6(bits: u128, len: u8) -> u128 {
    bits & u128::MAX.checked_shl(128 - u32::from(len)).unwrap_or(0)
}

impl<T> AllowedIps<T> {
    /// Gives the prefix to `owner`, whoever had it. Host bits are dropped.
    pub(super) fn insert(&mut self, prefix: IpNetwork, owner: T) {
        let len = prefix.prefix();
        match prefix.ip() {
            IpAddr::V4(ip) => self.v4.entry(len).or_default().insert(mask4(ip.into(), len), owner),
            IpAddr::V6(ip) => self.v6.entry(len).or_default().insert(mask6(ip.into(), len), owner),
        };
    }

    /// Who owns the longest prefix that holds the address.
    pub(super) fn find(&self, ip: IpAddr) -> Option<&T> {
        match ip {
            IpAddr::V4(ip) => self.v4.iter().rev().find_map(|(len, owners)| owners.get(&mask4(ip.into(), *len))),
            IpAddr::V6(ip) => self.v6.iter().rev().find_map(|(len, owners)| owners.get(&mask6(ip.into(), *len))),
        }
    }

    /// Keeps the prefixes for which `keep` holds.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(IpNetwork, &T) -> bool) {
        self.v4.retain(|len, owners| {
            owners.retain(|bits, owner| network(IpAddr::V4((*bits).into()), *len).is_some_and(|net| keep(net, owner)));
            !owners.is_empty()
        });
        self.v6.retain(|len, owners| {
            owners.retain(|bits, owner| network(IpAddr::V6((*bits).into()), *len).is_some_and(|net| keep(net, owner)));
            !owners.is_empty()
        });
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNetwork, &T)> {
        let v4 = self.v4.iter().flat_map(|(len, owners)| {
            owners.iter().filter_map(|(bits, owner)| Some((network(IpAddr::V4((*bits).into()), *len)?, owner)))
        });
        let v6 = self.v6.iter().flat_map(|(len, owners)| {
            owners.iter().filter_map(|(bits, owner)| Some((network(IpAddr::V6((*bits).into()), *len)?, owner)))
        });
        v4.chain(v6)
    }
}

/// `Some` for every length in the table: each came from an [`IpNetwork`] of that family.
fn network(ip: IpAddr, len: u8) -> Option<IpNetwork> {
    IpNetwork::new(ip, len).ok()
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::prelude::*;

    use super::*;

    /// Few bits vary, so that prefixes nest and collide.
    fn any_ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (0u32..16).prop_map(|n| IpAddr::V4(Ipv4Addr::from(n << 28 | n))),
            (0u128..16).prop_map(|n| IpAddr::V6(Ipv6Addr::from(n << 124 | n))),
        ]
    }

    fn any_net() -> impl Strategy<Value = IpNetwork> {
        (any_ip(), prop_oneof![Just(0u8), 1u8..6, 28u8..33, 124u8..129]).prop_map(|(ip, len)| {
            let len = len.min(if ip.is_ipv4() { 32 } else { 128 });
            let net = IpNetwork::new(ip, len).unwrap();
            IpNetwork::new(net.network(), len).unwrap()
        })
    }

    proptest! {
        #[test]
        fn agrees_with_a_plain_list(
            inserts in prop::collection::vec((any_net(), 0u8..4), 0..40),
            gone in 0u8..5,
            ip in any_ip(),
        ) {
            let mut table = AllowedIps::default();
            let mut model = BTreeMap::new();
            for (net, owner) in inserts {
                table.insert(net, owner);
                model.insert(net, owner);
            }
            table.retain(|_, owner| *owner != gone);
            model.retain(|_, owner| *owner != gone);

            prop_assert_eq!(table.iter().map(|(net, owner)| (net, *owner)).collect::<BTreeMap<_, _>>(), model.clone());
            let longest = model.iter().filter(|(net, _)| net.contains(ip)).max_by_key(|(net, _)| net.prefix());
            prop_assert_eq!(table.find(ip), longest.map(|(_, owner)| owner));
        }
    }
}
