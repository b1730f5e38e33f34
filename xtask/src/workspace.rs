//! Where this workspace lies, and how its programs are built.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::process;

/// The folder of the workspace's `Cargo.toml`.
pub fn root() -> &'static Path {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask)
}

/// The `cargo` that runs us, in the workspace's folder, with the environment that its caller had.
pub fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    // `cargo run` adds these. Build scripts (ring's) watch them and would run again, once with and once without.
    let added = |name: &str| {
        name.starts_with("CARGO_PKG_")
            || matches!(name, "CARGO_MANIFEST_DIR" | "CARGO_MANIFEST_PATH" | "CARGO_BIN_NAME" | "CARGO_CRATE_NAME")
    };
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_str().is_some_and(added)) {
        command.env_remove(name);
    }
    command
}

/// The build folder: `target`, unless cargo is configured otherwise.
pub fn target_dir() -> anyhow::Result<PathBuf> {
    let output = cargo().args(["metadata", "--no-deps", "--format-version", "1"]).output().context("cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let folder = metadata["target_directory"].as_str().context("cargo metadata names no target_directory")?;
    Ok(PathBuf::from(folder))
}

/// The command that builds the `carrick` that ships; [`carrick_path`] is where it then lies.
pub fn build_carrick_command() -> Command {
    let mut command = cargo();
    command.args(["build", "--release", "--locked", "--package", "agent"]);
    command
}

pub fn carrick_path() -> anyhow::Result<PathBuf> {
    Ok(target_dir()?.join("release/carrick"))
}

/// Builds the `carrick` that ships, and says where it lies.
pub fn build_carrick() -> anyhow::Result<PathBuf> {
    let ended = process::run("build carrick", &mut build_carrick_command())?;
    if !ended.success {
        bail!("{}\ncarrick does not build", ended.output);
    }
    carrick_path()
}
