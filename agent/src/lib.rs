//! Carrick's node agent. See ARCHITECTURE.md for the map.

pub mod api;
pub mod dial;
pub mod diff;
pub mod facts;
pub mod intent;
pub mod kernel;
pub mod keyring;
pub mod keys;
#[cfg(test)]
mod model;
pub mod names;
pub mod plan;
pub mod reconcile;
#[cfg(test)]
mod scratch;
pub mod source;
pub mod state;
pub mod tunnel;
