//! The folders of manifests: the one that all members of a lab read, unchanged, with one MeshCluster and one
//! RouteAdvertisement each; and one of each member of several nodes, with its Nodes, MeshGateways and Pods.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;

use crate::{Member, Node};

/// A folder of manifests. Files are replaced whole, so no reader ever sees half of one.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
}

impl Folder {
    /// An empty folder.
    pub fn create(path: PathBuf) -> Result<Folder> {
        fs::create_dir(&path).with_context(|| format!("mkdir {}", path.display()))?;
        Ok(Folder { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Creates or replaces a file, atomically.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.path.join(file);
        // Beside the folder, on the same file system: it never shows up among the manifests.
        let new = self.path.with_extension("new");
        fs::write(&new, text).with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("replace {}", path.display()))
    }

    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.path.join(file);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }
}

/// All folders of a lab.
#[derive(Clone, Debug)]
pub struct Mesh {
    shared: Folder,
    own: BTreeMap<String, Folder>,
}

impl Mesh {
    /// An empty shared folder.
    pub fn create(folder: PathBuf) -> Result<Mesh> {
        Ok(Mesh { shared: Folder::create(folder)?, own: BTreeMap::new() })
    }

    /// An empty folder of that member's own, beside the shared one.
    pub fn add_own(&mut self, member: &str) -> Result<&Folder> {
        let name = self.shared.path.file_name().context("a folder has a name")?.to_string_lossy();
        let folder = Folder::create(self.shared.path.with_file_name(format!("{name}-{member}")))?;
        Ok(self.own.entry(member.to_owned()).or_insert(folder))
    }

    /// The same folders, but for a copy of the shared one: for somebody who reads another.
    pub fn with_copy(&self, folder: PathBuf) -> Result<Mesh> {
        let copy = Folder::create(folder)?;
        for entry in fs::read_dir(&self.shared.path).context("read the shared folder")? {
            let entry = entry?;
            fs::copy(entry.path(), copy.path.join(entry.file_name())).context("copy a manifest")?;
        }
        Ok(Mesh { shared: copy, own: self.own.clone() })
    }

    pub fn folder(&self) -> &Path {
        &self.shared.path
    }

    /// The member's own folder; a member of one node has none.
    pub fn own(&self, member: &str) -> Option<&Folder> {
        self.own.get(member)
    }

    /// Creates or replaces a file of the shared folder, atomically.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        self.shared.write(file, text)
    }

    pub fn remove(&self, file: &str) -> Result<()> {
        self.shared.remove(file)
    }

    /// Writes who the member is. `gateways`: public key and endpoints of each slot, from 0.
    pub fn write_cluster(&self, member: &Member, gateways: &[Gateway]) -> Result<()> {
        self.write(&format!("{}-cluster.yaml", member.name), &cluster(member, gateways))
    }

    /// Writes what the member offers.
    pub fn write_routes(&self, member: &Member, ranges: &[IpNetwork]) -> Result<()> {
        self.write(&format!("{}-routes.yaml", member.name), &routes(member, ranges))
    }

    /// Writes where a pod of a member of several nodes lives, where its node's ranges do not say it.
    pub fn write_pod(&self, member: &str, name: &str, node: &Node, addresses: &[IpAddr]) -> Result<()> {
        let own = self.own(member).with_context(|| format!("{member} has no folder of its own"))?;
        own.write(&format!("pod-{name}.yaml"), &pod(name, node.host.name(), addresses))
    }
}

/// A slot of a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gateway {
    pub public_key: String,
    /// `HOST:PORT`, tried in order; none behind NAT.
    pub endpoints: Vec<String>,
}

/// The manifest of a MeshCluster.
pub fn cluster(member: &Member, gateways: &[Gateway]) -> String {
    let Member { name, id, .. } = member;
    let mut text = format!(
        "apiVersion: carrick.dev/v1alpha1\nkind: MeshCluster\nmetadata:\n  name: {name}\nspec:\n  id: {id}\n  gateways:\n"
    );
    for (ordinal, Gateway { public_key, endpoints }) in gateways.iter().enumerate() {
        write!(text, "  - ordinal: {ordinal}\n    publicKey: {public_key:?}\n").expect("a String takes everything");
        if !endpoints.is_empty() {
            writeln!(text, "    endpoints: [{}]", quoted(endpoints)).expect("a String takes everything");
        }
    }
    text + &format!("  allowedCIDRs: [{}]\n", quoted(&member.allowed_ranges()))
}

