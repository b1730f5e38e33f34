//! What this machine needs before a command runs, and how it gets it.
//!
//! [`plan`] decides, from values; [`ensure()`] looks and acts. Invariant: packages are installed without asking only on
//! what was tried, Debian 12 as root; everywhere else one message names everything that is missing, and nothing is changed.

use std::{
    env, fmt, fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, bail, ensure};

use crate::{
    bpf_tools,
    tools::{self, Tool},
};

mod needs;
#[cfg(test)]
mod tests;

pub use needs::NEEDS;

/// The commands that need something of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum For {
    Demo,
    Test,
    Lab,
    Bench,
    Control,
    Vm,
    Chart,
    Cluster,
    Image,
}

impl fmt::Display for For {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            For::Demo => "demo",
            For::Test => "test",
            For::Lab => "lab",
            For::Bench => "bench",
            For::Control => "bench control",
            For::Vm => "vm",
            For::Chart => "chart",
            For::Cluster => "cluster up",
            For::Image => "image",
        })
    }
}

/// What is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// Effective uid 0.
    Root,
    /// Network and mount namespaces may be made.
    Namespaces,
    /// A program in PATH or an sbin folder.
    Program(&'static str),
    File(&'static str),
    /// A component of the active rustup toolchain, and the program that it brings.
    Component(&'static str, &'static str),
    /// A Go toolchain, or a Python that can fetch one.
    GoOrVenv,
    Go,
    /// What the agent's `build.rs` looks for: a compiler and a linker for the BPF programs.
    BpfCompiler,
    BpfLinker,
    /// The library that our own linker is linked to; where there is a linker it is not needed.
    Llvm,
    Built(&'static Tool),
}

/// One line of [`NEEDS`].
#[derive(Debug)]
pub struct Need {
    pub what: What,
    /// The package that brings it: Debian's, Fedora's, Arch's name. Several stand with a space between.
    pub packages: Option<[&'static str; 3]>,
    pub purpose: &'static str,
    pub by: &'static [For],
}

/// The fields of os-release(5) that we judge by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Os {
    pub id: String,
    pub version_id: String,
    pub id_like: String,
    pub pretty_name: String,
}

impl Os {
    fn parse(os_release: &str) -> Os {
        let field = |name: &str| {
            let value = os_release.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
            value.unwrap_or_default().trim_matches(['"', '\'']).to_owned()
        };
        Os {
            id: field("ID"),
            version_id: field("VERSION_ID"),
            id_like: field("ID_LIKE"),
            pretty_name: field("PRETTY_NAME"),
        }
    }

    fn was_tried(&self) -> bool {
        self.id == "debian" && self.version_id == "12"
    }

    fn is(&self, family: &[&str]) -> bool {
        family.iter().any(|id| self.id == *id || self.id_like.split(' ').any(|like| like == *id))
    }
}

/// What is to be done before the command runs.
#[derive(Debug, PartialEq, Eq)]
pub enum Plan {
    Ready,
    /// These, in this order.
    Install(Vec<Action>),
    /// Nothing is changed; the user is told this.
    Refuse(String),
}

#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    Apt(Vec<&'static str>),
    Rustup(Vec<&'static str>),
    FetchGo,
    Build(&'static Tool),
}

/// Decides from what is missing, who we are and where. Pure.
pub fn plan(command: For, missing: &[&Need], root: bool, os: &Os) -> Plan {
    if missing.is_empty() {
        return Plan::Ready;
    }
    // A package can be had by root on Debian 12; the other three cannot be had by a program at all.
    let beyond_us = |need: &&Need| match need.what {
        What::Root | What::Namespaces => true,
        What::File(_) | What::Program(_) | What::BpfCompiler | What::Llvm | What::GoOrVenv => {
            need.packages.is_none() || !root || !os.was_tried()
        }
        What::Component(..) | What::Go | What::BpfLinker | What::Built(_) => false,
    };
    if missing.iter().any(beyond_us) {
        return Plan::Refuse(message(command, missing, root, os));
    }
    let mut actions = Vec::new();
    let packages = packages(missing, 0);
    if !packages.is_empty() {
        actions.push(Action::Apt(packages));
    }
    let components = components(missing);
    if !components.is_empty() {
        actions.push(Action::Rustup(components));
    }
    actions.extend(missing.iter().filter_map(|need| match need.what {
        What::Go => Some(Action::FetchGo),
        What::BpfLinker => Some(Action::Build(&tools::BPF_LINKER)),
        What::Built(tool) => Some(Action::Build(tool)),
        _ => None,
    }));
    Plan::Install(actions)
}

/// Each once: a package may bring several programs.
fn packages(missing: &[&Need], family: usize) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for package in missing.iter().filter_map(|need| Some(need.packages?[family])).flat_map(str::split_whitespace) {
        if !packages.contains(&package) {
            packages.push(package);
        }
    }
    packages
}

fn components(missing: &[&Need]) -> Vec<&'static str> {
    missing.iter().filter_map(|need| if let What::Component(name, _) = need.what { Some(name) } else { None }).collect()
}

/// Everything that is missing, each with its purpose, and the line to paste.
fn message(command: For, missing: &[&Need], root: bool, os: &Os) -> String {
    let mut text = String::from("missing on this machine:\n");
    for need in missing {
        let ours = if matches!(need.what, What::Go | What::BpfLinker | What::Built(_)) {
            "; xtask gets it itself, into its cache"
        } else {
            ""
        };
        text += &format!("  {:<28} {}{ours}\n", describe(need.what), need.purpose);
    }
    let mut lines = lines_to_paste(missing, root, os);
    let needs_root = missing.iter().any(|need| need.what == What::Root);
    if needs_root {
        lines.push(format!("sudo env \"PATH=$PATH\" \"HOME=$HOME\" cargo xtask {command}"));
    }
    if !lines.is_empty() {
        text += &format!("paste this line:\n  {}\n", lines.join(" && "));
    }
    if needs_root && command == For::Test {
        text += "without root: cargo test -p agent\n";
    }
    if missing.iter().any(|need| need.what == What::Namespaces) {
        text += "making namespaces is forbidden here (a container?): it needs CAP_SYS_ADMIN and CAP_NET_ADMIN\n";
    }
    if !os.was_tried() {
        let name = if os.pretty_name.is_empty() { "this system" } else { &os.pretty_name };
        text += &format!("only Debian 12 was tried, {name} was not\n");
    }
    text
}

fn describe(what: What) -> String {
    match what {
        What::Root => "root".to_owned(),
        What::Namespaces => "namespaces".to_owned(),
        What::Program(name) | What::File(name) => name.to_owned(),
        What::Component(name, _) => format!("rustup component {name}"),
        What::GoOrVenv => "go >= 1.26, or python3 venv".to_owned(),
        What::BpfCompiler => "rustc with rust-src".to_owned(),
        What::BpfLinker => tools::BPF_LINKER.name().to_owned(),
        What::Llvm => "LLVM 22".to_owned(),
        What::Go => "go >= 1.26".to_owned(),
        What::Built(tool) => tool.name().to_owned(),
    }
}

fn lines_to_paste(missing: &[&Need], root: bool, os: &Os) -> Vec<String> {
    let sudo = if root { "" } else { "sudo " };
    let managers: [(&[&str], &str); 3] = [
        (&["debian", "ubuntu"], "apt-get install -y --no-install-recommends"),
        (&["fedora", "rhel", "centos"], "dnf install -y"),
        (&["arch"], "pacman -S --needed"),
    ];
    let mut lines = Vec::new();
    if missing.iter().any(|need| need.what == What::File("/dev/net/tun")) {
        lines.push(format!("{sudo}modprobe tun"));
    }
    // An unknown distribution is told Debian's names, which are also the most usual ones.
    let family = managers.iter().position(|(ids, _)| os.is(ids)).unwrap_or(0);
    let packages = packages(missing, family);
    if !packages.is_empty() {
        if family == 0 {
            lines.push(format!("{sudo}apt-get update"));
        }
        lines.push(format!("{sudo}{} {}", managers[family].1, packages.join(" ")));
    }
    let components = components(missing);
    if !components.is_empty() {
        lines.push(format!("rustup component add {}", components.join(" ")));
    }
    lines
}

/// Makes sure that `command` finds what it needs. With `install` false nothing is changed.
///
/// An error says everything that is missing and how to get it.
pub fn ensure(command: For, install: bool) -> anyhow::Result<()> {
    let os = Os::parse(&fs::read_to_string("/etc/os-release").unwrap_or_default());
    let missing = missing_for(command);
    let root = is_there(What::Root);
    match plan(command, &missing, root, &os) {
        Plan::Ready => Ok(()),
        Plan::Refuse(message) => bail!("{}", message.trim_end()),
        Plan::Install(_) if !install => bail!("{}", message(command, &missing, root, &os).trim_end()),
        Plan::Install(actions) => {
            actions.iter().try_for_each(perform)?;
            let still: Vec<_> = missing_for(command).iter().map(|need| describe(need.what)).collect();
            ensure!(still.is_empty(), "installed, and yet not to be found: {}", still.join(", "));
            Ok(())
        }
    }
}

fn missing_for(command: For) -> Vec<&'static Need> {
    NEEDS.iter().filter(|need| need.by.contains(&command) && !is_there(need.what)).collect()
}

