//! What passed on every node's uplink, told apart by node.

use std::collections::BTreeMap;

use anyhow::Result;

use crate::{
    Lab, Member,
    capture::{Capture, Expected, Seen},
    carrick::{DEVICES, HOP_PORT, TUNNEL_PORT},
};

/// Running captures, by node.
#[derive(Debug)]
pub struct Watch {
    captures: BTreeMap<String, Capture>,
}

impl Lab {
    /// Captures on the uplinks of all nodes. Clear text is what comes from or goes to another member's ranges; between
    /// the nodes of one member its own ranges may pass.
    pub fn watch(&self) -> Result<Watch> {
        let mut captures = BTreeMap::new();
        for (member, node) in self.nodes() {
            let capture = Capture::start(self.switch(&member.name)?, &node.port, self.expected(member))?;
            captures.insert(node.host.name().to_owned(), capture);
        }
        Ok(Watch { captures })
    }

    fn expected(&self, member: &Member) -> Expected {
        let others = self.clusters.iter().map(|cluster| &cluster.member).filter(|other| other.name != member.name);
        Expected {
            tunnel: TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1,
            hop: HOP_PORT,
            private: others.flat_map(Member::allowed_ranges).collect(),
        }
    }
}

impl Watch {
    /// Ends it and returns what passed, by node.
    pub fn stop(self) -> Result<BTreeMap<String, Seen>> {
        self.captures.into_iter().map(|(node, capture)| Ok((node, capture.stop()?))).collect()
    }
}

/// What passed on all uplinks together.
pub fn sum(seen: &BTreeMap<String, Seen>) -> Seen {
    let mut sum = Seen::default();
    seen.values().cloned().for_each(|seen| sum.add(seen));
    sum
}
