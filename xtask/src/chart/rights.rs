//! Laws of what the agents may do with the API.

use serde_json::Value;

use super::laws::{Rendering, items, name, texts};

const READ: [&str; 3] = ["get", "list", "watch"];

/// A binding's subjects that are the service account of workers or of gateways.
fn binds(binding: &Value, account: &str) -> bool {
    items(&binding["subjects"]).any(|subject| subject["kind"] == "ServiceAccount" && subject["name"] == account)
}

fn roles<'a>(rendering: &'a Rendering<'_>) -> impl Iterator<Item = &'a Value> {
    rendering.of_kind("ClusterRole").chain(rendering.of_kind("Role"))
}

fn bindings<'a>(rendering: &'a Rendering<'_>) -> impl Iterator<Item = &'a Value> {
    rendering.of_kind("ClusterRoleBinding").chain(rendering.of_kind("RoleBinding"))
}

fn is_role_of(role: &Value, binding: &Value) -> bool {
    let namespace = |object: &Value| object["metadata"]["namespace"].clone();
    binding["roleRef"]["kind"] == role["kind"]
        && binding["roleRef"]["name"] == role["metadata"]["name"]
        && (role["kind"] == "ClusterRole" || namespace(role) == namespace(binding))
}

/// Each rule, with whose it is.
fn rules<'a>(rendering: &'a Rendering<'_>) -> impl Iterator<Item = (&'a Value, &'a Value)> {
    roles(rendering).flat_map(|role| items(&role["rules"]).map(move |rule| (role, rule)))
}

pub(super) fn name_what_they_allow(rendering: &Rendering<'_>) -> Vec<String> {
    let lists = ["apiGroups", "resources", "verbs"];
    let vague =
        |rule: &Value| lists.iter().any(|list| texts(&rule[*list]).is_empty() || texts(&rule[*list]).contains(&"*"));
    let dangerous =
        |rule: &Value| texts(&rule["verbs"]).iter().any(|verb| ["bind", "escalate", "impersonate"].contains(verb));
    let found = rules(rendering).filter(|(_, rule)| vague(rule) || dangerous(rule));
    found.map(|(role, rule)| format!("{}: {rule} allows more than it names", name(role))).collect()
}

/// And no Secret at all: what they need of it is a file.
pub(super) fn of_workers_are_to_read(rendering: &Rendering<'_>) -> Vec<String> {
    let of_workers =
        |role: &Value| bindings(rendering).any(|binding| binds(binding, "carrick-worker") && is_role_of(role, binding));
    let writes = |rule: &Value| texts(&rule["verbs"]).iter().any(|verb| !READ.contains(verb));
    let keys = |rule: &Value| texts(&rule["resources"]).contains(&"secrets");
    let found = rules(rendering).filter(|(role, rule)| of_workers(role) && (writes(rule) || keys(rule)));
    found.map(|(role, rule)| format!("{}: {rule} is not for workers", name(role))).collect()
}

pub(super) fn to_secrets_are_by_name(rendering: &Rendering<'_>) -> Vec<String> {
    let there = |named: &str| rendering.of_kind("Secret").any(|secret| secret["metadata"]["name"] == named);
    let narrow = |role: &Value, rule: &Value| {
        let names = texts(&rule["resourceNames"]);
        role["kind"] == "Role"
            && !names.is_empty()
            && names.iter().all(|named| named.starts_with("carrick-gateway-") && there(named))
            && texts(&rule["verbs"]) == ["get", "update"]
    };
    let wide = |(role, rule): &(&Value, &Value)| texts(&rule["resources"]).contains(&"secrets") && !narrow(role, rule);
    let found = rules(rendering).filter(wide);
    found.map(|(role, rule)| format!("{}: {rule} is more than slots' keys", name(role))).collect()
}

