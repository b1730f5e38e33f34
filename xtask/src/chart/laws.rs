//! What must hold of whatever the chart renders to.
//!
//! Invariant: a law is a pure function of the [`Rendering`], so each is shown to catch what it forbids by a test.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{Switches, flags::Flags, pods, rights, rollout};

/// What came of one set of values.
pub(super) struct Rendering<'a> {
    pub objects: Vec<Value>,
    pub switches: Switches,
    pub flags: &'a Flags,
}

impl Rendering<'_> {
    pub(super) fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.objects.iter().filter(move |object| object["kind"] == kind)
    }

    pub(super) fn is_on(&self, switch: &str) -> bool {
        self.switches.get(switch).copied().unwrap_or(false)
    }
}

type Law = fn(&Rendering<'_>) -> Vec<String>;

const LAWS: &[Law] = &[
    names_are_unique,
    namespaces_are_named_where_there_are_any,
    labels_are_complete,
    what_cannot_be_made_again_is_kept,
    the_hop_has_a_secret_and_slots_have_none,
    switches_do_what_they_say,
    policies_deny,
    pods::are_not_privileged,
    pods::are_on_the_host_network_and_survive,
    pods::mount_only_what_they_need,
    pods::run_an_image_that_is_named,
    pods::pass_flags_that_there_are,
    pods::one_agent_is_on_every_node,
    rights::name_what_they_allow,
    rights::of_workers_are_to_read,
    rights::to_secrets_are_by_name,
    rights::to_slots_objects_are_by_name,
    rights::to_others_kinds_are_to_read,
    rights::are_bound_to_what_is_there,
    rollout::replaces_before_it_adds,
    rollout::of_gateways_is_slot_by_slot,
    rollout::of_tunnels_is_for_people,
    rollout::waits_for_what_is_this_node_s,
    rollout::to_uninstall_cleans_every_node,
];

/// Everything that breaks a law.
pub(super) fn violations(rendering: &Rendering<'_>) -> Vec<String> {
    LAWS.iter().flat_map(|law| law(rendering)).collect()
}

const CLUSTER_WIDE: [&str; 5] = [
    "ClusterRole",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
    "ValidatingAdmissionPolicy",
    "ValidatingAdmissionPolicyBinding",
];
const IN_A_NAMESPACE: [&str; 6] = ["DaemonSet", "ResourceQuota", "Role", "RoleBinding", "Secret", "ServiceAccount"];
const KEPT: [&str; 2] = ["CustomResourceDefinition", "Secret"];

/// `Kind name`, or `Kind namespace/name`.
pub(super) fn name(object: &Value) -> String {
    let text = |field: &Value| field.as_str().unwrap_or("?").to_owned();
    let metadata = &object["metadata"];
    match metadata["namespace"].as_str() {
        Some(namespace) => format!("{} {namespace}/{}", text(&object["kind"]), text(&metadata["name"])),
        None => format!("{} {}", text(&object["kind"]), text(&metadata["name"])),
    }
}

/// The texts of a list; what is none counts as empty.
pub(super) fn texts(list: &Value) -> Vec<&str> {
    list.as_array().into_iter().flatten().map(|text| text.as_str().unwrap_or_default()).collect()
}

pub(super) fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list.as_array().into_iter().flatten()
}

fn names_are_unique(rendering: &Rendering<'_>) -> Vec<String> {
    let mut seen = BTreeSet::new();
    let names = rendering.objects.iter().map(name);
    names.filter(|name| name.contains('?') || !seen.insert(name.clone())).map(|name| format!("{name}: twice")).collect()
}

fn namespaces_are_named_where_there_are_any(rendering: &Rendering<'_>) -> Vec<String> {
    let problem = |object: &Value| {
        let kind = object["kind"].as_str().unwrap_or_default();
        let named = object["metadata"]["namespace"].is_string();
        match (CLUSTER_WIDE.contains(&kind), IN_A_NAMESPACE.contains(&kind)) {
            (true, _) if named => Some("has a namespace, but its kind has none"),
            (_, true) if !named => Some("lacks a namespace"),
            (false, false) => Some("is of a kind that no law knows"),
            _ => None,
        }
    };
    let objects = rendering.objects.iter();
    objects.filter_map(|object| problem(object).map(|problem| format!("{}: {problem}", name(object)))).collect()
}

