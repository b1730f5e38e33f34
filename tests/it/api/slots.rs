//! Slots that nodes take by Lease.

use std::{thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use expect_test::expect;
use lab::{Process, STATE_DIR, wait_for};
use serde_json::{Value, json};

use super::{
    client::Ask,
    export::run,
    kubernetes::{ADMIN, GATEWAY, MESH},
    world::{RANGES, World, cluster},
};

/// The other node's clock is half an hour ahead, and ten times as fast.
const CLOCK: &str = "+30m x10";
/// Longer than a Lease of that clock, shorter than what its holder has to renew it.
const PATIENCE: Duration = Duration::from_secs(15);
/// A Lease of that clock, probes, and what the machine has to do besides.
const TAKEN_WITHIN: Duration = Duration::from_secs(60);
const OTHER: usize = 1;

pub(super) fn an_auto_slot_is_taken_over_from_who_is_gone_whatever_the_clocks_say(world: &mut World) -> Result<()> {
    label(world, GATEWAY, "auto")?;
    label(world, OTHER, "auto")?;
    let first = [tunnel(world, GATEWAY)?, start(world, GATEWAY, None)?];
    held_by(world, "mn-0")?;
    world.put_mesh()?;
    let key = slot(world)?["spec"]["publicKey"].clone();

    let _second = [tunnel(world, OTHER)?, start(world, OTHER, Some(CLOCK))?];
    let free = |status: &Value| status["synced"] == true && status["slot"].is_null();
    world.wait_status(OTHER, "that it holds no slot", free)?;
    sleep(PATIENCE);
    ensure!(slot(world)?["spec"]["node"] == "mn-0", "{}", slot(world)?);
    ensure!(free(&world.status(OTHER)?), "{}", world.status(OTHER)?);

    // Its power is cut.
    world.lab.power_off(world.node(GATEWAY))?;
    let gone = std::time::Instant::now();
    drop(first);
    held_by(world, "mn-1")?;
    println!("taken over after {:?}", gone.elapsed());
    ensure!(slot(world)?["spec"]["publicKey"] == key, "the key is the slot's: {}", slot(world)?);
    world.wait_status(OTHER, "that it holds the slot", |status| status["slot"] == 0)?;

    // It comes back, and believes to be what it was until it hears.
    world.lab.power_on(world.node(GATEWAY))?;
    let _first = [tunnel(world, GATEWAY)?, start(world, GATEWAY, None)?];
    world.wait_status(GATEWAY, "that it holds no slot", free)?;
    ensure!(slot(world)?["spec"]["node"] == "mn-1", "{}", slot(world)?);

    label(world, GATEWAY, "0")?;
    let none = json!({"metadata": {"labels": {"carrick.dev/gateway": null}}});
    world.admin(&Ask::merge("/api/v1/nodes/mn-1", none))?;
    let leases = "/apis/coordination.k8s.io/v1/namespaces/carrick/leases/carrick-gateway-0";
    world.admin(&Ask::delete(leases)).map(drop)
}

/// As the plugin's help says: a second key, the folder names it, the first goes. What is in use stays.
pub(super) fn a_slot_s_key_is_rotated_by_the_plugin_and_the_folder(world: &mut World) -> Result<()> {
    let [gateway, _worker] = world.start_both()?;
    let old = slot(world)?["spec"]["publicKey"].as_str().context("a key")?.to_owned();
    let mut told = plugin(world, "show")?;
    told += &plugin(world, &format!("drop {old}"))?;
    let added = plugin(world, "add")?;
    let new = added.lines().nth(1).context("the public half of a key")?.to_owned();
    told += &added;
    told += &plugin(world, "add")?;
    told += &plugin(world, &format!("drop {new} --ordinal 1"))?;

    told += &plugin(world, "show -n elsewhere")?;

    world.put("meshclusters", &[cluster("mn", 1, &new, &RANGES)])?;
    told += &plugin(world, &format!("drop {new}"))?;
    wait_for("the new key to be published", TAKEN_WITHIN, || match slot(world) {
        Ok(slot) if slot["spec"]["publicKey"] == *new => Ok(()),
        other => Err(format!("{other:?}")),
    })?;
    world.wait_well(GATEWAY)?;
    told += &plugin(world, &format!("drop {old}"))?;
    told += &plugin(world, &format!("drop {old}"))?;
    told += &plugin(world, "show")?;
    drop(gateway);
    let _gateway = world.start(GATEWAY)?;
    world.wait_well(GATEWAY)?;
    ensure!(slot(world)?["spec"]["publicKey"] == *new, "{}", slot(world)?);
    let told = told.replace(&old, "OLD").replace(&new, "NEW");
    expect![[r#"
        $ kubectl-carrick keys show
        OLD
        $ kubectl-carrick keys drop OLD
        carrick: Secret carrick/carrick-gateway-0 holds no other key than OLD: `keys add` makes one
        exit code 1
        $ kubectl-carrick keys add
        NEW
        $ kubectl-carrick keys add
        carrick: Secret carrick/carrick-gateway-0 holds two keys already: delete the one that is no longer used
        exit code 1
        $ kubectl-carrick keys drop NEW --ordinal 1
        carrick: Secret carrick/carrick-gateway-1: there is no key in it yet: the agent makes it
        exit code 1
        $ kubectl-carrick keys show -n elsewhere
        carrick: Secret elsewhere/carrick-gateway-0: secrets "carrick-gateway-0" not found (404): the chart makes what is missing, one for each slot
        exit code 1
        $ kubectl-carrick keys drop NEW
        carrick: MeshCluster mn names NEW: have the mesh's folder name the other first
        exit code 1
        $ kubectl-carrick keys drop OLD
        $ kubectl-carrick keys drop OLD
        carrick: Secret carrick/carrick-gateway-0 does not hold OLD: `keys show` says what it holds
        exit code 1
        $ kubectl-carrick keys show
        NEW
    "#]]
    .assert_eq(&told);
    Ok(())
}

fn plugin(world: &World, line: &str) -> Result<String> {
    run(world, ADMIN, &[&format!("kubectl-carrick keys {line}")])
}

fn label(world: &World, node: usize, value: &str) -> Result<()> {
    let label = json!({"metadata": {"labels": {"carrick.dev/gateway": value}}});
    world.admin(&Ask::merge(&format!("/api/v1/nodes/{}", world.node(node).host.name()), label)).map(drop)
}

fn tunnel(world: &World, node: usize) -> Result<Process> {
    world.carrick.start_tunnel(world.node(node))
}

/// As the chart starts it on gateways, where there is one slot; with a clock of its own.
fn start(world: &World, node: usize, clock: Option<&str>) -> Result<Process> {
    let config = world.kubeconfig_of(node, "carrick-gateway")?;
    let mut line = Vec::new();
    if let Some(clock) = clock {
        let preload = world.lab.internet.output("faketime", &["-f", "+0", "sh", "-c", "echo $LD_PRELOAD"])?;
        line.extend([format!("LD_PRELOAD={}", preload.trim()), format!("FAKETIME={clock}")]);
    }
    let (program, reads) = (world.carrick.path().display(), world.reads(node, "mn", &config));
    let agent = format!("{program} agent {reads} --state-dir {STATE_DIR} --gateway-slots 1");
    line.extend(agent.split(' ').map(str::to_owned));
    world.node(node).host.spawn("agent", "env", &line.iter().map(String::as_str).collect::<Vec<_>>())
}

fn slot(world: &World) -> Result<Value> {
    world.admin(&Ask::get(&format!("{MESH}/meshgateways/0")))
}

fn held_by(world: &World, node: &str) -> Result<()> {
    wait_for(&format!("the slot to be {node}'s"), TAKEN_WITHIN, || {
        let slot = slot(world).map_err(|error| format!("{error:#}"))?;
        if slot["spec"]["node"] == node { Ok(()) } else { Err(slot.to_string()) }
    })
    .context("the slot")
}
