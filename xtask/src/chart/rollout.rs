//! Laws of how pods are replaced, and how they end: slot by slot, and with nothing left behind.

use serde_json::{Value, json};

use super::{
    laws::{Rendering, items, name, texts},
    pods::{containers, pod, unlike},
};

/// Seconds that `carrick drain` takes at most, and some for the agent to end.
const DRAIN: u64 = 30 + 10;
/// Seconds until others have found a gateway again: they probe an idle one every 7 s at least.
const FOUND_AGAIN: u64 = 7;

fn named<'a>(rendering: &'a Rendering<'_>, names: &'a [&str]) -> impl Iterator<Item = &'a Value> {
    rendering.of_kind("DaemonSet").filter(|object| names.iter().any(|name| object["metadata"]["name"] == *name))
}

fn seconds(object: &Value, path: &str) -> u64 {
    object.pointer(path).and_then(Value::as_u64).unwrap_or(0)
}

/// A node has one agent at any time: none before the one before has ended.
pub(super) fn replaces_before_it_adds(rendering: &Rendering<'_>) -> Vec<String> {
    let surges = |object: &&Value| !object["spec"]["updateStrategy"]["rollingUpdate"]["maxSurge"].is_null();
    let found = rendering.of_kind("DaemonSet").filter(surges);
    found.map(|object| format!("{}: has two pods on a node for a while", name(object))).collect()
}

/// One at a time, drained first, and the next one when this one has been found again.
pub(super) fn of_gateways_is_slot_by_slot(rendering: &Rendering<'_>) -> Vec<String> {
    if rendering.is_on("uninstall") {
        return Vec::new();
    }
    let wanted = [
        ("/spec/updateStrategy/type", json!("RollingUpdate")),
        ("/spec/updateStrategy/rollingUpdate/maxUnavailable", json!(1)),
        ("/spec/template/spec/containers/0/lifecycle/preStop/exec/command", json!(["carrick", "drain"])),
    ];
    let of_one = |object: &Value| {
        let mut found = unlike(object, &wanted);
        let (grace, pause) = ("/spec/template/spec/terminationGracePeriodSeconds", "/spec/minReadySeconds");
        if seconds(object, grace) < DRAIN {
            found.push(format!("{grace} is less than the {DRAIN} s of a drain"));
        }
        if seconds(object, pause) <= FOUND_AGAIN {
            found.push(format!(
                "{pause} is not more than {FOUND_AGAIN}: the next one goes before this one is found again"
            ));
        }
        found.into_iter().map(|problem| format!("{}: {problem}", name(object))).collect::<Vec<_>>()
    };
    named(rendering, &["carrick-gateway"]).flat_map(of_one).collect()
}

/// A restart of the tunnel costs its sessions, whatever else an upgrade changes.
pub(super) fn of_tunnels_is_for_people(rendering: &Rendering<'_>) -> Vec<String> {
    let wanted = [("/spec/updateStrategy", json!({"type": "OnDelete"}))];
    let of_one = |object: &Value| -> Vec<String> {
        unlike(object, &wanted).into_iter().map(|problem| format!("{}: {problem}", name(object))).collect()
    };
    named(rendering, &["carrick-tunnel"]).flat_map(of_one).collect()
}

/// Nothing that a tenant writes makes a pod unready, or restarts one.
pub(super) fn waits_for_what_is_this_node_s(rendering: &Rendering<'_>) -> Vec<String> {
    if rendering.is_on("uninstall") {
        return Vec::new();
    }
    let wanted = [
        ("/readinessProbe/exec/command", json!(["carrick", "status", "--serving"])),
        ("/livenessProbe", Value::Null),
        ("/startupProbe", Value::Null),
    ];
    let agents = named(rendering, &["carrick-worker", "carrick-gateway"]);
    let of_one = |object: &Value| -> Vec<String> {
        let all = containers(object).flat_map(|container| unlike(container, &wanted));
        all.map(|problem| format!("{}: {problem}", name(object))).collect()
    };
    agents.flat_map(of_one).collect()
}

/// Where the chart cleans up, every node does so at once; a pod is ready when it has done so, and has no further rights.
pub(super) fn to_uninstall_cleans_every_node(rendering: &Rendering<'_>) -> Vec<String> {
    if !rendering.is_on("uninstall") {
        return Vec::new();
    }
    let wanted = [
        ("/spec/updateStrategy/type", json!("RollingUpdate")),
        ("/spec/updateStrategy/rollingUpdate/maxUnavailable", json!("100%")),
        ("/spec/template/spec/automountServiceAccountToken", json!(false)),
        ("/spec/template/spec/serviceAccountName", Value::Null),
    ];
    let of_one = |object: &Value| {
        let mut found = unlike(object, &wanted);
        let arguments = |list: &str| items(&pod(object)[list]).map(|one| texts(&one["args"])).collect::<Vec<_>>();
        // A container that has only begun counts as ready: what comes before it has to end first.
        let (first, then) = (arguments("initContainers"), arguments("containers"));
        let without_wait =
            |list: &[&str]| list.iter().filter(|word| **word != "--wait").map(|&word| word.to_owned()).collect();
        let same: Vec<Vec<String>> = then.iter().map(|list| without_wait(list)).collect();
        if first.len() != 1 || same != first || !then.iter().all(|list| list.contains(&"--wait")) {
            found.push(format!("cleans up by {first:?}, then {then:?}"));
        }
        found.into_iter().map(|problem| format!("{}: {problem}", name(object))).collect::<Vec<_>>()
    };
    rendering.of_kind("DaemonSet").flat_map(of_one).collect()
}

