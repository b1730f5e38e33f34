//! Which compiler and linker build the BPF programs. The agent's `build.rs` takes them, and `xtask` knows by it what to
//! install.
//!
//! Invariant: a compiler that is returned has the standard library's source and an LLVM whose bitcode the linker reads; a
//! linker that is returned runs.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The newest LLVM whose bitcode `bpf-linker` reads: the one that it is linked to.
pub const LLVM: u32 = 22;
const LINKER_VERSION: &str = "0.13.0";

/// The compiler named by CARRICK_BPF_RUSTC, else the first that fits: the running one, rustup's nightly, the system's.
pub fn compiler() -> Result<PathBuf, String> {
    if let Some(named) = env::var_os("CARRICK_BPF_RUSTC") {
        return fits(Path::new(&named))
            .map(|()| PathBuf::from(named))
            .map_err(|why| format!("CARRICK_BPF_RUSTC: {why}"));
    }
    let running = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let candidates = [Some(running.into()), rustup_nightly(), Some(PathBuf::from("/usr/bin/rustc"))];
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
pub fn linker() -> Result<PathBuf, String> {
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
             apt-get install -y --no-install-recommends llvm-{LLVM}-dev && \
             PATH=/usr/lib/llvm-{LLVM}/bin:$PATH cargo install bpf-linker --version {LINKER_VERSION} --locked \
             --no-default-features --features llvm-{LLVM}\n"
        )
    })
}

/// It needs LLVM's library when it runs.
fn runs(program: &Path) -> bool {
    program.is_file() && Command::new(program).arg("--version").output().is_ok_and(|output| output.status.success())
}
