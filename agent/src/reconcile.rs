//! One pass: the operations between what is wanted and what is, applied in order.
//!
//! Invariants: an error never removes a working path, and never opens one that is not guarded. After a failed make, an
//! unreadable layer or an incomplete view, every break is withheld; where the nft table cannot be made, so is every
//! peer. The next pass, which is the same whole pass again, catches up.

use std::{collections::BTreeMap, fmt, io, time::SystemTime};

use crate::{
    diff::diff,
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
    Address,
    /// The pinned maps.
    Maps,
    /// What is attached where.
    Programs,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Layer::Link => "links",
            Layer::WireGuard => "WireGuard",
            Layer::Route => "routes",
            Layer::Rule => "rules",
            Layer::Nft => "nftables",
            Layer::Address => "addresses",
            Layer::Maps => "BPF maps",
            Layer::Programs => "BPF programs",
        })
    }
}

impl Op {
    /// Where the operation has its effect.
    pub fn layer(&self) -> Layer {
        match self {
            Op::SetHop(_) | Op::SetLink { .. } | Op::DelLink(_) => Layer::Link,
            Op::SetDevice { .. } | Op::SetPeer { .. } | Op::DropAllowedIps { .. } | Op::RemovePeer { .. } => {
                Layer::WireGuard
            }
            Op::SetRoute { .. } | Op::DelRoute { .. } => Layer::Route,
            Op::AddRule(_) | Op::DelRule(_) => Layer::Rule,
            Op::GrowNft(_) | Op::ShrinkNft(_) => Layer::Nft,
            Op::AddOverlay(_) | Op::DelOverlay(_) => Layer::Address,
            Op::LoadMaps | Op::SetEntry(_) | Op::NarrowOwn(..) | Op::DelEntry(_) | Op::UnloadMaps => Layer::Maps,
            Op::Attach(_) | Op::Detach(_) => Layer::Programs,
        }
    }
}

/// One reading of everything of ours.
#[derive(Debug, Default)]
pub struct Reading {
    pub state: State,
    pub pairs: BTreeMap<(Device, PublicKey), Pair>,
    /// Layers that could not be read; what `state` says of them is not to be believed, so nothing is broken.
    pub failed: Vec<ReadError>,
}

/// A layer that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {layer}")]
pub struct ReadError {
    pub layer: Layer,
    pub source: io::Error,
}

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{op}")]
pub struct ApplyError {
    pub op: Op,
    pub source: io::Error,
}

/// Where operations go: the kernel, or in tests a model of it.
#[allow(async_fn_in_trait)]
pub trait Kernel {
    async fn read(&mut self) -> Reading;
    async fn apply(&mut self, op: &Op) -> io::Result<()>;
}

/// What a pass did.
#[derive(Debug, Default)]
pub struct Outcome {
    pub applied: Vec<Op>,
    pub failed: Vec<ApplyError>,
    /// Operations that wait for a better view: breaks, and all of a layer that could not be read.
    pub withheld: usize,
}

/// Whether an operation must wait for a better view. `failed`: operations of this pass that went wrong.
pub fn waits(op: &Op, complete: bool, reading: &Reading, failed: &[ApplyError]) -> bool {
    let unread = |layer: Layer| reading.failed.iter().any(|failed| failed.layer == layer);
    // Each further call would hang for as long.
    let hangs = |layer: Layer| {
        failed.iter().any(|failed| failed.op.layer() == layer && failed.source.kind() == io::ErrorKind::TimedOut)
    };
    let unguarded = reading.state.nft.is_none()
        && (unread(Layer::Nft) || failed.iter().any(|failed| matches!(failed.op, Op::GrowNft(_))));
    match op {
        _ if unread(op.layer()) || hangs(op.layer()) => true,
        Op::SetLink { .. } | Op::SetPeer { .. } => unguarded,
        op if op.is_break() => !complete || !reading.failed.is_empty() || !failed.is_empty(),
        _ => false,
    }
}

