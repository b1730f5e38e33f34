//! Counters and health maps.
