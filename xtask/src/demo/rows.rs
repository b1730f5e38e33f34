//! What every demo tries between two pods, and what it saw on the way between the members.

use std::{net::SocketAddr, time::Duration};

use ::lab::{
    capture::Seen,
    traffic::{http, ping::ping, tcp},
};
use anyhow::Result;
use serde_json::{Value, json};

use super::{PORT, describe, load::End, say, table::Table};

const THROUGHPUT_TIME: Duration = Duration::from_secs(5);

pub fn pings(table: &mut Table, between: &str, [from, to]: [End<'_>; 2]) -> Result<()> {
    let pings = ping(from.network, to.ip, 5)?;
    let median = pings.median_ms().map_or(Value::Null, |ms| json!((ms * 1e3).round() / 1e3));
    table.hold(format!("ping, {between}"), pings.all_answered(), median, "ms");
    Ok(())
}

/// The page of a pod by its own address; the server must have seen the client pod's own address.
pub fn page(table: &mut Table, between: &str, [client, server]: [End<'_>; 2]) -> Result<()> {
    let address: SocketAddr = (server.ip, PORT).into();
    let _server = http::Server::start(server.network, address)?;
    let seen = http::get(client.network, address)?;
    table.hold(format!("http, {between}: client seen"), seen == client.ip, seen.to_string(), "");
    Ok(())
}

pub fn throughput(table: &mut Table, between: &str, [from, to]: [End<'_>; 2]) -> Result<()> {
    say(&format!("tcp throughput, {between}, {} s", THROUGHPUT_TIME.as_secs()));
    let tcp = tcp::throughput(from.network, to.network, (to.ip, PORT).into(), 1, THROUGHPUT_TIME)?;
    say(&format!("retransmits: {}", tcp.retransmits));
    table.hold(format!("tcp, {between}"), tcp.bytes > 0, tcp.megabits_per_second().round() as u64, "Mb/s");
    Ok(())
}

/// On the internet's end of the members' uplinks.
pub fn underlay(table: &mut Table, seen: &Seen) {
    let Seen { tunnel, clear, other, missed, described, .. } = seen;
    describe(described);
    let told = *tunnel > 0 && *missed == 0;
    if !told {
        say(&format!("the capture saw {tunnel} packets of the tunnel and missed {missed}: it proves nothing"));
    }
    say(&format!("underlay: {tunnel} packets of the tunnel"));
    table.hold("underlay: packets other than the tunnel's UDP", told && *other == 0, *other, "packets");
    table.hold("underlay: clear text between pod ranges", told && *clear == 0, *clear, "packets");
}

/// What left a member's nodes for another's range, while things failed.
pub fn clear_text(table: &mut Table, name: &str, seen: &Seen) {
    describe(&seen.described.iter().filter(|line| line.starts_with("clear text")).cloned().collect::<Vec<_>>());
    let told = seen.tunnel > 0 && seen.missed == 0;
    table.hold(name, told && seen.clear == 0, seen.clear, "packets");
}
