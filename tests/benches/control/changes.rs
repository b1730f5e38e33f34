//! How long it takes from the change of an object until it is in the kernels, beside a plain watch of the same objects.
//!
//! A change gives one RouteAdvertisement another range for one that it had. It begins when its request is sent. It is in a kernel
//! when that tells that the new range is routed, which is what a pass makes last, and the old one is not any more. All
//! three are heard as they happen, on threads of their own.

use std::{
    collections::BTreeMap,
    sync::mpsc::{Receiver, Sender, channel},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use futures::{AsyncBufReadExt, StreamExt};
use ipnetwork::IpNetwork;
use kube::{Config, config::KubeConfigOptions, config::Kubeconfig};
use lab::routes::Watch;
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    client::Ask,
    counts::bytes,
    kubernetes::{GATEWAY, Kubernetes, MESH, WORKER},
    mesh,
    start::TABLE,
};

const LIMIT: Duration = Duration::from_secs(30);
/// From one change to the next, in milliseconds: it is not always the same, so that no timer of the agent's is always met at the same place.
const PAUSE: [u64; 5] = [300, 410, 530, 670, 790];

/// Since the request was sent, in milliseconds.
#[derive(Debug, Serialize)]
pub(crate) struct Changed {
    /// Until it was answered.
    answer: f64,
    /// Until a plain watch, from the worker's node, told of it.
    watch: f64,
    /// Until it was in the kernel.
    worker: f64,
    gateway: f64,
}

/// Whoever hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Ear {
    Watch,
    Worker,
    Gateway,
}

/// What was heard of a range: that it is there, or gone.
type Heard = (Ear, bool, IpNetwork, Instant);

pub(crate) fn measure(
    kubernetes: &Kubernetes,
    members: u16,
    changes: usize,
) -> Result<(Vec<Changed>, BTreeMap<&'static str, u64>)> {
    let (tell, heard) = channel();
    listen(kubernetes, Ear::Worker, WORKER, tell.clone())?;
    listen(kubernetes, Ear::Gateway, GATEWAY, tell.clone())?;
    listen_to_api(kubernetes, tell)?;
    let before = bytes(kubernetes)?;
    let mut found = Vec::new();
    for number in 0..changes {
        if number % 50 == 0 {
            eprintln!("change {number} of {changes} ...");
        }
        found.push(one(kubernetes, members, number, &heard)?);
        thread::sleep(Duration::from_millis(PAUSE[number % PAUSE.len()]));
    }
    let after = bytes(kubernetes)?;
    let each = [("worker", WORKER), ("gateway", GATEWAY)].map(|(name, node)| {
        let node = kubernetes.node(node).host.name();
        (name, (after[node] - before[node]) / changes.max(1) as u64)
    });
    Ok((found, each.into()))
}

fn one(kubernetes: &Kubernetes, members: u16, number: usize, heard: &Receiver<Heard>) -> Result<Changed> {
    // One advertisement after the other; those that have had their turn are changed once more.
    let all = usize::from(members * mesh::ADVERTISEMENTS);
    let (turn, at) = (number / all, (number % all) as u16);
    let (member, advertisement) = (at % members, at / members);
    let [old, new] = [turn, turn + 1].map(|changed| mesh::ranges(member, advertisement, changed));
    let path = format!("{MESH}/routeadvertisements/{}", mesh::advertisement(member, advertisement));
    let ask = Ask::merge(&path, json!({"spec": {"routes": mesh::routes(&new)}}));
    let (old, new): (IpNetwork, IpNetwork) = (old[0].parse()?, new[0].parse()?);

    let sent = Instant::now();
    kubernetes.admin(&ask)?;
    let answer = sent.elapsed();
    let mut missing = vec![
        (Ear::Watch, true, new),
        (Ear::Worker, true, new),
        (Ear::Worker, false, old),
        (Ear::Gateway, true, new),
        (Ear::Gateway, false, old),
    ];
    let mut times = BTreeMap::new();
    while !missing.is_empty() {
        let left = LIMIT.saturating_sub(sent.elapsed());
        let Ok((ear, there, range, at)) = heard.recv_timeout(left) else {
            bail!("change {number}, {old} to {new}: {missing:?} not within {LIMIT:?}")
        };
        if let Some(found) = missing.iter().position(|one| *one == (ear, there, range)) {
            missing.swap_remove(found);
            let time = times.entry(ear).or_insert(at);
            *time = at.max(*time);
        }
    }
    let since = |time: Duration| time.as_secs_f64() * 1e3;
    let [watch, worker, gateway] = [Ear::Watch, Ear::Worker, Ear::Gateway].map(|ear| since(times[&ear] - sent));
    Ok(Changed { answer: since(answer), watch, worker, gateway })
}

/// Tells of the routes of a node, until nobody hears.
fn listen(kubernetes: &Kubernetes, ear: Ear, node: usize, tell: Sender<Heard>) -> Result<()> {
    let watch = Watch::new(&kubernetes.node(node).host, TABLE)?;
    thread::spawn(move || {
        loop {
            // An error ends it, and with it the measurement: what it should hear is missing.
            let changes = watch.next(LIMIT).unwrap_or_else(|error| panic!("{error:#}"));
            for change in changes {
                if tell.send((ear, change.there, change.to, change.at)).is_err() {
                    return;
                }
            }
        }
    });
    Ok(())
}

/// Tells of the ranges of each RouteAdvertisement that a plain watch from the worker's node tells of, and returns when it
/// has begun.
fn listen_to_api(kubernetes: &Kubernetes, tell: Sender<Heard>) -> Result<()> {
    let path = format!("{MESH}/routeadvertisements");
    let listed = kubernetes.admin(&Ask::get(&format!("{path}?limit=1")))?;
    let version = listed["metadata"]["resourceVersion"].as_str().context("a version")?;
    let uri = format!("{path}?watch=true&resourceVersion={version}&timeoutSeconds=3600");
    let kubeconfig = kubernetes.kubeconfig.clone();
    let (begun, begins) = channel();
    // It stays in the network namespace that it is born in.
    kubernetes.node(WORKER).host.run(|| {
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let config = Kubeconfig::read_from(kubeconfig)?;
                let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
                let client = kube::Client::try_from(config)?;
                let stream = client.request_stream(http::Request::get(uri).body(Vec::new())?).await?;
                begun.send(())?;
                let mut lines = stream.lines();
                while let Some(line) = lines.next().await {
                    let line = line?;
                    let at = Instant::now();
                    let event: Value = serde_json::from_str(&line)?;
                    let routes = event["object"]["spec"]["routes"].as_array().context("routes")?;
                    for range in routes.iter().filter_map(|route| route["cidr"].as_str()) {
                        if tell.send((Ear::Watch, true, range.parse()?, at)).is_err() {
                            break;
                        }
                    }
                }
                Ok::<_, anyhow::Error>(())
            })
        });
        Ok(())
    })?;
    begins.recv_timeout(LIMIT).context("the plain watch to begin")
}
