//! Keeps everything that a packet meets on one processor.
//!
//! A round trip wakes a dozen threads. Across processors, those of a virtual machine above all, a wake-up costs more than
//! what is measured, and another amount for each place that the scheduler happens to choose.

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CpuSet, sched_getaffinity, sched_setaffinity},
    unistd::Pid,
};

/// The calling thread, for [`sched_setaffinity`].
const ME: Pid = Pid::from_raw(0);

/// Keeps the thread that made it on one processor while it lives, with all that it starts: programs that begin there do
/// not reckon with more.
#[derive(Debug)]
pub struct OnOne {
    before: CpuSet,
}

impl OnOne {
    pub fn new() -> Result<OnOne> {
        let before = sched_getaffinity(ME).context("sched_getaffinity")?;
        sched_setaffinity(ME, &first_of(&before)?).context("sched_setaffinity")?;
        Ok(OnOne { before })
    }
}

impl Drop for OnOne {
    fn drop(&mut self) {
        if let Err(error) = sched_setaffinity(ME, &self.before) {
            eprintln!("the benchmark stays on one processor: {error}");
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
    bail!("this thread may run nowhere")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_on_one_processor_and_goes_back() {
        let before = sched_getaffinity(ME).unwrap();
        let on_one = OnOne::new().unwrap();
        assert_eq!(sched_getaffinity(ME).unwrap(), first_of(&before).unwrap());
        let inherited = std::thread::spawn(|| sched_getaffinity(ME).unwrap()).join().unwrap();
        assert_eq!(inherited, first_of(&before).unwrap());
        drop(on_one);
        assert_eq!(sched_getaffinity(ME).unwrap(), before);
    }
}