/// What is of a slot is written by its name. `create` alone cannot be limited so, where the request says no name: of a
/// Lease. (One of server-side apply does.)
pub(super) fn to_slots_objects_are_by_name(rendering: &Rendering<'_>) -> Vec<String> {
    let slots = |prefix: &str| -> Vec<String> { (0..8).map(|slot| format!("{prefix}{slot}")).collect() };
    let (gateways, leases) = (slots(""), slots("carrick-gateway-"));
    let wide = |(role, rule): &(&Value, &Value)| {
        let asks = |resource: &str| texts(&rule["resources"]).contains(&resource);
        let by_name = |names: &[String]| texts(&rule["resourceNames"]) == *names;
        let only = |verbs: &[&str]| texts(&rule["verbs"]).iter().all(|verb| verbs.contains(verb));
        let of_gateways = asks("meshgateways") || asks("meshgateways/status");
        let of_leases = asks("leases");
        (of_gateways && !only(&READ) && !by_name(&gateways))
            || (of_leases && (role["kind"] != "Role" || !only(&["list", "create"]) && !by_name(&leases)))
    };
    let found = rules(rendering).filter(wide);
    found.map(|(role, rule)| format!("{}: {rule} is more than slots' objects", name(role))).collect()
}

/// Of Kubernetes' and of network plugins only these kinds are looked at, and of CRDs only named ones.
pub(super) fn to_others_kinds_are_to_read(rendering: &Rendering<'_>) -> Vec<String> {
    const READABLE: [&str; 5] = ["nodes", "servicecidrs", "ciliumnodes", "ippools", "blockaffinities"];
    let fits = |rule: &Value| {
        let only_reads = texts(&rule["verbs"]).iter().all(|verb| READ.contains(verb));
        let known = |resource: &&str| {
            READABLE.contains(resource)
                || (*resource == "customresourcedefinitions" && !texts(&rule["resourceNames"]).is_empty())
        };
        only_reads && texts(&rule["resources"]).iter().all(known)
    };
    let cluster_wide = rules(rendering).filter(|(role, _)| role["kind"] == "ClusterRole");
    let found = cluster_wide.filter(|(_, rule)| texts(&rule["apiGroups"]) != ["carrick.dev"] && !fits(rule));
    found.map(|(role, rule)| format!("{}: {rule} is more than where pods and services are", name(role))).collect()
}

