//! `carrick export`.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, bail};
use kube::Resource;
use serde::Serialize;
use tokio::time::{Instant, sleep};

use crate::{
    api::Objects,
    args,
    export::{Given, Proposal, awaited, propose, written},
    names::MemberName,
    source::{self, Once, Origin},
};

/// Between two looks for the gateways' keys.
const LOOK: Duration = Duration::from_secs(2);
/// Who is told the cluster's name by the chart, and how.
const DAEMON_SET: &str = "carrick-gateway";
const CONTAINER: &str = "agent";
const NAME_FLAG: &str = "--cluster-name=";

pub(super) async fn run(args: args::Export) -> anyhow::Result<bool> {
    let server = args.access.server().once().await?;
    let cluster = match args.cluster_name {
        Some(name) => name,
        None => installed_name(&server, &args.namespace).await?,
    };
    let mut given = Given { cluster, endpoints: Default::default(), ranges: args.pod_cidrs };
    for args::SlotEndpoint { slot, endpoint } in args.endpoints {
        given.endpoints.entry(slot).or_default().push(endpoint);
    }
    let here = with_keys(&server, Duration::from_secs(args.wait)).await?;
    let mesh = read_mesh(&args.mesh_dir).await?;
    let proposal = propose(&given, &here, &mesh, &args.mesh_domain)?;
    proposal.notes.iter().for_each(|note| eprintln!("note: {note}"));
    proposal.rejected.iter().for_each(|rejection| eprintln!("refused: {rejection}"));
    if !proposal.rejected.is_empty() {
        bail!("nothing is written: the folder would have it refused");
    }
    let Proposal { cluster, advertisement, .. } = &proposal;
    let [clusters, routes] = files(&args.mesh_dir, given.cluster.as_str());
    let drafts = [draft(clusters, cluster, &mesh.clusters)?, draft(routes, advertisement, &mesh.advertisements)?];
    drafts.iter().flatten().try_for_each(check_own)?;
    drafts.iter().flatten().try_for_each(write)?;
    let folder = args.mesh_dir.display();
    if drafts.iter().flatten().next().is_none() {
        println!("{folder} has all of it already");
    }
    println!("commit the folder, or `kubectl apply -R -f {folder}` in every member");
    Ok(true)
}

/// The cluster's name, as the chart was told.
async fn installed_name(server: &Once, namespace: &str) -> anyhow::Result<MemberName> {
    let remedy = || {
        format!(
            "give the cluster's name with --cluster-name, as DaemonSet {DAEMON_SET} of namespace {namespace} does not tell it"
        )
    };
    let arguments = server.arguments(namespace, DAEMON_SET, CONTAINER).await.with_context(remedy)?;
    let name = arguments.iter().find_map(|argument| argument.strip_prefix(NAME_FLAG));
    name.with_context(remedy)?.parse().with_context(remedy)
}

/// What the API server has, once every gateway has published its key.
async fn with_keys(server: &Once, patience: Duration) -> anyhow::Result<Objects> {
    let began = Instant::now();
    loop {
        let waited = began.elapsed();
        let late = waited >= patience;
        let so_far = format!("{} s of at most {}", waited.as_secs(), patience.as_secs());
        let here = match server.gateways_and_nodes().await {
            Err(error) if error.passes && !late => {
                eprintln!("waiting for the API server ({so_far}): {error}");
                sleep(LOOK).await;
                continue;
            }
            answer => answer?,
        };
        let missing = awaited(&here);
        if missing.slots.is_empty() && missing.any == 0 {
            return Ok(here);
        }
        if late && missing.slots.is_empty() && !here.gateways.is_empty() {
            eprintln!("note: no key yet from {missing}: a later export adds what comes");
            return Ok(here);
        }
        if late {
            bail!(
                "no key from {missing} within {} s: are the pods of DaemonSet {DAEMON_SET} ready?",
                patience.as_secs()
            );
        }
        eprintln!("waiting for the key of {missing} ({so_far})");
        sleep(LOOK).await;
    }
}