/// Definitions are generated, and so have none.
fn labels_are_complete(rendering: &Rendering<'_>) -> Vec<String> {
    let wanted = ["name", "instance", "version", "managed-by"].map(|label| format!("app.kubernetes.io/{label}"));
    let objects = rendering.objects.iter().filter(|object| object["kind"] != "CustomResourceDefinition");
    let lacks = |object: &Value| {
        let labels = &object["metadata"]["labels"];
        let missing: Vec<_> = wanted.iter().filter(|label| !labels[label.as_str()].is_string()).cloned().collect();
        (!missing.is_empty()).then(|| format!("{}: lacks {}", name(object), missing.join(", ")))
    };
    objects.filter_map(lacks).collect()
}

fn what_cannot_be_made_again_is_kept(rendering: &Rendering<'_>) -> Vec<String> {
    let kept = rendering.objects.iter().filter(|object| KEPT.iter().any(|kind| object["kind"] == *kind));
    let lost = kept.filter(|object| object["metadata"]["annotations"]["helm.sh/resource-policy"] != "keep");
    lost.map(|object| format!("{}: goes with the release", name(object))).collect()
}

/// What the kubelet writes to the file `hop` is 32 bytes in base64; a slot's key is nobody's to make but the gateway's.
fn the_hop_has_a_secret_and_slots_have_none(rendering: &Rendering<'_>) -> Vec<String> {
    let mut found = Vec::new();
    for secret in rendering.of_kind("Secret") {
        let slot = secret["metadata"]["name"].as_str().and_then(|name| name.strip_prefix("carrick-gateway-"));
        let holds = !secret["data"].is_null() || !secret["stringData"].is_null();
        if slot.is_some() == holds {
            found.push(format!("{}: {}", name(secret), if holds { "has data" } else { "has no data" }));
        }
        if slot.is_none() && !secret["data"]["hop"].as_str().is_some_and(is_secret) {
            found.push(format!("{}: its hop is not 32 bytes in base64", name(secret)));
        }
    }
    found
}

fn is_secret(data: &str) -> bool {
    let file = decoded(data).and_then(|file| String::from_utf8(file).ok());
    file.and_then(|line| decoded(line.trim())).is_some_and(|bytes| bytes.len() == 32)
}

fn decoded(text: &str) -> Option<Vec<u8>> {
    use base64::{Engine, engine::general_purpose::STANDARD};
    STANDARD.decode(text).ok()
}

fn switches_do_what_they_say(rendering: &Rendering<'_>) -> Vec<String> {
    let count = |kind| rendering.of_kind(kind).count();
    let cleans = |object: &&Value| pods::containers(object).all(|container| container["args"][0] == "cleanup");
    let uninstalls = rendering.of_kind("DaemonSet").all(|object| cleans(&object));
    [
        ("crds.install", count("CustomResourceDefinition") == 4, count("CustomResourceDefinition") == 0),
        (
            "admissionPolicies.enabled",
            count("ValidatingAdmissionPolicy") == 3,
            count("ValidatingAdmissionPolicy") + count("ValidatingAdmissionPolicyBinding") == 0,
        ),
        ("resourceQuota", count("ResourceQuota") == 1, count("ResourceQuota") == 0),
        ("uninstall", count("DaemonSet") == 2 && uninstalls, count("DaemonSet") == 3 && !uninstalls),
    ]
    .into_iter()
    .filter(|(switch, on, off)| !if rendering.is_on(switch) { *on } else { *off })
    .map(|(switch, ..)| format!("{switch} is {}, and nothing shows it", rendering.is_on(switch)))
    .collect()
}