#[cfg(test)]
mod tests {
    use super::{
        super::laws::tests::{check, check_with},
        *,
    };

    const GATEWAY: &str = "{kind: DaemonSet, metadata: {name: carrick-gateway}, spec: {minReadySeconds: 10, \
        updateStrategy: {type: RollingUpdate, rollingUpdate: {maxUnavailable: 1}}, template: {spec: { \
        terminationGracePeriodSeconds: 45, containers: [{lifecycle: {preStop: {exec: {command: [carrick, drain]}}}}]}}}}";
    const WHO: &str = "DaemonSet carrick-gateway";

    #[test]
    fn gateways_that_go_too_fast_are_found() {
        check(of_gateways_is_slot_by_slot, GATEWAY, &[]);
        let command = "/spec/template/spec/containers/0/lifecycle/preStop/exec/command";
        for (from, to, found) in [
            ("maxUnavailable: 1", "maxUnavailable: 2", "/spec/updateStrategy/rollingUpdate/maxUnavailable is 2"),
            ("RollingUpdate", "OnDelete", r#"/spec/updateStrategy/type is "OnDelete""#),
            ("[carrick, drain]", "[carrick, status]", &format!(r#"{command} is ["carrick","status"]"#)),
            (
                "minReadySeconds: 10",
                "minReadySeconds: 7",
                "/spec/minReadySeconds is not more than 7: the next one goes before this one is found again",
            ),
            (
                "PeriodSeconds: 45",
                "PeriodSeconds: 30",
                "/spec/template/spec/terminationGracePeriodSeconds is less than the 40 s of a drain",
            ),
        ] {
            check(of_gateways_is_slot_by_slot, &GATEWAY.replace(from, to), &[&format!("{WHO}: {found}")]);
        }
        let surge = GATEWAY.replace("maxUnavailable: 1", "maxUnavailable: 1, maxSurge: 1");
        check(replaces_before_it_adds, GATEWAY, &[]);
        check(replaces_before_it_adds, &surge, &[&format!("{WHO}: has two pods on a node for a while")]);
        let tunnel = GATEWAY.replace("carrick-gateway", "carrick-tunnel");
        let rolls = r#"DaemonSet carrick-tunnel: /spec/updateStrategy is {"rollingUpdate":{"maxUnavailable":1},"type":"RollingUpdate"}"#;
        check(of_tunnels_is_for_people, &tunnel, &[rolls]);
    }

    #[test]
    fn a_pod_that_a_tenant_can_make_unready_is_found() {
        let agent = |probes: &str| GATEWAY.replace("lifecycle:", &format!("{probes}, lifecycle:"));
        let good = "readinessProbe: {exec: {command: [carrick, status, --serving]}}";
        check(waits_for_what_is_this_node_s, &agent(good), &[]);
        let all = format!(r#"{WHO}: /readinessProbe/exec/command is ["carrick","status"]"#);
        check(waits_for_what_is_this_node_s, &agent(&good.replace(", --serving", "")), &[&all]);
        let restarted = format!("{WHO}: /livenessProbe is {{}}");
        check(waits_for_what_is_this_node_s, &agent(&format!("{good}, livenessProbe: {{}}")), &[&restarted]);
    }

    #[test]
    fn a_node_that_is_left_dirty_is_found() {
        let good = "{kind: DaemonSet, metadata: {name: d}, spec: {updateStrategy: {type: RollingUpdate, rollingUpdate: \
            {maxUnavailable: 100%}}, template: {spec: {automountServiceAccountToken: false, \
            initContainers: [{args: [cleanup, --a]}], containers: [{args: [cleanup, --wait, --a]}]}}}}";
        let check =
            |yaml: &str, expected: &[&str]| check_with(&["uninstall"], to_uninstall_cleans_every_node, yaml, expected);
        check(good, &[]);
        let ends = r#"DaemonSet d: cleans up by [["cleanup", "--a"]], then [["cleanup", "--a"]]"#;
        check(&good.replace("--wait, ", ""), &[ends]);
        let other = r#"DaemonSet d: cleans up by [["cleanup"]], then [["cleanup", "--wait", "--a"]]"#;
        check(&good.replace("[cleanup, --a]", "[cleanup]"), &[other]);
        let slow = "DaemonSet d: /spec/updateStrategy/rollingUpdate/maxUnavailable is \"10%\"";
        check(&good.replace("100%", "10%"), &[slow]);
    }
}
