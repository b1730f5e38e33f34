//! `cargo xtask vm`: this tree on the kernels that it must run on, in QEMU guests.
//!
//! A guest is Debian's kernel and an initial RAM disk ([`image`]) that holds busybox, two modules and the built tests: nothing
//! of this machine but its processor. Invariant: only a guest that says that its job succeeded counts as one.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use clap::{Subcommand, ValueEnum};

use crate::{
    elf::{self, Arch},
    process, tools, workspace,
};

mod image;
mod kernel;

use image::Image;
use kernel::Kernel;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Loads and attaches the BPF programs there, and compares them with their model.
    Load {
        #[arg(value_enum, required = true)]
        kernels: Vec<Version>,
        /// Generated packets for all programs together.
        #[arg(long, default_value_t = 5_000)]
        cases: u32,
    },
}

/// A series of Debian's cloud kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Version {
    /// Debian 12's: WireGuard, no tcx.
    #[value(name = "6.1")]
    V6_1,
    /// Debian 12's backport: WireGuard and tcx.
    #[value(name = "6.12")]
    V6_12,
}

/// The line by which a guest says that its job succeeded.
const DONE: &str = "carrick-guest: done";
/// Seconds after which a guest hangs.
const AT_MOST: &str = "600";
/// For clsact; tcx needs none.
const MODULES: [&str; 2] = ["net/sched/sch_ingress.ko", "net/sched/cls_bpf.ko"];

/// True if every kernel took every program.
pub fn run(args: &Args) -> Result<bool> {
    let Action::Load { kernels, cases } = &args.command;
    let ended = load_on(kernels, *cases)?;
    println!("{}", ended.output);
    Ok(ended.success)
}

/// Loads the programs on each kernel and tries them with so many packets. A success if every kernel took every program.
pub fn load_on(kernels: &[Version], cases: u32) -> Result<process::Ended> {
    let tests = build_tests()?;
    let mut all = process::Ended { success: true, output: String::new() };
    for version in kernels {
        let kernel = Kernel::fetch(*version)?;
        let output = load(&kernel, &tests, cases)?;
        all.success &= output.lines().any(|line| line.trim() == DONE);
        all.output += &format!("Linux {}\n{}", kernel.release, said(&output));
    }
    Ok(all)
}

/// Builds the tests as `cargo xtask test` does, and says where they lie.
fn build_tests() -> Result<PathBuf> {
    let build = ["test", "--release", "--locked", "--package", "tests", "--test", "it", "--no-run"];
    let ended = process::run("build the tests", workspace::cargo().args(build))?;
    ensure!(ended.success, "{}\nthe tests do not build", ended.output);
    // `  Executable tests/it/main.rs (target/release/deps/it-0123456789abcdef)`
    let line = ended.output.lines().rev().find(|line| line.trim_start().starts_with("Executable "));
    let path = line.and_then(|line| line.rsplit_once('(')?.1.strip_suffix(')'));
    Ok(workspace::root().join(path.with_context(|| format!("{}\ncargo names no executable", ended.output))?))
}

/// Runs the job; what the guest wrote.
fn load(kernel: &Kernel, tests: &Path, cases: u32) -> Result<String> {
    let disk = tools::cache_dir()?.join(format!("vm/load-{}.cpio", kernel.release));
    fs::write(&disk, load_image(kernel, tests, cases)?).with_context(|| format!("write {}", disk.display()))?;
    let mut command = Command::new("timeout");
    // Emulated: a machine that is a guest itself may offer a KVM that does not work.
    command.args([AT_MOST, "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max"]);
    command.args(["-m", "2048", "-smp", "2", "-nographic", "-no-reboot", "-nic", "none", "-kernel"]);
    command.arg(&kernel.image).arg("-initrd").arg(&disk);
    command.args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1 rdinit=/init"]);
    let ended = process::run(&format!("guest with Linux {}", kernel.release), &mut command)?;
    if !ended.success {
        bail!("{}\nthe guest did not end by itself within {AT_MOST} s", ended.output);
    }
    Ok(ended.output)
}

fn load_image(kernel: &Kernel, tests: &Path, cases: u32) -> Result<Vec<u8>> {
    let mut image = Image::default();
    for folder in ["proc", "sys", "dev", "tmp", "root"] {
        image.folder(folder);
    }
    image.program("/bin/busybox", Path::new("/bin/busybox"))?;
    image.program("/it", tests)?;
    let program = fs::read(tests).with_context(|| format!("read {}", tests.display()))?;
    for (path, library) in elf::loaded_by(&program, Arch::HOST, Path::new("/"))? {
        image.file(&path.to_string_lossy(), 0o755, &library);
    }
    let mut script = String::from(INIT);
    for module in MODULES {
        let name = format!("/{}", module.rsplit('/').next().unwrap_or(module));
        image.file(&name, 0o644, &kernel.module(module)?);
        script += &format!("insmod {name} || exit\n");
    }
    let job = format!("CARRICK_BPF_CASES={cases} /it --nocapture --test-threads=2 bpf::");
    script += &format!("{job} && echo '{DONE}'\n");
    image.file("/init", 0o755, script.as_bytes());
    Ok(image.into_bytes())
}

/// The guest's first process. It powers the guest off, however it ends.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox --install /bin
export PATH=/bin
trap 'echo o > /proc/sysrq-trigger; sleep 60' EXIT
mount -t proc proc /proc && mount -t sysfs sys /sys && mount -t devtmpfs dev /dev && mount -t tmpfs tmp /tmp || exit
mount -t bpf bpf /sys/fs/bpf || exit
ip link set lo up
echo \"carrick-guest: Linux $(uname -r)\"
";

/// What the guest said, without what its firmware and kernel said before.
fn said(output: &str) -> &str {
    output.find("carrick-guest:").map_or(output, |at| &output[at..])
}
