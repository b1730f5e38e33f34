//! A member whose API server has the chart: a gateway `mn-0` and a worker `mn-1`, on which the agent runs as in a pod, by the
//! token of one.
//!
//! Invariant: a test finds no object of the mesh, and nothing of Carrick on the nodes.

use std::{
    ops::{Deref, DerefMut},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use lab::{
    apiserver::{Store, User},
    carrick::Running,
    wait_for,
};
use serde_json::{Value, json};

use super::{
    client::Ask,
    kubernetes::{GATEWAY, Kubernetes, MESH, WORKER, object, program},
};
use crate::joined::{SOON, carrick};

/// The kubelet of `mn-1`.
pub(crate) const KUBELET: &str = "kubelet-token";
/// Of a node that is about to join, `mn-9`.
pub(crate) const NEW_KUBELET: &str = "new-kubelet-token";
/// May write RouteAdvertisements, and speak for the members `mn` and `junk`.
pub(crate) const TENANT: &str = "tenant-token";

const USERS: [User; 3] = [
    User { token: KUBELET, name: "system:node:mn-1", group: "system:nodes" },
    User { token: NEW_KUBELET, name: "system:node:mn-9", group: "system:nodes" },
    User { token: TENANT, name: "tenant", group: "tenants" },
];

pub(crate) const RBAC: &str = "/apis/rbac.authorization.k8s.io/v1";

/// [`Kubernetes`], and a tenant of it.
pub(crate) struct World {
    kubernetes: Kubernetes,
    pub(crate) store: Store,
}

impl Deref for World {
    type Target = Kubernetes;

    fn deref(&self) -> &Kubernetes {
        &self.kubernetes
    }
}

impl DerefMut for World {
    fn deref_mut(&mut self) -> &mut Kubernetes {
        &mut self.kubernetes
    }
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
    *world = (*ran < tests).then_some(after);
}

impl World {
    /// One of its own, which ends with the value.
    pub(crate) fn new(store: Store) -> Result<World> {
        let kubernetes = Kubernetes::new(&format!("api-{store:?}"), carrick()?, store, &USERS)?;
        let world = World { kubernetes, store };
        world.make_tenant().and_then(|()| world.wait_policies()).inspect_err(|_| world.show_logs())?;
        Ok(world)
    }

    fn make_tenant(&self) -> Result<()> {
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
        Ok(())
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

    /// Runs `kubectl` as administrator.
    pub(crate) fn kubectl(&self, arguments: &str) -> Result<String> {
        let config =
            format!("--kubeconfig={} --cache-dir={}", self.kubeconfig.display(), self.lab.dir("kubectl").display());
        let line = format!("{config} {arguments}");
        self.lab.internet.output(program("KUBECTL")?, &line.split(' ').collect::<Vec<_>>())
    }

    /// Of the own kinds nothing is left, and the nodes are as they were.
    fn reset(&self) -> Result<()> {
        for plural in ["meshclusters", "routeadvertisements", "egresspolicies", "meshgateways"] {
            self.admin(&Ask::delete(&format!("{MESH}/{plural}")))?;
        }
        [GATEWAY, WORKER].into_iter().try_for_each(|node| self.carrick.cleanup(self.node(node)).map(drop))
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
}

/// What the other member offers.
pub(crate) const VA: &str = "10.44.0.0/16";
/// What `mn` may claim.
pub(crate) const RANGES: [&str; 2] = ["10.42.0.0/16", "fd00:10:1::/48"];

/// Any valid public keys.
pub(crate) const KEYS: [&str; 2] =
    ["FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=", "QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE="];

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
