//! The first process of a machine: makes its root, brings its uplink up, starts its daemons, and reaps what they leave.
//!
//! Invariant: it ends only by SIGKILL, and with it everything in the machine: the kernel kills a PID namespace with its
//! first process. What it has to say is in `init.log` of the machine's folder.

use std::{
    collections::VecDeque,
    fs::{self, File},
    io::Write,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::{
    errno::Errno,
    sys::{
        signal::{Signal, kill},
        wait::{WaitPidFlag, WaitStatus, waitpid},
    },
    unistd::Pid,
};

use super::{
    cgroup, daemons, root,
    spec::{Program, Spec, Step},
};

/// How often it looks around.
const POLL: Duration = Duration::from_millis(50);
/// How long a daemon that has ended stays down, and a step that has failed.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the uplink may take to be plugged in.
const UPLINK_LIMIT: Duration = Duration::from_secs(30);
/// A daemon is down while a file of its name is in this folder of the machine's.
pub const STOPPED: &str = "stopped";

/// Runs a machine. The caller is the first process of its namespaces, but still at home in the old root and groups.
pub fn run(path: &Path) -> Result<bool> {
    let text = fs::read(path).with_context(|| path.display().to_string())?;
    let spec: Spec = serde_json::from_slice(&text).with_context(|| path.display().to_string())?;
    cgroup::enter(&spec.cgroups, &spec.name)?;
    root::enter(&spec)?;
    uplink(&spec)?;
    eprintln!("{} is up", spec.name);
    let mut machine =
        Machine { stopped: spec.dir.join(STOPPED), steps: spec.steps.into(), attempt: None, daemons: Vec::new() };
    loop {
        machine.turn()?;
        sleep(POLL);
    }
}

/// Waits until `eth0` is plugged in, and sets it up.
fn uplink(spec: &Spec) -> Result<()> {
    let started = Instant::now();
    while !Path::new("/sys/class/net/eth0").exists() {
        ensure!(started.elapsed() < UPLINK_LIMIT, "eth0 was not plugged in");
        sleep(Duration::from_millis(10));
    }
    for (name, value) in &spec.sysctls {
        let path = Path::new("/proc/sys").join(name);
        fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display()))?;
    }
    let mut ip = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).spawn().context("ip")?;
    ip.stdin.take().context("ip has no input")?.write_all(spec.links.as_bytes()).context("ip")?;
    ensure!(ip.wait().context("ip")?.success(), "ip failed:\n{}", spec.links);
    Ok(())
}

struct Machine {
    stopped: PathBuf,
    /// What is left to do, the next first.
    steps: VecDeque<Step>,
    /// The run of the next step, if that is [`Step::Until`].
    attempt: Option<State>,
    daemons: Vec<Daemon>,
}

struct Daemon {
    name: String,
    program: Program,
    state: State,
}

/// Of a process that is to run.
#[derive(Clone, Copy)]
enum State {
    Runs(Pid),
    /// Is started then.
    Down(Instant),
}

impl Machine {
    fn turn(&mut self) -> Result<()> {
        self.reap()?;
        for daemon in &mut self.daemons {
            daemon.turn(self.stopped.join(&daemon.name).exists())?;
        }
        self.step()
    }

    /// Learns which processes have ended. Most are none of ours: orphans come to the first process.
    fn reap(&mut self) -> Result<()> {
        loop {
            let (pid, success, status) = match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid, code == 0, format!("status {code}")),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, false, signal.to_string()),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(()),
                Ok(_) => continue,
                Err(error) => return Err(error).context("waitpid"),
            };
            self.ended(pid, success, &status);
        }
    }

    fn ended(&mut self, pid: Pid, success: bool, status: &str) {
        let again = State::Down(Instant::now() + PAUSE);
        for daemon in self.daemons.iter_mut().filter(|daemon| daemon.state.is(pid)) {
            eprintln!("{} ended: {status}", daemon.name);
            daemon.state = again;
        }
        if self.attempt.is_some_and(|attempt| attempt.is(pid)) {
            self.attempt = (!success).then_some(again);
            if success {
                self.steps.pop_front();
            }
        }
    }

    /// Takes the next steps, as far as they go at once.
    fn step(&mut self) -> Result<()> {
        while let Some(step) = self.steps.front() {
            match step {
                Step::Daemon { name, program } | Step::Idle { name, program } => {
                    let state = State::Down(Instant::now());
                    let mut daemon = Daemon { name: name.clone(), program: program.clone(), state };
                    daemon.turn(self.stopped.join(name).exists())?;
                    self.daemons.push(daemon);
                }
                Step::Until(program) => {
                    let attempt = self.attempt.get_or_insert(State::Down(Instant::now()));
                    if attempt.is_due() {
                        *attempt = State::Runs(start(program, "steps")?);
                    }
                    return Ok(());
                }
                Step::FlannelRange => {
                    // It is not there, or not whole, until flanneld has spoken to the API server.
                    let written = fs::read_to_string(daemons::FLANNEL_RANGE).unwrap_or_default();
                    let Some(conflist) = daemons::flannel_conflist(&written) else { return Ok(()) };
                    fs::write(daemons::CONFLIST, conflist).context(daemons::CONFLIST)?;
                }
            }
            self.steps.pop_front();
        }
        Ok(())
    }
}

impl Daemon {
    /// Starts it when that is due; kills it if it is to be down.
    fn turn(&mut self, stopped: bool) -> Result<()> {
        match self.state {
            State::Runs(pid) if stopped => {
                // It may have ended just now: then it is reaped next.
                kill(pid, Signal::SIGKILL).ok();
            }
            State::Down(_) if !stopped && self.state.is_due() => {
                self.state = State::Runs(start(&self.program, &self.name)?);
            }
            _ => {}
        }
        Ok(())
    }
}

impl State {
    fn is(self, pid: Pid) -> bool {
        matches!(self, State::Runs(runs) if runs == pid)
    }

    fn is_due(self) -> bool {
        matches!(self, State::Down(until) if Instant::now() >= until)
    }
}

/// Starts a program whose output goes to that log. It is reaped by [`Machine::reap`].
#[allow(clippy::zombie_processes)]
fn start(program: &Program, log: &str) -> Result<Pid> {
    let path = Path::new("/var/log").join(format!("{log}.log"));
    let out = File::options().create(true).append(true).open(&path).with_context(|| path.display().to_string())?;
    let err = out.try_clone().context("a second handle of a log")?;
    let mut command = Command::new(&program.path);
    command.args(&program.arguments).envs(program.environment.iter().cloned());
    command.stdin(Stdio::null()).stdout(out).stderr(err).process_group(0);
    let child = command.spawn().with_context(|| format!("run {}", program.path.display()))?;
    Ok(Pid::from_raw(child.id().cast_signed()))
}
