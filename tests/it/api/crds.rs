//! What the schemas accept and refuse, what `carrick validate` makes of the same, and what `kubectl` shows. Cases are data;
//! `UPDATE_EXPECT=1` writes the answers anew.

use std::fs;

use anyhow::{Context, Result, bail, ensure};
use expect_test::{expect, expect_file};
use serde_json::{Value, json};

use super::{
    client::{Answer, Ask},
    kubernetes::{ADMIN, MESH, object},
    world::{KEYS, RANGES, World, advertisement, cluster, mesh_gateway},
};

const CASES: &str = include_str!("cases/crds.txt");

/// What a case's heading says of the API server and of `validate`: whether they take it.
const HEADINGS: [(&str, [bool; 2]); 3] = [
    ("## accepted", [true, true]),
    ("## accepted, and refused by validate", [true, false]),
    ("## refused", [false, false]),
];

pub(super) fn the_schema_refuses_what_it_can_and_validate_the_rest(world: &mut World) -> Result<()> {
    let (mut text, mut wrong, mut wanted) = (String::new(), Vec::new(), None);
    for line in CASES.lines().filter(|line| !line.starts_with("=>")) {
        text += &format!("{line}\n");
        if let Some((_, both)) = HEADINGS.iter().find(|(heading, _)| *heading == line) {
            wanted = Some(*both);
        }
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let (plural, case) = read(line)?;
        let path = format!("{MESH}/{plural}?dryRun=All&fieldValidation=Strict");
        let answer = world.ask(ADMIN, &Ask::create(&path, case.clone()))?;
        let refusals = validate(world, &case)?;
        text += &format!("=> {}\n", shown(&answer));
        text += &refusals.iter().map(|refusal| format!("=> validate: {refusal}\n")).collect::<String>();
        let taken = [answer.is_ok(), refusals.is_empty()];
        if wanted != Some(taken) {
            wrong.push(line.to_owned());
        }
    }
    expect_file!["cases/crds.txt"].assert_eq(&text);
    ensure!(wrong.is_empty(), "these stand under the wrong heading:\n{}", wrong.join("\n"));
    Ok(())
}

/// The plural of its kind, and a good object changed by the case's patch.
fn read(line: &str) -> Result<(&'static str, Value)> {
    let (kind, patch) = line.split_once(' ').with_context(|| format!("KIND PATCH: {line}"))?;
    let (plural, mut object) = match kind {
        "MeshCluster" => ("meshclusters", cluster("mn", 1, KEYS[0], &RANGES)),
        "RouteAdvertisement" => ("routeadvertisements", advertisement("mn", &["10.42.0.0/16"])),
        "EgressPolicy" => ("egresspolicies", object("EgressPolicy", "all", &json!({}))),
        "MeshGateway" => ("meshgateways", mesh_gateway(0, "mn-0")),
        _ => bail!("what is {kind}?"),
    };
    merge(&mut object, &expand(&serde_json::from_str(patch).with_context(|| line.to_owned())?)?);
    Ok((plural, object))
}

/// As a JSON merge patch (RFC 7396).
fn merge(value: &mut Value, patch: &Value) {
    let Value::Object(fields) = patch else {
        *value = patch.clone();
        return;
    };
    if !value.is_object() {
        *value = json!({});
    }
    for (name, patch) in fields {
        if patch.is_null() {
            value.as_object_mut().map(|object| object.remove(name));
        } else {
            merge(&mut value[name], patch);
        }
    }
}

