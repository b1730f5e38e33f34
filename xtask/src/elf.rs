//! What a program needs beside itself in a root of its own: its loader, and the libraries that this will look for.
//!
//! The files are read, nothing is run, so the programs may be of another machine. Invariant: a library is looked for where
//! the loader does without a cache (ld.so(8)), so what is not found here would not be found there either.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use object::{
    LittleEndian, elf,
    read::elf::{FileHeader, ProgramHeader},
};

/// A processor, by the name that OCI and Debian have for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// This machine's.
    pub const HOST: Arch = if cfg!(target_arch = "aarch64") { Arch::Arm64 } else { Arch::Amd64 };

    pub fn name(self) -> &'static str {
        match self {
            Arch::Amd64 => "amd64",
            Arch::Arm64 => "arm64",
        }
    }

    /// The prefix of its compilers, and the name of Debian's folders for its libraries.
    pub fn gnu(self) -> &'static str {
        match self {
            Arch::Amd64 => "x86_64-linux-gnu",
            Arch::Arm64 => "aarch64-linux-gnu",
        }
    }

    /// `rustc`'s name for it.
    pub fn target(self) -> &'static str {
        match self {
            Arch::Amd64 => "x86_64-unknown-linux-gnu",
            Arch::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    fn machine(self) -> u16 {
        match self {
            Arch::Amd64 => elf::EM_X86_64,
            Arch::Arm64 => elf::EM_AARCH64,
        }
    }
}

/// Every file that `program` loads before its `main`, by the path at which the loader opens it. A static program has none.
///
/// `root` is the tree that they are taken from, `/` for this machine's; the keys are paths inside it.
pub fn loaded_by(program: &[u8], arch: Arch, root: &Path) -> Result<BTreeMap<PathBuf, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let needs = Needs::read(program, arch)?;
    if let Some(interpreter) = &needs.interpreter {
        let path = PathBuf::from(interpreter);
        let bytes = read_below(root, &path).with_context(|| format!("the loader {interpreter}"))?;
        found.insert(path, bytes);
    }
    let mut open = needs.libraries;
    while let Some(library) = open.pop() {
        if found.keys().any(|path: &PathBuf| path.ends_with(&library)) {
            continue;
        }
        let (path, bytes) = find(&library, arch, root)?;
        open.extend(Needs::read(&bytes, arch).with_context(|| path.display().to_string())?.libraries);
        found.insert(path, bytes);
    }
    Ok(found)
}

fn find(library: &str, arch: Arch, root: &Path) -> Result<(PathBuf, Vec<u8>)> {
    ensure!(!library.contains('/'), "needs {library}, a library with a path: not supported");
    let gnu = arch.gnu();
    let folders = [format!("/lib/{gnu}"), format!("/usr/lib/{gnu}"), "/lib64".into(), "/usr/lib64".into()];
    for folder in folders.into_iter().chain(["/lib".into(), "/usr/lib".into()]) {
        let path = Path::new(&folder).join(library);
        if below(root, &path).is_file() {
            let bytes = read_below(root, &path)?;
            return Ok((path, bytes));
        }
    }
    bail!("needs {library}, which is in none of the loader's folders below {}", root.display())
}

/// An absolute path of the tree as this machine sees it.
pub fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn read_below(root: &Path, path: &Path) -> Result<Vec<u8>> {
    let path = below(root, path);
    fs::read(&path).with_context(|| format!("read {}", path.display()))
}

/// What an ELF file asks of the loader.
#[derive(Debug, PartialEq, Eq)]
struct Needs {
    interpreter: Option<String>,
    libraries: Vec<String>,
}

impl Needs {
    fn read(file: &[u8], arch: Arch) -> Result<Needs> {
        let endian = LittleEndian;
        let header = elf::FileHeader64::<LittleEndian>::parse(file).context("not an ELF file of 64 bits")?;
        let machine = header.e_machine(endian);
        ensure!(machine == arch.machine(), "an ELF file for machine {machine}, not for {}", arch.name());
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).context("a name in the ELF file is not UTF-8");
        let mut needs = Needs { interpreter: None, libraries: Vec::new() };
        for segment in header.program_headers(endian, file)? {
            if let Some(name) = segment.interpreter(endian, file)? {
                needs.interpreter = Some(text(name)?);
            }
        }
        let dynamic = header.sections(endian, file)?.dynamic_table(endian, file)?;
        for entry in dynamic.iter() {
            match entry.tag {
                elf::DT_NEEDED => needs.libraries.push(text(dynamic.string(entry)?)?),
                elf::DT_RPATH | elf::DT_RUNPATH => {
                    bail!("looks for libraries in {}: not supported", text(dynamic.string(entry)?)?)
                }
                _ => {}
            }
        }
        Ok(needs)
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process::Command};

    use super::*;

    fn this_program() -> Vec<u8> {
        fs::read(env::current_exe().unwrap()).unwrap()
    }

    #[test]
    fn what_it_finds_is_what_the_loader_loads() {
        let found = loaded_by(&this_program(), Arch::HOST, Path::new("/")).unwrap();
        let output = Command::new("ldd").arg(env::current_exe().unwrap()).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut loaded: Vec<_> =
            text.split_whitespace().filter(|word| word.starts_with('/')).map(PathBuf::from).collect();
        loaded.sort();
        assert_eq!(found.into_keys().collect::<Vec<_>>(), loaded);
    }

    #[test]
    fn a_program_for_another_machine_is_refused() {
        let other = if Arch::HOST == Arch::Amd64 { Arch::Arm64 } else { Arch::Amd64 };
        let error = loaded_by(&this_program(), other, Path::new("/")).unwrap_err();
        assert!(error.to_string().ends_with(&format!("not for {}", other.name())), "{error}");
    }

    #[test]
    fn a_library_that_is_not_there_is_named() {
        let empty = Path::new("/proc/self/fdinfo");
        let error = find("libc.so.6", Arch::HOST, empty).unwrap_err();
        assert_eq!(
            error.to_string(),
            "needs libc.so.6, which is in none of the loader's folders below /proc/self/fdinfo"
        );
    }

    #[test]
    fn a_script_is_no_program() {
        let error = loaded_by(b"#!/bin/sh\n", Arch::HOST, Path::new("/")).unwrap_err();
        assert_eq!(error.to_string(), "not an ELF file of 64 bits");
    }
}