fn policies_deny(rendering: &Rendering<'_>) -> Vec<String> {
    let bound = |policy: &Value| {
        let mut bindings = rendering.of_kind("ValidatingAdmissionPolicyBinding");
        bindings.any(|binding| {
            binding["spec"]["policyName"] == policy["metadata"]["name"]
                && texts(&binding["spec"]["validationActions"]) == ["Deny"]
                && binding["spec"]["matchResources"].is_null()
        })
    };
    let policies = rendering.of_kind("ValidatingAdmissionPolicy");
    let weak = policies.filter(|policy| policy["spec"]["failurePolicy"] != "Fail" || !bound(policy));
    weak.map(|policy| format!("{}: denies nothing, or not always", name(policy))).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// What a law says of these objects.
    pub(crate) fn check(law: Law, yaml: &str, expected: &[&str]) {
        check_with(&[], law, yaml, expected);
    }

    /// With these switches on.
    pub(crate) fn check_with(on: &[&str], law: Law, yaml: &str, expected: &[&str]) {
        let flags = Flags::new();
        let objects = serde_saphyr::from_multiple(yaml).expect("YAML");
        let switches = on.iter().map(|&switch| (switch.to_owned(), true)).collect();
        let found = law(&Rendering { objects, switches, flags: &flags });
        assert_eq!(found, expected);
    }

    #[test]
    fn twins_and_the_nameless_are_found() {
        let one = "{kind: Secret, metadata: {name: a, namespace: ns}}";
        let other = "{kind: Secret, metadata: {name: a, namespace: ms}}";
        check(names_are_unique, &format!("{one}\n---\n{other}"), &[]);
        check(names_are_unique, &format!("{one}\n---\n{one}"), &["Secret ns/a: twice"]);
        check(names_are_unique, "{kind: Secret}", &["Secret ?: twice"]);
    }

    #[test]
    fn a_namespace_stands_where_it_belongs() {
        let law = namespaces_are_named_where_there_are_any;
        check(law, "{kind: Secret, metadata: {name: a}}", &["Secret a: lacks a namespace"]);
        let role = "{kind: ClusterRole, metadata: {name: a, namespace: ns}}";
        check(law, role, &["ClusterRole ns/a: has a namespace, but its kind has none"]);
        check(law, "{kind: Job, metadata: {name: a}}", &["Job a: is of a kind that no law knows"]);
        check(law, "{kind: ClusterRole, metadata: {name: a}}", &[]);
    }

    #[test]
    fn labels_are_asked_of_all_but_definitions() {
        let secret = "{kind: Secret, metadata: {name: a, labels: {app.kubernetes.io/name: carrick}}}";
        let lacks = "lacks app.kubernetes.io/instance, app.kubernetes.io/version, app.kubernetes.io/managed-by";
        check(labels_are_complete, secret, &[&format!("Secret a: {lacks}")]);
        check(labels_are_complete, "{kind: CustomResourceDefinition, metadata: {name: a}}", &[]);
    }

    #[test]
    fn keys_and_definitions_are_kept() {
        let law = what_cannot_be_made_again_is_kept;
        check(law, "{kind: Secret, metadata: {name: a}}", &["Secret a: goes with the release"]);
        check(law, "{kind: Secret, metadata: {name: a, annotations: {helm.sh/resource-policy: keep}}}", &[]);
        check(law, "{kind: Role, metadata: {name: a}}", &[]);
    }

    #[test]
    fn the_hop_secret_is_one_and_the_slots_are_empty() {
        let law = the_hop_has_a_secret_and_slots_have_none;
        // `FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=`, and one byte less.
        let secret = "RnBDeWh3czljeHdXb1Y0eEVMdGZKdmpKTit6UVZSUElTbGxSV2dlb3BWRT0=";
        let short = "RnBDeWh3czljeHdXb1Y0eEVMdGZKdmpKTit6UVZSUElTbGxSV2dlb3BRPT0=";
        let hop = |data: &str| format!("{{kind: Secret, metadata: {{name: hop}}, data: {{hop: {data}}}}}");
        check(law, &hop(secret), &[]);
        check(law, &hop(short), &["Secret hop: its hop is not 32 bytes in base64"]);
        check(law, "{kind: Secret, metadata: {name: carrick-gateway-0}}", &[]);
        let full = "{kind: Secret, metadata: {name: carrick-gateway-0}, data: {key: eA==}}";
        check(law, full, &["Secret carrick-gateway-0: has data"]);
    }

    #[test]
    fn a_policy_that_is_not_bound_denies_nothing() {
        let policy = "{kind: ValidatingAdmissionPolicy, metadata: {name: a}, spec: {failurePolicy: Fail}}";
        let binding = "{kind: ValidatingAdmissionPolicyBinding, spec: {policyName: a, validationActions: [Deny]}}";
        let weak = "ValidatingAdmissionPolicy a: denies nothing, or not always";
        check(policies_deny, policy, &[weak]);
        check(policies_deny, &format!("{policy}\n---\n{binding}"), &[]);
        check(policies_deny, &format!("{policy}\n---\n{}", binding.replace("Deny", "Audit")), &[weak]);
        check(policies_deny, &format!("{}\n---\n{binding}", policy.replace("Fail", "Ignore")), &[weak]);
    }

    #[test]
    fn a_switch_without_effect_is_found() {
        let objects = serde_saphyr::from_multiple("{kind: ResourceQuota}").expect("YAML");
        let flags = Flags::new();
        let switches = Switches::from([("crds.install".to_owned(), true), ("uninstall".to_owned(), false)]);
        let found = switches_do_what_they_say(&Rendering { objects, switches, flags: &flags });
        let nothing = |switch: &str, on: bool| format!("{switch} is {on}, and nothing shows it");
        assert_eq!(
            found,
            [nothing("crds.install", true), nothing("resourceQuota", false), nothing("uninstall", false)]
        );
    }
}
