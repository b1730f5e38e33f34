//! A member whose API server has the chart: a gateway `mn-0` and a worker `mn-1`, on which the agent runs as in a pod, by the
//! token of one.
//!
//! Invariant: a test finds no object of the mesh, and nothing of Carrick on the nodes.

use std::{
    env, fs,
    io::Write,
    net::IpAddr,
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
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
use crate::joined::{SOON, carrick};

pub(crate) const ADMIN: &str = "admin-token";
/// The kubelet of `mn-1`.
pub(crate) const KUBELET: &str = "kubelet-token";
/// Of a node that is about to join, `mn-9`.
pub(crate) const NEW_KUBELET: &str = "new-kubelet-token";
/// May write RouteAdvertisements, and speak for the members `mn` and `junk`.
pub(crate) const TENANT: &str = "tenant-token";

const USERS: [User; 4] = [
    User { token: ADMIN, name: "admin", group: "system:masters" },
    User { token: KUBELET, name: "system:node:mn-1", group: "system:nodes" },
    User { token: NEW_KUBELET, name: "system:node:mn-9", group: "system:nodes" },
    User { token: TENANT, name: "tenant", group: "tenants" },
];

pub(crate) const GATEWAY: usize = 0;
pub(crate) const WORKER: usize = 1;
pub(crate) const MESH: &str = "/apis/carrick.dev/v1alpha1";
pub(crate) const CARRICK: &str = "/api/v1/namespaces/carrick";
pub(crate) const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";
/// How long a server may take until it answers.
const START_LIMIT: Duration = Duration::from_secs(120);

pub(crate) struct World {
    pub(crate) lab: Lab,
    pub(crate) server: ApiServer,
    pub(crate) carrick: Carrick,
    pub(crate) store: Store,
    client: Client,
    /// Of the administrator.
    kubeconfig: PathBuf,
    spoilt: bool,
}

/// The worlds of the two stores, and how many tests have had theirs.
static WORLDS: [Mutex<(Option<World>, usize)>; 2] = [const { Mutex::new((None, 0)) }; 2];

/// Runs a test in the world of a store. Each of a store's `tests` tests has it in its turn; the last ends it.
pub(crate) fn on(store: Store, tests: usize, test: fn(&mut World) -> Result<()>) {
    let mut shared = WORLDS[store as usize].lock().unwrap_or_else(PoisonError::into_inner);
    let (world, ran) = &mut *shared;
    *ran += 1;
    let run = |world: Option<World>| {
        let mut world = world.map_or_else(|| World::new(store), Ok)?;
        world.reset().and_then(|()| test(&mut world)).inspect_err(|_| world.show_logs())?;
        Ok::<_, anyhow::Error>(world)
    };
    // One in which a test has failed is not used again.
    let after = run(world.take()).unwrap_or_else(|error| panic!("{error:?}"));
    *world = Some(after).filter(|world| *ran < tests && !world.spoilt);
}

impl World {
    /// One of its own, which ends with the value.
    pub(crate) fn new(store: Store) -> Result<World> {
        let [mn, _] = Member::pair();
        let lab = Lab::build(Guard::unique(&format!("api-{store:?}"))?, &[Member { nodes: 2, ..mn }])?;
        let address = lab.internet_address("mn")?;
        let programs =
            Programs { etcd: program("ETCD")?, kine: program("KINE")?, apiserver: program("KUBE_APISERVER")? };
        let server = ApiServer::start(&lab.internet, address, &programs, store, &USERS)?;
        let kubeconfig = server.kubeconfig("admin", ADMIN, "carrick")?;
        wait_for("the API server's certificate", START_LIMIT, || Client::new(&kubeconfig).map_err(|e| e.to_string()))?;
        let client = Client::new(&kubeconfig)?;
        let mut world = World { lab, server, carrick: carrick()?, store, client, kubeconfig, spoilt: false };
        world.wait_ready().and_then(|()| world.install()).inspect_err(|_| world.show_logs())?;
        Ok(world)
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
        let rules = json!([
            {"apiGroups": ["carrick.dev"], "resources": ["routeadvertisements"], "verbs": ["*"]},
            {"apiGroups": ["carrick.dev"], "resources": ["meshclusters"], "resourceNames": ["mn", "junk"], "verbs": ["advertise"]},
        ]);
        let group = "rbac.authorization.k8s.io";
        self.admin(&Ask::create(
            &format!("{RBAC}/clusterroles"),
            json!({"metadata": {"name": "tenant"}, "rules": rules}),
        ))?;
        self.admin(&Ask::create(
            &format!("{RBAC}/clusterrolebindings"),
            json!({"metadata": {"name": "tenant"}, "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": "tenant"},
                   "subjects": [{"kind": "User", "name": "tenant", "apiGroup": group}]}),
        ))?;
        self.wait_policies()
    }

    /// Installs or upgrades the release, as the words say, with these values.
    pub(crate) fn helm(&self, words: &[&str], values: &[&str]) -> Result<()> {
        let chart = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/carrick");
        let chart = chart.to_str().context("the chart's path")?;
        let config = self.kubeconfig.to_str().context("the kubeconfig's path")?;
        let mut line = words.to_vec();
        line.extend(["carrick", chart, "--namespace", "carrick", "--kubeconfig", config]);
        line.extend(["cluster.name=mn"].iter().chain(values).flat_map(|value| ["--set", value]));
        self.lab.internet.output(program("HELM")?, &line).map(drop)
    }

    /// Policies are in force some time after they are there.
    fn wait_policies(&self) -> Result<()> {
        let gateway = self.token("carrick-gateway", "mn-0")?;
        let label = json!({"metadata": {"labels": {"carrick.dev/gateway": "0"}}});
        let asks = [
            (KUBELET, Ask::merge("/api/v1/nodes/mn-1?dryRun=All", label)),
            (
                TENANT,
                Ask::create(&format!("{MESH}/routeadvertisements?dryRun=All"), advertisement("va", &["10.44.0.0/16"])),
            ),
            (gateway.as_str(), Ask::apply(&format!("{MESH}/meshgateways/1"), mesh_gateway(1, "mn-1"))),
        ];
        for (token, ask) in asks {
            wait_for(&format!("the policy against {}", ask.shown()), SOON, || match self.ask(token, &ask) {
                Ok(Err(refusal)) if refusal.message.contains("ValidatingAdmissionPolicy") => Ok(()),
                other => Err(format!("{other:?}")),
            })?;
        }
        Ok(())
    }

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

    /// Asks for all of them, several at a time; every one must succeed.
    pub(crate) fn ask_all(&self, token: &str, asks: impl Iterator<Item = Ask> + Send) -> Result<()> {
        self.client.ask_all(&self.lab.internet, token, asks)
    }

    /// Runs `kubectl` as administrator.
    pub(crate) fn kubectl(&self, arguments: &str) -> Result<String> {
        let config =
            format!("--kubeconfig={} --cache-dir={}", self.kubeconfig.display(), self.lab.dir("kubectl").display());
        let line = format!("{config} {arguments}");
        self.lab.internet.output(program("KUBECTL")?, &line.split(' ').collect::<Vec<_>>())
    }

    /// Puts objects of the mesh there, or makes them so.
    pub(crate) fn put(&self, plural: &str, objects: &[Value]) -> Result<()> {
        objects.iter().try_for_each(|object| {
            let name = object["metadata"]["name"].as_str().context("a name")?;
            self.admin(&Ask::apply(&format!("{MESH}/{plural}/{name}"), object.clone())).map(drop)
        })
    }

    /// Of the own kinds nothing is left, and the nodes are as they were.
    fn reset(&self) -> Result<()> {
        for plural in ["meshclusters", "routeadvertisements", "egresspolicies", "meshgateways"] {
            self.admin(&Ask::delete(&format!("{MESH}/{plural}")))?;
        }
        [GATEWAY, WORKER].into_iter().try_for_each(|node| self.carrick.cleanup(self.node(node)).map(drop))
    }

    /// Nobody can use this world any more after this test.
    pub(crate) fn spoil(&mut self) {
        self.spoilt = true;
    }

    pub(crate) fn node(&self, number: usize) -> &Node {
        &self.lab.clusters[0].nodes[number]
    }

    pub(crate) fn keys(&self, node: usize) -> PathBuf {
        self.node(node).host.dir().join("keys")
    }

    /// The mesh: this member, whose gateway's key is the one that it has made, and another that nobody answers for.
    pub(crate) fn put_mesh(&self) -> Result<()> {
        let gateway = wait_for("the gateway's MeshGateway", SOON, || {
            self.admin(&Ask::get(&format!("{MESH}/meshgateways/0"))).map_err(|error| format!("{error:#}"))
        })?;
        let key = gateway["spec"]["publicKey"].as_str().context("a key")?;
        self.put("meshclusters", &[cluster("mn", 1, key, &RANGES), cluster("va", 2, KEYS[1], &["10.44.0.0/15"])])?;
        self.put("routeadvertisements", &[advertisement("mn", &RANGES), advertisement("va", &[VA])])
    }

    /// Both nodes run, and have the mesh in their kernels.
    pub(crate) fn start_both(&self) -> Result<[Running; 2]> {
        // What an empty API server is filled with is not trusted at once.
        self.put("meshclusters", &[cluster("va", 2, KEYS[1], &["10.44.0.0/15"])])?;
        let running = [self.start(GATEWAY)?, self.start(WORKER)?];
        self.put_mesh()?;
        for node in [GATEWAY, WORKER] {
            self.wait_route(node, VA, true)?;
            self.wait_well(node)?;
        }
        Ok(running)
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

    /// What the agent says, ready or not.
    pub(crate) fn status(&self, node: usize) -> Result<Value> {
        self.answer(node, "status")
    }

    /// What would be done on that node, were it one of that member.
    pub(crate) fn plan(&self, node: usize, member: &str) -> Result<Value> {
        self.answer(node, &format!("plan {}", self.reads(node, member, &self.kubeconfig(node)?)))
    }

    /// Of a command that says by its exit code whether the answer pleases.
    fn answer(&self, node: usize, command: &str) -> Result<Value> {
        let script = format!("{} {command} -o json || true", self.carrick.path().display());
        let text = self.node(node).host.output("sh", &["-c", &script])?;
        serde_json::from_str(&text).with_context(|| format!("carrick {command} -o json: {text:?}"))
    }

    /// Waits until the agent's status is so.
    pub(crate) fn wait_status(&self, node: usize, what: &str, so: impl Fn(&Value) -> bool) -> Result<Value> {
        wait_for(&format!("{} to say {what}", self.node(node).host.name()), SOON, || {
            let status = self.status(node).map_err(|error| format!("{error:#}"))?;
            if so(&status) { Ok(status) } else { Err(status.to_string()) }
        })
    }

    /// What the agent says of the API server: nothing, if all is well.
    pub(crate) fn problems(&self, status: &Value) -> Vec<String> {
        let all = status["problems"].as_array().map_or(&[][..], Vec::as_slice);
        let url = self.server.url();
        let ours = all.iter().filter_map(|problem| Some(problem.as_str()?.strip_prefix(&url)?.trim().to_owned()));
        ours.collect()
    }

    /// Waits until the agent has read everything, and has it in the kernel.
    pub(crate) fn wait_well(&self, node: usize) -> Result<Value> {
        self.wait_status(node, "that all is well", |status| {
            let done = status["failures"] == json!([]) && status["withheld"] == 0 && status["rejections"] == json!([]);
            done && status["synced"] == true && self.problems(status).is_empty()
        })
    }

    /// What Carrick has in the kernel for packets to other members: both tables of both families.
    pub(crate) fn routes(&self, node: usize) -> Result<String> {
        let show = |family: &str, table: &str| {
            let said = self
                .node(node)
                .host
                .output("sh", &["-c", &format!("ip {family} route show table {table} 2>&1 || true")])?;
            Ok::<_, anyhow::Error>(
                said.lines().map(|line| format!("{table} {}\n", line.trim_end())).collect::<String>(),
            )
        };
        let tables = [("-4", "7473"), ("-4", "7474"), ("-6", "7473"), ("-6", "7474")];
        tables.iter().map(|(family, table)| show(family, table)).collect()
    }

    /// Waits until a range is, or is no longer, routed by Carrick.
    pub(crate) fn wait_route(&self, node: usize, range: &str, there: bool) -> Result<()> {
        self.wait_route_within(SOON, node, range, there)
    }

    pub(crate) fn wait_route_within(&self, limit: Duration, node: usize, range: &str, there: bool) -> Result<()> {
        let state = if there { "routed" } else { "gone" };
        let what = format!("{range} to be {state} on {}", self.node(node).host.name());
        wait_for(&what, limit, || {
            let routes = self.routes(node).map_err(|error| format!("{error:#}"))?;
            if routes.contains(range) == there { Ok(()) } else { Err(routes) }
        })
    }

    fn show_logs(&self) {
        self.lab.show_logs();
        for log in ["etcd.log", "kine.log", "kube-apiserver.log"] {
            let path = self.lab.internet.dir().join(log);
            if path.exists() {
                eprintln!("--- the end of {}\n{}", path.display(), tail(&path, 20));
            }
        }
    }
}

/// A program that `cargo xtask test` has built, and names.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    let variable = format!("CARRICK_{name}");
    let Some(path) = env::var_os(&variable) else { bail!("{variable} is not set: run `cargo xtask test`") };
    Ok(path.into())
}

