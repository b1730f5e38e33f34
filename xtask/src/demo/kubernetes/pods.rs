//! One pod on every node, which only waits: sockets are opened in its network namespace.

use std::{net::IpAddr, time::Duration};

use ::lab::Namespace;
use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{
    cluster::{
        images::BUSYBOX,
        record::{Cluster, Clusters},
        up,
    },
    demo::load::End,
};

pub const NAMESPACE: &str = "demo";
/// `@IMAGE@` stands for its image. Whoever is in its namespace may open ping sockets.
const MANIFEST: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: demo}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: wait, namespace: demo}
spec:
  selector: {matchLabels: {app: wait}}
  template:
    metadata: {labels: {app: wait}}
    spec:
      terminationGracePeriodSeconds: 1
      automountServiceAccountToken: false
      securityContext: {sysctls: [{name: net.ipv4.ping_group_range, value: "0 2147483647"}]}
      containers: [{name: wait, image: "@IMAGE@", command: [/bin/wait]}]
"#;

/// A pod that runs.
pub struct Pod {
    pub ip: IpAddr,
    pub network: Namespace,
}

impl Pod {
    pub fn end(&self) -> End<'_> {
        End { network: &self.network, ip: self.ip }
    }
}

/// Starts them in both clusters, and waits until they run.
pub fn start(clusters: &Clusters) -> Result<()> {
    for cluster in &clusters.clusters {
        cluster.kubectl(&["apply", "-f", "-"], &MANIFEST.replace("@IMAGE@", BUSYBOX))?;
    }
    for cluster in &clusters.clusters {
        up::wait(&format!("the demo's pods of {}", cluster.name), &up::node_logs(cluster), || {
            cluster.nodes.iter().try_for_each(|node| find(cluster, &node.name).map(drop))
        })?;
    }
    Ok(())
}

/// That on a node.
pub fn on(cluster: &Cluster, node: &str) -> Result<Pod> {
    let (name, ip, container) = find(cluster, node)?;
    let machine = cluster.nodes.iter().find(|machine| machine.name == node).context("a machine")?;
    Ok(Pod { ip, network: machine.network_of(&name, &container)? })
}

/// Has that on a node replaced by another, and waits until it runs.
pub fn renew(cluster: &Cluster, node: &str) -> Result<()> {
    let (name, ..) = find(cluster, node)?;
    cluster.kubectl_within(Duration::from_secs(60), &["-n", NAMESPACE, "delete", "pod", &name], "")?;
    up::wait(&format!("another pod on {node}"), &up::node_logs(cluster), || find(cluster, node).map(drop))
}

/// An object as `get -o yaml` shows it, to be made once more: an object that claims a version must be there already.
pub fn without_identity(objects: &str) -> String {
    let of_the_old =
        |line: &&str| !["resourceVersion:", "uid:"].iter().any(|field| line.trim_start().starts_with(field));
    objects.lines().filter(of_the_old).map(|line| format!("{line}\n")).collect()
}

/// Name, address and container.
fn find(cluster: &Cluster, node: &str) -> Result<(String, IpAddr, String)> {
    let field = format!("spec.nodeName={node}");
    let list = cluster.kubectl(&["-n", NAMESPACE, "get", "pods", "--field-selector", &field, "-o", "json"], "")?;
    let list: Value = serde_json::from_str(&list).context("pods")?;
    let pod = &list["items"][0];
    let container = &pod["status"]["containerStatuses"][0];
    ensure!(container["ready"] == true, "no pod runs on {node}");
    let text = |value: &Value| value.as_str().map(str::to_owned).context("a pod's status is incomplete");
    Ok((text(&pod["metadata"]["name"])?, text(&pod["status"]["podIP"])?.parse()?, text(&container["containerID"])?))
}
