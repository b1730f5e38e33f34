//! The kernel, naively: what each operation does to a [`State`], and arbitrary states to try it on.
//!
//! It holds what the real one holds: a peer needs its device, a prefix its peer, a route through the hop its link, up, a
//! program its link and the maps; and what a device carried goes with it.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::LazyLock,
};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use proptest::{collection, option, prelude::*, sample};

use crate::{
    keys::{HopId, PrivateKey, PskId, PublicKey},
    names::{Device, Interface, MemberId, Ordinal, Table},
    reconcile::{Kernel, Reading},
    state::{
        Attachment, Config, Entry, Family, Home, Hop, Key, Link, Lookups, Maps, Nft, Node, Op, Peer, Program, Remote,
        Route, Rule, State, WireGuard,
    },
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
            state.links.entry(Interface::WireGuard(*device)).or_insert(NEW_LINK);
            state.wireguard.insert(*device, wireguard.clone());
        }
        Op::SetHop(hop) => {
            del_link(state, Interface::Hop);
            state.links.insert(Interface::Hop, NEW_LINK);
            state.hop = Some(hop.clone());
        }
        Op::LoadMaps if state.maps.is_some() => return None,
        Op::LoadMaps => state.maps = Some(Maps::default()),
        Op::SetEntry(entry) => set_entry(state.maps.as_mut()?, entry),
        Op::Attach(at) => {
            state.maps.as_ref()?;
            let foreign = at.program == Program::SteerNative;
            (foreign || state.links.contains_key(&Interface::from_link(&at.link)?)).then_some(())?;
            state.programs.insert(at.clone());
        }
        Op::AddOverlay(address) => return state.overlay.insert(*address).then_some(()),
        Op::SetLink { interface, link } => {
            *state.links.get_mut(interface)? = link.clone();
            if *interface == Interface::Hop && !link.up {
                state.routes.retain(|_, route| !matches!(route, Route::Hop { .. }));
            }
        }
        Op::SetPeer { device, key, peer, gained } => {
            state.wireguard.get(device)?;
            let before = state.peers.get(&(*device, *key)).and_then(|peer| peer.endpoint);
            let endpoint = peer.endpoint.or(before);
            state.peers.insert((*device, *key), Peer { endpoint, ..peer.clone() });
            state.allowed_ips.extend(gained.iter().map(|prefix| ((*device, *prefix), *key)));
        }
        Op::GrowNft(nft) => state.nft = Some(nft.clone()),
        Op::ShrinkNft(nft) => state.nft = nft.clone(),
        Op::SetRule(rule, lookups) => drop(state.rules.insert(*rule, lookups.clone())),
        Op::DelRule(rule) => return state.rules.remove(rule).map(drop),
        Op::SetRoute { table, to, route } => {
            if let Route::Hop { .. } = route {
                state.links.get(&Interface::Hop).filter(|link| link.up)?;
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
        Op::DelEntry(key) => return del_entry(state.maps.as_mut()?, *key),
        Op::NarrowOwn(prefix, members) => *state.maps.as_mut()?.own.get_mut(prefix)? = members.clone(),
        Op::DelOverlay(address) => return state.overlay.remove(address).then_some(()),
        Op::Detach(at) => return state.programs.remove(at).then_some(()),
        Op::DelLink(interface) => return del_link(state, *interface),
        // The pins are what keeps programs attached.
        Op::UnloadMaps => {
            state.maps = None;
            state.programs.clear();
        }
    }
    Some(())
}

const NEW_LINK: Link = Link { mtu: 1500, up: false, bare: false, forwarding: false, rp_filter: 1, gro: true };

/// `None` if there was none.
fn del_link(state: &mut State, interface: Interface) -> Option<()> {
    let existed = state.links.remove(&interface);
    let name = interface.to_string();
    state.programs.retain(|at| at.link != name);
    let config = state.maps.as_mut().and_then(|maps| maps.config.take_if(|config| names(config, interface)));
    drop(config);
    match interface {
        Interface::Hop => {
            state.hop = None;
            state.routes.retain(|_, route| !matches!(route, Route::Hop { .. }));
        }
        Interface::WireGuard(device) => {
            state.wireguard.remove(&device);
            state.peers.retain(|(of, _), _| *of != device);
            state.allowed_ips.retain(|(of, _), _| *of != device);
        }
    }
    existed.map(drop)
}

/// Whether the link's index is in there: it is wrong as soon as the link is another.
fn names(config: &Config, interface: Interface) -> bool {
    match interface {
        Interface::Hop => true,
        Interface::WireGuard(device) => config.wireguard.contains(&device),
    }
}

fn set_entry(maps: &mut Maps, entry: &Entry) {
    match entry {
        Entry::Config(config) => maps.config = Some(config.clone()),
        Entry::Remote(to, remote) => drop(maps.remote.insert(*to, *remote)),
        Entry::Own(prefix, members) => drop(maps.own.insert(*prefix, members.clone())),
        Entry::Home(to, home) => drop(maps.homes.insert(*to, *home)),
        Entry::Node(at, node) => drop(maps.nodes.insert(*at, *node)),
    }
}

