//! How long it takes from the start of an agent, with nothing kept and nothing in the kernel, until every member's ranges are
//! routed: the last thing that a pass makes.

use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{carrick::Running, routes::Watch, wait_for};
use serde::Serialize;

use crate::{
    Both,
    client::Ask,
    counts::bytes,
    kubernetes::{GATEWAY, Kubernetes, MESH, WORKER},
    mesh,
};

/// Where Carrick has its routes.
pub(crate) const TABLE: u32 = 7473;
const LIMIT: Duration = Duration::from_secs(300);

#[derive(Debug, Serialize)]
pub(crate) struct Start {
    worker: One,
    gateway: One,
}

#[derive(Debug, Serialize)]
struct One {
    milliseconds: f64,
    /// What passed between API server and node until then, both directions.
    bytes: u64,
}

/// Has the gateway make its key, and makes the own member of it.
pub(crate) fn first(kubernetes: &Kubernetes, members: u16) -> Result<Both> {
    let watches = [watch(kubernetes, GATEWAY)?, watch(kubernetes, WORKER)?];
    let both = Both { gateway: kubernetes.start(GATEWAY)?, worker: kubernetes.start(WORKER)? };
    let path = format!("{MESH}/meshgateways/0");
    let made = wait_for("the gateway's MeshGateway", LIMIT, || {
        kubernetes.admin(&Ask::get(&path)).map_err(|error| format!("{error:#}"))
    })?;
    let [cluster, advertisement] = mesh::own(made["spec"]["publicKey"].as_str().context("a key")?);
    kubernetes.put("meshclusters", &[cluster])?;
    kubernetes.put("routeadvertisements", &[advertisement])?;
    for watch in watches {
        routed(&watch, mesh::offered(members))?;
    }
    Ok(both)
}

/// Ends both, and starts them again as if they had never been there.
pub(crate) fn again(kubernetes: &Kubernetes, members: u16, both: Both) -> Result<(Start, Both)> {
    let Both { gateway, worker } = both;
    gateway.terminate()?;
    worker.terminate()?;
    for node in [GATEWAY, WORKER] {
        kubernetes.carrick.cleanup(kubernetes.node(node))?;
    }
    let (worker, worker_runs) = one(kubernetes, members, WORKER)?;
    let (gateway, gateway_runs) = one(kubernetes, members, GATEWAY)?;
    Ok((Start { worker, gateway }, Both { gateway: gateway_runs, worker: worker_runs }))
}

fn one(kubernetes: &Kubernetes, members: u16, node: usize) -> Result<(One, Running)> {
    let watch = watch(kubernetes, node)?;
    let count = || Ok::<_, anyhow::Error>(bytes(kubernetes)?[kubernetes.node(node).host.name()]);
    let tunnel = (node == GATEWAY).then(|| kubernetes.carrick.start_tunnel(kubernetes.node(node))).transpose()?;
    let before = count()?;
    let began = Instant::now();
    let running = Running { tunnel, agent: kubernetes.start_agent(node)? };
    let done = routed(&watch, mesh::offered(members))?;
    let one = One { milliseconds: (done - began).as_secs_f64() * 1e3, bytes: count()? - before };
    Ok((one, running))
}

fn watch(kubernetes: &Kubernetes, node: usize) -> Result<Watch> {
    Watch::new(&kubernetes.node(node).host, TABLE)
}

/// When the last of so many ranges of IPv4 was routed.
fn routed(watch: &Watch, wanted: usize) -> Result<Instant> {
    let until = Instant::now() + LIMIT;
    let mut there = BTreeSet::new();
    loop {
        let left = until.saturating_duration_since(Instant::now());
        ensure!(!left.is_zero(), "{} of {wanted} ranges are routed within {LIMIT:?}", there.len());
        for change in watch.next(left)? {
            match (change.there, change.to.is_ipv4()) {
                (true, true) => there.insert(change.to),
                (false, true) => there.remove(&change.to),
                _ => continue,
            };
            if there.len() == wanted {
                return Ok(change.at);
            }
        }
    }
}
