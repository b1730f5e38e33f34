//! Routes in our two tables. Whatever stands in them is ours, whoever wrote it.
//!
//! Our routes are `proto kernel`: systemd-networkd removes the `unreachable` and `throw` routes of others at each restart
//! unless they bear it (`manager_mark_routes`), and routing daemons neither learn nor delete such routes.
//!
//! Invariant: a route reads as [`Route::Hop`], [`Route::Throw`] or [`Route::Unreachable`] only if it is, in everything the
//! kernel acts on, the one route that [`set`] would write for its prefix; everything else there is [`Route::Other`].

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnetwork::IpNetwork;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{
        RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteMetric, RoutePreference, RouteProtocol,
        RouteScope, RouteType,
    },
};

use super::rtnl::{Rtnl, absent_is_done, is};
use crate::{
    names::Table,
    state::{Family, Route},
};

pub(super) type Routes = BTreeMap<(Table, IpNetwork), Route>;

/// What the kernel gives IPv6 routes without a metric (`IP6_RT_PRIO_USER`); IPv4's default is 0.
const IPV6_METRIC: u32 = 1024;

/// Our tables. `hop` is the index of `carrick-hop`, if it exists.
pub(super) async fn read(rtnl: &Rtnl, hop: Option<u32>) -> io::Result<Routes> {
    let mut routes = Routes::new();
    for table in Table::ALL {
        for family in Family::ALL {
            for message in dump(rtnl, table, family).await? {
                let Some(to) = destination(&message) else { continue };
                // Two routes for one prefix are never both ours.
                let route = decode(&message, hop);
                routes.entry((table, to)).and_modify(|route| *route = Route::Other).or_insert(route);
            }
        }
    }
    Ok(routes)
}

/// Makes it the prefix's route. `index` is the device's, 0 for a route without one. `thorough`: other routes are known
/// to stand there, and are removed after it is in place.
pub(super) async fn set(
    rtnl: &Rtnl,
    (table, to): (Table, IpNetwork),
    route: &Route,
    index: u32,
    thorough: bool,
) -> io::Result<()> {
    let message = encode(table, to, route, index)?;
    let replaced = rtnl.change(RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE).await;
    let behind_another = replaced.as_ref().is_err_and(|error| is(error, &[libc::EEXIST]));
    if !behind_another {
        replaced?;
    }
    if thorough || behind_another {
        remove(rtnl, table, to, |found| decode(found, Some(index)) != *route).await?;
    }
    Ok(())
}

/// Leaves the prefix without a route. `thorough`: more than a plain one is known to stand there.
pub(super) async fn delete(rtnl: &Rtnl, table: Table, to: IpNetwork, thorough: bool) -> io::Result<()> {
    if thorough {
        return remove(rtnl, table, to, |_| true).await;
    }
    let mut message = blank(table, to);
    // Matches every scope (net/ipv4/fib_trie.c `fib_table_delete`).
    message.header.scope = RouteScope::NoWhere;
    absent_is_done(rtnl.change(RouteNetlinkMessage::DelRoute(message), 0).await)
}

/// Deletes those routes of the prefix that `stray` picks, each by its own description.
async fn remove(rtnl: &Rtnl, table: Table, to: IpNetwork, stray: impl Fn(&RouteMessage) -> bool) -> io::Result<()> {
    for found in dump(rtnl, table, family(to)).await? {
        if destination(&found) == Some(to) && stray(&found) {
            absent_is_done(rtnl.change(RouteNetlinkMessage::DelRoute(found), 0).await)?;
        }
    }
    Ok(())
}

async fn dump(rtnl: &Rtnl, table: Table, family: Family) -> io::Result<Vec<RouteMessage>> {
    let mut filter = RouteMessage::default();
    filter.header.address_family = address_family(family);
    filter.attributes = vec![RouteAttribute::Table(table.id())];
    let answers = match rtnl.dump(RouteNetlinkMessage::GetRoute(filter)).await {
        // The kernel makes a table with its first route.
        Err(error) if is(&error, &[libc::ENOENT]) => Vec::new(),
        // IPv6 is not compiled in, or off by `ipv6.disable=1`.
        Err(error) if family == Family::V6 && is(&error, &[libc::EOPNOTSUPP, libc::EAFNOSUPPORT]) => Vec::new(),
        answers => answers?,
    };
    let ours = |route: &RouteMessage| {
        let stored = !route.header.flags.contains(RouteFlags::Cloned);
        stored && route.header.address_family == address_family(family) && self::table(route) == table.id()
    };
    let route = |answer| if let RouteNetlinkMessage::NewRoute(route) = answer { Some(route) } else { None };
    Ok(answers.into_iter().filter_map(route).filter(ours).collect())
}

