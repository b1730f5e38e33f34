//! The kernel, naively: what each operation does to a [`State`], and arbitrary states to try it on.
//!
//! It holds what the real one holds: a peer needs its device, a prefix its peer, and what a device carried goes with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::LazyLock,
};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use proptest::{collection, option, prelude::*, sample};

use crate::{
    keys::{PrivateKey, PskId, PublicKey},
    names::{Device, Ordinal, Table},
    reconcile::{Kernel, Reading},
    state::{Family, Link, Nft, Op, Peer, Route, Rule, State, WireGuard},
};

/// A kernel in memory, which refuses the operations whose number `refuse` names.
#[derive(Debug, Default)]
pub(crate) struct Model {
    pub(crate) state: State,
    pub(crate) refuse: BTreeSet<usize>,
    pub(crate) applied: Vec<Op>,
    pub(crate) tried: usize,
}

impl Kernel for Model {
    async fn read(&mut self) -> Reading {
        Reading { state: self.state.clone(), ..Reading::default() }
    }

    async fn apply(&mut self, op: &Op) -> io::Result<()> {
        self.tried += 1;
        if self.refuse.contains(&(self.tried - 1)) {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        apply(&mut self.state, op).ok_or(io::ErrorKind::NotFound)?;
        self.applied.push(op.clone());
        Ok(())
    }
}

/// Does to the state what the operation does to the kernel; `None` where the kernel would refuse.
pub(crate) fn apply(state: &mut State, op: &Op) -> Option<()> {
    match op {
        Op::SetDevice { device, wireguard } => {
            let new = Link { mtu: 1500, up: false, bare: false, forwarding: false, rp_filter: 1 };
            state.links.entry(*device).or_insert(new);
            state.wireguard.insert(*device, wireguard.clone());
        }
        Op::SetLink { device, link } => *state.links.get_mut(device)? = link.clone(),
        Op::SetPeer { device, key, peer, gained } => {
            state.wireguard.get(device)?;
            let before = state.peers.get(&(*device, *key)).and_then(|peer| peer.endpoint);
            let endpoint = peer.endpoint.or(before);
            state.peers.insert((*device, *key), Peer { endpoint, ..peer.clone() });
            state.allowed_ips.extend(gained.iter().map(|prefix| ((*device, *prefix), *key)));
        }
        Op::GrowNft(nft) => state.nft = Some(nft.clone()),
        Op::ShrinkNft(nft) => state.nft = nft.clone(),
        Op::AddRule(rule) => return state.rules.insert(*rule).then_some(()),
        Op::DelRule(rule) => return state.rules.remove(rule).then_some(()),
        Op::SetRoute { table, to, route } => {
            if let Route::Dev { device, .. } = route {
                state.links.get(device).filter(|link| link.up)?;
            }
            state.routes.insert((*table, *to), route.clone());
        }
        Op::DelRoute { table, to } => return state.routes.remove(&(*table, *to)).map(drop),
        Op::DropAllowedIps { device, key, lost } => {
            for prefix in lost {
                state.allowed_ips.remove(&(*device, *prefix)).filter(|owner| owner == key)?;
            }
        }
        Op::RemovePeer { device, key } => {
            state.peers.remove(&(*device, *key))?;
            state.allowed_ips.retain(|(of, _), owner| (of, &*owner) != (device, key));
        }
        Op::DelDevice { device } => {
            state.links.remove(device);
            state.wireguard.remove(device);
            state.peers.retain(|(of, _), _| of != device);
            state.allowed_ips.retain(|(of, _), _| of != device);
            state.routes.retain(|_, route| !matches!(route, Route::Dev { device: via, .. } if via == device));
        }
    }
    Some(())
}

/// A key that only tells peers apart.
pub(crate) fn key(n: u8) -> PublicKey {
    static KEYS: LazyLock<Vec<PublicKey>> =
        LazyLock::new(|| (1..=128).map(|n| PrivateKey::new([n; 32]).public()).collect());
    KEYS[usize::from(n)]
}

/// One of a few prefixes, so that states collide.
pub(crate) fn prefix(n: u8) -> IpNetwork {
    if n.is_multiple_of(2) {
        IpNetwork::V4(Ipv4Network::new(Ipv4Addr::new(10, n, 0, 0), 16).expect("16 is a length"))
    } else {
        IpNetwork::V6(Ipv6Network::new(Ipv6Addr::new(0xfd00, u16::from(n), 0, 0, 0, 0, 0, 0), 32).expect("32 is"))
    }
}

fn device() -> impl Strategy<Value = Device> {
    (0..3i64).prop_map(|n| Device(Ordinal::new(n).expect("in range")))
}

fn some_prefix() -> impl Strategy<Value = IpNetwork> {
    (0..6u8).prop_map(prefix)
}

fn link() -> impl Strategy<Value = Link> {
    (sample::select(vec![1280, 1420]), any::<bool>(), any::<bool>(), 0..3u8)
        .prop_map(|(mtu, bare, forwarding, rp_filter)| Link { mtu, up: true, bare, forwarding, rp_filter })
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (1..4u8).prop_map(|n| SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, n)), 27473))
}

