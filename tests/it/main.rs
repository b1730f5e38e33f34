//! Everything that is tested with namespaces, programs or servers: one binary. Needs root.

mod api;
mod bpf;
mod damage;
mod endpoints;
mod folder;
mod forged;
mod joined;
mod lab;
mod mesh;
mod repair;
mod start;