/// Roles to accounts, and pods to accounts.
pub(super) fn are_bound_to_what_is_there(rendering: &Rendering<'_>) -> Vec<String> {
    let account = |named: &Value, namespace: &Value| {
        let mut accounts = rendering.of_kind("ServiceAccount");
        accounts.any(|one| one["metadata"]["name"] == *named && one["metadata"]["namespace"] == *namespace)
    };
    let mut found = Vec::new();
    for binding in bindings(rendering) {
        if !roles(rendering).any(|role| is_role_of(role, binding)) {
            found.push(format!("{}: its role is not there", name(binding)));
        }
        let subjects: Vec<&Value> = items(&binding["subjects"]).collect();
        if subjects.is_empty() || !subjects.iter().all(|subject| account(&subject["name"], &subject["namespace"])) {
            found.push(format!("{}: its account is not there", name(binding)));
        }
    }
    let idle = roles(rendering).filter(|role| !bindings(rendering).any(|binding| is_role_of(role, binding)));
    found.extend(idle.map(|role| format!("{}: is bound to nobody", name(role))));
    for object in rendering.of_kind("DaemonSet") {
        let pod = &object["spec"]["template"]["spec"];
        let has_none = pod["serviceAccountName"].is_null() && pod["automountServiceAccountToken"] == false;
        if !has_none && !account(&pod["serviceAccountName"], &object["metadata"]["namespace"]) {
            found.push(format!("{}: its account is not there", name(object)));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::{super::laws::tests::check, *};

    fn role(kind: &str, rule: &str) -> String {
        format!("{{kind: {kind}, metadata: {{name: r, namespace: ns}}, rules: [{rule}]}}")
    }

    /// A binding of the role to an account that is there.
    fn bound(kind: &str, account: &str) -> String {
        let metadata = format!("metadata: {{name: {account}, namespace: ns}}");
        let subject = format!("{{kind: ServiceAccount, name: {account}, namespace: ns}}");
        let binding =
            format!("{{kind: {kind}Binding, {metadata}, roleRef: {{kind: {kind}, name: r}}, subjects: [{subject}]}}");
        format!("\n---\n{{kind: ServiceAccount, {metadata}}}\n---\n{binding}")
    }

    #[test]
    fn what_names_nothing_allows_too_much() {
        let good = "{apiGroups: [''], resources: [nodes], verbs: [get]}";
        check(name_what_they_allow, &role("Role", good), &[]);
        for (from, to, rule) in [
            ("[nodes]", "['*']", r#"{"apiGroups":[""],"resources":["*"],"verbs":["get"]}"#),
            ("[get]", "['*']", r#"{"apiGroups":[""],"resources":["nodes"],"verbs":["*"]}"#),
            ("[get]", "[impersonate]", r#"{"apiGroups":[""],"resources":["nodes"],"verbs":["impersonate"]}"#),
            ("apiGroups: [''], ", "", r#"{"resources":["nodes"],"verbs":["get"]}"#),
        ] {
            let found = format!("Role ns/r: {rule} allows more than it names");
            check(name_what_they_allow, &role("Role", &good.replace(from, to)), &[&found]);
        }
    }

    #[test]
    fn a_worker_that_writes_or_reads_keys_is_found() {
        let objects = |resource: &str, verb: &str, account: &str| {
            let rule = format!("{{resources: [{resource}], verbs: [get, {verb}]}}");
            role("ClusterRole", &rule) + &bound("ClusterRole", account)
        };
        check(of_workers_are_to_read, &objects("nodes", "watch", "carrick-worker"), &[]);
        check(of_workers_are_to_read, &objects("nodes", "patch", "carrick-gateway"), &[]);
        let writes = r#"ClusterRole ns/r: {"resources":["nodes"],"verbs":["get","patch"]} is not for workers"#;
        check(of_workers_are_to_read, &objects("nodes", "patch", "carrick-worker"), &[writes]);
        let keys = r#"ClusterRole ns/r: {"resources":["secrets"],"verbs":["get","list"]} is not for workers"#;
        check(of_workers_are_to_read, &objects("secrets", "list", "carrick-worker"), &[keys]);
    }

    #[test]
    fn secrets_are_those_of_slots_that_there_are() {
        let secret = "\n---\n{kind: Secret, metadata: {name: carrick-gateway-0}}";
        let rule =
            |names: &str, verbs: &str| format!("{{resources: [secrets], resourceNames: [{names}], verbs: [{verbs}]}}");
        let good = rule("carrick-gateway-0", "get, update");
        check(to_secrets_are_by_name, &(role("Role", &good) + secret), &[]);
        for (kind, names, verbs) in [
            ("ClusterRole", "carrick-gateway-0", "get, update"),
            ("Role", "", "get, update"),
            ("Role", "carrick-gateway-1", "get, update"),
            ("Role", "carrick-gateway-0", "get, list"),
        ] {
            let list = |texts: &str| {
                let quoted: Vec<String> =
                    texts.split(", ").filter(|text| !text.is_empty()).map(|text| format!("{text:?}")).collect();
                quoted.join(",")
            };
            let shown =
                format!(r#"{{"resourceNames":[{}],"resources":["secrets"],"verbs":[{}]}}"#, list(names), list(verbs));
            let found = format!("{kind} ns/r: {shown} is more than slots' keys");
            check(to_secrets_are_by_name, &(role(kind, &rule(names, verbs)) + secret), &[&found]);
        }
    }

    #[test]
    fn what_is_written_of_slots_has_their_names() {
        let law = to_slots_objects_are_by_name;
        let names = |prefix: &str| (0..8).map(|slot| format!("{prefix}{slot}")).collect::<Vec<_>>().join("','");
        let named = |prefix: &str| format!("resourceNames: ['{}'], ", names(prefix));
        let rule =
            |names: &str, resource: &str, verb: &str| format!("{{{names}resources: [{resource}], verbs: [{verb}]}}");
        for (names, resource, verb) in [
            (named(""), "meshgateways", "create"),
            (named(""), "meshgateways/status", "patch"),
            (String::new(), "meshgateways", "watch"),
            (named("carrick-gateway-"), "leases", "patch"),
            (String::new(), "leases", "list"),
            (String::new(), "leases", "create"),
        ] {
            check(law, &role("Role", &rule(&names, resource, verb)), &[]);
        }
        for (resource, verb) in
            [("meshgateways", "create"), ("meshgateways/status", "patch"), ("leases", "patch"), ("leases", "delete")]
        {
            let shown = format!(r#"{{"resources":["{resource}"],"verbs":["{verb}"]}}"#);
            let found = format!("Role ns/r: {shown} is more than slots' objects");
            check(law, &role("Role", &rule("", resource, verb)), &[&found]);
        }
        let everywhere = r#"ClusterRole ns/r: {"resources":["leases"],"verbs":["list"]} is more than slots' objects"#;
        check(law, &role("ClusterRole", &rule("", "leases", "list")), &[everywhere]);
    }

    #[test]
    fn what_is_others_is_only_read_and_crds_by_name() {
        let law = to_others_kinds_are_to_read;
        let crds = "apiGroups: [apiextensions.k8s.io], resources: [customresourcedefinitions], verbs: [watch]";
        for good in [
            "{apiGroups: [''], resources: [nodes], verbs: [get, watch]}".to_owned(),
            "{apiGroups: [crd.projectcalico.org], resources: [ippools, blockaffinities], verbs: [list]}".to_owned(),
            "{apiGroups: [carrick.dev], resources: [meshgateways], verbs: [patch]}".to_owned(),
            format!("{{resourceNames: [a.b], {crds}}}"),
        ] {
            check(law, &role("ClusterRole", &good), &[]);
        }
        for (rule, shown) in [
            (
                "{apiGroups: [''], resources: [pods], verbs: [get]}",
                r#"{"apiGroups":[""],"resources":["pods"],"verbs":["get"]}"#,
            ),
            (
                "{apiGroups: [cilium.io], resources: [ciliumnodes], verbs: [get, update]}",
                r#"{"apiGroups":["cilium.io"],"resources":["ciliumnodes"],"verbs":["get","update"]}"#,
            ),
            (
                &format!("{{{crds}}}"),
                r#"{"apiGroups":["apiextensions.k8s.io"],"resources":["customresourcedefinitions"],"verbs":["watch"]}"#,
            ),
        ] {
            let found = format!("ClusterRole ns/r: {shown} is more than where pods and services are");
            check(law, &role("ClusterRole", rule), &[&found]);
        }
    }

    #[test]
    fn loose_ends_are_found() {
        let law = are_bound_to_what_is_there;
        check(law, &(role("Role", "") + &bound("Role", "a")), &[]);
        check(law, &role("Role", ""), &["Role ns/r: is bound to nobody"]);
        check(law, &bound("Role", "a")[5..], &["RoleBinding ns/a: its role is not there"]);
        let elsewhere = bound("Role", "a").replacen("{kind: ServiceAccount, metadata", "{kind: Other, metadata", 1);
        check(law, &(role("Role", "") + &elsewhere), &["RoleBinding ns/a: its account is not there"]);
        let pod =
            "{kind: DaemonSet, metadata: {name: d, namespace: ns}, spec: {template: {spec: {serviceAccountName: a}}}}";
        check(law, pod, &["DaemonSet ns/d: its account is not there"]);
        check(law, &pod.replace("serviceAccountName: a", "automountServiceAccountToken: false"), &[]);
    }
}
