//! The prober's place in the agent: it runs on the maps of now, and is told whom to probe after each pass.
//!
//! It has a thread of its own: what a pass asks of links and of the programs at them waits for the kernel's one lock over
//! all links, which others may hold for seconds, and the word of a gateway lapses sooner.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    thread::JoinHandle,
};

use ebpf::Count;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::{
    health::{Alarm, Drain, Targets},
    intent::Intent,
    kernel::bpf::health::Health,
    keys::PublicKey,
    names::{Device, Interface, MemberId, MemberName, Ordinal},
    overlay::Overlay,
    probe::{self, Report, Wanted},
    state::State,
    status::{self, DropStatus, MemberStatus, NetworkPlugin, SentStatus},
};

/// The way of what came out of tunnels.
const FROM_PEERS: &str = "from peers";

/// Between passes: what the prober is told, what it says, and the maps that it and status work on.
#[derive(Debug)]
pub(super) struct Probing {
    port: u16,
    wanted: watch::Sender<Option<Wanted>>,
    reports: watch::Sender<Option<Report>>,
    /// Ends with the sender of what is wanted, within a step.
    thread: Option<JoinHandle<()>>,
    counters: Option<Health>,
}

impl Probing {
    pub(super) fn new(port: u16) -> (Probing, watch::Receiver<Option<Report>>) {
        let (reports, reported) = watch::channel(None);
        (Probing { port, wanted: watch::Sender::new(None), reports, thread: None, counters: None }, reported)
    }

    /// Whether these maps are the ones that are worked on.
    pub(super) fn works_on(&self, generation: Option<u32>) -> bool {
        let alive = self.thread.as_ref().is_some_and(|thread| !thread.is_finished());
        self.counters.as_ref().map(Health::generation) == generation && (alive || generation.is_none())
    }

