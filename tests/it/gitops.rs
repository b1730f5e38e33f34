//! What GitOps tools make of the mesh's objects: the health check of `docs/gitops.md`, run by the Lua that Argo CD's is a
//! version of.

use std::{fmt::Write, process::Command};

use agent::{
    api::{MeshCluster, Objects, RouteAdvertisement},
    conditions::{Subject, sayings},
    intent::{self, Intent, Local},
};
use expect_test::expect;
use serde_json::{Value, json};

/// The check, as it stands in the docs.
fn health_check() -> String {
    let docs = include_str!("../../docs/gitops.md");
    let (_, from) = docs.split_once("&carrick |\n").expect("the check");
    let lines = from.lines().map_while(|line| line.strip_prefix("    "));
    lines.map(|line| format!("{line}\n")).collect()
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

/// `Healthy`, `Progressing` or `Degraded`, and why.
fn health(object: &Value) -> String {
    let script = format!(
        "local obj = {}\nlocal function check()\n{}end\nlocal health = check()\nprint(health.status .. \" \" .. health.message)",
        lua(object),
        health_check()
    );
    let run = Command::new("lua5.1").args(["-e", &script]).output().expect("lua5.1 runs");
    assert!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    String::from_utf8(run.stdout).expect("text").trim_end().to_owned()
}

fn objects() -> Objects {
    let meta = |name: &str| json!({"name": name, "uid": name, "generation": 3});
    let clusters = json!([{"metadata": meta("mn"), "spec": {"id": 1, "allowedCIDRs": ["10.42.0.0/16"]}}]);
    let advertisement = |name: &str, cluster: &str, cidr: &str| json!({"metadata": meta(name), "spec": {"cluster": cluster, "routes": [{"cidr": cidr, "type": "Pod"}]}});
    let advertisements = json!([
        advertisement("good", "mn", "10.42.0.0/16"),
        advertisement("refused", "mn", "10.43.0.0/16"),
        advertisement("waits", "va", "10.44.0.0/16"),
    ]);
    Objects {
        clusters: serde_json::from_value(clusters).expect("MeshClusters"),
        advertisements: serde_json::from_value(advertisements).expect("RouteAdvertisements"),
        ..Objects::default()
    }
}

/// Each object with the status that a gateway writes.
fn said(objects: &Objects) -> Vec<(Subject, Value)> {
    let me = "mn".parse().expect("a name");
    let (mesh, mut rejected) = intent::mesh(objects, "mesh.internal");
    let local = Local { cluster: me, cidrs: Vec::new(), api_server: None };
    let (intent, here) = Intent::new(&mesh, objects, &local);
    rejected.extend(here);
    let said = sayings(objects, &rejected, &intent.me, &Default::default()).into_iter();
    said.map(|(subject, saying)| {
        let status = saying.due("2026-01-01T00:00:00Z".parse().expect("a time")).expect("nothing stands");
        let object = json!({"metadata": {"name": subject.name, "generation": 3}, "status": status});
        (subject, object)
    })
    .collect()
}

#[test]
fn argo_cd_s_health_check_reads_each_status_right() {
    let mut told = String::new();
    for (subject, mut object) in said(&objects()) {
        writeln!(told, "{:?} {}: {}", subject.kind, subject.name, health(&object)).expect("a string");
        object["metadata"]["generation"] = json!(4);
        writeln!(told, "  changed since: {}", health(&object)).expect("a string");
    }
    expect![[r#"
        MeshCluster mn: Healthy
          changed since: Progressing no gateway of this cluster has seen it yet
        RouteAdvertisement good: Healthy
          changed since: Progressing no gateway of this cluster has seen it yet
        RouteAdvertisement refused: Degraded spec.routes[0].cidr: OutsideAllowed: 10.43.0.0/16 lies in none of the allowedCIDRs of MeshCluster mn: have it added there
          changed since: Progressing no gateway of this cluster has seen it yet
        RouteAdvertisement waits: Progressing spec.cluster: UnknownCluster: no MeshCluster named va is accepted: this waits until one is
          changed since: Progressing no gateway of this cluster has seen it yet
    "#]].assert_eq(&told);
}

#[test]
fn what_nobody_has_looked_at_is_not_healthy() {
    use kube::CustomResourceExt;
    for crd in [MeshCluster::crd(), RouteAdvertisement::crd()] {
        let crd = serde_json::to_value(crd).expect("a CRD is JSON");
        let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
        let new = json!({"metadata": {"generation": 1}, "status": schema["properties"]["status"]["default"]});
        let told = [health(&new), health(&json!({"metadata": {"generation": 1}}))];
        assert_eq!(told, ["Progressing no gateway of this cluster has seen it yet"; 2]);
        assert_ne!(new["status"], Value::Null);
    }
}
