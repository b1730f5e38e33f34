//! The chart, as an API server judges it.

use std::{collections::BTreeSet, env, fs, path::PathBuf};

use anyhow::{Context, Result, ensure};
use expect_test::expect_file;
use lab::wait_for;
use serde_json::{Value, json};

use super::{
    client::Ask,
    export::run,
    kubernetes::{ADMIN, CARRICK},
    world::{KUBELET, NEW_KUBELET, World},
};
use crate::joined::SOON;

/// Server-side dry run.
const DRY: &str = "apply --server-side --force-conflicts --dry-run=server -f";

/// Everything that it renders, whatever its values; and where that is.
fn rendered() -> Result<(Vec<Value>, PathBuf)> {
    let variable = "CARRICK_CHART_OBJECTS";
    let path: PathBuf = env::var_os(variable).with_context(|| format!("{variable}: run `cargo xtask test`"))?.into();
    let mut list: Value = serde_json::from_slice(&fs::read(&path)?)?;
    Ok((serde_json::from_value(list["items"].take())?, path))
}

pub(super) fn the_server_takes_the_chart_with_all_values(world: &mut World) -> Result<()> {
    let (all, path) = rendered()?;
    let dry = world.kubectl(&format!("{DRY} {}", path.display()))?;
    let taken = dry.lines().filter(|line| line.ends_with("serverside-applied (server dry run)")).count();
    ensure!(taken == all.len() && taken > 50, "{taken} of {} objects were taken:\n{dry}", all.len());
    Ok(())
}

/// Pods as the DaemonSets make them, also those that clean up. Of a DaemonSet, whoever applies it is only warned.
pub(super) fn pod_security_admits_the_pods_once_the_notes_are_followed(world: &mut World) -> Result<()> {
    // As a controller makes it, which is not here.
    let account = json!({"apiVersion": "v1", "kind": "ServiceAccount"});
    world.admin(&Ask::apply(&format!("{CARRICK}/serviceaccounts/default"), account))?;
    let notes = world.helm(&["upgrade"], &[])?;
    let line =
        notes.lines().map(str::trim).find(|line| line.starts_with("kubectl label") && line.contains("namespace"));
    let line = line.context("the notes name no label of the namespace")?;
    let (mut items, mut kinds) = (Vec::new(), BTreeSet::new());
    for set in rendered()?.0.into_iter().filter(|object| object["kind"] == "DaemonSet") {
        let account = &set["spec"]["template"]["spec"]["serviceAccountName"];
        if !kinds.insert(format!("{} {account}", set["metadata"]["name"])) {
            continue;
        }
        let metadata = json!({"name": set["metadata"]["name"], "namespace": set["metadata"]["namespace"]});
        let pod = &set["spec"]["template"]["spec"];
        items.push(json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod}));
        items.push(set);
    }
    let file = world.lab.dir("pods.json");
    fs::write(&file, json!({"apiVersion": "v1", "kind": "List", "items": &items}).to_string())?;
    let judge = format!("kubectl {DRY} {}", file.display());
    let create = Ask::create(&format!("{CARRICK}/pods?dryRun=All"), items.swap_remove(0));
    let mut told = String::new();
    for level in ["restricted", "baseline", "privileged"] {
        if level == "privileged" {
            told += &run(world, ADMIN, &[line])?;
        } else {
            let label = json!({"metadata": {"labels": {"pod-security.kubernetes.io/enforce": level}}});
            world.admin(&Ask::merge(CARRICK, label))?;
        }
        wait_for(&format!("{level} to be in force"), SOON, || match world.ask(ADMIN, &create) {
            Ok(Ok(_)) if level == "privileged" => Ok(()),
            Ok(Err(refusal)) if refusal.message.contains(level) => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        told += &format!("## {level}\n{}", distinct(&run(world, ADMIN, &[&judge])?));
    }
    expect_file!["cases/pod_security.txt"].assert_eq(&told);
    Ok(())
}

/// The lines but for the first, the command; sorted, each once.
fn distinct(said: &str) -> String {
    said.lines().skip(1).collect::<BTreeSet<_>>().into_iter().map(|line| format!("{line}\n")).collect()
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