/// The table in a route message.
pub(super) fn table(message: &RouteMessage) -> u32 {
    let long = message.attributes.iter().find_map(|a| if let RouteAttribute::Table(id) = a { Some(*id) } else { None });
    long.unwrap_or(message.header.table.into())
}

fn destination(message: &RouteMessage) -> Option<IpNetwork> {
    let address = message.attributes.iter().find_map(|a| match a {
        RouteAttribute::Destination(address) => ip(address),
        _ => None,
    });
    let address = address.or(match message.header.address_family {
        AddressFamily::Inet => Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        AddressFamily::Inet6 => Some(IpAddr::V6(Ipv6Addr::UNSPECIFIED)),
        _ => None,
    })?;
    IpNetwork::new(address, message.header.destination_prefix_length).ok()
}

fn blank(table: Table, to: IpNetwork) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = address_family(family(to));
    message.header.destination_prefix_length = to.prefix();
    message.attributes = vec![RouteAttribute::Destination(to.network().into()), RouteAttribute::Table(table.id())];
    message
}

fn encode(table: Table, to: IpNetwork, route: &Route, index: u32) -> io::Result<RouteMessage> {
    let mut message = blank(table, to);
    message.header.protocol = RouteProtocol::Kernel;
    message.header.kind = match route {
        Route::Hop { .. } => RouteType::Unicast,
        Route::Throw => RouteType::Throw,
        Route::Unreachable => RouteType::Unreachable,
        Route::Other => {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no route of ours: never to be written"));
        }
    };
    message.header.scope = scope(to.is_ipv4(), route);
    message.attributes.push(RouteAttribute::Priority(metric(to.is_ipv4())));
    if let Route::Hop { mtu, source } = route {
        message.attributes.push(RouteAttribute::Oif(index));
        message.attributes.extend(mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
        message.attributes.extend(source.map(|source| RouteAttribute::PrefSource(source.into())));
    }
    Ok(message)
}

fn decode(message: &RouteMessage, hop: Option<u32>) -> Route {
    let ipv4 = message.header.address_family == AddressFamily::Inet;
    let (mut oif, mut source, mut mtu, mut priority, mut plain) = (None, None, None, 0, true);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(_) | RouteAttribute::Table(_) | RouteAttribute::CacheInfo(_) => {}
            RouteAttribute::Preference(RoutePreference::Medium) => {}
            RouteAttribute::Oif(index) => oif = Some(*index),
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Priority(metric) => priority = *metric,
            RouteAttribute::Metrics(metrics) => match metrics[..] {
                [RouteMetric::Mtu(metric)] => mtu = Some(metric),
                _ => plain = false,
            },
            _ => plain = false,
        }
    }
    let route = match message.header.kind {
        RouteType::Unicast if oif.is_some() && oif == hop => Route::Hop { mtu, source },
        RouteType::Throw => Route::Throw,
        RouteType::Unreachable => Route::Unreachable,
        _ => Route::Other,
    };
    let header = &message.header;
    let as_written = plain
        && priority == metric(ipv4)
        && header.protocol == RouteProtocol::Kernel
        && header.scope == scope(ipv4, &route)
        && header.tos == 0
        && header.source_prefix_length == 0;
    if as_written { route } else { Route::Other }
}

/// What `ip route` would choose: IPv6 knows no scopes.
fn scope(ipv4: bool, route: &Route) -> RouteScope {
    if ipv4 && matches!(route, Route::Hop { .. }) { RouteScope::Link } else { RouteScope::Universe }
}

fn metric(ipv4: bool) -> u32 {
    if ipv4 { 0 } else { IPV6_METRIC }
}

fn family(to: IpNetwork) -> Family {
    if to.is_ipv4() { Family::V4 } else { Family::V6 }
}

pub(super) fn address_family(family: Family) -> AddressFamily {
    match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::kernel::tests::{in_netns, sh};

    #[test]
    fn foreign_routes_are_not_even_sent() {
        in_netns(|| async {
            let rtnl = Rtnl::new().unwrap();
            let crowd: String =
                (0..5000).map(|n| format!("route add throw 10.{}.{}.0/24\n", n / 256, n % 256)).collect();
            sh(&format!("ip -batch - <<'E'\n{crowd}E\nip route add throw 10.44.0.0/16 table 7473"));
            let mut filter = RouteMessage::default();
            filter.header.address_family = AddressFamily::Inet;
            filter.attributes = vec![RouteAttribute::Table(7473)];
            assert_eq!(rtnl.dump(RouteNetlinkMessage::GetRoute(filter)).await.unwrap().len(), 1);
        });
    }
}
