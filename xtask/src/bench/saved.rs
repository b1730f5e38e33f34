//! What benchmarks leave in `target/bench`, for those that go on and those that draw.

use std::{fs, path::PathBuf, thread::available_parallelism};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::report::Measured;
use crate::workspace;

/// Where it was measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    pub processor: String,
    pub cores: usize,
    /// Linux's release.
    pub kernel: String,
}

/// The last whole run of `bench datapath`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Datapath {
    pub machine: Machine,
    pub rounds: u32,
    pub results: Vec<Measured>,
}

impl Machine {
    pub fn read() -> Result<Machine> {
        let read = |path: &str| fs::read_to_string(path).with_context(|| path.to_owned());
        let kernel = read("/proc/sys/kernel/osrelease")?.trim().to_owned();
        let cores = available_parallelism().context("count the cores")?.get();
        Ok(Machine { processor: processor(&read("/proc/cpuinfo")?), cores, kernel })
    }
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} cores of {}, Linux {}", self.cores, self.processor, self.kernel)
    }
}

/// Its name in proc_cpuinfo(5), which not every architecture has.
fn processor(cpuinfo: &str) -> String {
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.trim_start().strip_prefix(':'));
    name.map_or(std::env::consts::ARCH, str::trim).to_owned()
}

/// A file of `target/bench`, whose folder is made.
pub fn path(file: &str) -> Result<PathBuf> {
    let folder = workspace::target_dir()?.join("bench");
    fs::create_dir_all(&folder).with_context(|| format!("mkdir {}", folder.display()))?;
    Ok(folder.join(file))
}

const DATAPATH: &str = "datapath.json";

pub fn write_datapath(run: &Datapath) -> Result<()> {
    write(DATAPATH, run)
}

pub fn read_datapath() -> Result<Datapath> {
    read(DATAPATH, "datapath")
}

/// Into a file of `target/bench`.
pub fn write(file: &str, run: &impl Serialize) -> Result<()> {
    let path = path(file)?;
    fs::write(&path, serde_json::to_string_pretty(run)?).with_context(|| format!("write {}", path.display()))
}

/// `by`: the benchmark that writes the file, and its arguments.
pub fn read<T: DeserializeOwned>(file: &str, by: &str) -> Result<T> {
    let path = path(file)?;
    let text =
        fs::read_to_string(&path).with_context(|| format!("{}: run `cargo xtask bench {by}`", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{}: run `cargo xtask bench {by}` again", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_processor_has_a_name_or_an_architecture() {
        assert_eq!(processor("processor\t: 0\nmodel name\t: Some CPU @ 2.50GHz\n"), "Some CPU @ 2.50GHz");
        assert_eq!(processor("processor\t: 0\n"), std::env::consts::ARCH);
    }
}