fn perform(action: &Action) -> anyhow::Result<()> {
    match action {
        Action::Apt(packages) => {
            let apt = || {
                let mut command = Command::new("apt-get");
                command.env("DEBIAN_FRONTEND", "noninteractive");
                command
            };
            tools::install("apt-get update", apt().arg("update"))?;
            let name = format!("apt-get install {}", packages.join(" "));
            tools::install(&name, apt().args(["install", "-y", "--no-install-recommends"]).args(packages))
        }
        Action::Rustup(components) => {
            let name = format!("rustup component add {}", components.join(" "));
            tools::install(&name, Command::new("rustup").args(["component", "add"]).args(components))
        }
        Action::FetchGo => tools::install_go(),
        Action::Build(tool) => tool.build(),
    }
    .context("cannot set up this machine")
}

fn is_there(what: What) -> bool {
    match what {
        What::Root => nix::unistd::geteuid().is_root(),
        // A user may make none, and is told so by the line about root.
        What::Namespaces => {
            !nix::unistd::geteuid().is_root() || succeeds(Command::new("unshare").args(["--net", "--mount", "true"]))
        }
        What::Program(name) => find_program(name),
        // rustup leaves a stand-in for each program in PATH, also where the component is not installed.
        What::Component(_, program) => succeeds(Command::new(program).arg("--version")),
        What::File(path) => Path::new(path).exists(),
        What::GoOrVenv => tools::go().is_some() || succeeds(Command::new("python3").args(["-c", "import ensurepip"])),
        What::Go => tools::go().is_some(),
        What::BpfCompiler => bpf_tools::compiler().is_ok(),
        What::BpfLinker => bpf_tools::linker().is_ok(),
        What::Llvm => bpf_tools::linker().is_ok() || Path::new(tools::LLVM).exists(),
        What::Built(tool) => tool.is_built(),
    }
}

fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

fn find_program(name: &str) -> bool {
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|folder| folder.join(name).is_file())
}
