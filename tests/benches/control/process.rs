//! What a process has of memory and has had of processors, by proc(5).

use std::{collections::BTreeMap, fs};

use anyhow::{Context, Result};
use lab::Process;
use serde::Serialize;

use crate::Both;

/// In KiB.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Memory {
    /// What is mapped and there, files of which it has the only copy included.
    resident: u64,
    /// The most that was ever resident.
    peak: u64,
    /// The resident part, shared pages by their share.
    proportional: u64,
}

pub(crate) fn all(both: &Both) -> Result<BTreeMap<&'static str, Memory>> {
    processes(both)?.map(|(name, process)| Ok((name, memory(process)?))).collect()
}

/// Every process of ours, by its name in the results.
pub(crate) fn processes(both: &Both) -> Result<impl Iterator<Item = (&'static str, &Process)>> {
    let tunnel = both.gateway.tunnel()?;
    Ok([("worker", &both.worker.agent), ("gateway", &both.gateway.agent), ("tunnel", tunnel)].into_iter())
}

fn memory(process: &Process) -> Result<Memory> {
    let (status, rollup) = (read(process, "status")?, read(process, "smaps_rollup")?);
    Ok(Memory { resident: kib(&status, "VmRSS")?, peak: kib(&status, "VmHWM")?, proportional: kib(&rollup, "Pss")? })
}

/// Processor time that it has had so far, in seconds, to a hundredth.
pub(crate) fn seconds(process: &Process) -> Result<f64> {
    let stat = read(process, "stat")?;
    // Its name may hold anything; the state behind it is field 3, user and system time are fields 14 and 15.
    let (_, fields) = stat.rsplit_once(") ").context("the name in stat")?;
    let ticks = fields.split(' ').skip(11).take(2).map(str::parse::<f64>);
    Ok(ticks.sum::<Result<f64, _>>().with_context(|| stat.clone())? / 100.0)
}

fn read(process: &Process, file: &str) -> Result<String> {
    let pid = process.pid().context("it runs")?;
    let path = format!("/proc/{pid}/{file}");
    fs::read_to_string(&path).context(path)
}

fn kib(text: &str, field: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().strip_suffix(" kB"));
    number.and_then(|number| number.parse().ok()).with_context(|| format!("{field} in {text}"))
}