/// An element of a list that holds `{1..3}` stands for three: with 1, 2 and 3 in its place, and without quotes where they
/// are all that a text holds.
fn expand(value: &Value) -> Result<Value> {
    match value {
        Value::Object(fields) => fields
            .iter()
            .map(|(name, value)| Ok((name.clone(), expand(value)?)))
            .collect::<Result<_>>()
            .map(Value::Object),
        Value::Array(elements) => {
            let mut all = Vec::new();
            for element in elements {
                let text = element.to_string();
                let range = text.split_once('{').and_then(|_| {
                    let (before, _) = text.split_once("..")?;
                    let from = before.rsplit_once('{')?.1;
                    let to = text.split_once("..")?.1.split_once('}')?.0;
                    Some((from.parse::<u32>().ok()?, to.parse::<u32>().ok()?))
                });
                let Some((from, to)) = range else {
                    all.push(element.clone());
                    continue;
                };
                let place = format!("{{{from}..{to}}}");
                for n in from..=to {
                    let text = text.replace(&format!("\"{place}\""), &n.to_string()).replace(&place, &n.to_string());
                    all.push(serde_json::from_str(&text).context(text)?);
                }
            }
            Ok(Value::Array(all))
        }
        other => Ok(other.clone()),
    }
}

fn shown(answer: &Answer) -> String {
    match answer {
        Ok(_) => "accepted".to_owned(),
        Err(refusal) => {
            let reason = refusal.message.split_once(" is invalid: ").map_or(&*refusal.message, |(_, reason)| reason);
            format!("{} {}", refusal.code, reason.trim_end().replace('\n', " "))
        }
    }
}

/// What `carrick validate` refuses of a folder with this object and those that it names.
fn validate(world: &World, case: &Value) -> Result<Vec<String>> {
    let folder = world.lab.dir("validate");
    fs::create_dir_all(&folder).context("make a folder")?;
    let address = json!({"type": "InternalIP", "address": "203.0.113.2"});
    let address6 = json!({"type": "InternalIP", "address": "2001:db8:1::2"});
    let status = json!({"addresses": [address, address6]});
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "mn-0"}, "status": status});
    let mut named = vec![node, cluster("va", 2, KEYS[1], &["10.44.0.0/16"])];
    named.extend((case["kind"] != "MeshCluster").then(|| cluster("mn", 1, KEYS[0], &RANGES)));
    let documents: String = named.iter().map(|object| format!("---\n{object}\n")).collect();
    fs::write(folder.join("named.yaml"), documents).context("write what is named")?;
    fs::write(folder.join("case.yaml"), case.to_string()).context("write the case")?;
    let script = format!("{} validate {} -o json || true", world.carrick.path().display(), folder.display());
    let said: Value = serde_json::from_str(&world.lab.internet.output("sh", &["-c", &script])?)?;
    let prefix = format!("{}/", folder.display());
    let list = |name: &str| said[name].as_array().cloned().unwrap_or_default();
    let texts = list("problems").into_iter().chain(list("rejections"));
    Ok(texts.filter_map(|text| Some(text.as_str()?.replace(&prefix, ""))).collect())
}

