//! What GitOps tools make of the mesh's objects while a gateway comes, judges and goes: kstatus by its own library, Argo CD by
//! the health check of `docs/gitops.md`, run by the Lua that Argo CD's is a version of.

use std::fmt::Write;

use anyhow::{Context, Result};
use expect_test::expect_file;
use lab::wait_for;
use serde_json::{Value, json};

use super::{
    kubernetes::{GATEWAY, object, program},
    world::{KEYS, RANGES, VA, World, advertisement, cluster, mesh_gateway},
};
use crate::joined::SOON;

const DOCS: &str = include_str!("../../../docs/gitops.md");

pub(super) fn kstatus_and_argo_cd_read_each_status_right(world: &mut World) -> Result<()> {
    let mn = cluster("mn", 1, KEYS[0], &RANGES);
    let [va, taken] = [("va", 2), ("wa", 3)].map(|(name, id)| cluster(name, id, KEYS[1], &[VA]));
    world.put("meshclusters", &[mn, va, taken])?;
    let outside = advertisement("va", &[VA, "10.45.0.0/16"]);
    world
        .put("routeadvertisements", &[advertisement("mn", &RANGES), outside, advertisement("xa", &["10.46.0.0/16"])])?;
    world.put("egresspolicies", &[object("EgressPolicy", "all", &json!({"members": ["mn"]}))])?;
    world.put("meshgateways", &[mesh_gateway(1, "mn-1")])?;
    let mut told = format!("## applied, and no gateway runs\n{}", read(world)?);
    let gateway = world.start(GATEWAY)?;
    told += &format!("\n## judged: xa has no MeshCluster yet\n{}", judged(world, 1)?);

    gateway.agent.kill()?;
    let mn = cluster("mn", 1, KEYS[0], &RANGES[..1]);
    let va = cluster("va", 2, KEYS[1], &["10.44.0.0/15"]);
    let [wa, xa] = [("wa", 3, "10.47.0.0/16"), ("xa", 4, "10.46.0.0/16")]
        .map(|(name, id, range)| object("MeshCluster", name, &json!({"id": id, "allowedCIDRs": [range]})));
    world.put("meshclusters", &[mn, va, wa, xa])?;
    let inside = advertisement("va", &[VA, "10.45.1.0/24"]);
    world.put("routeadvertisements", &[advertisement("mn", &RANGES[..1]), inside])?;
    world.put("egresspolicies", &[object("EgressPolicy", "all", &json!({"members": ["va"]}))])?;
    told += &format!("\n## mended, xa joins, and no gateway runs\n{}", read(world)?);
    let _agent = world.start_agent(GATEWAY)?;
    told += &format!("\n## judged again\n{}", judged(world, 0)?);
    expect_file!["cases/gitops.txt"].assert_eq(&told);
    Ok(())
}

/// What is read of all objects once so many of them wait.
fn judged(world: &World, waiting: usize) -> Result<String> {
    wait_for(&format!("all objects but {waiting} to be judged"), SOON, || {
        let told = read(world).map_err(|error| format!("{error:#}"))?;
        if told.matches("kstatus: InProgress").count() == waiting { Ok(told) } else { Err(told) }
    })
}

/// What the tools make of every object.
fn read(world: &World) -> Result<String> {
    let list = world.kubectl("get meshclusters,routeadvertisements,egresspolicies,meshgateways -o json")?;
    let kstatus = world.lab.internet.pipe(&program("KSTATUS")?, &[], &list)?;
    let list: Value = serde_json::from_str(&list)?;
    let mut told = String::new();
    for (object, kstatus) in list["items"].as_array().context("a list")?.iter().zip(kstatus.lines()) {
        let [kind, name] = [&object["kind"], &object["metadata"]["name"]].map(|text| text.as_str().unwrap_or_default());
        writeln!(told, "{kind} {name}\n  kstatus: {kstatus}\n  Argo CD: {}", health(world, kind, object)?)?;
    }
    Ok(told)
}

/// `Healthy`, `Progressing` or `Degraded`, and why.
fn health(world: &World, kind: &str, object: &Value) -> Result<String> {
    if !DOCS.contains(&format!("resource.customizations.health.carrick.dev_{kind}:")) {
        return Ok("no check".to_owned());
    }
    let (_, check) = DOCS.split_once("&carrick |\n").context("the check")?;
    let check: Vec<&str> = check.lines().map_while(|line| line.strip_prefix("    ")).collect();
    let script = format!(
        "local obj = {}\nlocal function check()\n{}\nend\nlocal health = check()\nprint(health.status, health.message)",
        lua(object),
        check.join("\n")
    );
    Ok(world.lab.internet.output("lua5.1", &["-e", &script])?.trim_end().replace('\t', " "))
}

/// A JSON value as Lua writes it.
fn lua(value: &Value) -> String {
    match value {
        Value::Null => "nil".to_owned(),
        Value::Array(list) => format!("{{{}}}", list.iter().map(lua).collect::<Vec<_>>().join(",")),
        Value::Object(fields) => {
            let fields = fields.iter().map(|(key, value)| format!("[{key:?}]={}", lua(value)));
            format!("{{{}}}", fields.collect::<Vec<_>>().join(","))
        }
        plain => plain.to_string(),
    }
}
