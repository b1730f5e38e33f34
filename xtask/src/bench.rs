//! Measurements against budgets. Never part of the tests: a number depends on the machine, so every budget is a ratio
//! of one run, or a size.

mod ends;
mod implementation;
mod report;
mod traffic;
mod tunnel;

use std::path::Path;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Our userspace tunnel against gotatun, boringtun and wireguard-go, and its memory.
    Tunnel(tunnel::Args),
}

/// Measures `carrick`; true if every budget holds.
pub fn run(args: &Args, carrick: &Path) -> anyhow::Result<bool> {
    match &args.what {
        What::Tunnel(args) => tunnel::run(args, carrick),
    }
}
