//! Where a gateway is dialled: `host:port`, parsed.

use std::net::{IpAddr, Ipv6Addr};

use super::{Endpoint, Host, Reason, Refusal, prefix::special, quoted, refusal};
use crate::api::limits::MAX_ENDPOINT_PORT;

/// Parses `host:port`. `mesh_domain` is lower case without a trailing dot: names under it are refused, because they
/// resolve through the tunnel that they would start.
pub(super) fn parse(text: &str, mesh_domain: &str) -> Result<Endpoint, Refusal> {
    let (host, port) = split(text)?;
    let port = self::port(port, text)?;
    let host = match host {
        Written::Ip(ip) => address(ip)?,
        Written::Text(text) => match text.parse::<IpAddr>() {
            Ok(ip) => address(ip)?,
            Err(_) => name(text, mesh_domain)?,
        },
    };
    Ok(Endpoint { host, port })
}

enum Written<'a> {
    Ip(IpAddr),
    Text(&'a str),
}

fn split(text: &str) -> Result<(Written<'_>, &str), Refusal> {
    let bad = |why: &str| refusal(Reason::InvalidEndpoint, format!("{} {why}", quoted(text)));
    let Some((host, port)) = text.rsplit_once(':') else {
        return Err(bad("is not host:port: write it like gw0.example.com:27473"));
    };
    if let Some(inner) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        let ip: Result<Ipv6Addr, _> = inner.parse();
        return match ip {
            Ok(ip) => Ok((Written::Ip(IpAddr::V6(ip)), port)),
            Err(_) => Err(bad("has no IPv6 address in its brackets: write it like [2001:db8::1]:27473")),
        };
    }
    if host.contains(':') {
        return Err(bad("is not host:port: an IPv6 address stands in brackets, like [2001:db8::1]:27473"));
    }
    Ok((Written::Text(host), port))
}

fn port(port: &str, whole: &str) -> Result<u16, Refusal> {
    let digits = !port.is_empty() && port.bytes().all(|c| c.is_ascii_digit());
    let number = port.parse().ok().filter(|_| digits);
    number.filter(|port| (1..=MAX_ENDPOINT_PORT).contains(port)).ok_or_else(|| {
        let message =
            format!("{} needs a port from 1 to {MAX_ENDPOINT_PORT}: seven more ports follow it", quoted(whole));
        refusal(Reason::InvalidPort, message)
    })
}

fn address(ip: IpAddr) -> Result<Host, Refusal> {
    match special(ip) {
        None => Ok(Host::Ip(ip)),
        Some((reason, what)) => {
            let message = format!("{ip} lies in {what}: name the address that other members dial");
            Err(refusal(reason, message))
        }
    }
}

/// A host name (RFC 1123): labels of letters, digits and '-'.
fn name(text: &str, mesh_domain: &str) -> Result<Host, Refusal> {
    let lower = text.to_ascii_lowercase();
    let name = lower.strip_suffix('.').unwrap_or(&lower);
    let label = |label: &str| {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        (1..=63).contains(&label.len()) && label.bytes().all(inner) && !label.starts_with('-') && !label.ends_with('-')
    };
    if name.len() > 253 || !name.split('.').all(label) {
        let message =
            format!("{} is neither an IP address nor a DNS name: write it like gw0.example.com", quoted(text));
        return Err(refusal(Reason::InvalidHost, message));
    }
    let last = name.rsplit('.').next().unwrap_or(name);
    // Resolvers take such names for addresses in forms of their own: 10.1 is 10.0.0.1, and 0x7f000001 is 127.0.0.1.
    let hex = |text: &str| text.bytes().all(|c| c.is_ascii_hexdigit());
    if last.bytes().all(|c| c.is_ascii_digit()) || last.strip_prefix("0x").is_some_and(hex) {
        let message = format!("{} ends in a number but is no IPv4 address: correct the address", quoted(text));
        return Err(refusal(Reason::InvalidHost, message));
    }
    if last == "localhost" {
        let message = format!("{} is loopback: name the address that other members dial", quoted(text));
        return Err(refusal(Reason::Loopback, message));
    }
    if under(name, mesh_domain) {
        let message = format!(
            "{} is in the mesh's own domain {mesh_domain}, which resolves through the tunnel: use a name outside it",
            quoted(text)
        );
        return Err(refusal(Reason::InMeshDomain, message));
    }
    Ok(Host::Name(name.to_owned()))
}

/// Whether the name is the domain or below it.
fn under(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| !domain.is_empty() && (rest.is_empty() || rest.ends_with('.')))
}
