//! Objects that nobody needs: very many, and a very large one.

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{apiserver::Store, carrick::Running};
use serde_json::json;

use super::{
    client::Ask,
    counts::asked,
    kubernetes::{ADMIN, GATEWAY, MESH, WORKER, object},
    world::{TENANT, VA, World, advertisement},
};

/// So many of them are deleted again.
const DELETED: usize = 200;
/// MiB: what the chart grants a worker's agent, its BPF maps included.
const MEMORY: u64 = 128;
/// How long a change may take to arrive behind all that, on a machine that has more to do.
const LATE: Duration = Duration::from_secs(120);

/// Advertisements that a member's team makes, each refused: as many as fit into the time that all checks may take.
fn junk(store: Store) -> usize {
    match store {
        Store::Etcd => 5_000,
        Store::Kine => 1_000,
    }
}

pub(super) fn junk_and_giants_hold_nobody_up(world: &mut World) -> Result<()> {
    world.spoil();
    let made_up = junk(world.store);
    let running = world.start_both()?;
    world.put("meshclusters", &[object("MeshCluster", "junk", &json!({"id": 3, "allowedCIDRs": ["10.99.0.0/16"]}))])?;
    let before = used(&running)?;
    let began = Instant::now();
    let path = format!("{MESH}/routeadvertisements");
    let name = |n: usize| format!("junk-{n}");
    let create = |n: usize| {
        let mut junk = advertisement("junk", &[&format!("10.98.{}.{}/32", n / 256 % 256, n % 256)]);
        junk["metadata"]["name"] = name(n).into();
        Ask::create(&path, junk)
    };
    world.ask_all(TENANT, (0..made_up).map(create))?;
    let made = began.elapsed();
    let giant = json!([{"key": "a", "operator": "In", "values": ["x".repeat(1 << 20)]}]);
    let giant = object("EgressPolicy", "giant", &json!({"podSelector": {"matchExpressions": giant}}));
    world.admin(&Ask::create(&format!("{MESH}/egresspolicies"), giant))?;

    let followed = follow(world, "10.45.1.0/24")?;
    let after = used(&running)?;
    println!("{made_up} objects in {made:?}; then a change to another member's arrives in {followed:?}");
    println!("MiB at most, and seconds of a processor, of gateway and worker: {before:?}, then {after:?}");
    ensure!(after.iter().all(|(mebibytes, _)| *mebibytes <= MEMORY), "{after:?}, and the chart grants {MEMORY} MiB");

    let seen = world.server.audit()?.len();
    world.ask_all(ADMIN, (0..DELETED).map(|n| Ask::delete(&format!("{path}/{}", name(n)))))?;
    let followed = follow(world, "10.45.2.0/24")?;
    let requests: usize = asked(&world.server.audit()?[seen..], "worker").values().sum();
    println!("{DELETED} deleted, and a change behind them arrives in {followed:?}: {requests} requests of a worker");
    ensure!(requests <= DELETED, "{requests} requests because of {DELETED} deletions");
    Ok(())
}

/// Changes what the other member offers, and waits until that has arrived; all changes before it have, too.
fn follow(world: &World, range: &str) -> Result<Duration> {
    world.put("routeadvertisements", &[advertisement("va", &[VA, range])])?;
    let changed = Instant::now();
    for node in [GATEWAY, WORKER] {
        world.wait_route_within(LATE, node, range, true)?;
    }
    Ok(changed.elapsed())
}

/// The most memory that each agent has had so far, in MiB, and the time that it has run, in seconds of a processor.
fn used(running: &[Running; 2]) -> Result<Vec<(u64, u64)>> {
    let one = |running: &Running| {
        let proc = format!("/proc/{}", running.agent.pid().context("it runs")?);
        let status = fs::read_to_string(format!("{proc}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("VmHWM")?;
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse()?;
        let stat = fs::read_to_string(format!("{proc}/stat"))?;
        // The second field may hold anything but ')'; utime and stime are the 14th and 15th, in hundredths.
        let (_, rest) = stat.rsplit_once(')').context("proc(5)")?;
        let ticks = rest.split_whitespace().skip(11).take(2).map(str::parse::<u64>).sum::<Result<u64, _>>()?;
        Ok((kibibytes / 1024, ticks / 100))
    };
    running.iter().map(one).collect()
}
