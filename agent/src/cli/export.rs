//! `carrick export`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::{
    api::Objects,
    args,
    export::{Given, Proposal, awaited, propose},
    source::{self, Origin},
};

/// Between two looks for the gateways' keys.
const LOOK: Duration = Duration::from_secs(2);

pub(super) async fn run(args: args::Export) -> anyhow::Result<bool> {
    let here = with_keys(&args).await?;
    let mesh = read_mesh(&args.mesh_dir).await?;
    let mut given = Given { cluster: args.cluster_name, endpoints: Default::default(), ranges: args.pod_cidrs };
    for args::SlotEndpoint { slot, endpoint } in args.endpoints {
        given.endpoints.entry(slot).or_default().push(endpoint);
    }
    let proposal = propose(&given, &here, &mesh, &args.mesh_domain)?;
    let name = given.cluster.as_str();
    let known = |path: &Path, is_there: bool| {
        if is_there && !path.exists() {
            bail!(
                "the folder has {name} in another file than {}: move it there, or edit it by hand to say\n{}",
                path.display(),
                shown(&proposal)?
            );
        }
        Ok(())
    };
    let [cluster, routes] = files(&args.mesh_dir, name);
    known(&cluster, mesh.clusters.iter().any(|one| one.metadata.name.as_deref() == Some(name)))?;
    known(&routes, mesh.advertisements.iter().any(|one| one.metadata.name.as_deref() == Some(name)))?;
    proposal.notes.iter().for_each(|note| eprintln!("note: {note}"));
    proposal.rejected.iter().for_each(|rejection| eprintln!("refused: {rejection}"));
    if !proposal.rejected.is_empty() {
        bail!("nothing is written: the folder would have it refused");
    }
    write(&cluster, &proposal.cluster)?;
    write(&routes, &proposal.advertisement)?;
    println!("commit the folder, or `kubectl apply -R -f {}` in every member", args.mesh_dir.display());
    Ok(true)
}

/// What the API server has, once every gateway has published its key.
async fn with_keys(args: &args::Export) -> anyhow::Result<Objects> {
    let began = Instant::now();
    let origin = Origin::Kube(args.server());
    loop {
        let here = source::read(&origin).await?.objects;
        let missing = awaited(&here);
        let labelled = here.nodes.iter().any(|node| node.metadata.labels.contains_key(crate::slot::LABEL));
        if missing.is_empty() && (!here.gateways.is_empty() || !labelled) {
            return Ok(here);
        }
        let slots: Vec<String> = missing.iter().map(ToString::to_string).collect();
        let which = if slots.is_empty() { "a slot".to_owned() } else { format!("slots {}", slots.join(", ")) };
        if began.elapsed() >= Duration::from_secs(args.wait) {
            bail!("no key for {which} after {} s: are the pods of the chart's DaemonSet carrick-gateway running?", args.wait);
        }
        eprintln!("waiting for the key of {which}, {} s of at most {}", began.elapsed().as_secs(), args.wait);
        sleep(LOOK).await;
    }
}

/// What the folder has; nothing where there is none yet.
async fn read_mesh(dir: &Path) -> anyhow::Result<Objects> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let is_empty = fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?.next().is_none();
    if is_empty {
        return Ok(Objects::default());
    }
    let snapshot = source::read(&Origin::Folders(vec![dir.to_owned()])).await?;
    if let Some(problem) = snapshot.problems.first() {
        bail!("{problem}: the folder has to be right before something is added to it");
    }
    Ok(snapshot.objects)
}

/// Where a member's MeshCluster and its RouteAdvertisement belong: each has other owners.
fn files(dir: &Path, name: &str) -> [PathBuf; 2] {
    [dir.join("clusters").join(format!("{name}.yaml")), dir.join("routes").join(name).join("pods.yaml")]
}

fn shown(proposal: &Proposal) -> anyhow::Result<String> {
    let [cluster, routes] =
        [serde_saphyr::to_string(&proposal.cluster)?, serde_saphyr::to_string(&proposal.advertisement)?];
    Ok(format!("{cluster}---\n{routes}"))
}

/// Whole or not at all, and only if it is another.
fn write(path: &Path, object: &impl Serialize) -> anyhow::Result<()> {
    let text = serde_saphyr::to_string(object)?;
    match fs::read_to_string(path) {
        Ok(there) if there == text => {
            println!("{} is so already", path.display());
            return Ok(());
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot read {}", path.display()));
        }
        _ => {}
    }
    let dir = path.parent().context("a file in a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let draft = path.with_extension("yaml.new");
    fs::write(&draft, text).and_then(|()| fs::rename(&draft, path)).with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}
