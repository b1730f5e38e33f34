//! `carrick plan`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::Context;
use serde::Serialize;
use tokio::time::timeout;

use crate::{
    agent::check_backend,
    args,
    causes::with_cause,
    dial::Dialer,
    diff::diff,
    gateway::SlotSecret,
    kernel::{Linux, bpf::Bpf, facts},
    keys::{PrivateKey, PublicKey},
    names::Ordinal,
    reconcile::{Kernel, waits},
    resolve::{Resolved, Resolver},
    source::{self, Origin},
    state::Op,
    survey::{Found, Keys, SlotKeys, View, node_name, survey},
    tunnel::client::Client,
};

/// How long names are given to resolve; the rest is planned without them.
const PATIENCE: Duration = Duration::from_secs(3);

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    operations: Vec<String>,
    /// What would be done if everything could be read.
    waiting: Vec<String>,
    rejections: Vec<String>,
    problems: Vec<String>,
}

async fn read_keys(server: &source::Server, slot: Ordinal) -> Result<BTreeMap<PublicKey, PrivateKey>, String> {
    let keys = SlotSecret::new(server, None, slot).await?.read().await?;
    Ok(keys.into_iter().map(|key| (key.public(), key)).collect())
}

pub(super) async fn run(args: args::Plan) -> anyhow::Result<bool> {
    check_backend(&args.node.backend)?;
    let origin = args.node.origin(node_name(&args.node));
    let snapshot = source::read(&origin).await?;
    let view = View::new(&snapshot, &args.node);
    let secret = match (&origin, view.intent.slot_of(&node_name(&args.node))) {
        (Origin::Kube(server), Some(slot)) => Some(read_keys(server, slot).await),
        _ => None,
    };
    let mut keys = Keys::default();
    keys.refresh(
        &args.node,
        &view.intent,
        secret.as_ref().map_or(SlotKeys::Folder, |read| SlotKeys::Secret(read.as_ref().ok())),
    );
    let resolved = resolve(view.endpoint_names()).await;
    let client = Client::new(&args.node.backend.run_dir);
    let bpf = Bpf::new(&args.node.backend.bpffs, &args.node.backend.run_dir)?;
    let mut kernel = Linux::new(client, keys.secrets(), bpf).context("cannot open netlink sockets")?;
    let reader = facts::Reader::new().context("cannot open netlink sockets")?;
    let internal = view.intent.addresses_of(&node_name(&args.node));
    let node = reader.read(&internal).await.context("cannot read this node's links and addresses")?;
    let mut reading = kernel.read().await;
    // A path MTU that only the agent's probes know shows in no plan made here.
    let found = Found { node: &node, resolved: &resolved, reading: &reading, mtus: BTreeMap::new() };
    let clock = (&mut Dialer::default(), Duration::ZERO);
    let survey = survey(&view, &keys, found, &args.node, clock);
    reading.excuse_absent_tunnel(&survey.desired);
    let operations = diff(&survey.desired, &reading.state);
    let (waiting, operations): (Vec<Op>, Vec<Op>) =
        operations.into_iter().partition(|operation| waits(operation, survey.complete, &reading, &[]));
    let unresolved = resolved.failed.iter().map(|(name, why)| format!("endpoint {name} does not resolve: {why}"));
    let answer = Answer {
        operations: operations.iter().map(ToString::to_string).collect(),
        waiting: waiting.iter().map(ToString::to_string).collect(),
        rejections: view.rejected.iter().chain(&survey.rejected).map(ToString::to_string).collect(),
        problems: (view.problems.iter().chain(&keys.problems).cloned())
            .chain(secret.and_then(Result::err))
            .chain(node.conditions.iter().map(ToString::to_string))
            .chain(unresolved)
            .chain(reading.failed.iter().map(|error| with_cause(error)))
            .collect(),
    };
    super::print(args.output.output, &answer, || {
        let operations = answer.operations.iter().map(|operation| format!("{operation}\n"));
        let waiting = answer.waiting.iter().map(|operation| format!("# waits: {operation}\n"));
        let rejections = answer.rejections.iter().map(|rejection| format!("# refused: {rejection}\n"));
        let problems = answer.problems.iter().map(|problem| format!("# problem: {problem}\n"));
        operations.chain(waiting).chain(rejections).chain(problems).collect()
    })?;
    Ok(true)
}

async fn resolve(names: BTreeSet<String>) -> Resolved {
    let (mut resolver, mut results) = Resolver::new();
    resolver.follow(&names);
    let settled = |resolved: &Resolved| {
        names.iter().all(|name| resolved.addresses.contains_key(name) || resolved.failed.contains_key(name))
    };
    let in_time = matches!(timeout(PATIENCE, results.wait_for(settled)).await, Ok(Ok(_)));
    let mut resolved = results.borrow().clone();
    for name in names.iter().filter(|name| !in_time && !resolved.addresses.contains_key(*name)) {
        resolved.failed.entry(name.clone()).or_insert_with(|| "no answer within 3 s".to_owned());
    }
    resolved
}
