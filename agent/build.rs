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

use self::bpf_tools::{compiler, linker};

#[path = "build/bpf_tools.rs"]
mod bpf_tools;

const TARGET: &str = "bpfel-unknown-none";
/// Both binaries of `ebpf`.
const OBJECTS: [&str; 2] = ["programs", "programs-test"];

fn main() -> ExitCode {
    for changed in ["../ebpf/src", "../ebpf/Cargo.toml", "../Cargo.toml", "../Cargo.lock", "build.rs", "build"] {
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
    // Of `target`, for all profiles: OUT_DIR is target/<profile>/build/<package>/out. Not `target` itself, whose lock the
    // outer cargo holds while it waits for us.
    let target_dir = out.ancestors().nth(4).unwrap_or(&out).join("bpf");
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.args(["build", "--locked", "--package", "ebpf", "--bins", "--profile", "bpf", "-Z", "build-std=core"]);
    command.args(["--target", TARGET, "--target-dir"]).arg(&target_dir);
    command.current_dir("..");
    // What the outer cargo set is about another target and another compiler.
    for (name, _) in env::vars_os().filter(|(name, _)| leaks(name)) {
        command.env_remove(name);
    }
    command.env("RUSTC", compiler).env("RUSTC_BOOTSTRAP", "1");
    command.env("CARGO_TARGET_BPFEL_UNKNOWN_NONE_LINKER", linker);
    let flags = ["-Clink-arg=--btf".to_owned()].into_iter().chain(remaps(compiler)?);
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.collect::<Vec<_>>().join("\x1f"));
    let output = command.output().map_err(|error| format!("{command:?}: {error}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    for warning in said.lines().filter(|line| line.starts_with("warning")) {
        println!("cargo::warning=BPF: {warning}");
    }
    if !output.status.success() {
        return Err(format!("the BPF programs do not build with {}:\n{said}", compiler.display()));
    }
    for object in OBJECTS {
        let built = target_dir.join(TARGET).join("bpf").join(object);
        fs::copy(&built, out.join(object)).map_err(|error| format!("copy {}: {error}", built.display()))?;
    }
    Ok(())
}

/// Takes this machine's folders out of the objects, so that they are the same wherever they are built. The tree becomes `.`,
/// from where the linker still finds the lines of source that the verifier shows.
fn remaps(compiler: &Path) -> Result<Vec<String>, String> {
    let absolute = |path: &Path| path.canonicalize().map_err(|error| format!("{}: {error}", path.display()));
    let sysroot = Command::new(compiler).args(["--print", "sysroot"]).output();
    let sysroot = sysroot.map_err(|error| format!("{}: {error}", compiler.display()))?.stdout;
    let library = Path::new(String::from_utf8_lossy(&sysroot).trim()).join("lib/rustlib/src/rust/library");
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let cargo = home.or_else(|| Some(Path::new(&env::var_os("HOME")?).join(".cargo")));
    let folders = [
        (cargo.ok_or("neither CARGO_HOME nor HOME is set")?, "/cargo"),
        // Debian's is a link: the compiler writes down both.
        (absolute(&library)?, "/rust/library"),
        (library, "/rust/library"),
        (absolute(Path::new(".."))?, "."),
    ];
    Ok(folders.map(|(from, to)| format!("--remap-path-prefix={}={to}", from.display())).into())
}

/// Variables of the outer build. What says where crates come from and are kept stays.
fn leaks(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    let kept = ["CARGO_HOME", "CARGO_NET_", "CARGO_HTTP_", "CARGO_REGISTR", "CARGO_SOURCE_"];
    let ours = name.starts_with("CARGO") || name.starts_with("RUSTC") || name.starts_with("RUSTDOC");
    let others = ["RUSTFLAGS", "CLIPPY_ARGS", "TARGET", "HOST", "PROFILE", "DEBUG", "OPT_LEVEL", "OUT_DIR"];
    (ours && !kept.iter().any(|kept| name.starts_with(kept))) || others.contains(&name)
}
