//! Carrick's own commands, one file each; this one is their table of contents.
//!
//! Invariant: nothing here depends on `agent`. What runs is the `carrick` that was built, as a user would run it.

// A binary has no users: `pub` says what a module offers to its neighbours.
#![allow(unreachable_pub)]

mod bench;
#[path = "../../agent/build/bpf_tools.rs"]
mod bpf_tools;
mod chart;
mod cluster;
mod demo;
mod elf;
mod image;
mod lab;
mod oci;
mod process;
mod setup;
mod test;
mod tidy;
mod tools;
mod vm;
mod workspace;

use std::{env, os::unix::process::CommandExt, process::ExitCode};

use clap::{Parser, Subcommand};

use crate::setup::For;

/// Carrick's own commands.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", disable_help_subcommand = true)]
struct Args {
    /// Installs nothing: says what is missing instead.
    #[arg(long, global = true)]
    no_install: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Shows two members talking, on this machine: sets up, builds, runs, cleans up.
    Demo(demo::Args),
    /// Gives members of namespaces to try things in by hand.
    Lab(lab::Args),
    /// Runs every check: formatting, lints, documentation, licences, unit and law tests, and the lab.
    Test(test::Args),
    /// Measures, and compares with budgets.
    Bench(bench::Args),
    /// Tries this tree on other kernels, in QEMU guests.
    Vm(vm::Args),
    /// Checks the Helm chart: lints it, and renders it with every combination of its switches.
    Chart(chart::Args),
    /// Gives two real Kubernetes clusters on this machine.
    Cluster(cluster::Args),
    /// Writes the container image and the list of what is in it; needs no container engine.
    Image(image::Args),
    /// Checks the rules of this tree that no compiler knows.
    Tidy(tidy::Args),
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if process::interrupted() => {
            eprintln!("interrupted");
            ExitCode::from(130)
        }
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// True if what was run holds.
fn run(args: Args) -> anyhow::Result<bool> {
    look_into_sbin()?;
    if let Command::Cluster(machine) = &args.command
        && machine.is_machine()
    {
        // No thread yet, and no signal handled: it is the first process of its namespaces.
        return cluster::run(machine);
    }
    process::pass_on_interrupts()?;
    let install = !args.no_install;
    match args.command {
        Command::Demo(args) => {
            setup::ensure(args.needs(), install)?;
            demo::run(&args, workspace::build_carrick)
        }
        Command::Lab(args) => {
            setup::ensure(For::Lab, install)?;
            lab::run(&args)
        }
        Command::Test(args) => {
            setup::ensure(For::Test, install)?;
            test::run(&args)
        }
        Command::Bench(args) => {
            if let Some(needs) = args.needs() {
                setup::ensure(needs, install)?;
            }
            bench::run(&args, workspace::build_carrick)
        }
        Command::Vm(args) => {
            setup::ensure(For::Vm, install)?;
            vm::run(&args)
        }
        Command::Chart(args) => {
            setup::ensure(For::Chart, install)?;
            chart::run(&args)
        }
        Command::Cluster(args) => {
            if args.makes_clusters() {
                setup::ensure(For::Cluster, install)?;
            }
            cluster::run(&args)
        }
        Command::Image(args) => {
            setup::ensure(For::Image, install)?;
            image::run(&args)
        }
        Command::Tidy(args) => tidy::run(&args),
    }
}

/// Starts again with the sbin folders in PATH where they are missing, as in a shell of Debian's `su`: `nft` is there.
fn look_into_sbin() -> anyhow::Result<()> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<_> = env::split_paths(&path).collect();
    let known = folders.len();
    for sbin in ["/usr/sbin", "/sbin"] {
        if !folders.iter().any(|folder| folder.as_os_str() == sbin) {
            folders.push(sbin.into());
        }
    }
    if folders.len() == known {
        return Ok(());
    }
    let error = std::process::Command::new(env::current_exe()?)
        .args(env::args_os().skip(1))
        .env("PATH", env::join_paths(folders)?)
        .exec();
    Err(error.into())
}
