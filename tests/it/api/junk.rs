//! Objects that nobody needs: very many, and a very large one.

use std::{fs, thread::sleep, time::{Duration, Instant}};

use anyhow::{Context, Result, ensure};
use lab::carrick::Running;
use serde_json::json;

use super::{
    client::Ask,
    world::{GATEWAY, MESH, TENANT, VA, WORKER, World, advertisement, object},
};

/// Advertisements that a member's team makes, each refused: what fits the time that all checks may take.
const JUNK: usize = 2_000;
/// MiB: what the chart grants a worker's agent, its BPF maps included.
const MEMORY: u64 = 128;

pub(super) fn junk_and_giants_hold_nobody_up(world: &mut World) -> Result<()> {
    world.spoil();
    let running = world.start_both()?;
    world.put("meshclusters", &[object("MeshCluster", "junk", &json!({"id": 3, "allowedCIDRs": ["10.99.0.0/16"]}))])?;
    let before = memory(&running)?;

    let began = Instant::now();
    let path = format!("{MESH}/routeadvertisements");
    let create = |n: usize| {
        let mut junk = advertisement("junk", &[&format!("10.98.{}.{}/32", n / 256 % 256, n % 256)]);
        junk["metadata"]["name"] = json!(format!("junk-{n}"));
        Ask::create(&path, junk)
    };
    world.ask_all(TENANT, (0..JUNK).map(create))?;
    let made = began.elapsed();
    let giant = json!({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": ["x".repeat(1 << 20)]}]}});
    world.admin(&Ask::create(&format!("{MESH}/egresspolicies"), object("EgressPolicy", "giant", &giant)))?;

    world.put("routeadvertisements", &[advertisement("va", &[VA, "10.45.0.0/16"])])?;
    let changed = Instant::now();
    for node in [GATEWAY, WORKER] {
        world.wait_route(node, "10.45.0.0/16", true)?;
    }
    let followed = changed.elapsed();
    sleep(Duration::from_secs(2));
    let after = memory(&running)?;
    println!("{JUNK} objects in {made:?}; a change to another member's in {followed:?}; most memory of gateway and worker, MiB: {before:?}, then {after:?}");
    ensure!(after.iter().all(|mebibytes| *mebibytes <= MEMORY), "{after:?} MiB, and the chart grants {MEMORY}");
    Ok(())
}

/// The most that each has had so far, in MiB.
fn memory(running: &[Running; 2]) -> Result<Vec<u64>> {
    let one = |running: &Running| {
        let status = fs::read_to_string(format!("/proc/{}/status", running.agent.pid().context("it runs")?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kibibytes / 1024)
    };
    running.iter().map(one).collect()
}
