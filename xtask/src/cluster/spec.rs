//! What the first process of a machine is told: a value, written as JSON beside the machine's files.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::cgroup::Hierarchy;

/// One machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Also its host name.
    pub name: String,
    /// Its own files outside: its disk ([`DISKS`]), certificates, logs.
    pub dir: PathBuf,
    pub cgroups: Vec<Hierarchy>,
    /// Folders of outside that it sees, at the same paths.
    pub shared: Vec<PathBuf>,
    /// Settings below `/proc/sys`.
    pub sysctls: Vec<(String, String)>,
    /// What gives its uplink addresses and routes: `ip` commands, one a line.
    pub links: String,
    /// Files of its root, which is made anew at each boot.
    pub files: Vec<(PathBuf, String)>,
    /// What it does, one after the other.
    pub steps: Vec<Step>,
}

/// What survives a boot: folders of [`Spec::dir`], and where the machine sees them. On a real file system: containerd
/// cannot stack an overlay on an overlay.
pub const DISKS: &[(&str, &str)] = &[
    ("containerd", "/var/lib/containerd"),
    ("kubelet", "/var/lib/kubelet"),
    ("store", "/var/lib/store"),
    ("log", "/var/log"),
];

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// Starts it, and goes on. When it ends it is started again.
    Daemon { name: String, program: Program },
    /// A daemon that is down until somebody starts it.
    Idle { name: String, program: Program },
    /// Goes on when it has succeeded; runs it again until then.
    Until(Program),
    /// Goes on when flanneld has said which range is this node's, and tells the network plugin.
    FlannelRange,
}

/// A program and its arguments.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    pub path: PathBuf,
    pub arguments: Vec<String>,
    pub environment: Vec<(String, String)>,
}

impl Program {
    /// Arguments with white space between them.
    pub fn new(path: impl Into<PathBuf>, arguments: &str) -> Program {
        let arguments = arguments.split_whitespace().map(str::to_owned).collect();
        Program { path: path.into(), arguments, environment: Vec::new() }
    }
}
