//! Wake-ups from the kernel: something of ours changed, or something that the plan depends on.
//!
//! An event says only that there is reason to look; what is the case is then read. So an overrun of the socket, which
//! loses events, is itself an event and never an error.
//!
//! Not everything is told: a clsact filter that goes is, a tcx program that goes is not (only asking, `BPF_PROG_QUERY`,
//! tells), nor is a write to a pinned map or to bpffs.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    time::Duration,
};

use netlink_packet_core::{NetlinkBuffer, NetlinkMessage, NetlinkPayload, NlaBuffer, NlasIterator};
use netlink_packet_route::{RouteNetlinkMessage, link::LinkMessage, route::RouteMessage, rule::RuleMessage};
use netlink_sys::{
    AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket,
    protocols::{NETLINK_NETFILTER, NETLINK_ROUTE},
};
use rtnetlink::MulticastGroup;

use super::{address, link, nft, route, rtnl::is, rule};
use crate::{
    names::{Interface, Table},
    state::{Family, Rule},
};

/// Why to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Event {
    /// A link, route, rule, overlay address or the nft table of ours changed, or a filter on a link that carries our
    /// programs: by us, or by somebody else.
    Ours,
    /// An address, an MTU, a default route or the forwarding of the node changed.
    Facts,
    /// Events were lost: anything may have changed.
    Overrun,
}

// include/uapi/linux/rtnetlink.h, netconf.h, netfilter/nf_tables.h
const RTM_NEWQDISC: u16 = 36;
const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_DELTFILTER: u16 = 45;
const RTM_NEWNETCONF: u16 = 80;
const RTM_DELNETCONF: u16 = 81;
const NETCONFA_IFINDEX: u16 = 1;
const NETCONFA_IFINDEX_ALL: i32 = -1;
/// The name of the table is the first attribute of every kind of nftables event but `NFT_MSG_NEWGEN`.
const NFTA_TABLE: u16 = 1;
/// `struct netconfmsg` and `struct nfgenmsg`, aligned.
const SMALL_HEADER: usize = 4;
const NLMSG_HEADER: usize = 16;

/// In `struct tcmsg`, where the index of the link is.
const TC_IFINDEX: usize = 4;

const GROUPS: [MulticastGroup; 10] = [
    MulticastGroup::Link,
    MulticastGroup::Tc,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv4Rule,
    MulticastGroup::Ipv4Netconf,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv6Route,
    MulticastGroup::Ipv6Rule,
    MulticastGroup::Ipv6Netconf,
];

/// Bytes wanted for each receive buffer; the kernel gives at most net.core.rmem_max.
const RECEIVE_BUFFER: u32 = 1 << 20;
/// Between attempts on a socket that fails otherwise than by an overrun.
const PAUSE: Duration = Duration::from_secs(1);

/// The kernel's events, of the network namespace in which it was made.
pub struct Watch {
    rtnetlink: TokioSocket,
    nftables: TokioSocket,
    links: Links,
    /// Not yet handed out.
    pending: BTreeSet<Event>,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("pending", &self.pending).finish_non_exhaustive()
    }
}

/// What was last heard of each link: tells an MTU that changed from a link that is merely mentioned.
#[derive(Debug, Default)]
struct Links {
    heard: BTreeMap<u32, Heard>,
    /// Names of foreign links that carry programs of ours.
    native: BTreeSet<String>,
}

#[derive(Debug, PartialEq)]
struct Heard {
    name: Option<String>,
    mtu: Option<u32>,
}

impl Watch {
    /// Subscribes; whatever happens from here on is heard. Needs CAP_NET_ADMIN (for nftables), and a tokio runtime.
    pub fn new() -> io::Result<Watch> {
        Watch::with_buffer(RECEIVE_BUFFER)
    }

    fn with_buffer(bytes: u32) -> io::Result<Watch> {
        let groups: Vec<u32> = GROUPS.iter().map(|group| *group as u32).collect();
        Ok(Watch {
            rtnetlink: subscribe(NETLINK_ROUTE, &groups, bytes)?,
            nftables: subscribe(NETLINK_NETFILTER, &[libc::NFNLGRP_NFTABLES as u32], bytes)?,
            links: Links::default(),
            pending: BTreeSet::new(),
        })
    }

