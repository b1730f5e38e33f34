//! Builds the `carrick` of the image: static, and the same bytes from the same tree wherever that lies.
//!
//! Invariant: no path of this machine reaches the compiler's output; each is mapped to a name that all builds share.

use std::{
    collections::BTreeMap,
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use crate::{oci::Arch, process, workspace};

/// What the image says of its origin.
#[derive(Debug)]
pub struct Package {
    pub version: String,
    pub license: String,
    pub repository: Option<String>,
    /// The commit, where the tree is exactly it.
    pub revision: Option<String>,
}

impl Package {
    /// From the agent's manifest, and from git.
    pub fn read() -> Result<Package> {
        let output = stdout(workspace::cargo().args(["metadata", "--no-deps", "--locked", "--format-version", "1"]))?;
        let metadata: serde_json::Value = serde_json::from_str(&output).context("cargo metadata")?;
        let agent = metadata["packages"].as_array().into_iter().flatten().find(|package| package["name"] == "agent");
        let agent = agent.context("cargo metadata names no package agent")?;
        let text = |field: &str| agent[field].as_str().map(str::to_owned);
        let git = |args: &[&str]| stdout(Command::new("git").args(args).current_dir(workspace::root()));
        // Without git, or outside of a clone, there is no commit to name.
        let clean = git(&["status", "--porcelain"]).is_ok_and(|changes| changes.trim().is_empty());
        let revision = clean.then(|| git(&["rev-parse", "HEAD"]).ok()).flatten();
        Ok(Package {
            version: text("version").context("the agent has no version")?,
            license: text("license").context("the agent has no licence")?,
            repository: text("repository"),
            revision: revision.map(|revision| revision.trim().to_owned()),
        })
    }

    /// The image-spec's annotations, as labels.
    pub fn labels(&self) -> BTreeMap<String, String> {
        let known = [
            ("title", Some("carrick")),
            ("description", Some("Joins Kubernetes clusters over WireGuard")),
            ("version", Some(self.version.as_str())),
            ("licenses", Some(self.license.as_str())),
            ("source", self.repository.as_deref()),
            ("revision", self.revision.as_deref()),
        ];
        let labels = known.into_iter().filter_map(|(name, value)| Some((name, value?)));
        labels.map(|(name, value)| (format!("org.opencontainers.image.{name}"), value.to_owned())).collect()
    }
}

/// Each thing that a build for `arch` lacks here, with its remedy. `nft` is the file that the image would hold.
pub fn missing(arch: Arch, nft: &Path) -> Vec<String> {
    let target = arch.target();
    let library = stdout(rustc().args(["--print", "target-libdir", "--target", target]));
    let cc = compiler(arch);
    let libc = stdout(Command::new(&cc).arg("-print-file-name=libc.a"));
    lacks(
        arch,
        nft,
        &Found {
            std: library.is_ok_and(|folder| Path::new(folder.trim()).is_dir()),
            cc: libc.is_ok(),
            // A file that the compiler does not find is answered by its bare name.
            libc: libc.is_ok_and(|path| Path::new(path.trim()).is_absolute()),
            nft: std::fs::read(nft).is_ok_and(|bytes| crate::elf::is_for(&bytes, arch)),
        },
    )
}

/// What was looked for.
struct Found {
    std: bool,
    cc: bool,
    libc: bool,
    nft: bool,
}

fn lacks(arch: Arch, nft: &Path, found: &Found) -> Vec<String> {
    let (name, target, cc) = (arch.name(), arch.target(), compiler(arch));
    let packages = match (arch == Arch::HOST, arch) {
        (true, _) => ["gcc", "libc6-dev"],
        (false, Arch::Amd64) => ["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"],
        (false, Arch::Arm64) => ["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"],
    };
    let lines = [
        (found.std, format!("  Rust's library for {target}: rustup target add {target}")),
        (found.cc, format!("  {cc}: apt-get install -y --no-install-recommends {}", packages[0])),
        (
            found.libc,
            format!("  the C library for {name}, static: apt-get install -y --no-install-recommends {}", packages[1]),
        ),
        (
            found.nft,
            format!(
                "  {}, nft for {name}: name a Debian of {name} that has the package nftables by --root DIR \
                 (mmdebstrap --architectures={name} --include=nftables bookworm DIR)",
                nft.display()
            ),
        ),
    ];
    lines.into_iter().filter(|(there, _)| !there).map(|(_, line)| line).collect()
}

/// The C compiler that also links.
pub fn compiler(arch: Arch) -> String {
    if arch == Arch::HOST { "cc".to_owned() } else { format!("{}-gcc", arch.gnu()) }
}

/// Builds the `carrick` of the tree into `target`; where it lies.
pub fn carrick(tree: &Path, target: &Path, arch: Arch) -> Result<PathBuf> {
    let triple = arch.target();
    let mut command = workspace::cargo();
    command.current_dir(tree).args(["build", "--release", "--locked", "--package", "agent", "--target", triple]);
    command.arg("--target-dir").arg(target);
    // What the caller may have set for other builds.
    for name in ["CFLAGS", "CARGO_BUILD_RUSTFLAGS", "RUSTFLAGS"] {
        command.env_remove(name);
    }
    let mut flags = vec!["-Ctarget-feature=+crt-static".to_owned()];
    flags.extend(remaps(&paths(tree, target)?).map(|(from, to)| format!("--remap-path-prefix={from}={to}")));
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
    // Without line numbers: they are five times the rest.
    command.env("CARGO_PROFILE_RELEASE_DEBUG", "none").env("CARGO_PROFILE_RELEASE_STRIP", "debuginfo");
    command.env("CARGO_INCREMENTAL", "0");
    if arch != Arch::HOST {
        let linker = format!("CARGO_TARGET_{}_LINKER", triple.to_uppercase().replace('-', "_"));
        command.env(linker, compiler(arch));
    }
    let ended = process::run(&format!("build carrick for {}", arch.name()), &mut command)?;
    ensure!(ended.success, "{}\ncarrick does not build", ended.output);
    Ok(target.join(triple).join("release/carrick"))
}

/// The folders whose names the compiler would write down.
struct Paths {
    tree: String,
    target: String,
    cargo_home: String,
    /// rustc's, and the commit that it was built from.
    sysroot: String,
    commit: String,
}

fn paths(tree: &Path, target: &Path) -> Result<Paths> {
    let text = |path: &Path| path.to_str().map(str::to_owned).with_context(|| format!("{}: not UTF-8", path.display()));
    let home = |below: &str| env::var_os("HOME").map(|home| Path::new(&home).join(below));
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| home(".cargo"));
    let version = stdout(rustc().arg("-vV"))?;
    let commit = version.lines().find_map(|line| line.strip_prefix("commit-hash: "));
    Ok(Paths {
        tree: text(tree)?,
        target: text(target)?,
        cargo_home: text(&cargo_home.context("neither CARGO_HOME nor HOME is set")?)?,
        sysroot: stdout(rustc().args(["--print", "sysroot"]))?.trim().to_owned(),
        commit: commit.context("rustc -vV names no commit")?.to_owned(),
    })
}

