//! Carrick in the clusters, as its users bring it there: the image on every node, gateways labelled, the chart installed by
//! helm, the mesh's folder written by `carrick export` of each, and applied to both.
//!
//! Each step may be done again: what stands already stays, and pods are replaced only by what has changed.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use ::lab::carrick::{MemberStatus, Status, TUNNEL_PORT};
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{
    daemons, design,
    design::Design,
    images,
    record::{self, Cluster, Clusters, Machine, output},
    up::{self, Progress},
};
use crate::{image, tools, workspace};

pub const NAMESPACE: &str = "carrick";
const RELEASE: &str = "carrick";
const LABEL: &str = "carrick.dev/gateway";
/// Settings of a release.
pub type Values = BTreeMap<String, Value>;

/// The image, in an archive that every node sees.
#[derive(Clone, Debug)]
pub struct Prepared {
    reference: String,
    archive: PathBuf,
    /// The `carrick` that is in it.
    program: PathBuf,
}

/// Builds the image, or packs that `carrick`. Another `build` is another image, though of the same programs.
pub fn prepare(carrick: Option<&Path>, build: &str) -> Result<Prepared> {
    let (image, program) = image::local(carrick, build)?;
    let archive = images::dir()?.join(format!("carrick-{build}.tar"));
    fs::create_dir_all(images::dir()?).context("a folder for images")?;
    image.write(&archive)?;
    Ok(Prepared { reference: image.reference().to_owned(), archive, program })
}

/// Both clusters, with what they are.
pub struct Members<'a> {
    pub all: Vec<(Design, &'a Cluster)>,
}