    /// Names the foreign links on which filters concern us.
    pub fn set_native(&mut self, native: BTreeSet<String>) {
        self.links.native = native;
    }

    /// Waits for the next event. Dropping the future loses nothing.
    pub async fn next(&mut self) -> Event {
        loop {
            if let Some(event) = self.pending.pop_last() {
                return event;
            }
            let (from_rtnetlink, received) = tokio::select! {
                received = self.rtnetlink.recv_from_full() => (true, received),
                received = self.nftables.recv_from_full() => (false, received),
            };
            match received {
                Ok((datagram, _)) if from_rtnetlink => rtnetlink_events(&datagram, &mut self.links, &mut self.pending),
                Ok((datagram, _)) => nftables_events(&datagram, &mut self.pending),
                Err(error) if is(&error, &[libc::EINTR]) => {}
                Err(error) if is(&error, &[libc::ENOBUFS]) => return Event::Overrun,
                Err(error) => {
                    tracing::warn!(%error, "cannot read the kernel's events; everything is read again instead");
                    tokio::time::sleep(PAUSE).await;
                    return Event::Overrun;
                }
            }
        }
    }
}

fn subscribe(protocol: isize, groups: &[u32], bytes: u32) -> io::Result<TokioSocket> {
    let mut socket = TokioSocket::new(protocol)?;
    socket.socket_mut().set_rx_buf_sz(bytes)?;
    socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}

/// The messages of a datagram: (type, payload, whole message).
fn messages(datagram: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let message = NetlinkBuffer::new_checked(rest).ok()?;
        let (kind, length) = (message.message_type(), message.length() as usize);
        let whole = rest.get(..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, whole.get(NLMSG_HEADER..)?, whole))
    })
}

fn rtnetlink_events(datagram: &[u8], links: &mut Links, events: &mut BTreeSet<Event>) {
    for (kind, payload, whole) in messages(datagram) {
        if matches!(kind, RTM_NEWNETCONF | RTM_DELNETCONF) {
            events.extend(netconf_event(payload, links));
            continue;
        }
        if matches!(kind, RTM_NEWQDISC | RTM_DELQDISC | RTM_NEWTFILTER | RTM_DELTFILTER) {
            events.extend(filter_event(payload, links));
            continue;
        }
        match NetlinkMessage::<RouteNetlinkMessage>::deserialize(whole).map(|message| message.payload) {
            Ok(NetlinkPayload::InnerMessage(message)) => events.extend(rtnetlink_event(message, links)),
            Ok(_) => {}
            // It might have been about us.
            Err(_) => events.extend([Event::Overrun]),
        }
    }
}

fn rtnetlink_event(message: RouteNetlinkMessage, links: &mut Links) -> Option<Event> {
    match message {
        RouteNetlinkMessage::NewLink(link) => links.heard(&link),
        RouteNetlinkMessage::DelLink(link) => links.gone(&link),
        RouteNetlinkMessage::NewAddress(address) | RouteNetlinkMessage::DelAddress(address) => {
            let ours = address::is_marked(&address) || links.ours(address.header.index);
            Some(if ours { Event::Ours } else { Event::Facts })
        }
        RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route) => route_event(&route),
        RouteNetlinkMessage::NewRule(rule) | RouteNetlinkMessage::DelRule(rule) => rule_event(&rule),
        _ => None,
    }
}

fn route_event(message: &RouteMessage) -> Option<Event> {
    let table = route::table(message);
    if Table::ALL.iter().any(|ours| ours.id() == table) {
        return Some(Event::Ours);
    }
    (message.header.destination_prefix_length == 0).then_some(Event::Facts)
}

fn rule_event(message: &RuleMessage) -> Option<Event> {
    let ours = Table::ALL.into_iter().map(|table| Rule { family: Family::V4, table });
    let concerns = |rule: Rule| rule.priority() == rule::priority(message) || rule.table.id() == rule::table(message);
    ours.into_iter().any(concerns).then_some(Event::Ours)
}

