//! Keeps everything that a packet meets on one processor.
//!
//! A round trip wakes a dozen threads. Across processors, those of a virtual machine above all, a wake-up costs more than
//! what is measured, and another amount for each place that the scheduler happens to choose.

use std::fs;

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The threads that were moved, and where they may run. They may again once this value is gone.
#[derive(Debug)]
pub struct OnOne {
    moved: Vec<(Pid, CpuSet)>,
}

impl OnOne {
    /// Moves all threads of these processes, and the calling one: what they start stays with them.
    pub fn new(pids: &[u32]) -> Result<OnOne> {
        let mut threads = vec![Pid::from_raw(0)];
        for pid in pids {
            let folder = format!("/proc/{pid}/task");
            for thread in fs::read_dir(&folder).with_context(|| folder.clone())? {
                let name = thread?.file_name();
                let id = name.to_str().and_then(|name| name.parse().ok());
                threads.push(Pid::from_raw(id.with_context(|| format!("{folder}: {}", name.display()))?));
            }
        }
        let one = first_of(&sched_getaffinity(threads[0]).context("sched_getaffinity")?)?;
        let mut on_one = OnOne { moved: Vec::new() };
        for thread in threads {
            let before = sched_getaffinity(thread).context("sched_getaffinity")?;
            sched_setaffinity(thread, &one).context("sched_setaffinity")?;
            on_one.moved.push((thread, before));
        }
        Ok(on_one)
    }
}

impl Drop for OnOne {
    fn drop(&mut self) {
        for (thread, before) in &self.moved {
            match sched_setaffinity(*thread, before) {
                // It has ended.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => eprintln!("thread {thread} stays on one processor: {error}"),
            }
        }
    }
}

fn first_of(set: &CpuSet) -> Result<CpuSet> {
    let mut one = CpuSet::new();
    for processor in 0..CpuSet::count() {
        if set.is_set(processor)? {
            one.set(processor)?;
            return Ok(one);
        }
    }
    anyhow::bail!("this thread may run nowhere")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_on_one_processor_and_goes_back() {
        let me = Pid::from_raw(0);
        let before = sched_getaffinity(me).unwrap();
        let on_one = OnOne::new(&[]).unwrap();
        assert_eq!(sched_getaffinity(me).unwrap(), first_of(&before).unwrap());
        drop(on_one);
        assert_eq!(sched_getaffinity(me).unwrap(), before);
        assert!(OnOne::new(&[u32::MAX]).is_err());
    }
}
