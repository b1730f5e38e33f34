//! The folder of manifests that all members of a lab read, unchanged: one MeshCluster and one RouteAdvertisement each.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use ipnetwork::IpNetwork;

use crate::Member;

/// A folder of manifests. Files are replaced whole, so no reader ever sees half of one.
#[derive(Clone, Debug)]
pub struct Mesh {
    folder: PathBuf,
}

impl Mesh {
    /// An empty folder.
    pub fn create(folder: PathBuf) -> Result<Mesh> {
        fs::create_dir(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
        Ok(Mesh { folder })
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Creates or replaces a file, atomically.
    pub fn write(&self, file: &str, text: &str) -> Result<()> {
        let path = self.folder.join(file);
        // Beside the folder, on the same file system: it never shows up among the manifests.
        let new = self.folder.with_extension("new");
        fs::write(&new, text).with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("replace {}", path.display()))
    }

    pub fn remove(&self, file: &str) -> Result<()> {
        let path = self.folder.join(file);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Writes who the member is. `gateways`: public key and endpoints of each slot, from 0.
    pub fn write_cluster(&self, member: &Member, gateways: &[Gateway]) -> Result<()> {
        self.write(&format!("{}-cluster.yaml", member.name), &cluster(member, gateways))
    }

    /// Writes what the member offers.
    pub fn write_routes(&self, member: &Member, ranges: &[IpNetwork]) -> Result<()> {
        self.write(&format!("{}-routes.yaml", member.name), &routes(member, ranges))
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
    let quoted = |items: &[String]| items.iter().map(|item| format!("{item:?}")).collect::<Vec<_>>().join(", ");
    for (ordinal, Gateway { public_key, endpoints }) in gateways.iter().enumerate() {
        write!(text, "  - ordinal: {ordinal}\n    publicKey: {public_key:?}\n").expect("a String takes everything");
        if !endpoints.is_empty() {
            writeln!(text, "    endpoints: [{}]", quoted(endpoints)).expect("a String takes everything");
        }
    }
    let allowed: Vec<String> = member.allowed_ranges().iter().map(IpNetwork::to_string).collect();
    text + &format!("  allowedCIDRs: [{}]\n", quoted(&allowed))
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

#[cfg(test)]
mod tests {
    use super::*;

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
