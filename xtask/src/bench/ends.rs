//! Two nodes on one cable, without a tunnel yet: what every implementation gets alike.

use std::{fs, net::Ipv4Addr, path::PathBuf, sync::Arc};

use anyhow::{Context, Result};
use lab::{Host, guard::Guard};

/// The port of both tunnels; carrick's default, given to the others.
pub const PORT: u16 = 27473;
/// What fits through a cable of 1500 bytes: 20 (IPv4) or 40 (IPv6), 8 (UDP) and 32 (WireGuard) bytes are added.
pub const MTU: u16 = 1420;
/// By name, so that ours finds it as `gateway-0` too.
const KEY_FILE: &str = "gateway-0";

/// One node. Its pod is an address of its own, in its pod range.
#[derive(Debug)]
pub struct End {
    pub host: Host,
    /// The member's name, and its id.
    pub member: &'static str,
    pub id: u16,
    pub underlay: Ipv4Addr,
    pub pod: Ipv4Addr,
    /// In CIDR notation.
    pub pods: &'static str,
    /// Base64.
    pub public_key: String,
}

/// Both nodes. Ends, with everything that runs in it, with this value.
#[derive(Debug)]
pub struct Ends {
    pub ends: [End; 2],
    pub guard: Arc<Guard>,
}

impl Ends {
    pub fn new() -> Result<Ends> {
        let guard = Guard::unique("bench")?;
        let a = End::new(&guard, "mn", 1, Ipv4Addr::new(10, 42, 0, 1), "10.42.0.0/16")?;
        let b = End::new(&guard, "va", 2, Ipv4Addr::new(10, 44, 0, 1), "10.44.0.0/16")?;
        a.host.ip(&format!("link add eth0 mtu 1500 type veth peer name eth0 netns {}", b.host.pid()))?;
        for end in [&a, &b] {
            let (underlay, pod) = (end.underlay, end.pod);
            end.host
                .ip(&format!("link set eth0 mtu 1500 up\naddr add {underlay}/24 dev eth0\naddr add {pod}/32 dev lo"))?;
        }
        Ok(Ends { ends: [a, b], guard })
    }

    /// Each end with its other.
    pub fn both_ways(&self) -> [(&End, &End); 2] {
        let [a, b] = &self.ends;
        [(a, b), (b, a)]
    }
}

impl End {
    fn new(guard: &Arc<Guard>, member: &'static str, id: u16, pod: Ipv4Addr, pods: &'static str) -> Result<End> {
        let host = Host::machine(guard, member)?;
        let keys = host.dir().join("keys");
        fs::create_dir(&keys).with_context(|| format!("mkdir {}", keys.display()))?;
        let make = "chmod 700 \"$1\"; umask 077; wg genkey > \"$1/$2\"; wg pubkey < \"$1/$2\"";
        let folder = keys.to_str().context("a path is not UTF-8")?;
        let public_key = host.output("sh", &["-ec", make, "sh", folder, KEY_FILE])?.trim().to_owned();
        let [.., last] = id.to_be_bytes();
        Ok(End { host, member, id, underlay: Ipv4Addr::new(192, 0, 2, last), pod, pods, public_key })
    }

    /// The folder of the private key.
    pub fn keys(&self) -> PathBuf {
        self.host.dir().join("keys")
    }

    /// The file of the private key.
    pub fn key_file(&self) -> PathBuf {
        self.keys().join(KEY_FILE)
    }
}
