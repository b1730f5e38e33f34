//! Overlay addresses: computed by every node alike, allocated by nobody.
//!
//! Invariant: all hashes are SHA-256 and all integers big-endian, as every node of every version must agree on them.

use std::net::Ipv6Addr;

use ipnetwork::{IpNetwork, Ipv6Network};
use sha2::{Digest, Sha256};

use crate::names::{MemberId, NodeName, Ordinal};

/// The overlay of one mesh: a /64 for each member.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overlay([u8; 5]);

impl Overlay {
    /// `mesh_domain` in any case, with or without its trailing dot.
    pub fn new(mesh_domain: &str) -> Overlay {
        let domain = mesh_domain.to_ascii_lowercase();
        let hash = Sha256::new().chain_update(b"carrick overlay 1\0").chain_update(domain.trim_end_matches('.'));
        let hash = hash.finalize();
        Overlay([hash[0], hash[1], hash[2], hash[3], hash[4]])
    }

    /// The /48 of all members.
    pub fn whole(self) -> IpNetwork {
        let [a, b, c, d, e] = self.0;
        let first = Ipv6Addr::from([0xfd, a, b, c, d, e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        IpNetwork::V6(Ipv6Network::new(first, 48).expect("48 is a length"))
    }

    /// A member's /64, in fd00::/8 (RFC 4193).
    pub fn prefix(self, member: MemberId) -> IpNetwork {
        let network = Ipv6Network::new(self.address(member, [0; 8]), 64);
        IpNetwork::V6(network.expect("64 is a length"))
    }

    /// A slot's address: `::1` to `::8` of the member's prefix.
    pub fn slot(self, member: MemberId, slot: Ordinal) -> Ipv6Addr {
        self.address(member, [0, 0, 0, 0, 0, 0, 0, slot.get() + 1])
    }

    /// A node's address, whether it holds a slot or not: its host part is a hash of its name with the top bit set.
    pub fn node(self, member: MemberId, node: &NodeName) -> Ipv6Addr {
        let hash = Sha256::new().chain_update(b"carrick node 1\0").chain_update(node.as_str()).finalize();
        let mut host = [0; 8];
        host.copy_from_slice(&hash[..8]);
        host[0] |= 0x80;
        self.address(member, host)
    }

    fn address(self, member: MemberId, host: [u8; 8]) -> Ipv6Addr {
        let mut bytes = [0; 16];
        bytes[0] = 0xfd;
        bytes[1..6].copy_from_slice(&self.0);
        bytes[6..8].copy_from_slice(&member.get().to_be_bytes());
        bytes[8..].copy_from_slice(&host);
        bytes.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    /// These are on the wire between versions: a change here splits every mesh.
    #[test]
    fn addresses_are_what_every_other_node_computes() {
        let overlay = Overlay::new("Mesh.Internal.");
        assert_eq!(overlay, Overlay::new("mesh.internal"));
        let member = MemberId::new(258).expect("in range");
        let slot = Ordinal::new(7).expect("in range");
        let node = "worker-1.example".parse().expect("a node name");
        let told =
            format!("{}\n{}\n{}\n", overlay.prefix(member), overlay.slot(member, slot), overlay.node(member, &node));
        expect![[r#"
            fd77:8bad:2517:102::/64
            fd77:8bad:2517:102::8
            fd77:8bad:2517:102:eca5:b1:2d02:220c
        "#]]
        .assert_eq(&told);
    }
}
