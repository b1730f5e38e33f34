//! Measurements.
use std::path::Path;
#[derive(Debug, clap::Args)]
pub struct Args {}
pub fn run(_: &Args, _: &Path) -> anyhow::Result<bool> {
    anyhow::bail!("x")
}