/// The manifest of a RouteAdvertisement to everyone.
pub fn routes(member: &Member, ranges: &[IpNetwork]) -> String {
    let name = &member.name;
    let routes: String = ranges.iter().map(|range| format!("  - cidr: \"{range}\"\n    type: Pod\n")).collect();
    format!(
        "apiVersion: carrick.dev/v1alpha1\nkind: RouteAdvertisement\nmetadata:\n  name: {name}\nspec:\n  \
         cluster: {name}\n  routes:\n{routes}"
    )
}

/// The manifest of a Node: its name, ranges of pods and addresses.
pub fn node(name: &str, ranges: &[IpNetwork], addresses: &[IpAddr]) -> String {
    let lines: String =
        addresses.iter().map(|address| format!("  - type: InternalIP\n    address: \"{address}\"\n")).collect();
    format!(
        "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\nspec:\n  podCIDRs: [{}]\nstatus:\n  addresses:\n{lines}",
        quoted(ranges)
    )
}

/// The manifest of a MeshGateway: which node holds a slot.
pub fn mesh_gateway(ordinal: u8, node: &str, addresses: &[IpAddr], public_key: &str) -> String {
    format!(
        "apiVersion: carrick.dev/v1alpha1\nkind: MeshGateway\nmetadata:\n  name: \"{ordinal}\"\nspec:\n  node: {node}\n  \
         ordinal: {ordinal}\n  hopAddresses: [{}]\n  publicKey: {public_key:?}\n",
        quoted(addresses)
    )
}

/// The manifest of a Pod: where it runs, and its addresses.
pub fn pod(name: &str, node: &str, addresses: &[IpAddr]) -> String {
    let lines: String = addresses.iter().map(|address| format!("  - ip: \"{address}\"\n")).collect();
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: default\nspec:\n  nodeName: {node}\nstatus:\n  \
         podIPs:\n{lines}"
    )
}

fn quoted(items: &[impl ToString]) -> String {
    items.iter().map(|item| format!("{:?}", item.to_string())).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_of_a_member_are_what_its_cluster_would_say() {
        let addresses: [IpAddr; 2] = ["203.0.113.2", "2001:db8:1::2"].map(|ip| ip.parse().unwrap());
        assert_eq!(
            node("mn-0", &Member::pair()[0].node_pods(0).unwrap(), &addresses),
            r#"apiVersion: v1
kind: Node
metadata:
  name: mn-0
spec:
  podCIDRs: ["10.42.0.0/24", "fd00:10:1::/64"]
status:
  addresses:
  - type: InternalIP
    address: "203.0.113.2"
  - type: InternalIP
    address: "2001:db8:1::2"
"#
        );
        assert_eq!(
            mesh_gateway(1, "mn-1", &addresses, "c2F5cyB3aG8="),
            r#"apiVersion: carrick.dev/v1alpha1
kind: MeshGateway
metadata:
  name: "1"
spec:
  node: mn-1
  ordinal: 1
  hopAddresses: ["203.0.113.2", "2001:db8:1::2"]
  publicKey: "c2F5cyB3aG8="
"#
        );
        assert_eq!(
            pod("db-0", "mn-2", &["10.42.200.5".parse().unwrap()]),
            r#"apiVersion: v1
kind: Pod
metadata:
  name: db-0
  namespace: default
spec:
  nodeName: mn-2
status:
  podIPs:
  - ip: "10.42.200.5"
"#
        );
    }

    #[test]
    fn manifests_are_what_a_user_writes() {
        let [mn, va] = Member::pair();
        let gateway = |endpoints: &[&str]| Gateway {
            public_key: "c2F5cyB3aG8=".to_owned(),
            endpoints: endpoints.iter().map(|endpoint| (*endpoint).to_owned()).collect(),
        };
        assert_eq!(
            cluster(&mn, &[gateway(&["203.0.113.2:27473", "gw0.mn.example.com:27473"]), gateway(&[])]),
            r#"apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata:
  name: mn
spec:
  id: 1
  gateways:
  - ordinal: 0
    publicKey: "c2F5cyB3aG8="
    endpoints: ["203.0.113.2:27473", "gw0.mn.example.com:27473"]
  - ordinal: 1
    publicKey: "c2F5cyB3aG8="
  allowedCIDRs: ["10.42.0.0/16", "fd00:10:1::/48"]
"#
        );
        assert_eq!(
            routes(&va, &va.pod_ranges()),
            r#"apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata:
  name: va
spec:
  cluster: va
  routes:
  - cidr: "10.44.0.0/16"
    type: Pod
  - cidr: "fd00:10:2::/48"
    type: Pod
"#
        );
    }
}
