//! Builds the BPF programs of `ebpf` and leaves the objects in OUT_DIR, where `kernel::object` embeds them.
//!
//! That needs a compiler that has the standard library's source (`core` is built for BPF) and an LLVM that the linker can
//! read. What is missing is named with the line that installs it.

use std::{
    env,
    ffi::OsStr,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
};

const TARGET: &str = "bpfel-unknown-none";
/// Both binaries of `ebpf`.
const OBJECTS: [&str; 2] = ["programs", "programs-test"];
/// The newest LLVM whose bitcode `bpf-linker` reads: the one that it is linked to.
const LLVM: u32 = 22;
const LINKER_VERSION: &str = "0.13.0";

fn main() -> ExitCode {
    for changed in ["../ebpf", "../Cargo.toml", "../Cargo.lock", "build.rs"] {
        println!("cargo::rerun-if-changed={changed}");
    }
    for changed in ["CARRICK_BPF_RUSTC", "BPF_LINKER"] {
        println!("cargo::rerun-if-env-changed={changed}");
    }
    match (compiler(), linker()) {
        (Ok(compiler), Ok(linker)) => match build(&compiler, &linker) {
            Ok(()) => ExitCode::SUCCESS,
            Err(problem) => fail(&[problem]),
        },
        (compiler, linker) => fail(&[compiler.err(), linker.err()].into_iter().flatten().collect::<Vec<_>>()),
    }
}

fn fail(problems: &[String]) -> ExitCode {
    for line in problems.iter().flat_map(|problem| problem.lines()) {
        println!("cargo::error={line}");
    }
    ExitCode::FAILURE
}

fn build(compiler: &Path, linker: &Path) -> Result<(), String> {
    let out = PathBuf::from(env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    let target_dir = out.join("bpf");
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--locked", "--package", "ebpf", "--bins", "--profile", "bpf", "-Z", "build-std=core"]);
    // A folder of its own: the outer cargo holds the lock of the usual one while it waits for us.
    command.args(["--target", TARGET, "--target-dir"]).arg(&target_dir);
    command.current_dir("..");
    // What the outer cargo set is about another target and another compiler.
    for (name, _) in env::vars_os().filter(|(name, _)| leaks(name)) {
        command.env_remove(name);
    }
    command.env("RUSTC", compiler).env("RUSTC_BOOTSTRAP", "1");
    command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker);
    command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_RUSTFLAGS", "-Clink-arg=--btf");
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("the BPF programs do not build with {}:\n{said}", compiler.display()));
    }
    for object in OBJECTS {
        let built = target_dir.join(TARGET).join("bpf").join(object);
        fs::copy(&built, out.join(object)).map_err(|error| format!("copy {}: {error}", built.display()))?;
    }
    Ok(())
}

/// Variables of the outer build. What says where crates come from and are kept stays.
fn leaks(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    let ours = name.starts_with("CARGO") || name.starts_with("RUSTC") || name.starts_with("RUSTDOC");
    let others = ["RUSTFLAGS", "CLIPPY_ARGS", "TARGET", "HOST", "PROFILE", "DEBUG", "OPT_LEVEL", "OUT_DIR"];
    (ours && !kept.iter().any(|kept| name.starts_with(kept))) || others.contains(&name)
}

/// The compiler named by CARRICK_BPF_RUSTC, else the first that fits: the running one, rustup's nightly, the system's.
fn compiler() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("CARRICK_BPF_RUSTC") {
        return fits(Path::new(&named))
            .map(|()| PathBuf::from(named))
            .map_err(|why| format!("CARRICK_BPF_RUSTC: {why}"));
    }
    let running = env::var_os("RUSTC").map(PathBuf::from);
    let candidates = [running, rustup_nightly(), Some(PathBuf::from("/usr/bin/rustc"))];
    let mut problems = String::new();
    for candidate in candidates.into_iter().flatten() {
        match fits(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(problem) => problems += &format!("  {problem}\n"),
        }
    }
    Err(format!(
        "no compiler for the BPF programs:\n{problems}\
         install the library's source by one of\n  rustup component add rust-src\n  \
         apt-get install -y --no-install-recommends rustc-web rust-web-src    (Debian 12)\n"
    ))
}

/// Whether the compiler is there, has the source of `core`, and its bitcode can be read.
fn fits(compiler: &Path) -> Result<(), String> {
    let name = compiler.display();
    let ask = |arguments: &[&str]| {
        let output = Command::new(compiler).args(arguments).output().map_err(|error| format!("{name}: {error}"))?;
        Ok::<String, String>(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let sysroot = PathBuf::from(ask(&["--print", "sysroot"])?.trim());
    if !sysroot.join("lib/rustlib/src/rust/library/core/Cargo.toml").exists() {
        return Err(format!("{name}: without the library's source (rust-src)"));
    }
    let version = ask(&["-vV"])?;
    let llvm = |line: &str| line.strip_prefix("LLVM version: ")?.split('.').next()?.parse::<u32>().ok();
    match version.lines().find_map(llvm) {
        Some(llvm) if llvm <= LLVM => Ok(()),
        Some(llvm) => Err(format!("{name}: of LLVM {llvm}, bpf-linker reads at most {LLVM}")),
        None => Err(format!("{name}: does not tell its LLVM")),
    }
}

fn rustup_nightly() -> Option<PathBuf> {
    let output = Command::new("rustup").args(["which", "--toolchain", "nightly", "rustc"]).output().ok()?;
    let path = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| PathBuf::from(path.trim()))
}

/// The linker named by BPF_LINKER, else the first in PATH, in cargo's folder, or in the cache that xtask fills.
fn linker() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("BPF_LINKER").map(PathBuf::from) {
        return if runs(&named) { Ok(named) } else { Err(format!("BPF_LINKER: {} does not run", named.display())) };
    }
    let home = |below: &str| env::var_os("HOME").map(|home| Path::new(&home).join(below));
    let cargo = env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| home(".cargo"));
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or_else(|| home(".cache"));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(cargo.map(|cargo| cargo.join("bin")));
    let folders = folders.chain(cache.map(|cache| cache.join("carrick/tools/bin")));
    folders.map(|folder| folder.join("bpf-linker")).find(|linker| runs(linker)).ok_or_else(|| {
        format!(
            "no bpf-linker that runs; install it (Debian 12) by\n  \
             apt-get install -y --no-install-recommends llvm-{LLVM}-dev libzstd-dev zlib1g-dev && \
             PATH=/usr/lib/llvm-{LLVM}/bin:$PATH cargo install bpf-linker --version {LINKER_VERSION} --locked \
             --no-default-features --features llvm-{LLVM}\n"
        )
    })
}

/// It needs LLVM's library when it runs.
fn runs(program: &Path) -> bool {
    program.is_file() && Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}