/// Brings the kernel from `reading` to `desired`. `complete`: the view that `desired` was planned from is whole.
pub async fn reconcile(desired: &State, complete: bool, reading: &Reading, kernel: &mut impl Kernel) -> Outcome {
    let mut outcome = Outcome::default();
    for op in diff(desired, &reading.state) {
        if waits(&op, complete, reading, &outcome.failed) {
            outcome.withheld += 1;
            continue;
        }
        match kernel.apply(&op).await {
            Ok(()) => outcome.applied.push(op),
            Err(source) => outcome.failed.push(ApplyError { op, source }),
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Model, any_desired, any_state};
    use futures::executor::block_on;
    use proptest::{collection::btree_set, prelude::*};

    async fn pass(desired: &State, complete: bool, model: &mut Model) -> Outcome {
        let reading = model.read().await;
        reconcile(desired, complete, &reading, model).await
    }

    proptest! {
        #[test]
        fn a_second_pass_writes_nothing(desired in any_desired(), state in any_state()) {
            let mut model = Model { state, ..Model::default() };
            block_on(pass(&desired, true, &mut model));
            let second = block_on(pass(&desired, true, &mut model));
            prop_assert_eq!(second.applied, vec![]);
            prop_assert_eq!(second.withheld, 0);
        }

        #[test]
        fn an_incomplete_view_takes_nothing_away(desired in any_desired(), state in any_state()) {
            let mut model = Model { state, ..Model::default() };
            block_on(pass(&desired, false, &mut model));
            prop_assert!(model.applied.iter().all(|op| !op.is_break()));
        }

        #[test]
        fn a_failed_make_cancels_every_break(desired in any_desired(), state in any_state(), refused in 0..8usize) {
            let ops = diff(&desired, &state);
            prop_assume!(ops.get(refused).is_some_and(|op| !op.is_break()));
            let mut model = Model { state, refuse: [refused].into(), ..Model::default() };
            let outcome = block_on(pass(&desired, true, &mut model));
            prop_assert!(!outcome.failed.is_empty());
            prop_assert!(model.applied.iter().all(|op| !op.is_break()));
            prop_assert!(outcome.withheld >= ops.iter().filter(|op| op.is_break()).count());
        }

        #[test]
        fn passes_converge_once_the_kernel_stops_refusing(
            desired in any_desired(), state in any_state(), refuse in btree_set(0..30usize, 0..6)
        ) {
            let mut model = Model { state, refuse, ..Model::default() };
            block_on(pass(&desired, true, &mut model));
            model.refuse.clear();
            block_on(pass(&desired, true, &mut model));
            prop_assert_eq!(diff(&desired, &model.state), vec![]);
        }

        #[test]
        fn without_its_guard_no_peer_is_made(desired in any_desired(), state in any_state()) {
            let ops = diff(&desired, &state);
            let guard = ops.iter().position(|op| matches!(op, Op::GrowNft(_)));
            prop_assume!(guard.is_some() && state.nft.is_none());
            let mut model = Model { state, refuse: guard.into_iter().collect(), ..Model::default() };
            block_on(pass(&desired, true, &mut model));
            let unguarded = |op: &Op| matches!(op, Op::SetPeer { .. } | Op::SetLink { .. });
            prop_assert!(!model.applied.iter().any(unguarded));
        }

        #[test]
        fn a_layer_that_cannot_be_read_is_not_written(desired in any_desired(), state in any_state()) {
            let mut model = Model { state, ..Model::default() };
            let mut reading = block_on(model.read());
            let source = io::Error::from(io::ErrorKind::ConnectionRefused);
            reading.failed.push(ReadError { layer: Layer::Nft, source });
            block_on(reconcile(&desired, true, &reading, &mut model));
            prop_assert!(model.applied.iter().all(|op| op.layer() != Layer::Nft && !op.is_break()));
        }
    }
}
