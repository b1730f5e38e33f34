//! What a gateway's business with the API server goes by: what the agent knows of its cluster.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
};

use crate::{
    api::{MeshGateway, MeshGatewaySpec, MeshGatewayStatus, Objects, ReachedMember},
    conditions::{self, Saying, Subject},
    health::{Alarm, Life, Target},
    intent::{Intent, Rejection},
    keys::PublicKey,
    names::{NodeName, Ordinal},
    probe::Report,
    slot::{self, Wish},
};

/// What the agent knows of its cluster.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Known {
    /// What this node's label says.
    pub(super) label: Option<String>,
    /// Slots that a label pins, and to which node.
    pub(super) pinned: BTreeMap<Ordinal, NodeName>,
    pub(super) hop: BTreeSet<IpAddr>,
    /// As the API server has them.
    pub(super) gateways: BTreeMap<Ordinal, MeshGatewaySpec>,
    /// The keys that this member's MeshCluster names; `None`: there is no such MeshCluster.
    pub(super) named: Option<BTreeMap<Ordinal, PublicKey>>,
    /// Slots that other nodes hold.
    pub(super) others: BTreeSet<Ordinal>,
    /// Those of them that do not answer probes.
    pub(super) silent: BTreeSet<Ordinal>,
    /// What the MeshGateways say of themselves.
    pub(super) reports: BTreeMap<Ordinal, MeshGatewayStatus>,
    /// What this node would say of itself.
    pub(super) report: MeshGatewayStatus,
    /// What is to be said of the mesh's objects.
    pub(super) sayings: Arc<BTreeMap<Subject, Saying>>,
}

impl Known {
    /// `objects`: as the API server has them; `intent` and `rejected`: what they mean to this node; `drains`: it is asked to.
    pub fn new(
        me: &NodeName,
        objects: &Objects,
        (intent, rejected): (&Intent, &[Rejection]),
        report: Option<&Report>,
        drains: bool,
    ) -> Known {
        let named = |gateway: &'_ MeshGateway| {
            let ordinal = Ordinal::new(gateway.spec.ordinal)?;
            (gateway.metadata.name.as_deref() == Some(&*ordinal.to_string())).then_some(ordinal)
        };
        let named: Vec<_> = objects.gateways.iter().filter_map(|one| Some((named(one)?, one))).collect();
        let gateways: BTreeMap<_, _> = named.iter().map(|(slot, gateway)| (*slot, gateway.spec.clone())).collect();
        let reports: BTreeMap<_, _> =
            named.iter().filter_map(|(slot, gateway)| Some((*slot, gateway.status.clone()?))).collect();
        let labels = objects.nodes.iter().filter_map(|node| {
            let label = node.metadata.labels.get(slot::LABEL)?;
            Some((node.metadata.name.parse::<NodeName>().ok()?, label.clone()))
        });
        let labels: BTreeMap<NodeName, String> = labels.collect();
        let holders = intent.cluster.iter().flat_map(|cluster| &cluster.gateways);
        let others: BTreeSet<Ordinal> = holders.filter(|(_, node)| *node != me).map(|(slot, _)| *slot).collect();
        let is_silent = |slot: &&Ordinal| {
            let seen = report.and_then(|report| report.seen.get(&Target::Own(**slot)));
            seen.is_some_and(|seen| seen.life != Life::Up)
        };
        let silent: BTreeSet<Ordinal> = others.iter().filter(is_silent).copied().collect();
        let member = intent.members.get(&intent.me);
        // A worker says nothing, so it need not know.
        let speaking = if labels.contains_key(me) {
            let heard = reports.iter().filter(|(slot, _)| !silent.contains(slot));
            let heard = heard.map(|(slot, report)| (*slot, report.clone())).collect();
            conditions::sayings(objects, rejected, &intent.me, &heard)
        } else {
            BTreeMap::default()
        };
        Known {
            label: labels.get(me).cloned(),
            pinned: pinned(&labels, &gateways),
            hop: intent.addresses_of(me),
            named: member.map(|me| me.gateways.iter().map(|(slot, gateway)| (*slot, gateway.key)).collect()),
            silent,
            others,
            gateways,
            report: reported(intent, report, drains),
            reports,
            sayings: Arc::new(speaking),
        }
    }
}

/// What a gateway says of itself; when, is said when it is written.
fn reported(intent: &Intent, report: Option<&Report>, drains: bool) -> MeshGatewayStatus {
    let links = |id| {
        let lost = report.is_none_or(|report| report.verdict.alarms.contains(&Alarm::NoWay(id)));
        let reach = report.filter(|_| !lost).and_then(|report| report.verdict.reach.get(&id));
        reach.map_or(0, |reach| reach.links.count_ones().into())
    };
    let others = intent.others().filter(|(_, member)| !member.gateways.is_empty());
    let members = others.map(|(name, member)| ReachedMember { name: name.to_string(), gateways: links(member.id) });
    MeshGatewayStatus { heartbeat: None, draining: Some(drains), members: members.collect() }
}

/// Of several nodes that are pinned to one slot, it is who holds it already, else the first by name.
pub(super) fn pinned(
    labels: &BTreeMap<NodeName, String>,
    gateways: &BTreeMap<Ordinal, MeshGatewaySpec>,
) -> BTreeMap<Ordinal, NodeName> {
    let mut pinned = BTreeMap::new();
    for (node, label) in labels {
        let Ok(Wish::Pinned(slot)) = Wish::of(Some(label)) else { continue };
        let holds = gateways.get(&slot).is_some_and(|gateway| gateway.node == node.as_str());
        if holds || !pinned.contains_key(&slot) {
            pinned.insert(slot, node.clone());
        }
    }
    pinned
}