impl<'a> Members<'a> {
    pub fn of(clusters: &'a Clusters) -> Result<Members<'a>> {
        let nodes = clusters.clusters.iter().map(|cluster| cluster.nodes.len()).max().unwrap_or_default();
        let designs = design::both(u8::try_from(nodes).context("too many nodes")?)?;
        let pair = |design: Design| Ok((design.clone(), clusters.cluster(design.name())?));
        Ok(Members { all: designs.into_iter().map(pair).collect::<Result<_>>()? })
    }

    /// Installs Carrick in both, or the version that has changed since, and waits until every node has every way to the
    /// other member.
    pub fn install(&self, prepared: &Prepared, progress: &Progress) -> Result<()> {
        for (design, cluster) in &self.all {
            import(cluster, prepared)?;
            progress.say(&format!("{}: the image is on every node", cluster.name));
            design.gateways().iter().try_for_each(|(slot, seat)| label(cluster, *slot, &seat.name))?;
            upgrade(cluster, &values(cluster, prepared))?;
            progress.say(&format!("{}: the chart is installed", cluster.name));
        }
        record::give_tools(&[("kubectl", &tools::KUBECTL.path()?), ("kubectl-carrick", &prepared.program)])?;
        let folder = self.write_folder(prepared)?;
        progress.say(&format!("the mesh's folder is written: {}", folder.display()));
        for (_, cluster) in &self.all {
            cluster.kubectl(&["apply", "-R", "-f", &folder.display().to_string()], "")?;
            progress.say(&format!("{}: the folder is applied", cluster.name));
        }
        self.all.iter().try_for_each(|(_, cluster)| {
            self.wait_whole(cluster)?;
            progress.say(&format!("{}: every node has every way", cluster.name));
            Ok(())
        })
    }

    /// The folder that both members are given.
    fn write_folder(&self, prepared: &Prepared) -> Result<PathBuf> {
        let folder = record::folder()?.join("mesh");
        self.all.iter().try_for_each(|(design, cluster)| export(design, cluster, prepared, &folder))?;
        Ok(folder)
    }

    /// Waits until every node of a cluster says that it reaches the other members by every way that there is.
    pub fn wait_whole(&self, cluster: &Cluster) -> Result<()> {
        let mut left: Vec<&Machine> = cluster.nodes.iter().collect();
        up::wait(&format!("every way from the nodes of {}", cluster.name), &[], || {
            let pods = agents(cluster)?;
            let mut missing = Vec::new();
            left.retain(|node| match self.is_whole(cluster, node, &pods) {
                Ok(()) => false,
                Err(error) => {
                    missing.push(format!("{}: {error:#}", node.name));
                    true
                }
            });
            ensure!(missing.is_empty(), "{}", missing.join("; "));
            Ok(())
        })
    }

    /// [`Members::wait_whole`], of both.
    pub fn wait_all(&self) -> Result<()> {
        self.all.iter().try_for_each(|(_, cluster)| self.wait_whole(cluster))
    }

    fn is_whole(&self, cluster: &Cluster, node: &Machine, pods: &BTreeMap<String, String>) -> Result<()> {
        let pod = pods.get(&node.name).context("no agent runs there yet")?;
        let status = status(cluster, pod)?;
        let slots = |design: &Design| design.gateways().into_keys().collect::<Vec<u8>>();
        let own = self.all.iter().find(|(design, _)| design.name() == cluster.name).context("a cluster of ours")?;
        let slot = own.0.gateways().into_iter().find_map(|(slot, seat)| (seat.name == node.name).then_some(slot));
        let via: Vec<u8> = slots(&own.0).into_iter().filter(|other| Some(*other) != slot).collect();
        let others: Vec<&Design> =
            self.all.iter().map(|(design, _)| design).filter(|design| design.name() != cluster.name).collect();
        let names: Vec<&str> = others.iter().map(|design| design.name()).filter(|_| slot.is_some()).collect();
        let every = others.iter().map(|design| MemberStatus {
            member: design.name().to_owned(),
            via: via.clone(),
            links: if slot.is_some() { slots(design) } else { Vec::new() },
        });
        let lacks: Vec<String> = every
            .filter(|ways| !status.members.contains(ways))
            .map(|ways| format!("wanted {}", described(&ways)))
            .collect();
        ensure!(status.is_connected(&names) && lacks.is_empty(), "{}{}", lacks.join(", "), told(&status));
        Ok(())
    }
}

fn described(ways: &MemberStatus) -> String {
    let MemberStatus { member, via, links } = ways;
    format!("{member} by links to slots {links:?} and via own slots {via:?}")
}

/// What a status says of why something is missing.
fn told(status: &Status) -> String {
    let seen: Vec<String> = status.members.iter().map(described).collect();
    let ready = if status.ready { "ready" } else { "not ready" };
    format!(" ({ready}; has {}; problems: {:?})", seen.join(", "), status.problems)
}

/// Gives every node of a cluster the image.
pub fn import(cluster: &Cluster, prepared: &Prepared) -> Result<()> {
    cluster.nodes.iter().try_for_each(|node| import_on(node, prepared))
}

fn import_on(node: &Machine, prepared: &Prepared) -> Result<()> {
    let ctr = |arguments: &str| -> Result<String> {
        let mut command = node.command("ctr")?;
        command.args(["--address", daemons::CONTAINERD]).args(arguments.split_whitespace());
        output(&mut command, "").with_context(|| format!("{}: ctr {arguments}", node.name))
    };
    if ctr("--namespace k8s.io images list --quiet")?.lines().any(|line| line == prepared.reference) {
        return Ok(());
    }
    ctr(&daemons::import(&prepared.archive)).map(drop)
}

/// Makes a node the gateway of a slot.
pub fn label(cluster: &Cluster, slot: u8, node: &str) -> Result<()> {
    cluster.kubectl(&["label", "--overwrite", "node", node, &format!("{LABEL}={slot}")], "").map(drop)
}

/// What the chart is told of a cluster.
pub fn values(cluster: &Cluster, prepared: &Prepared) -> Values {
    let (repository, tag) = prepared.reference.rsplit_once(':').unwrap_or_default();
    let pairs = [("cluster.name", cluster.name.as_str()), ("image.repository", repository), ("image.tag", tag)];
    pairs.map(|(name, value)| (name.to_owned(), value.into())).into()
}

/// `helm upgrade --install`.
pub fn upgrade(cluster: &Cluster, values: &Values) -> Result<()> {
    let mut command = helm(cluster)?;
    command.args(["upgrade", "--install", RELEASE]).arg(workspace::root().join("manifests/carrick"));
    command.arg("--create-namespace");
    for (name, value) in values {
        command.args(["--set-json", &format!("{name}={value}")]);
    }
    output(&mut command, "").with_context(|| format!("{}: helm upgrade", cluster.name)).map(drop)
}

/// Waits until every pod of the agents' DaemonSets is of the latest revision, and ready.
pub fn wait_rolled_out(cluster: &Cluster) -> Result<()> {
    for name in ["carrick-worker", "carrick-gateway"] {
        up::wait(&format!("{}: {name} to be rolled out", cluster.name), &up::node_logs(cluster), || {
            let set = cluster.kubectl(&["-n", NAMESPACE, "get", "daemonset", name, "-o", "json"], "")?;
            ensure!(is_rolled_out(&set)?, "{}", pods(cluster)?);
            Ok(())
        })?;
    }
    Ok(())
}

fn is_rolled_out(set: &str) -> Result<bool> {
    let set: Value = serde_json::from_str(set).context("a DaemonSet")?;
    let status = &set["status"];
    let all = &status["desiredNumberScheduled"];
    let seen = status["observedGeneration"] == set["metadata"]["generation"];
    Ok(seen && status["updatedNumberScheduled"] == *all && status["numberAvailable"] == *all)
}

/// `helm rollback`, to the revision before.
pub fn rollback(cluster: &Cluster) -> Result<()> {
    output(helm(cluster)?.args(["rollback", RELEASE]), "")
        .with_context(|| format!("{}: helm rollback", cluster.name))
        .map(drop)
}

/// Takes the release away. What `uninstall=true` has not cleaned before stays in the nodes' kernels.
pub fn uninstall(cluster: &Cluster) -> Result<()> {
    output(helm(cluster)?.args(["uninstall", RELEASE]), "")
        .with_context(|| format!("{}: helm uninstall", cluster.name))
        .map(drop)
}

fn helm(cluster: &Cluster) -> Result<Command> {
    let mut command = cluster.client(tools::HELM.path()?)?;
    command.args(["--namespace", NAMESPACE]);
    Ok(command)
}

/// Adds the cluster's part to the mesh's folder, once its gateways have published their keys.
fn export(design: &Design, cluster: &Cluster, prepared: &Prepared, folder: &Path) -> Result<()> {
    let mut command = cluster.client(&prepared.program)?;
    command.args(["export", &format!("--wait={}", up::LIMIT.as_secs()), "--mesh-dir"]).arg(folder);
    for range in design.member.pod_ranges() {
        command.arg(format!("--pod-cidr={range}"));
    }
    for (slot, seat) in design.gateways().into_iter().filter(|_| !design.member.behind_nat) {
        command.arg(format!("--endpoint={slot}={}:{TUNNEL_PORT}", seat.address()));
    }
    let exported = output(&mut command, "").map(drop);
    exported.with_context(|| format!("{}: carrick export\n{}", cluster.name, pods(cluster).unwrap_or_default()))
}

/// For people.
fn pods(cluster: &Cluster) -> Result<String> {
    cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "-o", "wide"], "")
}

