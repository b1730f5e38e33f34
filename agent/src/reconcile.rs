//! One pass: the operations between what is wanted and what is, applied in order.
//!
//! Invariants: an error never removes a working path, and never opens one that is not guarded. After a failed make, an
//! unreadable layer or an incomplete view, every break is withheld. What guards is the programs: where those of a link
//! cannot be attached, it is not raised, and gets no peer; where a map cannot be filled, no peer gains a prefix. Nothing
//! waits for the nft table: without it masqueraded packets are refused by `steer`, and forged ones by `from_hop`. The
//! next pass, which is the same whole pass again, catches up.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, io,
    time::SystemTime,
};

use crate::{
    diff::diff,
    keys::PublicKey,
    names::{Device, Interface},
    state::{Op, Program, Route, State},
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
            Op::SetRule(..) | Op::DelRule(_) => Layer::Rule,
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

impl ReadError {
    /// Nobody runs WireGuard here, which is a reading too.
    fn is_absent_tunnel(&self) -> bool {
        let kind = self.source.kind();
        self.layer == Layer::WireGuard && matches!(kind, io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
    }
}

impl Reading {
    /// Where no WireGuard is wanted, it is no trouble that nobody runs one.
    pub fn excuse_absent_tunnel(&mut self, desired: &State) {
        if desired.wireguard.is_empty() {
            self.failed.retain(|error| !error.is_absent_tunnel());
        }
    }

    /// The wanted pairs that have no session, as far as it can be known: none of their packets can pass.
    pub fn severed(&self, desired: &State) -> BTreeSet<(Device, PublicKey)> {
        let unread = |error: &ReadError| error.layer == Layer::WireGuard && !error.is_absent_tunnel();
        if self.failed.iter().any(unread) {
            return BTreeSet::new();
        }
        let met = |pair| self.pairs.get(pair).is_some_and(|pair: &Pair| pair.last_handshake.is_some());
        desired.peers.keys().filter(|pair| !met(*pair)).copied().collect()
    }
}

/// An operation that failed.
#[derive(Debug, thiserror::Error)]
#[error("{op:#}")]
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
    let guards_unread = unread(Layer::Maps) || unread(Layer::Programs);
    let unguarded = |interface: Interface| guards_unread || failed.iter().any(|failed| guards(&failed.op, interface));
    let unfilled = || failed.iter().any(|failed| matches!(failed.op, Op::SetEntry(_)));
    match op {
        _ if unread(op.layer()) || hangs(op.layer()) => true,
        Op::SetLink { interface, .. } => unguarded(*interface),
        Op::SetPeer { device, gained, .. } => {
            unguarded(Interface::WireGuard(*device)) || (!gained.is_empty() && unfilled())
        }
        // Into a link that is not raised; but where only `steer` is missing, it goes nowhere, which is better than in the clear.
        Op::SetRoute { route: Route::Hop { .. }, .. } => unguarded(Interface::Hop),
        op if op.is_break() => !complete || !reading.failed.is_empty() || !failed.is_empty(),
        _ => false,
    }
}

/// Whether the link carries nothing before this is done.
fn guards(op: &Op, interface: Interface) -> bool {
    match op {
        Op::LoadMaps => true,
        Op::SetHop(_) => interface == Interface::Hop,
        Op::Attach(at) => at.program != Program::Steer && Interface::from_link(&at.link) == Some(interface),
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
    use crate::{
        model::{Model, any_desired, any_state},
        names::HOP,
    };
    use futures::executor::block_on;
    use proptest::{
        collection::btree_set,
        prelude::*,
        sample::{Index, select},
    };

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
        fn without_its_guard_no_peer_is_made(desired in any_desired(), state in any_state(), which in any::<Index>()) {
            let ops = diff(&desired, &state);
            let guard = |op: &Op| matches!(op, Op::LoadMaps | Op::SetEntry(_) | Op::Attach(_) | Op::SetHop(_));
            let all: Vec<usize> = (0..ops.len()).filter(|at| guard(&ops[*at])).collect();
            prop_assume!(!all.is_empty());
            let refused = *which.get(&all);
            let mut model = Model { state, refuse: [refused].into(), ..Model::default() };
            block_on(pass(&desired, true, &mut model));
            let lets_in = |op: &Op, link: &str| match op {
                Op::SetLink { interface, .. } => interface.to_string() == link,
                Op::SetPeer { device, .. } => device.to_string() == link,
                Op::SetRoute { route: Route::Hop { .. }, .. } => link == HOP,
                _ => false,
            };
            for op in &model.applied {
                prop_assert!(!match &ops[refused] {
                    Op::LoadMaps => Interface::all().any(|interface| lets_in(op, &interface.to_string())),
                    Op::SetEntry(_) => matches!(op, Op::SetPeer { gained, .. } if !gained.is_empty()),
                    Op::Attach(at) => at.program != Program::Steer && lets_in(op, &at.link),
                    _ => lets_in(op, HOP),
                }, "{op} without {}", ops[refused]);
            }
        }

        #[test]
        fn nothing_else_waits_for_the_nft_table(desired in any_desired(), state in any_state()) {
            let ops = diff(&desired, &state);
            let refused = ops.iter().position(|op| matches!(op, Op::GrowNft(_)));
            prop_assume!(refused.is_some());
            let mut model = Model { state, refuse: refused.into_iter().collect(), ..Model::default() };
            block_on(pass(&desired, true, &mut model));
            prop_assert_eq!(model.applied.len() + 1, ops.iter().filter(|op| !op.is_break()).count());
        }

        /// A tunnel that is gone has no session; of one that hangs nothing is known.
        #[test]
        fn a_pair_without_a_session_is_severed(desired in any_desired(), met in any::<Index>(), kind in select(vec![
            None, Some(io::ErrorKind::NotFound), Some(io::ErrorKind::ConnectionRefused), Some(io::ErrorKind::TimedOut),
        ])) {
            let mut reading = Reading::default();
            let all: BTreeSet<_> = desired.peers.keys().copied().collect();
            let mut expected = all.clone();
            match kind {
                None if !all.is_empty() => {
                    let pair = *all.iter().nth(met.index(all.len())).unwrap();
                    let met = Pair { last_handshake: Some(SystemTime::UNIX_EPOCH), ..Pair::default() };
                    reading.pairs = all.iter().map(|pair| (*pair, Pair::default())).collect();
                    reading.pairs.insert(pair, met);
                    expected.remove(&pair);
                }
                None => {}
                Some(kind) => reading.failed.push(ReadError { layer: Layer::WireGuard, source: kind.into() }),
            }
            if kind == Some(io::ErrorKind::TimedOut) {
                expected.clear();
            }
            prop_assert_eq!(reading.severed(&desired), expected);
        }

        #[test]
        fn a_layer_that_cannot_be_read_is_not_written(
            desired in any_desired(),
            state in any_state(),
            layer in select(vec![Layer::Nft, Layer::Maps, Layer::Programs, Layer::Link, Layer::WireGuard]),
        ) {
            let mut model = Model { state, ..Model::default() };
            let mut reading = block_on(model.read());
            let source = io::Error::from(io::ErrorKind::ConnectionRefused);
            reading.failed.push(ReadError { layer, source });
            block_on(reconcile(&desired, true, &reading, &mut model));
            prop_assert!(model.applied.iter().all(|op| op.layer() != layer && !op.is_break()));
            if matches!(layer, Layer::Maps | Layer::Programs) {
                let lets_in = |op: &Op| matches!(op, Op::SetPeer { .. } | Op::SetLink { .. });
                prop_assert!(!model.applied.iter().any(lets_in));
            }
        }
    }
}
