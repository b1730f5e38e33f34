//! One machine of the lab: a network namespace, and for a node a mount namespace, held by a sleeping process.
//!
//! A thread enters the namespaces, and what it starts is born there: no code runs between fork and exec.

use std::{
    convert::Infallible,
    fs::{self, File},
    io::Write,
    ops::Deref,
    os::unix::{
        fs::DirBuilderExt,
        process::{CommandExt, ExitStatusExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    guard::{self, Guard, HostRecord, MARK},
    wait_for,
};

/// How long a command that should be short (`ip`, `nft`, `carrick status`) may take: then `timeout` ends it with status 124.
const COMMAND_LIMIT_SECONDS: &str = "30";

/// How long the kernel may take to end a process after SIGKILL.
/// A drain may take 30 s, and closing an inotify instance waits for the kernel: seconds on a busy machine.
const END_LIMIT: Duration = Duration::from_secs(60);

/// A network namespace that traffic runs in: a host's, or that of a pod of a real cluster. Lives on with this value.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    net: File,
}

impl Namespace {
    /// That of a process, by its folder below `/proc`. `name`: what errors call it.
    pub fn of_process(name: &str, process: &Path) -> Result<Namespace> {
        let path = process.join("ns/net");
        let net = File::open(&path).with_context(|| format!("{name}: {}", path.display()))?;
        Ok(Namespace { name: name.to_owned(), net })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs a closure in it. A socket opened there stays there, on whatever thread it is used.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_thread(|| {
            setns(&self.net, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        })
        .with_context(|| self.name.clone())
    }
}

/// A [`Namespace`] and what else a machine has.
#[derive(Debug)]
pub struct Host {
    guard: Arc<Guard>,
    holder: Child,
    net: Namespace,
    /// Only of a node: it has its own /run, /sys, bpffs, hosts file and resolver configuration.
    mnt: Option<File>,
}

impl Host {
    /// A network namespace with the loopback up.
    pub fn network(guard: &Arc<Guard>, name: &str) -> Result<Host> {
        Host::new(guard, name, CloneFlags::CLONE_NEWNET)
    }

    /// A network and mount namespace: what a node is.
    pub fn machine(guard: &Arc<Guard>, name: &str) -> Result<Host> {
        Host::new(guard, name, CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
    }

    fn new(guard: &Arc<Guard>, name: &str, namespaces: CloneFlags) -> Result<Host> {
        let dir = guard.dir().join(name);
        fs::DirBuilder::new().mode(0o700).create(&dir).with_context(|| format!("mkdir {}", dir.display()))?;
        let mounts = namespaces.contains(CloneFlags::CLONE_NEWNS);
        let holder = on_thread(|| {
            unshare(namespaces).context("unshare")?;
            if mounts {
                own_mounts(guard.dir(), &dir)?;
            }
            let nothing = || Stdio::null();
            guard.spawn(Command::new("sleep").arg("infinity").stdin(nothing()).stdout(nothing()).stderr(nothing()))
        })
        .with_context(|| format!("make host {name}"))?;

        let process = PathBuf::from(format!("/proc/{}", holder.id()));
        let net = Namespace::of_process(name, &process)?;
        let mnt = process.join("ns/mnt");
        let mnt = if mounts { Some(File::open(&mnt).with_context(|| mnt.display().to_string())?) } else { None };
        let host = Host { guard: guard.clone(), holder, net, mnt };
        host.ip("link set lo up")?;
        // Addresses are usable at once, and anyone may ping.
        host.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        host.sysctl("net/ipv4/ping_group_range", "0 2147483647")?;
        Ok(host)
    }

    /// A process that lives in the host's namespaces as long as the lab does.
    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// The host's own files: its logs, keys, hosts file. The same path inside and outside.
    pub fn dir(&self) -> PathBuf {
        self.guard.dir().join(self.name())
    }

    /// Runs a closure in all namespaces of the host.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        self.run(|| {
            if let Some(mnt) = &self.mnt {
                // A thread may leave the mount namespace of the others only with its own root and working directory.
                unshare(CloneFlags::CLONE_FS).context("unshare")?;
                setns(mnt, CloneFlags::CLONE_NEWNS).context("enter the mount namespace")?;
            }
            work()
        })
    }

    /// Runs a program to its end and returns its standard output. Fails, with what it said, if it fails.
    pub fn output(&self, program: impl AsRef<Path>, arguments: &[&str]) -> Result<String> {
        self.pipe(program.as_ref(), arguments, "")
    }

    /// Several `ip` commands, one a line, in one process.
    pub fn ip(&self, commands: &str) -> Result<()> {
        self.pipe(Path::new("ip"), &["-batch", "-"], commands).map(drop)
    }

    /// Several `bridge` commands, one a line, in one process.
    pub fn bridge(&self, commands: &str) -> Result<()> {
        self.pipe(Path::new("bridge"), &["-batch", "-"], commands).map(drop)
    }

    /// Applies a ruleset in one transaction.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        self.pipe(Path::new("nft"), &["-f", "-"], ruleset).map(drop)
    }

    /// Sets a network sysctl, as in `net/ipv4/ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<()> {
        let path = Path::new("/proc/sys").join(name);
        self.run(|| fs::write(&path, value).with_context(|| format!("write {value} to {}", path.display())))
    }

    /// Sets reverse path filtering of all interfaces, and of those to come: 0 off, 1 strict, 2 loose.
    pub fn set_rp_filter(&self, mode: u8) -> Result<()> {
        self.run(|| {
            for entry in fs::read_dir("/proc/sys/net/ipv4/conf").context("read the sysctls")? {
                let path = entry?.path().join("rp_filter");
                fs::write(&path, mode.to_string()).with_context(|| format!("write {mode} to {}", path.display()))?;
            }
            Ok(())
        })
    }

    /// Forwards packets of both families.
    pub fn forward(&self) -> Result<()> {
        self.sysctl("net/ipv4/ip_forward", "1")?;
        self.sysctl("net/ipv6/conf/all/forwarding", "1")
    }

    /// What names this node resolves, as lines of a hosts file; it has no other resolver.
    pub fn set_hosts(&self, lines: &str) -> Result<()> {
        let path = self.dir().join("hosts");
        fs::write(&path, format!("127.0.0.1 localhost\n::1 localhost\n{lines}\n"))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Starts a program whose output goes to `NAME.log` in [`Host::dir`]; a second start appends.
    pub fn spawn(&self, name: &str, program: impl AsRef<Path>, arguments: &[&str]) -> Result<Process> {
        let log = self.dir().join(format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log).with_context(|| log.display().to_string())?;
        let stderr = file.try_clone()?;
        let mut command = Command::new(program.as_ref());
        command.args(arguments).stdin(Stdio::null()).stdout(file).stderr(stderr);
        let child = self.inside(|| self.guard.spawn(&mut command))?;
        Ok(Process { name: format!("{} {name}", self.name()), log, child: Some(child) })
    }

    /// The same, with something on its standard input.
    pub fn pipe(&self, program: &Path, arguments: &[&str], input: &str) -> Result<String> {
        let mut command = Command::new("timeout");
        command.arg(COMMAND_LIMIT_SECONDS).arg(program).args(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.inside(|| self.guard.spawn(&mut command))?;
        let mut stdin = child.stdin.take();
        let (fed, output) = thread::scope(|scope| {
            let fed = scope.spawn(move || stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(input.as_bytes())));
            let output = child.wait_with_output();
            (join(fed), output)
        });
        let output = output.context("wait")?;
        let shown = || format!("{}: {} {}", self.name(), program.display(), arguments.join(" "));
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{}: {}\n{}{}", shown(), output.status, said.trim_end(), numbered(input));
        fed.with_context(shown)?;
        String::from_utf8(output.stdout).with_context(shown)
    }
}

