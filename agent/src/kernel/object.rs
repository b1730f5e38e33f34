//! The BPF programs, as built by `build.rs`.
//!
//! Invariant: both objects are of this build's `ebpf`; their maps and values are those of its library.

/// The programs and maps of a node.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs"));

/// The same programs with entry points for test runs, and maps for these: `TEST_KEY`, `TEST_SEEN`.
pub static TEST_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs-test"));