/// What the folder has; nothing where there is none yet.
async fn read_mesh(dir: &Path) -> anyhow::Result<Objects> {
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    if !source::holds_manifests(dir) {
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

/// A file to be written.
struct Draft {
    path: PathBuf,
    text: String,
    /// What it may hold now, by kind and name, if the folder has the object.
    replaces: Option<(String, String)>,
}

/// `None` if the folder has the object as it should be, in whichever file.
fn draft<K>(path: PathBuf, object: &K, there: &[K]) -> anyhow::Result<Option<Draft>>
where
    K: Resource<DynamicType = ()> + Serialize + PartialEq,
{
    let name = object.meta().name.clone().unwrap_or_default();
    let old = written(there, &name);
    if old == Some(object) {
        return Ok(None);
    }
    let replaces = old.map(|_| (K::kind(&()).into_owned(), name));
    Ok(Some(Draft { path, text: serde_saphyr::to_string(object)?, replaces }))
}

/// A file is written only over one that holds the same object, and nothing else.
fn check_own(draft: &Draft) -> anyhow::Result<()> {
    let Draft { path, text, replaces } = draft;
    let held = match fs::read(path) {
        Ok(bytes) => source::named(&bytes).with_context(|| format!("cannot read {}", path.display()))?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
    };
    let held: Vec<(String, String)> = held.into_iter().map(|(kind, name)| (kind.to_owned(), name)).collect();
    if held == Vec::from_iter(replaces.clone()) {
        return Ok(());
    }
    let remedy = "edit the folder by hand to say";
    match replaces {
        Some((kind, name)) => {
            bail!("{kind} {name} does not lie alone in {}: move it there, or {remedy}\n{text}", path.display())
        }
        None => bail!("{} holds something else: move that, or {remedy}\n{text}", path.display()),
    }
}

/// Whole or not at all.
fn write(draft: &Draft) -> anyhow::Result<()> {
    let Draft { path, text, .. } = draft;
    let dir = path.parent().context("a file in a folder")?;
    fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let new = path.with_extension("yaml.new");
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, path));
    written.with_context(|| format!("cannot write {}", path.display()))?;
    println!("wrote {}", path.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;
    use crate::{
        api::{MeshCluster, MeshClusterSpec},
        scratch::Scratch,
    };

    fn cluster(name: &str, allowed: &str) -> MeshCluster {
        MeshCluster::new(name, MeshClusterSpec { id: 1, allowed_cidrs: vec![allowed.to_owned()], ..Default::default() })
    }

    #[test]
    fn a_file_is_written_only_over_the_same_object_alone() {
        let dir = Scratch::new();
        let path = dir.path().join("clusters/mn.yaml");
        fs::create_dir(dir.path().join("clusters")).unwrap();
        let (old, new) = (cluster("mn", "10.42.0.0/16"), cluster("mn", "10.0.0.0/8"));
        let [old_text, new_text, va] =
            [&old, &new, &cluster("va", "10.44.0.0/16")].map(|one| serde_saphyr::to_string(one).unwrap());
        let both = format!("{old_text}---\n{va}");
        let mut told = String::new();
        for (what, there, file) in [
            ("a first one", None, None),
            ("as it is, elsewhere", Some(&new), None),
            ("another, elsewhere", Some(&old), None),
            ("another", Some(&old), Some(&old_text)),
            ("another, with a neighbour", Some(&old), Some(&both)),
            ("another, elsewhere, and a stranger", Some(&old), Some(&va)),
            ("a first one, and a stranger", None, Some(&va)),
        ] {
            _ = fs::remove_file(&path);
            file.inspect(|text| fs::write(&path, text).unwrap());
            let draft = draft(path.clone(), &new, &Vec::from_iter(there.cloned())).unwrap();
            let outcome = draft.map(|draft| check_own(&draft).and_then(|()| write(&draft)));
            let shown = match outcome {
                None => "left alone".to_owned(),
                Some(Ok(())) => "written".to_owned(),
                Some(Err(error)) => error.to_string().lines().next().unwrap().replace(dir.path().to_str().unwrap(), ""),
            };
            let after = fs::read_to_string(&path).ok();
            let kept = after.as_ref() == file;
            assert!(kept || (shown == "written" && after.as_ref() == Some(&new_text)), "{what}");
            told += &format!("{what}: {shown}\n");
        }
        expect![[r#"
            a first one: written
            as it is, elsewhere: left alone
            another, elsewhere: MeshCluster mn does not lie alone in /clusters/mn.yaml: move it there, or edit the folder by hand to say
            another: written
            another, with a neighbour: MeshCluster mn does not lie alone in /clusters/mn.yaml: move it there, or edit the folder by hand to say
            another, elsewhere, and a stranger: MeshCluster mn does not lie alone in /clusters/mn.yaml: move it there, or edit the folder by hand to say
            a first one, and a stranger: /clusters/mn.yaml holds something else: move that, or edit the folder by hand to say
        "#]].assert_eq(&told);
    }
}
