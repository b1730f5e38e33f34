//! What a mesh of many members costs a worker and a gateway whose objects come from a real API server, as one line of JSON.
//!
//! Both agents run by the tokens of their pods, each on a node of its own, the gateway with its tunnel. The other members and
//! the other nodes are objects alone: nobody answers for them. The one argument is a [`Wanted`] in JSON.

mod changes;
#[path = "../../it/api/client.rs"]
// It asks for more in the tests.
#[allow(dead_code)]
mod client;
#[path = "../../it/api/counts.rs"]
mod counts;
#[path = "../../it/api/kubernetes.rs"]
mod kubernetes;
mod mesh;
mod process;
mod start;
mod steady;

use std::{collections::BTreeMap, env};

use anyhow::{Context, Result};
use lab::{Carrick, apiserver::Store, carrick::Running};
use serde::{Deserialize, Serialize};

use self::{
    changes::Changed,
    counts::count_bytes,
    kubernetes::{Kubernetes, program},
    process::Memory,
    start::Start,
    steady::Steady,
};

/// What is to be measured.
#[derive(Debug, Deserialize)]
struct Wanted {
    /// Beside the own one.
    members: u16,
    /// Of the own cluster.
    nodes: u16,
    /// How often both agents are started on an empty kernel.
    starts: usize,
    /// How many RouteAdvertisements are changed, one after the other.
    changes: usize,
    /// How long nothing happens, in seconds.
    steady: u64,
}

/// What was measured. By node: `worker` or `gateway`.
#[derive(Debug, Serialize)]
struct Found {
    starts: Vec<Start>,
    changes: Vec<Changed>,
    /// What passed between API server and node for each change, both directions, in bytes.
    change_bytes: BTreeMap<&'static str, u64>,
    /// By process: at the end, with everything that went before.
    memory: BTreeMap<&'static str, Memory>,
    steady: Steady,
}

fn main() -> Result<()> {
    let wanted =
        env::args().find(|argument| argument.starts_with('{')).context("one argument: what is wanted, in JSON")?;
    let wanted: Wanted = serde_json::from_str(&wanted).context("what is wanted")?;
    let kubernetes = Kubernetes::new("control", Carrick::new(&program("BIN")?)?, Store::Etcd, &[])?;
    let found = measure(&kubernetes, &wanted).inspect_err(|_| kubernetes.show_logs())?;
    println!("{}", serde_json::to_string(&found)?);
    Ok(())
}

fn measure(kubernetes: &Kubernetes, wanted: &Wanted) -> Result<Found> {
    let Wanted { members, nodes, .. } = *wanted;
    // Whoever is dialled there does not answer.
    kubernetes.lab.internet.ip(&format!("route add blackhole {}", mesh::UNDERLAY))?;
    count_bytes(kubernetes)?;
    eprintln!("{nodes} Nodes and {members} members ...");
    mesh::put(kubernetes, members, nodes)?;
    let mut starts = Vec::new();
    let mut running = start::first(kubernetes, members)?;
    for number in 1..=wanted.starts {
        eprintln!("start {number} of {} ...", wanted.starts);
        let (start, now) = start::again(kubernetes, members, running)?;
        starts.push(start);
        running = now;
    }
    steady::wait(kubernetes)?;
    let (changes, change_bytes) = changes::measure(kubernetes, members, wanted.changes)?;
    steady::wait(kubernetes)?;
    let steady = steady::measure(kubernetes, &running, wanted.steady)?;
    let memory = process::all(&running)?;
    Ok(Found { starts, changes, change_bytes, memory, steady })
}

/// Both nodes.
struct Both {
    gateway: Running,
    worker: Running,
}
