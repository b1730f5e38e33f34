//! Connection tracking entries that were masqueraded before our nft table stood: they would stay so for life, because a
//! connection's mapping is chosen once, by its first packet. Deleted, the next packet makes the entry anew.
//!
//! A small encoding of ctnetlink (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLA_F_NESTED, NLM_F_ACK, NLM_F_DUMP};
use netlink_sys::Socket;

use super::{
    netfilter::{NFGENMSG, connect, message, nlas, receive},
    prefix,
    rtnl::absent_is_done,
};

const CT_GET: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | 1;
const CT_DELETE: u16 = (libc::NFNL_SUBSYS_CTNETLINK as u16) << 8 | 2;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_STATUS_MASK: u16 = 26;
const CTA_TUPLE_IP: u16 = 1;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
/// The source of the connection was changed.
const IPS_SRC_NAT: u32 = 1 << 4;

/// Deletes the entries from an own to a remote range, (own, remote), whose replies are not addressed to their source.
/// Returns how many there were. Blocks.
pub(super) fn forget_masqueraded(pairs: &BTreeSet<(IpNetwork, IpNetwork)>) -> io::Result<usize> {
    let socket = connect()?;
    // There are few combinations of lengths, however many pairs.
    let lengths: BTreeSet<(u8, u8)> = pairs.iter().map(|(own, remote)| (own.prefix(), remote.prefix())).collect();
    let within = |source, remote| {
        lengths.iter().any(|(own_length, remote_length)| {
            let pair = prefix::around(source, *own_length).zip(prefix::around(remote, *remote_length));
            pair.is_some_and(|pair| pairs.contains(&pair))
        })
    };
    let mut forgotten = 0;
    for family in [libc::AF_INET as u8, libc::AF_INET6 as u8] {
        for entry in masqueraded(&socket, family)? {
            // The remote end as the reply names it: a DNAT on the way, to a service's endpoint, has happened by then.
            if within(entry.source, entry.remote) {
                absent_is_done(delete(&socket, family, entry.key))?;
                forgotten += 1;
            }
        }
    }
    Ok(forgotten)
}

/// An entry whose replies go to another address than its source.
struct Masqueraded {
    source: IpAddr,
    remote: IpAddr,
    /// The attributes by which the kernel finds it again, as it sent them.
    key: Vec<u8>,
}

fn masqueraded(socket: &Socket, family: u8) -> io::Result<Vec<Masqueraded>> {
    let mut filter = Vec::new();
    // Older kernels know no such filter and send everything.
    attribute(&mut filter, CTA_STATUS, &IPS_SRC_NAT.to_be_bytes());
    attribute(&mut filter, CTA_STATUS_MASK, &IPS_SRC_NAT.to_be_bytes());
    socket.send(&message(CT_GET, NLM_F_DUMP, family, &filter), 0)?;
    let mut found = Vec::new();
    receive(socket, |payload| {
        if let Some(entry) = payload.get(NFGENMSG..).and_then(entry) {
            found.push(entry);
        }
    })?;
    Ok(found)
}

fn delete(socket: &Socket, family: u8, key: Vec<u8>) -> io::Result<()> {
    socket.send(&message(CT_DELETE, NLM_F_ACK, family, &key), 0)?;
    receive(socket, |_| {})
}

/// `None` for an entry that is not masqueraded.
fn entry(attributes: &[u8]) -> Option<Masqueraded> {
    let (mut original, mut reply, mut key) = (None, None, Vec::new());
    for found in nlas(attributes) {
        match found.kind() {
            CTA_TUPLE_ORIG => original = addresses(found.value()),
            CTA_TUPLE_REPLY => reply = addresses(found.value()),
            _ => {}
        }
        match found.kind() {
            CTA_TUPLE_ORIG => attribute(&mut key, CTA_TUPLE_ORIG | NLA_F_NESTED, found.value()),
            kind @ (CTA_ZONE | CTA_ID) => attribute(&mut key, kind, found.value()),
            _ => {}
        }
    }
    let ((source, _), (remote, reply_to)) = (original?, reply?);
    (reply_to != source).then_some(Masqueraded { source, remote, key })
}

/// Source and destination of a tuple.
fn addresses(tuple: &[u8]) -> Option<(IpAddr, IpAddr)> {
    let (mut source, mut destination) = (None, None);
    let ip = nlas(tuple).find(|found| found.kind() == CTA_TUPLE_IP)?;
    for found in nlas(ip.value()) {
        match found.kind() {
            CTA_IP_V4_SRC | CTA_IP_V6_SRC => source = address(found.value()),
            CTA_IP_V4_DST | CTA_IP_V6_DST => destination = address(found.value()),
            _ => {}
        }
    }
    source.zip(destination)
}

fn address(value: &[u8]) -> Option<IpAddr> {
    let v4 = <[u8; 4]>::try_from(value).map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
    v4.or_else(|_| <[u8; 16]>::try_from(value).map(|bytes| IpAddr::V6(Ipv6Addr::from(bytes)))).ok()
}

