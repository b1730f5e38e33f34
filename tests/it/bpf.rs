//! The BPF programs, by test runs against a model of what they must do.
//!
//! - [`packet`]: packets as descriptions; [`cases`]: strategies for them and for the maps.
//! - [`check`]: whether what happened is what should.
//! - [`parse`], [`model`]: what each program must do, written from the design alone.
//! - [`maps`], [`run`]: the loaded object, its maps and its test runs.
//! - [`choose`]: the laws of the choice among gateways.
//! - [`laws`]: program and model agree; [`examples`]: what happens to a packet, as a table; [`load`]: the kernel takes them.

mod cases;
mod check;
mod choose;
mod examples;
mod laws;
mod load;
mod maps;
mod model;
mod packet;
mod parse;
mod run;

use anyhow::{Context, Result};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

/// Gives this thread a mount namespace with a BPF file system that nobody else sees: the maps are pinned by name.
fn own_bpffs() -> Result<()> {
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).context("unshare: this needs root")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make the mounts private")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).context("mount a BPF file system")
}