fn peer() -> impl Strategy<Value = Peer> {
    (option::of(endpoint()), sample::select(vec![0, 25]), option::of((0..2u8).prop_map(|n| PskId::from_bytes([n; 8]))))
        .prop_map(|(endpoint, keepalive, psk)| Peer { endpoint, keepalive, psk })
}

fn nft() -> impl Strategy<Value = Nft> {
    let pairs = || collection::btree_set((some_prefix(), some_prefix()), 0..4);
    (pairs(), pairs()).prop_map(|(keep_source, admit)| Nft { keep_source, admit })
}

fn rules() -> impl Strategy<Value = BTreeSet<Rule>> {
    let all: Vec<Rule> =
        Family::ALL.into_iter().flat_map(|family| Table::ALL.map(|table| Rule { family, table })).collect();
    sample::subsequence(all, 0..=4).prop_map(BTreeSet::from_iter)
}

fn route() -> impl Strategy<Value = Route> {
    prop_oneof![
        4 => (device(), any::<bool>()).prop_map(|(device, hint)| {
            Route::Dev { device, source: hint.then_some(IpAddr::V4(Ipv4Addr::new(10, 200, 0, 1))) }
        }),
        1 => Just(Route::Throw),
        1 => Just(Route::Unreachable),
        1 => Just(Route::Other),
    ]
}

prop_compose! {
    /// Any state that a kernel can be in: a peer has its device, a prefix its peer, a route its link.
    pub(crate) fn any_state()(
        links in collection::btree_map(device(), link(), 0..3),
        configured in collection::vec(any::<bool>(), 3),
        slot in 0..2u8,
        peers in collection::btree_map((device(), 0..4u8), peer(), 0..8),
        owners in collection::btree_map((device(), some_prefix()), 0..4u8, 0..12),
        routes in collection::btree_map((sample::select(Table::ALL.to_vec()), some_prefix()), route(), 0..12),
        rules in rules(),
        nft in option::of(nft()),
    ) -> State {
        let wireguard: BTreeMap<_, _> = links
            .keys()
            .zip(configured)
            .filter(|(_, configured)| *configured)
            .map(|(device, _)| (*device, WireGuard { key: key(100 + slot), port: 27473 }))
            .collect();
        let peers: BTreeMap<_, _> = peers
            .into_iter()
            .filter(|((device, _), _)| wireguard.contains_key(device))
            .map(|((device, n), peer)| ((device, key(n)), peer))
            .collect();
        let allowed_ips = owners
            .into_iter()
            .map(|((device, prefix), n)| ((device, prefix), key(n)))
            .filter(|((device, _), key)| peers.contains_key(&(*device, *key)))
            .collect();
        let routes = routes
            .into_iter()
            .filter(|(_, route)| !matches!(route, Route::Dev { device, .. } if !links.contains_key(device)))
            .collect();
        State { links, wireguard, peers, allowed_ips, routes, rules, nft }
    }
}

prop_compose! {
    /// Any state that a plan can want: every link is one of ours and configured, no route stands on a bare link.
    pub(crate) fn any_desired()(state in any_state()) -> State {
        let State { links, wireguard, peers, allowed_ips, mut routes, rules, nft } = state;
        let links: BTreeMap<_, _> = links
            .into_iter()
            .filter(|(device, _)| wireguard.contains_key(device))
            .map(|(device, link)| (device, Link::ours(link.mtu)))
            .collect();
        routes.retain(|_, route| match route {
            Route::Dev { device, .. } => links.contains_key(device),
            Route::Throw | Route::Unreachable => true,
            Route::Other => false,
        });
        State { links, wireguard, peers, allowed_ips, routes, rules, nft }
    }
}