impl Deref for Host {
    type Target = Namespace;

    fn deref(&self) -> &Namespace {
        &self.net
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Its namespaces, and with them its links, live on only as long as another process of the lab is in them.
        // SIGKILL to our own unreaped child cannot miss; a kept lab's hosts are forgotten, not dropped.
        drop(self.holder.kill());
        drop(self.holder.wait());
    }
}

/// A program that runs in a host, until it is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    log: PathBuf,
    /// `None` once it was reaped.
    child: Option<Child>,
}

impl Process {
    /// `None` once it has ended and was waited for.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Everything it has said so far.
    pub fn log(&self) -> Result<String> {
        fs::read_to_string(&self.log).with_context(|| self.log.display().to_string())
    }

    /// Fails, with the end of its log, if it does not run.
    pub fn check_running(&mut self) -> Result<()> {
        let Some(child) = &mut self.child else { return Err(anyhow!("{} has ended", self.name)) };
        match child.try_wait()? {
            None => Ok(()),
            Some(status) => Err(anyhow!("{} ended with {status}\n{}", self.name, tail(&self.log, 20))),
        }
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)?;
        self.wait().map(drop)
    }

    /// SIGTERM, and waits until it is gone; fails if it does not end by itself with success.
    pub fn terminate(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let status = self.wait()?;
        let ended = status.success() || status.signal() == Some(Signal::SIGTERM as i32);
        ensure!(ended, "{} ended with {status}\n{}", self.name, tail(&self.log, 20));
        Ok(())
    }

    /// Sends a signal. Fails if it was reaped already.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = self.pid().with_context(|| format!("{} has ended", self.name))?;
        kill(Pid::from_raw(pid.cast_signed()), signal).with_context(|| format!("{signal} to {}", self.name))
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let child = self.child.as_mut().with_context(|| format!("{} has ended", self.name))?;
        let status = reap(child).with_context(|| self.name.clone())?;
        self.child = None;
        Ok(status)
    }

    /// Lets it run on after this value is gone: it still ends with the lab.
    pub fn detach(mut self) {
        self.child = None;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // SIGKILL to our own unreaped child cannot miss.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Turns this process into `command`, inside a host of a lab that somebody else made. Returns only if that fails.
pub fn enter(host: &HostRecord, lab: &str, command: &mut Command) -> Result<Infallible> {
    ensure!(
        guard::processes(lab)?.contains(&host.pid),
        "{} of lab {lab} has ended: cargo xtask lab down {lab}",
        host.name
    );
    let namespace = |kind: &str| {
        let path = format!("/proc/{}/ns/{kind}", host.pid);
        File::open(&path).context(path)
    };
    let (net, mnt) = (namespace("net")?, namespace("mnt")?);
    setns(net, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
    unshare(CloneFlags::CLONE_FS).context("unshare")?;
    setns(mnt, CloneFlags::CLONE_NEWNS).context("enter the mount namespace")?;
    Err(command.env(MARK, lab).exec()).with_context(|| format!("{command:?}"))
}

/// The last lines of a file, or why there are none.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = match fs::read(path) {
        Ok(text) => String::from_utf8_lossy(&text).into_owned(),
        Err(error) => return format!("{}: {error}", path.display()),
    };
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Runs a closure on a thread of its own, which it may move into other namespaces.
fn on_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| join(scope.spawn(work)))
}

