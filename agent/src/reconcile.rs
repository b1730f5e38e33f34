//! The one loop.

use std::{collections::BTreeMap, io, time::SystemTime};

use crate::{
    keys::PublicKey,
    names::Device,
    state::{Op, State},
};

/// What is known of one pair of gateways beside its configuration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pair {
    pub last_handshake: Option<SystemTime>,
    /// Bytes since the peer was made.
    pub rx_bytes: u64,
    pub tx_bytes: u64,
}

/// Which part of the kernel an operation or a reading concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Layer {
    Link,
    WireGuard,
    Route,
    Rule,
    Nft,
}

/// One reading of everything of ours.
#[derive(Debug, Default)]
pub struct Reading {
    pub state: State,
    pub pairs: BTreeMap<(Device, PublicKey), Pair>,
    /// Layers that could not be read; what is in `state` of them is not to be believed, so nothing is broken.
    pub failed: Vec<(Layer, io::Error)>,
}

/// Where operations go: the kernel, or in tests a model of it.
#[allow(async_fn_in_trait)]
pub trait Kernel {
    async fn read(&mut self) -> Reading;
    async fn apply(&mut self, op: &Op) -> io::Result<()>;
}
