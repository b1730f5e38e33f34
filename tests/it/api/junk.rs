//! Objects that nobody needs: as many as can be made, as large as can be, and changed as often as can be.

use std::{
    collections::BTreeMap,
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::carrick::Running;
use serde_json::{Value, json};

use super::{
    client::{Ask, done},
    counts::asked,
    kubernetes::{ADMIN, GATEWAY, MESH, WORKER, object},
    world::{TENANT, VA, World, advertisement},
};

/// Names that a member's team tries.
const NAMES: usize = 5_000;
/// RouteAdvertisements that a member may have.
const ACCEPTED: usize = 64;
/// Times that each of them is changed.
const CHANGES: usize = 2;
/// MiB: what the chart grants a worker's agent, its BPF maps included.
const MEMORY: u64 = 128;
/// How long a change may take to arrive behind all that, on a machine that has more to do.
const LATE: Duration = Duration::from_secs(60);

/// As large as the schema allows, and nothing of it can be used.
fn junk(name: usize, change: usize) -> Value {
    let ranges: Vec<String> = (0..64).map(|n| format!("10.98.{}.{name}/32", n + change)).collect();
    let mut junk = offering(name, &ranges.iter().map(String::as_str).collect::<Vec<_>>());
    junk["spec"]["to"] = (0..1024).map(|n| format!("{n:04}-{}", "x".repeat(58))).collect();
    junk
}

fn offering(name: usize, ranges: &[&str]) -> Value {
    let mut junk = advertisement("junk", ranges);
    junk["metadata"]["name"] = named(name).into();
    junk
}

fn named(name: usize) -> String {
    if name == 0 { "junk".to_owned() } else { format!("junk.{name}") }
}

pub(super) fn junk_and_giants_hold_nobody_up(world: &mut World) -> Result<()> {
    let running = world.start_both()?;
    world.put("meshclusters", &[object("MeshCluster", "junk", &json!({"id": 3, "allowedCIDRs": ["10.99.0.0/16"]}))])?;
    let before = used(&running)?;
    let began = Instant::now();
    let path = format!("{MESH}/routeadvertisements");
    let beyond = (ACCEPTED..NAMES).map(|name| offering(name, &["10.98.0.0/16"]));
    let all = (0..ACCEPTED).map(|name| junk(name, 0)).chain(beyond);
    let mut codes: BTreeMap<u16, usize> = BTreeMap::new();
    world.ask_all(TENANT, all.map(|object| Ask::create(&path, object)), |_, answer| {
        *codes.entry(answer.map_or_else(|refusal| refusal.code, |_| 201)).or_default() += 1;
        Ok(())
    })?;
    println!("{NAMES} names tried in {:?}", began.elapsed());
    let wanted = BTreeMap::from([(201, ACCEPTED), (422, NAMES - ACCEPTED)]);
    ensure!(codes == wanted, "created by code: {codes:?}, wanted: {wanted:?}");
    let giant = json!([{"key": "a", "operator": "In", "values": ["x".repeat(1 << 20)]}]);
    let giant = object("EgressPolicy", "giant", &json!({"podSelector": {"matchExpressions": giant}}));
    world.admin(&Ask::create(&format!("{MESH}/egresspolicies"), giant))?;
    let followed = follow(world, "10.45.1.0/24")?;
    println!("then a change to another member's advertisement arrives in {followed:?}");

    let began = Instant::now();
    let changes = (1..=CHANGES).flat_map(|change| (0..ACCEPTED).map(move |name| (name, change)));
    let changes = changes.map(|(name, change)| {
        Ask::merge(
            &format!("{path}/{}", named(name)),
            json!({"spec": {"routes": junk(name, change)["spec"]["routes"]}}),
        )
    });
    world.ask_all(TENANT, changes, done)?;
    let made = began.elapsed();
    let followed = follow(world, "10.45.2.0/24")?;
    println!("{} changes in {made:?}, and one behind them arrives in {followed:?}", ACCEPTED * CHANGES);

    let seen = world.server.audit()?.len();
    world.ask_all(ADMIN, (0..ACCEPTED).map(|name| Ask::delete(&format!("{path}/{}", named(name)))), done)?;
    let followed = follow(world, "10.45.3.0/24")?;
    let requests: usize = asked(&world.server.audit()?[seen..], "worker").values().sum();
    println!("{ACCEPTED} deleted, and a change behind them arrives in {followed:?}: {requests} requests of a worker");
    // One for each, and what it asks now and then.
    ensure!(requests <= ACCEPTED + 10, "{requests} requests because of {ACCEPTED} deletions");
    let after = used(&running)?;
    println!("MiB at most, and seconds of a processor, of gateway and worker: {before:?}, then {after:?}");
    ensure!(after.iter().all(|(mebibytes, _)| *mebibytes <= MEMORY), "{after:?}, and the chart grants {MEMORY} MiB");
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