fn join<T>(thread: thread::ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn reap(child: &mut Child) -> Result<ExitStatus> {
    wait_for("the end of a process", END_LIMIT, || match child.try_wait() {
        Ok(Some(status)) => Ok(Ok(status)),
        Ok(None) => Err("it still runs".to_owned()),
        Err(error) => Ok(Err(error)),
    })?
    .context("wait")
}

/// What was piped in, with line numbers, as `ip -batch` and `nft` report errors.
fn numbered(input: &str) -> String {
    input.lines().enumerate().map(|(i, line)| format!("\n{:4}  {line}", i + 1)).collect()
}

/// Gives the mount namespace that this thread has just made its own /run, /sys, bpffs, hosts file and resolver.
fn own_mounts(lab: &Path, host: &Path) -> Result<()> {
    let none = None::<&str>;
    let say = |what: &str| format!("mount {what}");
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).with_context(|| say("/ private"))?;

    // The lab's directory lies below /run: it is carried over to the new one.
    let held = Path::new("/mnt");
    let tmpfs = Some("mode=0755");
    mount(Some("run"), held, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, tmpfs)
        .with_context(|| say("/run"))?;
    let inside = held.join(lab.strip_prefix("/run").context("the lab's directory is not in /run")?);
    fs::create_dir_all(&inside).with_context(|| format!("mkdir {}", inside.display()))?;
    mount(Some(lab), &inside, none, MsFlags::MS_BIND, none).with_context(|| say("the lab's directory"))?;
    mount(Some(held), "/run", none, MsFlags::MS_MOVE, none).with_context(|| say("/run"))?;

    // A new sysfs shows the devices of this network namespace.
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), none).with_context(|| say("/sys"))?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).with_context(|| say("/sys/fs/bpf"))?;

    own_file(&host.join("hosts"), Path::new("/etc/hosts"), "127.0.0.1 localhost\n::1 localhost\n")?;
    // Nothing listens there: an unknown name fails at once.
    own_file(&host.join("resolv.conf"), Path::new("/etc/resolv.conf"), "nameserver 127.0.0.1\noptions attempts:1\n")
}

/// Puts `file`, with `text` in it, in the place of `target`, which may be a link into the new and empty /run.
fn own_file(file: &Path, target: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    let target = match fs::read_link(target) {
        Ok(link) => Path::new("/etc").join(link),
        Err(_) => target.to_owned(),
    };
    if !target.exists() {
        fs::create_dir_all(target.parent().context("no parent")?)?;
        fs::write(&target, "").with_context(|| format!("write {}", target.display()))?;
    }
    mount(Some(file), &target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("mount {}", target.display()))
}
