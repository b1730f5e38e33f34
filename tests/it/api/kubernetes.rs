//! A member on Kubernetes: an API server with the chart, a gateway `mn-0` and a worker `mn-1`, on which the agent runs as in
//! a pod, by the token of one.
//!
//! Invariant: nothing here is a stand-in. Whoever lacks a right is refused.

use std::{
    env, fs,
    io::Write,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use lab::{
    Carrick, Lab, Member, Node, Process, STATE_DIR,
    apiserver::{ApiServer, Programs, Store, User},
    carrick::Running,
    guard::Guard,
    host::tail,
    wait_for,
};
use serde_json::{Value, json};

use super::client::{Answer, Ask, Client};

/// The token of the administrator.
pub(crate) const ADMIN: &str = "admin-token";

pub(crate) const GATEWAY: usize = 0;
pub(crate) const WORKER: usize = 1;
pub(crate) const MESH: &str = "/apis/carrick.dev/v1alpha1";
pub(crate) const CARRICK: &str = "/api/v1/namespaces/carrick";
/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(120);

pub(crate) struct Kubernetes {
    pub(crate) lab: Lab,
    pub(crate) server: ApiServer,
    pub(crate) carrick: Carrick,
    client: Client,
    /// Of the administrator.
    pub(crate) kubeconfig: PathBuf,
}

impl Kubernetes {
    /// The server, its chart and its nodes; no agent runs yet. `users` are known beside the administrator.
    pub(crate) fn new(name: &str, carrick: Carrick, store: Store, users: &[User]) -> Result<Kubernetes> {
        let [mn, _] = Member::pair();
        let lab = Lab::build(Guard::unique(name)?, &[Member { nodes: 2, ..mn }])?;
        let address = lab.internet_address("mn")?;
        let programs =
            Programs { etcd: program("ETCD")?, kine: program("KINE")?, apiserver: program("KUBE_APISERVER")? };
        let admin = User { token: ADMIN, name: "admin", group: "system:masters" };
        let server = ApiServer::start(&lab.internet, address, &programs, store, &[&[admin], users].concat())?;
        let kubeconfig = server.kubeconfig("admin", ADMIN, "carrick")?;
        wait_for("the API server's certificate", START_LIMIT, || Client::new(&kubeconfig).map_err(|e| e.to_string()))?;
        let client = Client::new(&kubeconfig)?;
        let mut kubernetes = Kubernetes { lab, server, carrick, client, kubeconfig };
        kubernetes.wait_ready().and_then(|()| kubernetes.install()).inspect_err(|_| kubernetes.show_logs())?;
        Ok(kubernetes)
    }

    /// Waits until the API server answers.
    pub(crate) fn wait_ready(&mut self) -> Result<()> {
        wait_for("the API server to be ready", START_LIMIT, || {
            if let Err(ended) = self.server.check_running() {
                return Ok(Err(ended));
            }
            self.admin(&Ask::get("/readyz")).map(|_| Ok(())).map_err(|error| format!("{error:#}"))
        })?
    }

    fn install(&self) -> Result<()> {
        self.helm(&["install", "--create-namespace"], &[])?;
        for node in [GATEWAY, WORKER] {
            self.make_node(node)?;
            for account in ["carrick-worker", "carrick-gateway"] {
                self.make_pod(account, self.node(node).host.name())?;
            }
            write_hop_secret(&self.keys(node))?;
        }
        Ok(())
    }

    /// Installs or upgrades the release, as the words say, with these values; what it says, the chart's notes too.
    pub(crate) fn helm(&self, words: &[&str], values: &[&str]) -> Result<String> {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/carrick");
        let chart = chart.to_str().context("the chart's path")?;
        let config = self.kubeconfig.to_str().context("the kubeconfig's path")?;
        let mut line = words.to_vec();
        line.extend(["carrick", chart, "--namespace", "carrick", "--kubeconfig", config]);
        line.extend(["cluster.name=mn"].iter().chain(values).flat_map(|value| ["--set", value]));
        self.lab.internet.output(program("HELM")?, &line)
    }

    /// What the kubelet would have made, and who labels gateways.
    fn make_node(&self, number: usize) -> Result<()> {
        let node = self.node(number);
        let name = node.host.name();
        let ranges: Vec<String> = node.ranges.iter().map(ToString::to_string).collect();
        self.admin(&Ask::create("/api/v1/nodes", json!({"metadata": {"name": name}, "spec": {"podCIDRs": ranges}})))?;
        let address = |ip: &IpAddr| json!({"type": "InternalIP", "address": ip.to_string()});
        let addresses: Vec<Value> = node.addresses.iter().map(address).collect();
        self.admin(&Ask::merge(&format!("/api/v1/nodes/{name}/status"), json!({"status": {"addresses": addresses}})))?;
        if number == GATEWAY {
            let label = json!({"metadata": {"labels": {"carrick.dev/gateway": "0"}}});
            self.admin(&Ask::merge(&format!("/api/v1/nodes/{name}"), label))?;
        }
        Ok(())
    }

    /// What a DaemonSet would have made.
    fn make_pod(&self, account: &str, node: &str) -> Result<()> {
        let spec = json!({
            "serviceAccountName": account, "nodeName": node, "automountServiceAccountToken": false,
            "containers": [{"name": "agent", "image": "carrick.dev/carrick"}],
        });
        let pod = json!({"metadata": {"name": format!("{account}-{node}")}, "spec": spec});
        self.admin(&Ask::create(&format!("{CARRICK}/pods"), pod)).map(drop)
    }

    /// The token of a service account, bound to its pod on that node, as the kubelet asks for it.
    pub(crate) fn token(&self, account: &str, node: &str) -> Result<String> {
        let pod = json!({"kind": "Pod", "apiVersion": "v1", "name": format!("{account}-{node}")});
        let path = format!("{CARRICK}/serviceaccounts/{account}/token");
        let answer = self.admin(&Ask::create(&path, json!({"spec": {"boundObjectRef": pod}})))?;
        Ok(answer["status"]["token"].as_str().context("a token")?.to_owned())
    }

    /// Asks; fails only where nothing answers.
    pub(crate) fn ask(&self, token: &str, ask: &Ask) -> Result<Answer> {
        self.client.ask(&self.lab.internet, token, ask)
    }

    /// Asks as administrator, who may do everything.
    pub(crate) fn admin(&self, ask: &Ask) -> Result<Value> {
        let answer = self.ask(ADMIN, ask)?;
        answer.map_err(|refusal| anyhow::anyhow!("{}: {} {}", ask.shown(), refusal.code, refusal.message))
    }

    /// Asks for all of them, several at a time, and hands on what was said to each, in any order.
    pub(crate) fn ask_all(
        &self,
        token: &str,
        asks: impl Iterator<Item = Ask> + Send,
        each: impl FnMut(&Ask, Answer) -> Result<()> + Send,
    ) -> Result<()> {
        self.client.ask_all(&self.lab.internet, token, asks, each)
    }

    /// Puts objects of the mesh there, or makes them so.
    pub(crate) fn put(&self, plural: &str, objects: &[Value]) -> Result<()> {
        objects.iter().try_for_each(|object| {
            let name = object["metadata"]["name"].as_str().context("a name")?;
            self.admin(&Ask::apply(&format!("{MESH}/{plural}/{name}"), object.clone())).map(drop)
        })
    }

    pub(crate) fn node(&self, number: usize) -> &Node {
        &self.lab.clusters[0].nodes[number]
    }

    pub(crate) fn keys(&self, node: usize) -> PathBuf {
        self.node(node).host.dir().join("keys")
    }

    /// What runs on that node as pods of the chart: the agent, and on the gateway the tunnel.
    pub(crate) fn start(&self, number: usize) -> Result<Running> {
        let tunnel = (number == GATEWAY).then(|| self.carrick.start_tunnel(self.node(number))).transpose()?;
        Ok(Running { tunnel, agent: self.start_agent(number)? })
    }

    /// Starts the agent alone, and nothing is kept of one before.
    pub(crate) fn start_agent(&self, number: usize) -> Result<Process> {
        self.node(number).host.output("rm", &["-rf", STATE_DIR])?;
        self.restart_agent(number, &self.kubeconfig(number)?)
    }

    /// By which that node's agent reaches the server.
    pub(crate) fn kubeconfig(&self, number: usize) -> Result<PathBuf> {
        self.kubeconfig_of(number, if number == GATEWAY { "carrick-gateway" } else { "carrick-worker" })
    }

    /// By which a pod of that account on that node does.
    pub(crate) fn kubeconfig_of(&self, number: usize, account: &str) -> Result<PathBuf> {
        let name = self.node(number).host.name();
        self.server.kubeconfig(name, &self.token(account, name)?, "carrick")
    }

    /// Starts the agent alone, with what one before has kept.
    pub(crate) fn restart_agent(&self, number: usize, config: &Path) -> Result<Process> {
        let line = format!("agent {} --state-dir {STATE_DIR}", self.reads(number, "mn", config));
        self.node(number).host.spawn("agent", self.carrick.path(), &line.split(' ').collect::<Vec<_>>())
    }

    /// The arguments of whoever reads the API server on a node, as a node of that member.
    pub(crate) fn reads(&self, number: usize, member: &str, config: &Path) -> String {
        let (name, config, keys) = (self.node(number).host.name(), config.display(), self.keys(number));
        format!("--kube --kubeconfig {config} --cluster-name {member} --node-name {name} --keys-dir {}", keys.display())
    }

    pub(crate) fn show_logs(&self) {
        self.lab.show_logs();
        for log in ["etcd.log", "kine.log", "kube-apiserver.log"] {
            let path = self.lab.internet.dir().join(log);
            if path.exists() {
                eprintln!("--- the end of {}\n{}", path.display(), tail(&path, 20));
            }
        }
    }
}

/// A program that `cargo xtask` has built, and names.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let variable = format!("CARRICK_{name}");
    let Some(path) = env::var_os(&variable) else { bail!("{variable} is not set: run `cargo xtask`") };
    Ok(path.into())
}

fn write_hop_secret(keys: &Path) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(keys).with_context(|| format!("mkdir {}", keys.display()))?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(keys.join("hop"))?;
    file.write_all(format!("{}=\n", "A".repeat(42) + "E").as_bytes()).context("write the hop secret")
}

pub(crate) fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "carrick.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}