/// The agents' pods that run, by node.
pub fn agents(cluster: &Cluster) -> Result<BTreeMap<String, String>> {
    by_node(cluster, "app.kubernetes.io/component in (worker,gateway)")
}

/// Pods of Carrick's that run and have those labels, by node.
pub fn by_node(cluster: &Cluster, selector: &str) -> Result<BTreeMap<String, String>> {
    let list = cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "-l", selector, "-o", "json"], "")?;
    running(&list)
}

fn running(list: &str) -> Result<BTreeMap<String, String>> {
    let list: Value = serde_json::from_str(list).context("pods")?;
    let pod = |item: &Value| {
        let stays = item["metadata"]["deletionTimestamp"].is_null() && item["status"]["phase"] == "Running";
        let text = |value: &Value| value.as_str().map(str::to_owned);
        if stays { Some((text(&item["spec"]["nodeName"])?, text(&item["metadata"]["name"])?)) } else { None }
    };
    Ok(list["items"].as_array().into_iter().flatten().filter_map(pod).collect())
}

/// What `carrick status` says in an agent's pod. Its exit code is left alone: the text has it.
pub fn status(cluster: &Cluster, pod: &str) -> Result<Status> {
    let mut command = cluster.client(tools::KUBECTL.path()?)?;
    command.args(["--request-timeout=20s", "-n", NAMESPACE, "exec", pod, "-c", "agent", "--"]);
    command.args(["carrick", "status", "-o", "json"]);
    let out = command.output().context("kubectl exec")?;
    let said = || String::from_utf8_lossy(&out.stderr).trim().to_owned();
    serde_json::from_slice(&out.stdout).with_context(|| format!("carrick status in {pod}: {}", said()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_are_read_as_the_api_server_lists_them() {
        let pods = r#"{"items": [
            {"metadata": {"name": "a"}, "spec": {"nodeName": "mn-0"}, "status": {"phase": "Running"}},
            {"metadata": {"name": "b"}, "spec": {"nodeName": "mn-1"}, "status": {"phase": "Pending"}},
            {"metadata": {"name": "c", "deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {"nodeName": "mn-1"}, "status": {"phase": "Running"}}
        ]}"#;
        assert_eq!(running(pods).unwrap(), BTreeMap::from([("mn-0".to_owned(), "a".to_owned())]));
    }
}