fn attribute(buffer: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    buffer.extend(length.to_ne_bytes());
    buffer.extend(kind.to_ne_bytes());
    buffer.extend(value);
    buffer.resize(buffer.len().next_multiple_of(4), 0);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::UdpSocket;

    use super::*;
    use crate::{
        kernel::tests::{in_netns, sh},
        state::Nft,
    };

    /// A node whose CNI masquerades whatever leaves by eth0, with own addresses that stand for pods'.
    fn masquerading_node() {
        sh("ip link add eth0 type veth peer name peer; ip link set peer up; ip link set eth0 up
            ip addr add 192.168.7.2/24 dev eth0; ip addr add 2001:db8:7::2/64 dev eth0 nodad
            ip addr add 10.42.0.5/32 dev lo; ip addr add fd42::5/128 dev lo nodad
            ip route add default via 192.168.7.1; ip route add default via 2001:db8:7::1
            ip neigh add 192.168.7.1 lladdr 02:00:00:00:00:01 dev eth0
            ip neigh add 2001:db8:7::1 lladdr 02:00:00:00:00:01 dev eth0
            nft add table inet cni
            nft 'add chain inet cni service { type nat hook output priority -100; }'
            nft add rule inet cni service ip daddr 10.43.0.1 dnat ip to 10.44.0.7
            nft 'add chain inet cni leave { type nat hook postrouting priority 100; }'
            nft add rule inet cni leave oifname eth0 udp dport 9 masquerade");
    }

    fn send(from: &str, to: &str) {
        let socket = UdpSocket::bind((from.parse::<IpAddr>().unwrap(), 0)).unwrap();
        socket.send_to(b"ping", to).unwrap();
    }

    /// Each entry as "source > destination: where replies go".
    fn entries() -> String {
        let mut lines: Vec<String> = sh("conntrack -L -f ipv4 2>/dev/null; conntrack -L -f ipv6 2>/dev/null")
            .lines()
            .filter(|line| line.starts_with("udp"))
            .map(|line| {
                let field =
                    |name: &str, nth| line.split(' ').filter_map(|word| word.strip_prefix(name)).nth(nth).unwrap();
                format!("{} > {}: {}\n", field("src=", 0), field("dst=", 0), field("dst=", 1))
            })
            .collect();
        lines.sort();
        lines.concat()
    }

    #[test]
    fn masqueraded_connections_to_remote_ranges_begin_anew_and_keep_their_source() {
        in_netns(|| async {
            masquerading_node();
            let all = || {
                send("10.42.0.5", "10.44.0.9:9");
                send("10.42.0.5", "10.44.0.9:10");
                send("10.42.0.5", "203.0.113.7:9");
                send("10.42.0.5", "10.43.0.1:9");
                send("192.168.7.2", "10.44.0.9:9");
                send("fd42::5", "[fd44::9]:9");
                send("fd42::5", "[2001:db8:99::9]:9");
            };
            all();
            let before = entries();
            let net = |text: &str| text.parse::<IpNetwork>().unwrap();
            let keep_source = BTreeSet::from([
                (net("10.42.0.0/16"), net("10.44.0.0/16")),
                (net("10.42.0.0/24"), net("10.45.0.0/24")),
                (net("fd42::/48"), net("fd44::/48")),
            ]);
            crate::kernel::nft::write(Some(Nft { keep_source: keep_source.clone(), ..Nft::default() }), None).unwrap();
            let forgotten = forget_masqueraded(&keep_source).unwrap();
            let after = entries();
            assert_eq!(forget_masqueraded(&keep_source).unwrap(), 0);
            sh("conntrack -F 2>/dev/null");
            all();
            let anew = entries();
            expect_test::expect![[r#"
                10.42.0.5 > 10.43.0.1: 192.168.7.2
                10.42.0.5 > 10.44.0.9: 10.42.0.5
                10.42.0.5 > 10.44.0.9: 192.168.7.2
                10.42.0.5 > 203.0.113.7: 192.168.7.2
                192.168.7.2 > 10.44.0.9: 192.168.7.2
                fd42::5 > 2001:db8:99::9: 2001:db8:7::2
                fd42::5 > fd44::9: 2001:db8:7::2
                -- 3 forgotten
                10.42.0.5 > 10.44.0.9: 10.42.0.5
                10.42.0.5 > 203.0.113.7: 192.168.7.2
                192.168.7.2 > 10.44.0.9: 192.168.7.2
                fd42::5 > 2001:db8:99::9: 2001:db8:7::2
                -- anew
                10.42.0.5 > 10.43.0.1: 10.42.0.5
                10.42.0.5 > 10.44.0.9: 10.42.0.5
                10.42.0.5 > 10.44.0.9: 10.42.0.5
                10.42.0.5 > 203.0.113.7: 192.168.7.2
                192.168.7.2 > 10.44.0.9: 192.168.7.2
                fd42::5 > 2001:db8:99::9: 2001:db8:7::2
                fd42::5 > fd44::9: fd42::5
            "#]]
            .assert_eq(&format!("{before}-- {forgotten} forgotten\n{after}-- anew\n{anew}"));
        });
    }
}
