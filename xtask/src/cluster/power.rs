//! Switches machines on and off.
//!
//! A machine is a process in namespaces of its own, network included, and everything that this process starts. Invariant:
//! a machine that is switched off leaves its disk, and nothing else: as after a power cut.

use std::{
    fs::{self, File},
    os::unix::process::CommandExt,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

use ::lab::{guard, wait_for};
use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};

use super::{
    NAME, cgroup,
    cgroup::Hierarchy,
    init,
    record::{Machine, output},
    spec::{Spec, Step},
};

/// How long the kernel may take to end a machine.
const END_LIMIT: Duration = Duration::from_secs(60);
const SPEC: &str = "spec.json";

/// Writes down what the machine does when it is switched on.
pub fn describe(spec: &Spec) -> Result<()> {
    let stopped = spec.dir.join(init::STOPPED);
    fs::create_dir_all(&stopped).with_context(|| format!("make {}", stopped.display()))?;
    for step in &spec.steps {
        if let Step::Idle { name, .. } = step {
            let path = stopped.join(name);
            fs::write(&path, "").with_context(|| format!("write {}", path.display()))?;
        }
    }
    let path = spec.dir.join(SPEC);
    fs::write(&path, serde_json::to_vec_pretty(spec)?).with_context(|| format!("write {}", path.display()))
}

/// Switches a machine on and plugs it in. `start` starts its first process.
pub fn on(machine: &mut Machine, switch: u32, start: impl FnOnce(&mut Command) -> Result<Child> + Send) -> Result<()> {
    ensure!(machine.pid.is_none(), "{} is on", machine.name);
    let log = machine.log("init");
    let out = File::options().create(true).append(true).open(&log).with_context(|| log.display().to_string())?;
    let mut command = Command::new(std::env::current_exe().context("our own program")?);
    command.args(["cluster", "init"]).arg(machine.dir.join(SPEC)).current_dir("/");
    command.stdin(Stdio::null()).stdout(out.try_clone().context("a second handle of a log")?).stderr(out);
    let child = in_new_namespaces(|| start(&mut command)).with_context(|| format!("start {}", machine.name))?;
    machine.pid = Some(child.id());
    let Machine { name, bridge, .. } = machine;
    let cable =
        format!("link add {name} type veth peer name eth0 netns {}\nlink set {name} master {bridge} up", child.id());
    ip(switch, &cable)
}

/// [`on`], when the clusters are kept and nobody guards them.
pub fn on_again(machine: &mut Machine, switch: u32) -> Result<()> {
    ensure!(guard::processes(NAME)?.contains(&switch), "the clusters have ended: cargo xtask cluster down");
    on(machine, switch, |command| command.env(guard::MARK, NAME).process_group(0).spawn().context("spawn"))
}

/// What the closure starts is the first process of these namespaces.
fn in_new_namespaces<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let all = CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            unshare(all).context("unshare")?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Pulls a machine's plug: when this returns, its processes, links and control groups are gone.
pub fn off(machine: &mut Machine, switch: u32, cgroups: &[Hierarchy]) -> Result<()> {
    let pid = machine.pid.with_context(|| format!("{} is off", machine.name))?;
    ensure!(
        guard::processes(NAME)?.contains(&pid),
        "{} has ended by itself: see {}",
        machine.name,
        machine.log("init").display()
    );
    let first = Pid::from_raw(pid.cast_signed());
    kill(first, Signal::SIGKILL).with_context(|| format!("kill {pid}"))?;
    // Whoever has started it reaps it; that may be us.
    match waitpid(first, None) {
        Ok(_) | Err(Errno::ECHILD) => {}
        Err(error) => return Err(error).with_context(|| format!("wait for {pid}")),
    }
    machine.pid = None;
    wait_for(&format!("the end of {}", machine.name), END_LIMIT, || {
        let gone = !Path::new("/proc").join(pid.to_string()).exists();
        // Its end of the cable goes with its network namespace, which the kernel takes down in its own time.
        let unplugged = ip(switch, &format!("link show {}", machine.name)).is_err();
        if gone && unplugged { Ok(()) } else { Err(format!("process gone: {gone}, unplugged: {unplugged}")) }
    })?;
    // The next kubelet would wait long for groups that a former one has left.
    cgroup::clear(cgroups, &machine.name)
}

/// `ip` commands, one a line, in the network namespace of that process.
pub fn ip(pid: u32, commands: &str) -> Result<()> {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/proc/{pid}/ns/net")).args(["--", "ip", "-batch", "-"]);
    output(&mut command, commands).with_context(|| format!("ip:\n{commands}")).map(drop)
}