/// From which prefix to which; of several that fit, rustc takes the last.
fn remaps(paths: &Paths) -> [(String, String); 4] {
    // What rustc itself calls its library where it has no source of it.
    let library = (format!("{}/lib/rustlib/src/rust", paths.sysroot), format!("/rustc/{}", paths.commit));
    [
        (paths.tree.clone(), "/carrick".to_owned()),
        (paths.target.clone(), "/carrick/target".to_owned()),
        (paths.cargo_home.clone(), "/cargo".to_owned()),
        library,
    ]
}

/// The compiler that cargo will run.
pub fn rustc() -> Command {
    let mut command = Command::new(env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.current_dir(workspace::root());
    command
}

/// What a short command says; an error if it fails.
pub fn stdout(command: &mut Command) -> Result<String> {
    let words = [command.get_program()].into_iter().chain(command.get_args());
    let named = words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
    let output = command.output().with_context(|| named.clone())?;
    ensure!(output.status.success(), "{named}: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_remedy() {
        let other = if Arch::HOST == Arch::Amd64 { Arch::Arm64 } else { Arch::Amd64 };
        let none = Found { std: false, cc: false, libc: false, nft: false };
        let lines = format!("missing:\n{}", lacks(other, Path::new("/r/usr/sbin/nft"), &none).join("\n"));
        let lines = lines.replace(other.target(), "TARGET").replace(other.gnu(), "GNU").replace(other.name(), "ARCH");
        expect![[r#"
            missing:
              Rust's library for TARGET: rustup target add TARGET
              GNU-gcc: apt-get install -y --no-install-recommends gcc-GNU
              the C library for ARCH, static: apt-get install -y --no-install-recommends libc6-dev-ARCH-cross
              /r/usr/sbin/nft, nft for ARCH: name a Debian of ARCH that has the package nftables by --root DIR (mmdebstrap --architectures=ARCH --include=nftables bookworm DIR)"#]]
        .assert_eq(&lines.replace("x86-64-linux-gnu", "GNU"));
    }

    #[test]
    fn only_what_is_missing_is_named() {
        let all = Found { std: true, cc: true, libc: true, nft: true };
        assert!(lacks(Arch::HOST, Path::new("/usr/sbin/nft"), &all).is_empty());
        let lines = lacks(Arch::HOST, Path::new("/usr/sbin/nft"), &Found { libc: false, ..all });
        assert_eq!(lines.len(), 1);
        assert!(lines[0].ends_with(" libc6-dev"), "{lines:?}");
    }

    #[test]
    fn labels_name_the_commit_only_where_there_is_one() {
        let package = |revision: Option<&str>| Package {
            version: "1.2.3".into(),
            license: "Apache-2.0".into(),
            repository: None,
            revision: revision.map(str::to_owned),
        };
        let text = |package: Package| format!("{:#?}", package.labels());
        expect![[r#"
            {
                "org.opencontainers.image.description": "Joins Kubernetes clusters over WireGuard",
                "org.opencontainers.image.licenses": "Apache-2.0",
                "org.opencontainers.image.title": "carrick",
                "org.opencontainers.image.version": "1.2.3",
            }"#]]
        .assert_eq(&text(package(None)));
        assert!(text(package(Some("c0ffee"))).contains(r#""org.opencontainers.image.revision": "c0ffee""#));
    }

    #[test]
    fn no_folder_of_this_machine_keeps_its_name() {
        let paths = Paths {
            tree: "/home/me/carrick".into(),
            target: "/var/built".into(),
            cargo_home: "/home/me/.cargo".into(),
            sysroot: "/home/me/.rustup/toolchains/stable".into(),
            commit: "c0ffee".into(),
        };
        let lines = remaps(&paths).map(|(from, to)| format!("{from} -> {to}\n")).concat();
        expect![[r#"
            /home/me/carrick -> /carrick
            /var/built -> /carrick/target
            /home/me/.cargo -> /cargo
            /home/me/.rustup/toolchains/stable/lib/rustlib/src/rust -> /rustc/c0ffee
        "#]]
        .assert_eq(&lines);
    }
}
