//! Cilium beside the bridges of [`Network::Routed`](super::design::Network): it enforces network policies, and does nothing
//! else. It is down until [`start`].

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::{
    record::{Cluster, Machine, output},
    spec::Program,
    up,
};
use crate::tools;

/// The agent, as [`Machine::start`] knows it.
pub const DAEMON: &str = "cilium-agent";
/// Warnings are errors where the agent compiles: this one has none to give.
pub const CLANG: &str = "/usr/lib/llvm-16/bin/clang";
/// In a node: what runs the agent.
pub const START: &str = "/etc/cilium/start";
pub const START_TEXT: &str = include_str!("cilium.sh");
/// The network plugin's settings, with Cilium's plugin after the others; the agent writes them once it is ready.
const CONFLIST: &str = "/etc/cni/net.d/05-cilium.conflist";
/// The rights of its agents: those of a test bed.
const RIGHTS: &str = r#"
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: cilium}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: cluster-admin}
subjects: [{kind: User, name: cilium, apiGroup: rbac.authorization.k8s.io}]
"#;

/// What it consists of.
#[derive(Clone, Debug)]
pub struct Programs {
    pub agent: PathBuf,
    pub plugin: PathBuf,
    /// The agent compiles some of it.
    pub source: PathBuf,
}

impl Programs {
    pub fn built() -> Result<Programs> {
        let [agent, plugin] = [&tools::CILIUM_AGENT, &tools::CILIUM_CNI].map(tools::Tool::path);
        Ok(Programs { agent: agent?, plugin: plugin?, source: tools::cilium_source()? })
    }
}

/// How the agent is run on a node: chained after another plugin, without services, tunnels or masquerading.
pub fn agent(programs: &Programs, node: &str, kubeconfig: &Path, pods: &str) -> Program {
    let Programs { agent, plugin, source } = programs;
    let arguments = format!(
        "--mount sh {START} {} {} {} --k8s-kubeconfig-path={} --identity-allocation-mode=crd --cluster-name=demo
         --enable-ipv6=false --ipam=kubernetes --routing-mode=native --ipv4-native-routing-cidr={pods}
         --enable-ipv4-masquerade=false --enable-local-node-route=false --enable-endpoint-routes=false
         --cni-chaining-mode=generic-veth --cni-chaining-target=pods --cni-exclusive=false
         --write-cni-conf-when-ready={CONFLIST} --enable-l7-proxy=false --kube-proxy-replacement=false
         --enable-health-checking=false --enable-endpoint-health-checking=false --enable-host-legacy-routing=true
         --install-iptables-rules=false --cgroup-root=/run/cilium/cgroupv2",
        source.display(),
        plugin.display(),
        agent.display(),
        kubeconfig.display(),
    );
    let mut program = Program::new("unshare", &arguments);
    let path = std::env::var("PATH").unwrap_or_default();
    let folder = Path::new(CLANG).parent().unwrap_or(Path::new("/"));
    program.environment.push(("PATH".to_owned(), format!("{}:{path}", folder.display())));
    program.environment.push(("K8S_NODE_NAME".to_owned(), node.to_owned()));
    program
}

/// The folder of its CRDs.
fn kinds() -> Result<String> {
    Ok(tools::cilium_source()?.join("pkg/k8s/apis/cilium.io/client/crds").display().to_string())
}

/// Has a node's pods that are made from now on obey network policies.
pub fn start(cluster: &Cluster, node: &Machine) -> Result<()> {
    cluster.kubectl(&["apply", "-f", "-"], RIGHTS)?;
    cluster.kubectl(&["apply", "--server-side", "-R", "-f", &kinds()?], "")?;
    node.start(DAEMON)?;
    up::wait(&format!("Cilium on {}", node.name), &[(node, &[DAEMON])], || {
        output(node.command("test")?.args(["-s", CONFLIST]), "").map(drop)
    })
}

/// Removes all of it but the programs on the pods' links: these go with their pods, which are to be made anew.
pub fn stop(cluster: &Cluster, node: &Machine) -> Result<()> {
    node.stop(DAEMON)?;
    let agent = tools::CILIUM_AGENT.path()?;
    let gone = format!("! pgrep -f ^{}", agent.display());
    up::wait(&format!("the end of Cilium on {}", node.name), &[], || {
        output(node.command("sh")?.args(["-c", &gone]), "").map(drop)
    })?;
    let clean = format!("rm -r {CONFLIST} /run/cilium /sys/fs/bpf/tc /sys/fs/bpf/cilium && ip link delete cilium_host");
    output(node.command("sh")?.args(["-c", &clean]), "")?;
    cluster.kubectl(&["delete", "-R", "-f", &kinds()?], "")?;
    let left = cluster.kubectl(&["get", "crd", "-o", "name"], "")?;
    ensure!(!left.contains(".cilium.io"), "kinds of Cilium are left: {left}");
    cluster.kubectl(&["delete", "-f", "-"], RIGHTS).map(drop)
}