/// A switch of a link, or of all of them at once, was written.
fn netconf_event(payload: &[u8], links: &Links) -> Option<Event> {
    let index = nla(payload.get(SMALL_HEADER..)?, NETCONFA_IFINDEX)?;
    let index = i32::from_ne_bytes(*index.first_chunk()?);
    let ipv4 = i32::from(*payload.first()?) == libc::AF_INET;
    match (index, ipv4) {
        // Writing conf/all/forwarding writes that of every link.
        (NETCONFA_IFINDEX_ALL, true) => Some(Event::Ours),
        (NETCONFA_IFINDEX_ALL, false) => Some(Event::Facts),
        (_, true) => links.ours(u32::try_from(index).ok()?).then_some(Event::Ours),
        (_, false) => None,
    }
}

/// A queueing discipline or a filter of a link changed.
fn filter_event(payload: &[u8], links: &Links) -> Option<Event> {
    let index = i32::from_ne_bytes(*payload.get(TC_IFINDEX..)?.first_chunk()?);
    links.carries_programs(u32::try_from(index).ok()?).then_some(Event::Ours)
}

fn nftables_events(datagram: &[u8], events: &mut BTreeSet<Event>) {
    let ours = messages(datagram).any(|(kind, payload, _)| {
        let event = kind >> 8 == libc::NFNL_SUBSYS_NFTABLES as u16 && kind & 0xff != libc::NFT_MSG_NEWGEN as u16;
        let inet = payload.first().is_some_and(|family| i32::from(*family) == libc::NFPROTO_INET);
        let table = payload.get(SMALL_HEADER..).and_then(|attributes| nla(attributes, NFTA_TABLE));
        event && inet && table.is_some_and(|name| name.strip_suffix(&[0]) == Some(nft::TABLE.as_bytes()))
    });
    if ours {
        events.insert(Event::Ours);
    }
}

/// The value of an attribute.
fn nla(attributes: &[u8], kind: u16) -> Option<&[u8]> {
    let mut found =
        NlasIterator::new(attributes).map_while(Result::ok).filter(|nla: &NlaBuffer<&[u8]>| nla.kind() == kind);
    found.next().map(|nla| {
        let length = nla.value_length();
        &nla.into_inner()[4..4 + length]
    })
}

impl Links {
    fn heard(&mut self, message: &LinkMessage) -> Option<Event> {
        let heard = Heard { name: link::name(message).map(str::to_owned), mtu: link::mtu(message) };
        let ours = heard.name.as_deref().is_some_and(is_ours);
        let before = self.heard.insert(message.header.index, heard);
        let changed = before.as_ref() != self.heard.get(&message.header.index);
        if ours { Some(Event::Ours) } else { changed.then_some(Event::Facts) }
    }

    fn gone(&mut self, message: &LinkMessage) -> Option<Event> {
        self.heard.remove(&message.header.index);
        Some(if link::name(message).is_some_and(is_ours) { Event::Ours } else { Event::Facts })
    }

    fn ours(&self, index: u32) -> bool {
        self.is(index, is_ours)
    }

    fn carries_programs(&self, index: u32) -> bool {
        self.is(index, |name| is_ours(name) || self.native.contains(name))
    }

    /// A link that has not been heard of since the start is asked for.
    fn is(&self, index: u32, which: impl Fn(&str) -> bool) -> bool {
        match self.heard.get(&index) {
            Some(heard) => heard.name.as_deref().is_some_and(which),
            None => {
                let name = nix::net::if_::if_indextoname(index).ok();
                name.as_ref().and_then(|name| name.to_str().ok()).is_some_and(which)
            }
        }
    }
}