/// Each line: what is changed of an object that is there, and the answer.
pub(super) fn what_must_not_change_does_not(world: &mut World) -> Result<()> {
    world.put("meshclusters", &[cluster("mn", 1, KEYS[0], &RANGES)])?;
    world.put("routeadvertisements", &[advertisement("mn", &["10.42.0.0/16"])])?;
    let cases = [
        ("meshclusters/mn", json!({"spec": {"id": 2}})),
        ("meshclusters/mn", json!({"spec": {"id": null}})),
        ("meshclusters/mn", json!({"spec": {"gateways": []}})),
        ("meshclusters/mn", json!({"spec": {"allowedCIDRs": []}})),
        ("routeadvertisements/mn", json!({"spec": {"cluster": "va"}})),
        ("routeadvertisements/mn", json!({"spec": {"to": ["va"]}})),
    ];
    let mut text = String::new();
    for (path, patch) in cases {
        let answer = world.ask(ADMIN, &Ask::merge(&format!("{MESH}/{path}?dryRun=All"), patch.clone()))?;
        text += &format!("{path} {patch}\n=> {}\n", shown(&answer));
    }
    expect![[r#"
        meshclusters/mn {"spec":{"id":2}}
        => 422 spec.id: Invalid value: 2: is immutable: delete the object and create it anew
        meshclusters/mn {"spec":{"id":null}}
        => 422 [spec.id: Required value, <nil>: Invalid value: null: some validation rules were not checked because the object was invalid; correct the existing errors to complete validation]
        meshclusters/mn {"spec":{"gateways":[]}}
        => accepted
        meshclusters/mn {"spec":{"allowedCIDRs":[]}}
        => accepted
        routeadvertisements/mn {"spec":{"cluster":"va"}}
        => 422 [<nil>: Invalid value: metadata.name must be the name in spec.cluster, alone or with a number behind it: .1 to .63, spec.cluster: Invalid value: "va": is immutable: delete the object and create it anew]
        routeadvertisements/mn {"spec":{"to":["va"]}}
        => accepted
    "#]].assert_eq(&text);
    Ok(())
}

pub(super) fn kubectl_shows_what_matters(world: &mut World) -> Result<()> {
    world.put("meshclusters", &[cluster("mn", 1, KEYS[0], &RANGES)])?;
    world.put("routeadvertisements", &[advertisement("mn", &["10.42.0.0/16", "fd00:10:1::/48"])])?;
    world.put("egresspolicies", &[object("EgressPolicy", "all", &json!({"members": ["mn"]}))])?;
    world.put("meshgateways", &[mesh_gateway(0, "mn-0")])?;
    let condition = |kind: &str| json!({"type": kind, "status": "True", "reason": "Accepted", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let status = json!({"status": {"conditions": [condition("Ready"), condition("Connected")]}});
    world.admin(&Ask::merge(&format!("{MESH}/meshclusters/mn/status"), status))?;
    let draining = json!({"status": {"draining": true}});
    world.admin(&Ask::merge(&format!("{MESH}/meshgateways/0/status"), draining))?;

    let text = ["get carrick", "get mcl,radv,egp,mgw -o wide", "explain meshcluster.spec.gateways.publicKey"]
        .map(|line| Ok(format!("$ kubectl {line}\n{}", without_age(&world.kubectl(line)?))))
        .into_iter()
        .collect::<Result<String>>()?;
    expect![[r#"
        $ kubectl get carrick
        NAME                           MEMBERS   READY
        egresspolicy.carrick.dev/all   ["mn"]    Unknown

        NAME                         ID    READY   CONNECTED
        meshcluster.carrick.dev/mn   1     True    True

        NAME                        NODE   DRAINING   HEARTBEAT
        meshgateway.carrick.dev/0   mn-0   true

        NAME                                CLUSTER   FIRST ROUTE    READY
        routeadvertisement.carrick.dev/mn   mn        10.42.0.0/16   Unknown
        $ kubectl get mcl,radv,egp,mgw -o wide
        NAME                         ID    READY   CONNECTED   ALLOWED
        meshcluster.carrick.dev/mn   1     True    True        ["10.42.0.0/16","fd00:10:1::/48"]

        NAME                                CLUSTER   FIRST ROUTE    READY     TO
        routeadvertisement.carrick.dev/mn   mn        10.42.0.0/16   Unknown

        NAME                           MEMBERS   READY
        egresspolicy.carrick.dev/all   ["mn"]    Unknown

        NAME                        NODE   DRAINING   HEARTBEAT   HOP
        meshgateway.carrick.dev/0   mn-0   true
        $ kubectl explain meshcluster.spec.gateways.publicKey
        GROUP:      carrick.dev
        KIND:       MeshCluster
        VERSION:    v1alpha1

        FIELD: publicKey <string>


        DESCRIPTION:
            The slot's WireGuard public key in base64, as `carrick keys show` prints it.
            A key belongs to a slot, not to a
            node, and to one slot only.


    "#]]
    .assert_eq(&text);
    Ok(())
}

/// Without the last column of tables, which is the object's age.
fn without_age(text: &str) -> String {
    let mut table = false;
    let line = |line: &str| {
        table = line.ends_with(" AGE") || (table && !line.is_empty());
        let kept = if table { line.rsplit_once(' ').map_or(line, |(kept, _)| kept) } else { line };
        format!("{}\n", kept.trim_end())
    };
    text.lines().map(line).collect()
}
