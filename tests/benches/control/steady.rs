//! What is asked of the API server, and what it costs, when nothing changes.

use std::{
    collections::BTreeMap,
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::wait_for;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    Both,
    client::Ask,
    counts::asked,
    kubernetes::{GATEWAY, Kubernetes},
    process::{processes, seconds},
};

/// It is steady when nothing was written for so long: of an object, status is written once in 10 s.
const QUIET: Duration = Duration::from_secs(15);
/// Of 1000 members a gateway has 3000 objects to write to.
const LIMIT: Duration = Duration::from_secs(3600);
const LEASES: &str = "/apis/coordination.k8s.io/v1/namespaces/carrick/leases";

#[derive(Debug, Serialize)]
pub(crate) struct Steady {
    seconds: f64,
    /// Requests in that time: of the worker, of the gateway, and of the gateway for its Lease.
    worker: usize,
    gateway: usize,
    lease: usize,
    /// Share of one processor that each process had.
    processor: BTreeMap<&'static str, f64>,
}

/// Waits until the gateway has written all that it has to say.
pub(crate) fn wait(kubernetes: &Kubernetes) -> Result<()> {
    let mut seen = (0, Instant::now());
    wait_for("status to be written", LIMIT, || {
        let audit = kubernetes.server.audit().map_err(|error| format!("{error:#}"))?;
        let written = audit.iter().filter(|event| event["verb"] == "patch").count();
        if written != seen.0 {
            seen = (written, Instant::now());
        }
        sleep(Duration::from_secs(1));
        if seen.1.elapsed() >= QUIET { Ok(()) } else { Err(format!("{written} writes")) }
    })
}

/// The gateway holds its slot by a Lease from now on, as that of an autoscaled group does.
pub(crate) fn measure(kubernetes: &Kubernetes, both: &Both, time: u64) -> Result<Steady> {
    let node = format!("/api/v1/nodes/{}", kubernetes.node(GATEWAY).host.name());
    kubernetes.admin(&Ask::merge(&node, json!({"metadata": {"labels": {"carrick.dev/gateway": "auto"}}})))?;
    wait_for("the gateway's Lease", LIMIT, || {
        let leases = kubernetes.admin(&Ask::get(LEASES)).map_err(|error| format!("{error:#}"))?;
        let held = leases["items"].as_array().is_some_and(|items| !items.is_empty());
        if held { Ok(()) } else { Err(leases.to_string()) }
    })?;
    wait(kubernetes)?;
    eprintln!("{time} s without a change ...");
    let begun = kubernetes.server.audit()?.len();
    let (began, before) = (Instant::now(), used(both)?);
    sleep(Duration::from_secs(time));
    let (took, after) = (began.elapsed().as_secs_f64(), used(both)?);
    let mut audit = kubernetes.server.audit()?.split_off(begun);
    // A watch is told when it begins and when it ends, perhaps one that began before.
    audit.retain(|event| event["verb"] != "watch" || event["stage"] == "ResponseStarted");
    let (lease, other): (Vec<Value>, Vec<Value>) = audit.into_iter().partition(is_of_lease);
    let count = |audit: &[Value], account: &str| asked(audit, account).values().sum();
    ensure!(!lease.is_empty(), "the gateway has not renewed its Lease");
    let processor = after.iter().map(|(name, after)| (*name, (after - before[name]) / took)).collect();
    Ok(Steady {
        seconds: took,
        worker: count(&other, "worker"),
        gateway: count(&other, "gateway"),
        lease: count(&lease, "gateway"),
        processor,
    })
}

fn is_of_lease(event: &Value) -> bool {
    event["requestURI"].as_str().is_some_and(|uri| uri.starts_with(LEASES))
}

fn used(both: &Both) -> Result<BTreeMap<&'static str, f64>> {
    processes(both)?.map(|(name, process)| Ok((name, seconds(process).context(name)?))).collect()
}
