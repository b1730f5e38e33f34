//! The same tunnels without our data plane: what `wg` and `ip route` alone would do, to compare with.
//!
//! Carrick joins the members first, so devices, peers and sessions are the same. Then its agents are killed, and its rules,
//! routes, programs and the hop go. Kernel routes lead the packets the same way instead: over the same nodes, through the
//! same tunnel, with the same MTU.

use anyhow::{Context, Result};

use super::{
    ends::MTU,
    joined::Joined,
    way::{DEVICE, Way},
};

/// Takes our data plane away from every node but for the tunnels, and keeps plugins from masquerading what crosses.
pub fn strip(joined: &Joined) -> Result<()> {
    joined.kill_agents()?;
    let [one, other] = joined.clusters().map(|cluster| cluster.member.pods.to_string());
    for (_, node) in joined.lab.nodes() {
        let host = &node.host;
        // A pinned link is all that holds a program where it is attached.
        host.output("rm", &["-rf", "/sys/fs/bpf/carrick"])?;
        host.ip("link del carrick-hop")?;
        for family in ["-4", "-6"] {
            for priority in ["11", "12"] {
                host.output("ip", &[family, "rule", "del", "priority", priority])?;
            }
        }
        host.nft(&keep_sources(&one, &other))?;
        // What comes out of one device may be answered through another, and a filter that is loose is strict on a device
        // without an address.
        host.set_rp_filter(0)?;
    }
    Ok(())
}

/// Leads what the last node of each member sends to the other member by these ways, there and back.
pub fn lead(joined: &Joined, ways: [Way; 2]) -> Result<()> {
    for (from, way) in ways.into_iter().enumerate() {
        let (sender, gateway) = (joined.last(from)?, joined.gateway(from, way.from)?);
        let pods = joined.clusters()[1 - from].member.pods.to_string();
        let address = gateway.addresses.first().with_context(|| format!("{} has no address", gateway.host.name()))?;
        let same = sender.host.name() == gateway.host.name();
        let routes = routes(&pods, (!same).then(|| address.to_string()).as_deref(), way.to);
        gateway.host.ip(&routes.gateway)?;
        if let Some(route) = routes.sender {
            sender.host.ip(&route)?;
        }
    }
    Ok(())
}

/// Commands of `ip`.
#[derive(Debug, PartialEq, Eq)]
struct Routes {
    /// Where it is not the gateway itself.
    sender: Option<String>,
    gateway: String,
}

fn routes(pods: &str, gateway: Option<&str>, device: u8) -> Routes {
    Routes {
        sender: gateway.map(|gateway| format!("route replace {pods} via {gateway} mtu {MTU}")),
        gateway: format!("route replace {pods} dev {DEVICE}{device} mtu {MTU}"),
    }
}

/// Maps the source of what goes from one range to the other to itself: a connection that has a mapping is not masqueraded.
fn keep_sources(one: &str, other: &str) -> String {
    format!(
        "table ip bench {{
    chain postrouting {{
        type nat hook postrouting priority srcnat - 2; policy accept;
        ip saddr {one} ip daddr {other} snat to ip saddr
        ip saddr {other} ip daddr {one} snat to ip saddr
    }}
}}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_routes_by_its_gateway_and_that_by_the_device_of_the_remote_slot() {
        assert_eq!(
            routes("10.44.0.0/16", Some("203.0.113.3"), 1),
            Routes {
                sender: Some("route replace 10.44.0.0/16 via 203.0.113.3 mtu 1420".to_owned()),
                gateway: "route replace 10.44.0.0/16 dev carrick-wg1 mtu 1420".to_owned(),
            }
        );
        assert_eq!(routes("10.44.0.0/16", None, 0).sender, None);
    }
}
