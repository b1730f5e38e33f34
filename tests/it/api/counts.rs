//! What the nodes ask of the API server and what passes between them, counted there.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

use super::kubernetes::{GATEWAY, Kubernetes, WORKER};

/// Requests of the account, each with how often: verb, kind, and the parameters that say what is wanted.
pub(crate) fn asked(audit: &[Value], account: &str) -> BTreeMap<String, usize> {
    let user = format!("system:serviceaccount:carrick:carrick-{account}");
    let mut asked = BTreeMap::new();
    let mut known = BTreeSet::new();
    for event in audit.iter().filter(|event| event["user"]["username"] == *user) {
        if known.insert(event["auditID"].as_str()) {
            *asked.entry(request(event)).or_default() += 1;
        }
    }
    asked
}

fn request(event: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let uri = text(&event["requestURI"]);
    let (path, query) = uri.split_once('?').unwrap_or((&uri, ""));
    let mut parameters: Vec<&str> = query.split('&').filter(|parameter| !parameter.is_empty()).collect();
    // Which version it was at is no matter, but whether one is named is.
    for parameter in &mut parameters {
        if parameter.starts_with("resourceVersion=") && *parameter != "resourceVersion=0" {
            *parameter = "resourceVersion=N";
        }
    }
    parameters.sort_unstable();
    format!("{} {path} {}", text(&event["verb"]), parameters.join(" ")).trim_end().to_owned()
}

/// Counts what the API server sends to each node and gets from it.
pub(crate) fn count_bytes(on: &Kubernetes) -> Result<()> {
    let mut rules = "add table inet count\ndelete table inet count\ntable inet count {\n".to_owned();
    let nodes: Vec<_> = [GATEWAY, WORKER].into_iter().map(|node| on.node(node)).collect();
    for node in &nodes {
        rules += &format!("counter {} {{}}\n", node.host.name());
    }
    for (hook, side) in [("input", "s"), ("output", "d")] {
        rules += &format!("chain {hook} {{ type filter hook {hook} priority 0\n");
        for node in &nodes {
            rules += &format!(
                "ip {side}addr {} tcp {side2}port 6443 counter name {}\n",
                node.addresses[0],
                node.host.name(),
                side2 = if side == "s" { "d" } else { "s" }
            );
        }
        rules += "}\n";
    }
    on.lab.internet.nft(&(rules + "}\n"))
}

pub(crate) fn bytes(on: &Kubernetes) -> Result<BTreeMap<String, u64>> {
    let text = on.lab.internet.output("nft", &["-j", "list", "counters", "table", "inet", "count"])?;
    let listed: Value = serde_json::from_str(&text)?;
    let counters = listed["nftables"].as_array().context("counters")?.iter().filter_map(|entry| {
        let counter = entry.get("counter")?;
        Some((counter["name"].as_str()?.to_owned(), counter["bytes"].as_u64()?))
    });
    Ok(counters.collect())
}
