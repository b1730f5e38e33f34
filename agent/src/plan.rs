//! The planner.

use crate::{
    facts::Facts,
    intent::{Intent, Rejection},
    state::State,
};

/// The whole state that this node should have.
pub fn plan(intent: &Intent, facts: &Facts) -> (State, Vec<Rejection>) {
    let _ = (intent, facts);
    todo!()
}
