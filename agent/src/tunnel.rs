//! The userspace WireGuard process.