fn del_entry(maps: &mut Maps, key: Key) -> Option<()> {
    match key {
        // An array has its one value always: it may be there and not read as one.
        Key::Config => maps.config = None,
        Key::Remote(to) => drop(maps.remote.remove(&to)?),
        Key::Own(prefix) => drop(maps.own.remove(&prefix)?),
        Key::Home(to) => drop(maps.homes.remove(&to)?),
        Key::Node(at) => drop(maps.nodes.remove(&at)?),
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
    let mtu = sample::select(vec![1280, 1420]);
    (mtu, any::<[bool; 4]>(), 0..3u8).prop_map(|(mtu, [up, bare, forwarding, gro], rp_filter)| Link {
        mtu,
        up,
        bare,
        forwarding,
        rp_filter,
        gro,
    })
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (1..4u8).prop_map(|n| SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, n)), 27473))
}

fn peer() -> impl Strategy<Value = Peer> {
    (option::of(endpoint()), sample::select(vec![0, 25]), option::of((0..2u8).prop_map(|n| PskId::from_bytes([n; 8]))))
        .prop_map(|(endpoint, keepalive, psk)| Peer { endpoint, keepalive, psk })
}

fn nft() -> impl Strategy<Value = Nft> {
    let pairs = collection::btree_set((some_prefix(), some_prefix()), 0..4);
    let native = sample::subsequence(NATIVE.to_vec(), 0..=2);
    (pairs, collection::btree_set(node_address(), 0..4), native, 0..2u16).prop_map(|(keep_source, nodes, native, n)| {
        let native = native.into_iter().map(str::to_owned).collect();
        Nft { keep_source, nodes, hop_port: 27472 * n, hop_sources: (27456 * n, 27471 * n), native }
    })
}

fn rules() -> impl Strategy<Value = BTreeMap<Rule, Lookups>> {
    let rule = (sample::select(Family::ALL.to_vec()), sample::select(Table::ALL.to_vec()));
    let lookups = [Lookups::All, Lookups::Forwarded, Lookups::NotBoundTo(NATIVE[0].to_owned())];
    collection::btree_map(
        rule.prop_map(|(family, table)| Rule { family, table }),
        sample::select(lookups.to_vec()),
        0..=4,
    )
}

fn route() -> impl Strategy<Value = Route> {
    let source = any::<bool>().prop_map(|hint| hint.then_some(IpAddr::V4(Ipv4Addr::new(10, 200, 0, 1))));
    prop_oneof![
        4 => (option::of(Just(1400)), source).prop_map(|(mtu, source)| Route::Hop { mtu, source }),
        1 => Just(Route::Throw),
        1 => Just(Route::Unreachable),
        1 => Just(Route::Other),
    ]
}

/// Foreign links.
const NATIVE: [&str; 2] = ["eth0", "eth1"];

fn interface() -> impl Strategy<Value = Interface> {
    prop_oneof![2 => Just(Interface::Hop), 3 => device().prop_map(Interface::WireGuard)]
}

fn hop() -> impl Strategy<Value = Hop> {
    prop_oneof![3 => Just(27472), 1 => Just(4789)].prop_map(|port| Hop { port, sources: (27456, 27471) })
}

fn member() -> impl Strategy<Value = MemberId> {
    (1..4i64).prop_map(|id| MemberId::new(id).expect("in range"))
}

fn node_address() -> impl Strategy<Value = IpAddr> {
    (0..4u8).prop_map(|n| IpAddr::V4(Ipv4Addr::new(192, 0, 2, n)))
}

fn overlay() -> impl Strategy<Value = Ipv6Addr> {
    (1..4u16).prop_map(|n| Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, n))
}

fn config() -> impl Strategy<Value = Config> {
    let some = (member(), option::of(Just(Ordinal::ZERO)), collection::btree_set(device(), 0..3), 1350..1352u16);
    some.prop_map(|(member, slot, wireguard, mtu)| Config {
        member,
        slot,
        overlay: Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1),
        hop: BTreeSet::from([IpAddr::V4(Ipv4Addr::new(192, 0, 2, 9))]),
        gateways: BTreeMap::new(),
        wireguard,
        secrets: vec![HopId::from_bytes([1; 8])],
        mtu,
        hop_mtu: 1420,
        wireguard_port: 27473,
        hop_port: 27472,
        probe_port: 27455,
    })
}

fn remote() -> impl Strategy<Value = Remote> {
    (member(), 0..3u8).prop_map(|(member, kind)| match kind {
        0 => Remote::Overlay(member),
        1 => Remote::Carved(member),
        _ => Remote::Range(member),
    })
}