fn is_ours(name: &str) -> bool {
    Interface::from_link(name).is_some()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernel::tests::{in_netns, sh};

    /// Every event up to the moment in which the kernel is silent.
    async fn heard(watch: &mut Watch) -> BTreeSet<Event> {
        let mut events = BTreeSet::new();
        while let Ok(event) = tokio::time::timeout(Duration::from_millis(100), watch.next()).await {
            events.insert(event);
        }
        events
    }

    fn check(prepare: &str, cause: &str, events: &[Event]) {
        in_netns(|| async {
            sh("ip link add eth0 type veth peer name peer; ip link set peer addrgenmode none up; ip link set eth0 addrgenmode none up
                ip addr add 192.168.7.2/24 dev eth0; ip tuntap add carrick-wg0 mode tun
                ip link set carrick-wg0 addrgenmode none up
                ip link add carrick-hop type vxlan external; ip link set carrick-hop addrgenmode none; ip link set carrick-hop up");
            let rtnl = super::super::rtnl::Rtnl::new().unwrap();
            address::add(&rtnl, "fd42::1".parse().unwrap()).await.unwrap();
            sh(prepare);
            let mut watch = Watch::new().unwrap();
            watch.set_native(["eth0".to_owned()].into());
            // What was so before the watch began is heard of once.
            sh("ip link set eth0 alias known; ip link set peer alias known; ip link set lo alias known");
            heard(&mut watch).await;
            sh(cause);
            assert_eq!(heard(&mut watch).await, BTreeSet::from_iter(events.iter().copied()), "{cause}");
        });
    }

    #[test]
    fn what_concerns_us_wakes_and_nothing_else() {
        use Event::{Facts, Ours};
        let table = "nft add table inet carrick; nft add chain inet carrick x";
        check("", "ip route add 10.44.0.0/16 dev carrick-wg0 table 7473", &[Ours]);
        check("", "ip route add throw fd44::/48 table 7474", &[Ours]);
        check(
            "",
            "ip route add 10.44.0.0/16 dev carrick-wg0 table 7472; ip route add 10.1.0.0/16 via 192.168.7.1",
            &[],
        );
        check("", "ip route add default via 192.168.7.1", &[Facts]);
        check("", "ip rule add pref 11 table 99; ip -6 rule add pref 99 table 7474", &[Ours]);
        check("", "ip rule add pref 99 table 99", &[]);
        check("", "ip addr add 10.9.9.9/32 dev carrick-wg0", &[Ours]);
        check("", "ip addr add 10.9.9.9/32 dev eth0", &[Facts]);
        check("", "ip link set eth0 mtu 1400", &[Facts]);
        check("", "ip link set eth0 txqueuelen 77", &[]);
        check("", "ip link set carrick-wg0 mtu 1400", &[Ours]);
        check("", "ip link set carrick-hop down", &[Ours]);
        check("", "ip link del carrick-hop", &[Ours]);
        check("", "ip addr del fd42::1/128 dev lo", &[Ours]);
        check("", "ip addr add fd42::2/128 dev lo nodad", &[Facts]);
        let clsact = "for link in carrick-hop eth0 peer; do tc qdisc add dev $link clsact; done";
        let filter = |link: &str| format!("tc filter add dev {link} ingress protocol all u32 match u32 0 0");
        check("", "tc qdisc add dev carrick-hop clsact", &[Ours]);
        check(clsact, &filter("carrick-hop"), &[Ours]);
        check(clsact, &filter("eth0"), &[Ours]);
        check(clsact, &filter("peer"), &[]);
        check(&[clsact, &filter("eth0")].join(";"), "tc filter del dev eth0 ingress", &[Ours]);
        check(clsact, "tc qdisc del dev eth0 clsact", &[Ours]);
        check("", "echo 2 > /proc/sys/net/ipv4/conf/carrick-wg0/rp_filter", &[Ours]);
        check("", "echo 2 > /proc/sys/net/ipv4/conf/eth0/rp_filter", &[]);
        check("", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding", &[Facts]);
        check("", table, &[Ours]);
        check(table, "nft add rule inet carrick x accept", &[Ours]);
        check(table, "nft flush ruleset", &[Ours]);
        check("", "nft add table ip carrick; nft add table inet carrick2; nft add table inet carr", &[]);
    }

    #[test]
    fn an_overrun_is_an_event_and_the_next_ones_are_heard() {
        in_netns(|| async {
            let mut watch = Watch::with_buffer(1).unwrap();
            let storm: String =
                (0..4000).map(|n| format!("route add 10.{}.{}.0/24 dev lo table 99\n", n / 256, n % 256)).collect();
            sh(&format!("ip -batch - <<'E'\n{storm}E"));
            assert_eq!(watch.next().await, Event::Overrun);
            heard(&mut watch).await;
            sh("ip route add throw 10.44.0.0/16 table 7473");
            assert_eq!(watch.next().await, Event::Ours);
            let storm: String = (0..4000).map(|n| format!("add table inet t{n}\n")).collect();
            sh(&format!("nft -f - <<'E'\n{storm}E"));
            assert_eq!(watch.next().await, Event::Overrun);
            heard(&mut watch).await;
            sh("nft add table inet carrick");
            assert_eq!(watch.next().await, Event::Ours);
        });
    }
}
