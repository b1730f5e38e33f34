//! Carrick's node agent, in reading order. ARCHITECTURE.md says where a packet goes and where to change what.
//!
//! ```text
//! folder -> source -> api -> intent ─┐
//!       keys, names, addresses -> facts ─> plan -> desired state ┐
//! netlink, nft, tunnel -> kernel::read ----------> actual state  ┴> diff -> [Op] -> kernel::apply
//! ```
//! Beside it, and untouched by any pass, [`probe`] asks the gateways and writes what [`health`] makes of their answers.
//!
//! Nothing but [`kernel`], [`tunnel`] and [`probe`] has an effect on the node, and nothing in [`intent`], [`state`],
//! [`plan`], [`diff`] or [`health`] does I/O, reads a clock, or looks at the environment.

pub mod args;
pub mod causes;
pub mod cli;

pub mod keys;
pub mod names;

pub mod api;
pub mod conditions;
pub mod dial;
pub mod export;
pub mod facts;
pub mod gateway;
pub mod health;
pub mod intent;
pub mod keyring;
pub mod kubectl;
pub mod overlay;
pub mod resolve;
pub mod slot;
pub mod source;

pub mod diff;
pub mod plan;
pub mod reconcile;
pub mod state;

pub mod kernel;
pub mod tunnel;

pub mod probe;

pub mod agent;
pub mod run_dir;
pub mod status;
pub mod status_socket;
pub mod survey;

#[cfg(test)]
mod model;
#[cfg(test)]
mod scratch;
