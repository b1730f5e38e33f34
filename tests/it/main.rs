//! Everything that is tested with namespaces, programs or servers: one binary. Needs root.

mod bpf;
mod endpoints;
mod folder;
mod joined;
mod lab;
mod mesh;
mod repair;
mod start;