fn write_hop_secret(keys: &Path) -> Result<()> {
    fs::DirBuilder::new().mode(0o700).create(keys).with_context(|| format!("mkdir {}", keys.display()))?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(keys.join("hop"))?;
    file.write_all(format!("{}=\n", "A".repeat(42) + "E").as_bytes()).context("write the hop secret")
}

/// What the other member offers.
pub(crate) const VA: &str = "10.44.0.0/16";
/// What `mn` may claim.
pub(crate) const RANGES: [&str; 2] = ["10.42.0.0/16", "fd00:10:1::/48"];

/// Any valid public keys.
pub(crate) const KEYS: [&str; 2] =
    ["FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=", "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="];

pub(crate) fn object(kind: &str, name: &str, spec: &Value) -> Value {
    json!({"apiVersion": "carrick.dev/v1alpha1", "kind": kind, "metadata": {"name": name}, "spec": spec})
}

pub(crate) fn cluster(name: &str, id: u16, key: &str, ranges: &[&str]) -> Value {
    let gateway = json!({"ordinal": 0, "publicKey": key, "endpoints": ["192.0.2.1:27473"]});
    object("MeshCluster", name, &json!({"id": id, "gateways": [gateway], "allowedCIDRs": ranges}))
}

pub(crate) fn advertisement(cluster: &str, ranges: &[&str]) -> Value {
    let routes: Vec<Value> = ranges.iter().map(|range| json!({"cidr": range, "type": "Pod"})).collect();
    object("RouteAdvertisement", cluster, &json!({"cluster": cluster, "routes": routes}))
}

pub(crate) fn mesh_gateway(ordinal: u8, node: &str) -> Value {
    let spec = json!({"ordinal": ordinal, "node": node, "publicKey": KEYS[0]});
    object("MeshGateway", &ordinal.to_string(), &spec)
}
