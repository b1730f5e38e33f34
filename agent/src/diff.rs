//! The diff.

use crate::state::{Op, State};

pub fn diff(desired: &State, actual: &State) -> Vec<Op> {
    let _ = (desired, actual);
    todo!()
}