prop_compose! {
    fn maps()(
        config in option::weighted(0.7, config()),
        remote in collection::btree_map(some_prefix(), remote(), 0..8),
        own in collection::btree_map(some_prefix(), collection::btree_set(member(), 0..4), 0..5),
        homes in collection::btree_map(
            some_prefix(),
            option::of(node_address()).prop_map(|node| node.map_or(Home::Here, Home::Node)),
            0..5,
        ),
        nodes in collection::btree_map(
            node_address(),
            (option::of(Just(Ordinal::ZERO)), node_address()).prop_map(|(slot, home)| Node { slot, home }),
            0..4,
        ),
    ) -> Maps {
        Maps { config, remote, own, homes, nodes }
    }
}

/// The programs that belong to a link of ours.
fn programs_of(interface: Interface) -> impl Iterator<Item = Attachment> {
    let programs = match interface {
        Interface::Hop => [Program::Steer, Program::FromHop],
        Interface::WireGuard(_) => [Program::ToPeer, Program::FromPeer],
    };
    programs.into_iter().map(move |program| Attachment { program, link: interface.to_string() })
}

fn programs() -> impl Strategy<Value = BTreeSet<Attachment>> {
    let native = NATIVE.map(|link| Attachment { program: Program::SteerNative, link: link.to_owned() });
    let all: Vec<Attachment> = Interface::all().flat_map(programs_of).chain(native).collect();
    let (count, most) = (all.len(), sample::subsequence(all.clone(), all.len() / 2..=all.len()));
    prop_oneof![most, sample::subsequence(all, count)].prop_map(BTreeSet::from_iter)
}

/// Takes away what a kernel could not hold.
fn tidy(state: &mut State) {
    let State { links, hop, wireguard, peers, allowed_ips, routes, maps, programs, .. } = state;
    wireguard.retain(|device, _| links.contains_key(&Interface::WireGuard(*device)));
    peers.retain(|(device, _), _| wireguard.contains_key(device));
    allowed_ips.retain(|(device, _), key| peers.contains_key(&(*device, *key)));
    let hop_link = links.get(&Interface::Hop);
    hop.take_if(|_| hop_link.is_none());
    routes.retain(|_, route| !matches!(route, Route::Hop { .. }) || hop_link.is_some_and(|link| link.up));
    if let Some(maps) = maps {
        let exist = |config: &Config| config.wireguard.iter().all(|d| links.contains_key(&Interface::WireGuard(*d)));
        maps.config.take_if(|config| hop_link.is_none() || !exist(config));
    }
    let stands = |at: &Attachment| Interface::from_link(&at.link).is_none_or(|link| links.contains_key(&link));
    programs.retain(|at| maps.is_some() && stands(at));
}

prop_compose! {
    /// Any state that a kernel can be in.
    pub(crate) fn any_state()(
        links in collection::btree_map(interface(), link(), 0..4),
        hop in option::weighted(0.8, hop()),
        devices in collection::btree_set(device(), 0..4),
        slot in 0..2u8,
        peers in collection::btree_map((device(), 0..4u8), peer(), 0..8),
        owners in collection::btree_map((device(), some_prefix()), 0..4u8, 0..12),
        routes in collection::btree_map((sample::select(Table::ALL.to_vec()), some_prefix()), route(), 0..12),
        rules in rules(),
        nft in option::of(nft()),
        overlay in collection::btree_set(overlay(), 0..3),
        (maps, programs) in (option::weighted(0.8, maps()), programs()),
    ) -> State {
        let key_of = |device| (device, WireGuard { key: key(100 + slot), port: 27473 });
        let mut state = State {
            links,
            hop,
            wireguard: devices.into_iter().map(key_of).collect(),
            peers: peers.into_iter().map(|((device, n), peer)| ((device, key(n)), peer)).collect(),
            allowed_ips: owners.into_iter().map(|(held, n)| (held, key(n))).collect(),
            routes,
            rules,
            nft,
            overlay,
            maps,
            programs,
        };
        tidy(&mut state);
        state
    }
}

prop_compose! {
    /// Any state that a plan can want: every link is one of ours, configured, and has its programs, which know what its
    /// peers hold; without maps there is none. Only the table of remote ranges leads anywhere.
    pub(crate) fn any_desired()(mut state in any_state()) -> State {
        let State { links, hop, wireguard, .. } = &state;
        let wanted = |interface: &Interface| state.maps.is_some() && match interface {
            Interface::Hop => hop.is_some(),
            Interface::WireGuard(device) => wireguard.contains_key(device),
        };
        let kept = links.iter().filter(|(interface, _)| wanted(interface));
        state.links = kept.map(|(interface, link)| (*interface, Link::ours(link.mtu))).collect();
        state.routes.retain(|(table, _), route| match route {
            Route::Hop { .. } => *table == Table::Remote,
            Route::Throw | Route::Unreachable => true,
            Route::Other => false,
        });
        tidy(&mut state);
        let native = state.programs.into_iter().filter(|at| at.program == Program::SteerNative);
        state.programs = native.chain(state.links.keys().copied().flat_map(programs_of)).collect();
        if let Some(maps) = &mut state.maps {
            for (_, prefix) in state.allowed_ips.keys() {
                maps.remote.entry(*prefix).or_insert(Remote::Range(MemberId::new(1).expect("in range")));
            }
        }
        state
    }
}
