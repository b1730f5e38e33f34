//! The lab: an internet, NAT routers, nodes and pods, each a network namespace of this machine.
//!
//! It runs the built `carrick` as a user would and depends on neither the agent nor kube, so that the demo, the
//! benchmarks and the tests share it. Everything needs root.
//!
//! - [`member`]: what a member is, and which addresses its parts get: pure data.
//! - [`topology`]: builds it: [`Lab`], [`Node`], [`Pod`].
//! - `cni`: what each network plugin sets up on the nodes, and the small BPF programs of two of them.
//! - [`host`]: one machine of the lab: runs closures and programs inside its namespaces.
//! - [`guard`]: the life of a lab: however its maker ends, nothing of it stays behind.
//! - [`carrick`] and [`mesh`]: the program under test, and the folder of manifests that it reads.
//! - [`traffic`]: numbered UDP, a TCP stream, TCP throughput, HTTP, ping, the MTU that a sender is told.
//! - [`capture`] and [`watch`]: what passed on an interface, and on every node's uplink.
//! - [`routes`]: what becomes of a host's routes, as its kernel tells it.
//! - [`faults`]: nodes switched off, links cut, lossy or narrow.
//! - [`apiserver`]: a Kubernetes API server on a host, with its store.
//!
//! Invariants: nothing ever appears in the machine's own network namespace, so parallel labs cannot collide; every
//! process of a lab carries its mark; every file of a lab lies in its one directory.

pub mod apiserver;
pub mod capture;
pub mod carrick;
mod cni;
pub mod faults;
pub mod guard;
pub mod host;
pub mod member;
pub mod mesh;
pub mod routes;
mod sys;
pub mod topology;
pub mod traffic;
pub mod wait;
pub mod watch;

pub use carrick::{Carrick, STATE_DIR};
pub use host::{Host, Namespace, Process};
pub use member::{Cni, Families, Member};
pub use mesh::Mesh;
pub use topology::{Lab, Node, Pod};
pub use wait::wait_for;
