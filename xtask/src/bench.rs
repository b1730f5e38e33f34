//! Measurements against budgets. Never part of the tests: a number depends on the machine, so a budget is a ratio or a
//! difference of one run wherever that says enough, else a size or a time with room to spare.

mod control;
mod datapath;
mod ends;
mod failover;
mod implementation;
mod joined;
mod plain;
mod plot;
mod processor;
mod report;
mod saved;
mod statistics;
mod steer;
mod traffic;
mod tunnel;
mod vxlan;
pub mod way;

use std::path::PathBuf;

use crate::setup::For;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Measure this carrick instead of building one.
    #[arg(long, value_name = "PATH", global = true)]
    carrick: Option<PathBuf>,
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Our userspace tunnel against gotatun, boringtun and wireguard-go, and its memory.
    Tunnel(tunnel::Args),
    /// Pod to remote pod against the same tunnels with plain routes, and what a packet costs in the BPF programs.
    Datapath(datapath::Args),
    /// How long traffic stands still when a gateway or a link fails, and what a drain and a restart lose. Goes on where it
    /// was ended.
    Failover(failover::Args),
    /// What a mesh of many members costs worker and gateway of a cluster with a real API server: time from the change of an
    /// object to the kernel, memory, requests.
    Control(control::Args),
    /// Makes the page of what `datapath`, `failover` and `control` found last, with its plots.
    Plot(plot::Args),
}

impl Args {
    /// The command whose needs of the machine are this one's: `tunnel` alone has others to build.
    pub fn needs(&self) -> Option<For> {
        match &self.what {
            What::Tunnel(_) => Some(For::Bench),
            What::Control(_) => Some(For::Control),
            What::Datapath(_) | What::Failover(_) => Some(For::Lab),
            What::Plot(_) => None,
        }
    }
}

/// Measures the `carrick` that was named, else the one that `carrick` builds and returns the path of. True if every budget
/// holds.
pub fn run(args: &Args, carrick: impl FnOnce() -> anyhow::Result<PathBuf>) -> anyhow::Result<bool> {
    let carrick = || args.carrick.clone().map_or_else(carrick, Ok);
    match &args.what {
        What::Tunnel(args) => tunnel::run(args, &carrick()?),
        What::Datapath(args) => datapath::run(args, &carrick()?),
        What::Failover(args) => failover::run(args, &carrick()?),
        What::Control(args) => control::run(args, &carrick()?),
        What::Plot(args) => plot::run(args),
    }
}
