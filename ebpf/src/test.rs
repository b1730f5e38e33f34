//! The BPF programs with entry points for test runs, which need two more maps. On other targets this is an empty program.

#![cfg_attr(target_arch = "bpf", no_std, no_main)]

#[cfg(target_arch = "bpf")]
mod programs;
#[cfg(target_arch = "bpf")]
mod test_entries;

#[cfg(not(target_arch = "bpf"))]
fn main() {}
