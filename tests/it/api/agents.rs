//! The agent on the objects of an API server: what arrives, and what never goes.

use std::{thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use expect_test::{Expect, expect};
use lab::wait_for;
use serde_json::{Value, json};

use super::{
    client::Ask,
    kubernetes::{GATEWAY, Kubernetes, MESH, WORKER},
    world::{KEYS, RANGES, RBAC, VA, World, advertisement, cluster},
};
use crate::joined::{SOON, says};

const NO_MESH: &str = "MeshClusters: there is none, nor has there been one since this start: nothing is taken away. Apply the \
                       mesh's manifests; a node that is to leave it, `carrick cleanup` clears";
const FILLING: &str = "MeshClusters: there was none at this start: nothing is taken away until what is applied now has not \
                       changed for 30 s";
pub(crate) const CRDS: &str = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions";

fn check(world: &World, node: usize, wanted: &Expect) -> Result<()> {
    wanted.assert_eq(&world.routes(node)?);
    Ok(())
}

pub(super) fn objects_arrive_are_followed_and_go_at_once_when_deleted(world: &mut World) -> Result<()> {
    let _agents = world.start_both()?;
    check(
        world,
        WORKER,
        &expect![[r#"
        7473 10.44.0.0/16 dev carrick-hop proto kernel scope link src 10.42.1.1 mtu 1420
        7474 unreachable 10.44.0.0/16 proto kernel
        7473 throw fd77:8bad:2517:1:ceda:ade:c148:5c38 dev lo proto kernel metric 1024 pref medium
        7473 fd77:8bad:2517:1::/64 dev carrick-hop proto kernel src fd77:8bad:2517:1:ceda:ade:c148:5c38 metric 1024 mtu 1420 pref medium
        7473 fd77:8bad:2517:2::/64 dev carrick-hop proto kernel src fd77:8bad:2517:1:ceda:ade:c148:5c38 metric 1024 mtu 1420 pref medium
        7474 throw fd77:8bad:2517:1:ceda:ade:c148:5c38 dev lo proto kernel metric 1024 pref medium
        7474 unreachable fd77:8bad:2517:1::/64 dev lo proto kernel metric 1024 pref medium
        7474 unreachable fd77:8bad:2517:2::/64 dev lo proto kernel metric 1024 pref medium
    "#]],
    )?;
    check(
        world,
        GATEWAY,
        &expect![[r#"
        7473 10.44.0.0/16 dev carrick-hop proto kernel scope link src 10.42.0.1 mtu 1420
        7474 unreachable 10.44.0.0/16 proto kernel
        7473 throw fd77:8bad:2517:1::1 dev lo proto kernel metric 1024 pref medium
        7473 fd77:8bad:2517:1::/64 dev carrick-hop proto kernel src fd77:8bad:2517:1::1 metric 1024 mtu 1420 pref medium
        7473 fd77:8bad:2517:2::/64 dev carrick-hop proto kernel src fd77:8bad:2517:1::1 metric 1024 mtu 1420 pref medium
        7474 throw fd77:8bad:2517:1::1 dev lo proto kernel metric 1024 pref medium
        7474 unreachable fd77:8bad:2517:1::/64 dev lo proto kernel metric 1024 pref medium
        7474 unreachable fd77:8bad:2517:2::/64 dev lo proto kernel metric 1024 pref medium
    "#]],
    )?;
    world.put("routeadvertisements", &[advertisement("va", &[VA, "10.45.0.0/16"])])?;
    for node in [GATEWAY, WORKER] {
        world.wait_route(node, "10.45.0.0/16", true)?;
        world.wait_well(node)?;
    }
    // Half of what there is: were it a list that lacks it, it would be doubted for five minutes.
    world.admin(&Ask::delete(&format!("{MESH}/routeadvertisements/va")))?;
    for node in [GATEWAY, WORKER] {
        world.wait_route(node, VA, false)?;
    }
    Ok(())
}

pub(super) fn a_crd_that_is_deleted_takes_nothing_away_and_comes_back(world: &mut World) -> Result<()> {
    let agents = world.start_both()?;
    let before = [world.routes(GATEWAY)?, world.routes(WORKER)?];
    let names = ["meshclusters.carrick.dev", "routeadvertisements.carrick.dev"];
    let crds = names.map(|name| world.admin(&Ask::get(&format!("{CRDS}/{name}"))));
    let crds = crds.into_iter().collect::<Result<Vec<_>>>()?;
    for name in names {
        world.admin(&Ask::delete(&format!("{CRDS}/{name}")))?;
    }
    for node in [GATEWAY, WORKER] {
        world.wait_status(node, "that two kinds are gone", |status| {
            ["MeshClusters", "RouteAdvertisements"]
                .iter()
                .all(|kind| says(status, "problems", &format!("{kind}: the API server does not have this kind")))
        })?;
        ensure!(world.routes(node)? == before[node]);
    }
    // One that starts now does not know what it had: its kernel does.
    let [gateway, worker] = agents;
    worker.agent.kill()?;
    let restarted = world.start_agent(WORKER)?;
    world.wait_status(WORKER, "that it has not read everything", |status| status["synced"] == false)?;
    ensure!(world.routes(WORKER)? == before[WORKER]);

    for mut crd in crds {
        for field in ["uid", "resourceVersion", "creationTimestamp", "generation", "managedFields"] {
            crd["metadata"].as_object_mut().map(|meta| meta.remove(field));
        }
        crd.as_object_mut().map(|crd| crd.remove("status"));
        wait_for("the CRD to be made again", SOON, || {
            world.admin(&Ask::create(CRDS, crd.clone())).map_err(|error| format!("{error:#}"))
        })?;
    }
    // The kinds are there, and empty.
    for node in [GATEWAY, WORKER] {
        world.wait_status(node, "that the kinds are there", |status| {
            let problems = world.problems(status);
            !problems.is_empty() && !problems.iter().any(|problem| problem.contains("does not have this kind"))
        })?;
        ensure!(world.routes(node)? == before[node]);
    }
    wait_for("the mesh to be put back", SOON, || world.put_mesh().map_err(|error| format!("{error:#}")))?;
    // Who knew it before trusts it at once; the other one's successor finds it whole.
    world.wait_well(GATEWAY)?;
    restarted.kill()?;
    ensure!(world.routes(WORKER)? == before[WORKER]);
    let _restarted = world.start_agent(WORKER)?;
    for node in [GATEWAY, WORKER] {
        world.wait_well(node)?;
        ensure!(world.routes(node)? == before[node]);
    }
    drop(gateway);
    Ok(())
}

pub(super) fn a_restart_on_an_empty_list_takes_nothing_away(world: &mut World) -> Result<()> {
    let [gateway, worker] = world.start_both()?;
    let before = [world.routes(GATEWAY)?, world.routes(WORKER)?];
    worker.agent.kill()?;
    gateway.agent.kill()?;
    for plural in ["meshclusters", "routeadvertisements"] {
        world.admin(&Ask::delete(&format!("{MESH}/{plural}")))?;
    }
    let agents = [world.start_agent(GATEWAY)?, world.start_agent(WORKER)?];
    for node in [GATEWAY, WORKER] {
        let none = |status: &Value| status["synced"] == true && !world.problems(status).is_empty();
        let told = world.wait_status(node, "that there is no mesh", none)?;
        ensure!(world.problems(&told) == [NO_MESH], "{told}");
        ensure!(world.routes(node)? == before[node], "{}", world.routes(node)?);
    }
    // Filled again, and for a while not trusted: the next that starts finds it whole.
    world.put_mesh()?;
    let filling = |status: &Value| world.problems(status) == [FILLING];
    world.wait_status(WORKER, "that the mesh is there again", filling)?;
    ensure!(world.routes(WORKER)? == before[WORKER]);
    drop(agents);
    let _agents = [world.start_agent(GATEWAY)?, world.start_agent(WORKER)?];
    for node in [GATEWAY, WORKER] {
        world.wait_well(node)?;
        ensure!(world.routes(node)? == before[node]);
    }
    Ok(())
}

pub(super) fn a_kind_that_is_forbidden_is_named(world: &mut World) -> Result<()> {
    let [_gateway, worker] = world.start_both()?;
    let before = world.routes(WORKER)?;
    worker.agent.kill()?;
    let role = format!("{RBAC}/clusterroles/carrick-worker");
    let good = world.admin(&Ask::get(&role))?;
    let mut rules = good["rules"].as_array().context("rules")?.clone();
    for rule in &mut rules {
        if let Some(kinds) = rule["resources"].as_array_mut() {
            kinds.retain(|kind| kind != "egresspolicies");
        }
    }
    world.admin(&Ask::merge(&role, json!({"rules": rules})))?;
    let _worker = world.start_agent(WORKER)?;
    let told = world.wait_status(WORKER, "what is forbidden", |status| says(status, "problems", "EgressPolicies"));
    let after = world.routes(WORKER)?;
    world.admin(&Ask::merge(&role, json!({"rules": good["rules"]})))?;
    expect![[r#": EgressPolicies: egresspolicies.carrick.dev is forbidden: User "system:serviceaccount:carrick:carrick-worker" cannot list resource "egresspolicies" in API group "carrick.dev" at the cluster scope (403): grant it, as the chart's RBAC does; nothing is changed until it can be read"#]].assert_eq(&world.problems(&told?).join("\n"));
    ensure!(after == before);
    world.wait_well(WORKER)?;
    ensure!(world.routes(WORKER)? == before);
    Ok(())
}

/// As after a boot: nothing is in the kernel, and nobody tells what belongs there.
pub(super) fn a_start_while_the_server_is_away_goes_on_with_what_it_said(world: &mut World) -> Result<()> {
    let [_gateway, worker] = world.start_both()?;
    world.wait_status(WORKER, "that it has kept what it knows", |status| status["lastKnownGoodAgeSeconds"].is_u64())?;
    let before = world.routes(WORKER)?;
    worker.agent.kill()?;
    let node = world.node(WORKER);
    let binary = world.carrick.path().display().to_string();
    node.host.output(&binary, &["cleanup", "--state-dir", "/run/elsewhere"])?;
    ensure!(world.routes(WORKER)? != before);

    let config = world.kubeconfig(WORKER)?;
    world.server.pause()?;
    let began = std::time::Instant::now();
    let restarted = world.restart_agent(WORKER, &config);
    let there = restarted.and_then(|running| world.wait_route(WORKER, VA, true).map(|()| running));
    let (after, took) = (world.routes(WORKER), began.elapsed());
    world.server.resume()?;
    let _running = there?;
    println!("routes without the API server after {took:?}");
    ensure!(after? == before);
    world.wait_well(WORKER)?;
    ensure!(world.routes(WORKER)? == before);
    Ok(())
}

/// It hangs; it is killed and starts on a store that was compacted, while an agent is held up: what that one asks for next is
/// forgotten (410).
pub(super) fn a_server_that_hangs_and_one_that_has_forgotten_take_nothing_away(world: &mut World) -> Result<()> {
    let [_gateway, worker] = world.start_both()?;
    let before = world.routes(WORKER)?;
    world.server.pause()?;
    sleep(Duration::from_secs(3));
    let status = world.status(WORKER);
    world.server.resume()?;
    ensure!(world.problems(&status?).is_empty() && world.routes(WORKER)? == before);
    world.put("routeadvertisements", &[advertisement("va", &[VA, "10.45.0.0/16"])])?;
    world.wait_route(WORKER, "10.45.0.0/16", true)?;

    worker.agent.signal(nix::sys::signal::Signal::SIGSTOP)?;
    for n in 0..20 {
        world.put("routeadvertisements", &[advertisement("va", &[VA, &format!("10.45.{n}.0/24")])])?;
    }
    let Kubernetes { server, lab, .. } = &mut **world;
    server.compact(&lab.internet)?;
    server.restart(&lab.internet)?;
    world.wait_ready()?;
    worker.agent.signal(nix::sys::signal::Signal::SIGCONT)?;
    world.wait_route(WORKER, "10.45.19.0/24", true)?;
    world.wait_route(WORKER, "10.45.0.0/16", false)?;
    ensure!(world.routes(WORKER)?.contains(VA));
    world.wait_well(WORKER)?;
    Ok(())
}

/// Names, ids, times and versions are given anew each time; members, ranges and ids collide.
pub(super) fn the_order_in_which_the_folder_is_applied_changes_nothing(world: &mut World) -> Result<()> {
    let [mn, va] = [cluster("mn", 1, KEYS[0], &RANGES), cluster("va", 2, KEYS[1], &["10.44.0.0/15"])];
    let mut clusters = [mn, va, cluster("wa", 2, KEYS[0], &[VA]), cluster("xa", 3, KEYS[1], &["10.0.0.0/8"])];
    let claims: [(&str, &[&str]); 4] = [
        ("mn", &RANGES),
        ("va", &[VA, "10.46.0.0/16"]),
        ("wa", &[VA]),
        ("xa", &["10.44.7.0/24", "10.42.0.0/24", "10.47.0.0/16"]),
    ];
    let mut claims = claims.map(|(name, ranges)| advertisement(name, ranges));
    let mut plans = Vec::new();
    for _ in 0..2 {
        world.put("meshclusters", &clusters)?;
        world.put("routeadvertisements", &claims)?;
        plans.push((world.plan(WORKER, "mn")?, world.plan(WORKER, "va")?));
        for plural in ["routeadvertisements", "meshclusters"] {
            world.admin(&Ask::delete(&format!("{MESH}/{plural}")))?;
        }
        // A creation time is in seconds.
        sleep(Duration::from_millis(1100));
        clusters.reverse();
        claims.reverse();
    }
    ensure!(plans[0] == plans[1], "{plans:#?}");
    let (mn, va) = &plans[0];
    ensure!(mn["operations"] != json!([]) && va["operations"] != json!([]), "{mn} {va}");
    let refused = |plan: &Value| serde_json::to_string_pretty(&plan["rejections"]);
    expect![[r#"
        [
          "MeshCluster/wa spec.id: DuplicateId: 2 is the id of va, which comes first by name: give wa an id of its own",
          "MeshCluster/xa spec.gateways[0].publicKey: DuplicateKey: the key is that of va's gateway 0: make one for this slot alone",
          "RouteAdvertisement/va spec.routes[1].cidr: OutsideAllowed: 10.46.0.0/16 lies in none of the allowedCIDRs of MeshCluster va: have it added there",
          "RouteAdvertisement/wa spec.cluster: UnknownCluster: no MeshCluster named wa is accepted: this waits until one is",
          "RouteAdvertisement/xa spec.routes[0].cidr: HeldByAnother: 10.44.7.0/24 overlaps 10.44.0.0/16, which va holds by the lower id (2, xa has 3): one of them must use another range",
          "RouteAdvertisement/xa spec.routes[1].cidr: HeldByAnother: 10.42.0.0/24 overlaps 10.42.0.0/16, which mn holds by the lower id (1, xa has 3): one of them must use another range",
          "MeshCluster/mn spec.gateways: NoGateway: no node of this cluster holds a slot: add a MeshGateway that names the node"
        ]"#]].assert_eq(&refused(mn)?);
    expect![[r#"
        [
          "MeshCluster/wa spec.id: DuplicateId: 2 is the id of va, which comes first by name: give wa an id of its own",
          "MeshCluster/xa spec.gateways[0].publicKey: DuplicateKey: the key is that of va's gateway 0: make one for this slot alone",
          "RouteAdvertisement/va spec.routes[1].cidr: OutsideAllowed: 10.46.0.0/16 lies in none of the allowedCIDRs of MeshCluster va: have it added there",
          "RouteAdvertisement/wa spec.cluster: UnknownCluster: no MeshCluster named wa is accepted: this waits until one is",
          "RouteAdvertisement/xa spec.routes[0].cidr: HeldByAnother: 10.44.7.0/24 overlaps 10.44.0.0/16, which va holds by the lower id (2, xa has 3): one of them must use another range",
          "RouteAdvertisement/xa spec.routes[1].cidr: HeldByAnother: 10.42.0.0/24 overlaps 10.42.0.0/16, which mn holds by the lower id (1, xa has 3): one of them must use another range",
          "RouteAdvertisement/mn spec.routes[0].cidr: OwnRange: 10.42.0.0/16 overlaps 10.42.1.0/24, which va uses itself (Node mn-1): one must use another range",
          "RouteAdvertisement/mn spec.routes[1].cidr: OwnRange: fd00:10:1::/48 overlaps fd00:10:1:1::/64, which va uses itself (Node mn-1): one must use another range",
          "MeshCluster/va spec.gateways: NoGateway: no node of this cluster holds a slot: add a MeshGateway that names the node"
        ]"#]].assert_eq(&refused(va)?);
    Ok(())
}
