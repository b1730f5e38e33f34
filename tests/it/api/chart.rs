//! The chart, as an API server judges it.

use std::{env, path::PathBuf};

use anyhow::{Context, Result, ensure};
use lab::wait_for;
use serde_json::{Value, json};

use super::{
    client::Ask,
    world::{KUBELET, NEW_KUBELET, World},
};
use crate::joined::SOON;

/// Server-side dry run of everything that it renders, whatever its values.
pub(super) fn the_server_takes_the_chart_with_all_values(world: &mut World) -> Result<()> {
    let variable = "CARRICK_CHART_OBJECTS";
    let path: PathBuf = env::var_os(variable).with_context(|| format!("{variable}: run `cargo xtask test`"))?.into();
    let list: Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    let all = list["items"].as_array().context("a list")?;
    let dry =
        world.kubectl(&format!("apply --server-side --force-conflicts --dry-run=server -f {}", path.display()))?;
    let taken = dry.lines().filter(|line| line.ends_with("serverside-applied (server dry run)")).count();
    ensure!(taken == all.len() && taken > 50, "{taken} of {} objects were taken:\n{dry}", all.len());
    Ok(())
}

pub(super) fn a_kubelet_labels_its_node_only_where_it_joins_and_only_if_that_is_set(world: &mut World) -> Result<()> {
    let label = json!({"metadata": {"name": "mn-9", "labels": {"carrick.dev/gateway": "1"}}});
    let joins = Ask::create("/api/v1/nodes?dryRun=All", label.clone());
    let later =
        Ask::merge("/api/v1/nodes/mn-1?dryRun=All", json!({"metadata": {"labels": label["metadata"]["labels"]}}));
    for (set, joined) in [("true", true), ("false", false)] {
        world.helm(&["upgrade"], &[&format!("admissionPolicies.labelsAtRegistration={set}")])?;
        wait_for(&format!("labelsAtRegistration={set} to be in force"), SOON, || {
            match world.ask(NEW_KUBELET, &joins) {
                Ok(answer) if answer.is_ok() == joined => Ok(()),
                other => Err(format!("{other:?}")),
            }
        })?;
        let refusal = world.ask(KUBELET, &later)?.err().context("a kubelet has labelled its node")?;
        ensure!(refusal.message.contains("ValidatingAdmissionPolicy"), "{}", refusal.message);
    }
    Ok(())
}