    /// Goes over to other maps: one handle for the prober, one for status. What was wanted still is.
    pub(super) fn work_on(&mut self, maps: Option<(Health, Health)>) -> io::Result<()> {
        self.stop();
        let Some((maps, counters)) = maps else { return Ok(()) };
        let prober = probe::run(maps, self.port, self.wanted.subscribe(), self.reports.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let run = move || match runtime.block_on(prober) {
            Ok(()) => info!("the prober ends"),
            Err(error) => warn!(%error, "the prober failed; the next pass starts it again"),
        };
        self.thread = Some(std::thread::Builder::new().name("prober".to_owned()).spawn(run)?);
        self.counters = Some(counters);
        Ok(())
    }

    /// Two probers must not write the same maps: waits until this one has ended.
    fn stop(&mut self) {
        let wanted = self.wanted.borrow().clone();
        self.wanted = watch::Sender::new(wanted);
        // One that has panicked has said so.
        self.thread.take().map(JoinHandle::join);
        self.counters = None;
    }

    pub(super) fn want(&self, wanted: Option<Wanted>) {
        crate::source::send_news(&self.wanted, wanted);
    }

    /// What the programs count, by way and by reason, and what that says of the network plugin; an error is for status to
    /// show.
    pub(super) fn counts(&self) -> io::Result<(Vec<SentStatus>, NetworkPlugin, Vec<DropStatus>)> {
        let Some(counters) = &self.counters else { return Ok((Vec::new(), NetworkPlugin::Unknown, Vec::new())) };
        let sent = counters.sent()?;
        let drops = counters.drops()?.into_iter();
        let drops = drops.map(|(reason, packets)| DropStatus { reason: reason.as_str().to_owned(), packets });
        Ok((by_way(&sent), network_plugin(&sent), drops.collect()))
    }
}

impl Drop for Probing {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Packets by way.
fn by_way(sent: &[Count]) -> Vec<SentStatus> {
    let slots = Ordinal::all().map(|slot| format!("slot {slot}"));
    let devices = Device::all().map(|device| device.to_string());
    let for_nodes = Device::all().map(|device| format!("{device} for other nodes"));
    let ways = slots.chain(devices).chain(for_nodes).chain([FROM_PEERS.to_owned()]);
    let told = ways.zip(sent).filter(|(_, count)| count.packets > 0);
    told.map(|(way, count)| SentStatus { way, packets: count.packets, bytes: count.bytes }).collect()
}

/// How the packets of this node's pods come to be steered.
fn network_plugin(sent: &[Count]) -> NetworkPlugin {
    let [any, past_routes] = [0..ebpf::sent::FOR_NODES, ebpf::sent::PAST_ROUTES..ebpf::sent::LEN]
        .map(|mut range| range.any(|index| sent[index as usize].packets > 0));
    match (past_routes, any) {
        (true, _) => NetworkPlugin::Native,
        (false, true) => NetworkPlugin::Routes,
        (false, false) => NetworkPlugin::Unknown,
    }
}

/// Whom this node probes, by the state that it should have; `None` where it is none of the mesh.
pub(super) fn wanted(
    intent: &Intent,
    overlay: Overlay,
    desired: &State,
    severed: &BTreeSet<(Device, PublicKey)>,
    drain: bool,
) -> Option<Wanted> {
    let config = desired.maps.as_ref()?.config.as_ref()?;
    let own = config.gateways.keys().map(|slot| (*slot, overlay.slot(config.member, *slot))).collect();
    let (mut members, mut without) = (BTreeMap::new(), BTreeSet::new());
    for (_, member) in intent.others() {
        let cut = member.gateways.iter().filter(|(slot, gateway)| severed.contains(&(Device(**slot), gateway.key)));
        without.extend(cut.map(|(slot, _)| (member.id, *slot)));
        let linked = member.gateways.iter().filter(|(slot, gateway)| {
            config.slot.is_some() && desired.peers.contains_key(&(Device(**slot), gateway.key))
        });
        members.insert(member.id, linked.map(|(slot, _)| (*slot, overlay.slot(member.id, *slot))).collect());
    }
    let tunnels = desired.links.iter().filter(|(interface, _)| matches!(interface, Interface::WireGuard(_)));
    let tunnel_mtu = tunnels.map(|(_, link)| link.mtu).min().and_then(|mtu| u16::try_from(mtu).ok());
    let targets = Targets {
        gateway: config.slot.is_some(),
        probing: !desired.overlay.is_empty(),
        own,
        members,
        severed: without,
        hop_mtu: config.hop_mtu,
        tunnel_mtu: tunnel_mtu.unwrap_or(config.mtu),
    };
    Some(Wanted { overlay: desired.overlay.first().copied(), targets, drain })
}

/// Whether routes are to carry other path MTUs.
pub(super) fn are_news(last: Option<&Report>, report: Option<&Report>) -> bool {
    let mtus = |report: Option<&Report>| -> Vec<u16> {
        report.iter().flat_map(|report| report.verdict.reach.values().map(|reach| reach.mtu)).collect()
    };
    mtus(last) != mtus(report)
}

/// The path MTU of every member that probes have found one for.
pub(super) fn mtus(intent: &Intent, report: Option<&Report>) -> BTreeMap<MemberName, u16> {
    let Some(report) = report else { return BTreeMap::new() };
    let found = |id: MemberId| report.verdict.reach.get(&id).map(|reach| reach.mtu).filter(|mtu| *mtu > 0);
    intent.others().filter_map(|(name, member)| Some((name.clone(), found(member.id)?))).collect()
}

/// The ways to each other member that has gateways.
pub(super) fn members(intent: &Intent, report: Option<&Report>) -> Vec<MemberStatus> {
    let slots = |bits: u8| (0..ebpf::SLOTS).filter(|slot| bits & (1 << slot) != 0).collect();
    let others = intent.others().filter(|(_, member)| !member.gateways.is_empty());
    let told = others.map(|(name, member)| {
        let reach = report.and_then(|report| report.verdict.reach.get(&member.id)).copied().unwrap_or_default();
        let lost = report.is_none_or(|report| report.verdict.alarms.contains(&Alarm::NoWay(member.id)));
        MemberStatus {
            member: name.to_string(),
            reached: !lost && (reach.links | reach.via) != 0,
            via: slots(reach.via),
            links: slots(reach.links),
            mtu: reach.mtu.into(),
        }
    });
    told.collect()
}

/// `asked`: somebody wants this gateway drained; the prober may not know it yet.
pub(super) fn drain(is_gateway: bool, asked: bool, report: Option<&Report>) -> status::Drain {
    let found = report.map(|report| report.drain).unwrap_or_default();
    match (is_gateway, asked, found) {
        (false, ..) => status::Drain::NoGateway,
        (true, false, _) => status::Drain::Taking,
        (true, true, Drain::No | Drain::Waiting) => status::Drain::Draining,
        (true, true, Drain::Quiet) => status::Drain::Drained,
        (true, true, Drain::GaveUp) => status::Drain::OverTime,
    }
}

/// What the prober has to say to people.
pub(super) fn problems(intent: &Intent, report: Option<&Report>) -> Vec<String> {
    let Some(report) = report else { return Vec::new() };
    let name = |id: MemberId| {
        let found = intent.others().find(|(_, member)| member.id == id);
        found.map_or_else(|| id.to_string(), |(name, _)| name.to_string())
    };
    let alarms = report.verdict.alarms.iter().map(|alarm| match alarm {
        Alarm::Late => {
            "the prober was away for more than a second: nothing was concluded from what it missed".to_owned()
        }
        Alarm::NoGatewayAnswers => "no other gateway of this cluster answers over the hop".to_owned(),
        Alarm::NoLinkAnswers => "no gateway of any other member answers".to_owned(),
        Alarm::NoWay(id) => format!("no way to {} is known: the last one that was stays in use", name(*id)),
        Alarm::Narrow(id) => format!(
            "the way to {} carries less than the 1280 bytes that IPv6 needs, and loses fragments: its IPv6 packets that \
             are longer are lost; widen it, or let fragments of UDP pass",
            name(*id)
        ),
    });
    let alarms: BTreeSet<String> = alarms.chain(report.problems.iter().cloned()).collect();
    alarms.into_iter().collect()
}
