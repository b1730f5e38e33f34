//! Laws of pods: what they may do to their node, and that they are there.

use serde_json::{Value, json};

use super::{
    flags,
    laws::{Rendering, items, name, texts},
};

/// The node's files that each DaemonSet may have; no other pod has any.
const HOST_PATHS: [(&str, &[&str]); 3] = [
    ("carrick-worker", &["/run/carrick", "/sys/fs/bpf"]),
    ("carrick-gateway", &["/run/carrick", "/sys/fs/bpf"]),
    ("carrick-tunnel", &["/run/carrick", "/dev/net/tun"]),
];
/// The capabilities that each may have.
const CAPABILITIES: [(&str, &[&str]); 3] = [
    ("carrick-worker", &["NET_ADMIN", "BPF", "PERFMON"]),
    ("carrick-gateway", &["NET_ADMIN", "BPF", "PERFMON"]),
    ("carrick-tunnel", &["NET_ADMIN"]),
];
const LABEL: &str = "carrick.dev/gateway";

fn of<'a>(table: &[(&str, &'a [&'a str])], object: &Value) -> &'a [&'a str] {
    table.iter().find(|(name, _)| object["metadata"]["name"] == *name).map_or(&[], |(_, allowed)| allowed)
}

pub(super) fn pod(object: &Value) -> &Value {
    &object["spec"]["template"]["spec"]
}

/// Of a DaemonSet: those that run before the others too.
pub(super) fn containers(object: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers"].into_iter().flat_map(|list| items(&pod(object)[list]))
}

/// Asks every container of every DaemonSet.
fn each(rendering: &Rendering<'_>, ask: impl Fn(&Value, &Value) -> Vec<String>) -> Vec<String> {
    let of_one = |object: &Value| -> Vec<String> {
        let say = |container: &Value, problem: String| format!("{} {}: {problem}", name(object), container["name"]);
        let all = containers(object).flat_map(|one| ask(object, one).into_iter().map(move |problem| say(one, problem)));
        all.collect()
    };
    rendering.of_kind("DaemonSet").flat_map(of_one).collect()
}

/// The fields that are not as they should be, as `field is VALUE`.
pub(super) fn unlike(object: &Value, wanted: &[(&str, Value)]) -> Vec<String> {
    let differs = |(path, wanted): &&(&str, Value)| object.pointer(path).unwrap_or(&Value::Null) != wanted;
    let say = |(path, _): &(&str, Value)| format!("{path} is {}", object.pointer(path).unwrap_or(&Value::Null));
    wanted.iter().filter(differs).map(say).collect()
}

pub(super) fn are_not_privileged(rendering: &Rendering<'_>) -> Vec<String> {
    each(rendering, |object, container| {
        let wanted = [
            ("/securityContext/privileged", json!(false)),
            ("/securityContext/allowPrivilegeEscalation", json!(false)),
            ("/securityContext/readOnlyRootFilesystem", json!(true)),
            ("/securityContext/runAsUser", json!(0)),
            ("/securityContext/capabilities/drop", json!(["ALL"])),
            ("/securityContext/capabilities/add", json!(of(&CAPABILITIES, object))),
            ("/securityContext/seccompProfile", Value::Null),
        ];
        unlike(container, &wanted)
    })
}

pub(super) fn are_on_the_host_network_and_survive(rendering: &Rendering<'_>) -> Vec<String> {
    let wanted = [
        ("/hostNetwork", json!(true)),
        ("/hostPID", Value::Null),
        ("/hostIPC", Value::Null),
        ("/dnsPolicy", json!("Default")),
        ("/securityContext/seccompProfile/type", json!("RuntimeDefault")),
        ("/priorityClassName", json!("system-node-critical")),
        ("/tolerations", json!([{"operator": "Exists"}])),
        ("/nodeSelector/kubernetes.io~1os", json!("linux")),
    ];
    let of_one = |object: &Value| -> Vec<String> {
        let say = |problem| format!("{}: {problem}", name(object));
        unlike(pod(object), &wanted).into_iter().map(say).collect()
    };
    let of_pods = rendering.of_kind("DaemonSet").flat_map(of_one);
    of_pods
        .chain(each(rendering, |_, container| {
            let wants =
                |path: &str| container.pointer(path).is_none_or(Value::is_null).then(|| format!("{path} is not set"));
            ["/resources/requests/cpu", "/resources/requests/memory", "/resources/limits/memory"]
                .into_iter()
                .filter_map(wants)
                .collect()
        }))
        .collect()
}

/// And everything that they mount is a volume, and every volume is mounted.
pub(super) fn mount_only_what_they_need(rendering: &Rendering<'_>) -> Vec<String> {
    let of_one = |object: &Value| {
        let mut found = Vec::new();
        let mounts: Vec<&Value> = containers(object).flat_map(|one| items(&one["volumeMounts"])).collect();
        let volumes: Vec<&Value> = items(&pod(object)["volumes"]).collect();
        for volume in &volumes {
            let path = &volume["hostPath"]["path"];
            if path.as_str().is_some_and(|path| !of(&HOST_PATHS, object).contains(&path)) {
                found.push(format!("{}: has {path} of its node", name(object)));
            }
            if !mounts.iter().any(|mount| mount["name"] == volume["name"]) {
                found.push(format!("{}: nothing mounts {}", name(object), volume["name"]));
            }
        }
        let strange = mounts.iter().filter(|mount| !volumes.iter().any(|volume| mount["name"] == volume["name"]));
        found.extend(strange.map(|mount| format!("{}: has no volume {}", name(object), mount["name"])));
        found
    };
    rendering.of_kind("DaemonSet").flat_map(of_one).collect()
}

/// By a tag other than `latest`, or a digest.
pub(super) fn run_an_image_that_is_named(rendering: &Rendering<'_>) -> Vec<String> {
    each(rendering, |_, container| {
        let image = container["image"].as_str().unwrap_or_default();
        let (tagged, digest) = image.split_once('@').map_or((image, None), |(tagged, digest)| (tagged, Some(digest)));
        let tag = tagged.rsplit('/').next().and_then(|last| last.split_once(':')).map_or("", |(_, tag)| tag);
        let digest_is_good =
            digest.is_none_or(|digest| digest.strip_prefix("sha256:").is_some_and(|hex| hex.len() == 64));
        let good = !tag.is_empty() && tag != "latest" && digest_is_good && container["imagePullPolicy"].is_string();
        if good { Vec::new() } else { vec![format!("its image is {image:?}")] }
    })
}

/// So do probes and hooks, which name the program too.
pub(super) fn pass_flags_that_there_are(rendering: &Rendering<'_>) -> Vec<String> {
    let commands = ["/readinessProbe/exec/command", "/livenessProbe/exec/command", "/lifecycle/preStop/exec/command"];
    each(rendering, |_, container| {
        let mut found = flags::unknown(rendering.flags, &texts(&container["args"]));
        for command in commands.iter().filter_map(|path| container.pointer(path)) {
            match texts(command).split_first() {
                Some((&"carrick", arguments)) => found.extend(flags::unknown(rendering.flags, arguments)),
                _ => found.push(format!("runs {command}, which the image does not have")),
            }
        }
        found
    })
}

/// Every term of the affinity asks for the label, or for none: no node has two agents, or none.
pub(super) fn one_agent_is_on_every_node(rendering: &Rendering<'_>) -> Vec<String> {
    let misplaced = |object: &&Value| {
        let operator = if object["metadata"]["name"] == "carrick-worker" { "DoesNotExist" } else { "Exists" };
        let path = "/affinity/nodeAffinity/requiredDuringSchedulingIgnoredDuringExecution/nodeSelectorTerms";
        let terms: Vec<&Value> = pod(object).pointer(path).into_iter().flat_map(items).collect();
        let asks = |term: &&Value| {
            let mut expressions = items(&term["matchExpressions"]);
            expressions.any(|one| one["key"] == LABEL && one["operator"] == operator)
        };
        terms.is_empty() || !terms.iter().all(asks)
    };
    let misplaced = rendering.of_kind("DaemonSet").filter(misplaced);
    misplaced.map(|object| format!("{}: is not placed by {LABEL}", name(object))).collect()
}

#[cfg(test)]
mod tests {
    use super::{super::laws::tests::check, *};

    /// The DaemonSet of workers, with this pod.
    fn worker(pod: &str) -> String {
        format!(
            "{{kind: DaemonSet, metadata: {{name: carrick-worker, namespace: ns}}, spec: {{template: {{spec: {pod}}}}}}}"
        )
    }

    /// ... with this container.
    fn container(fields: &str) -> String {
        worker(&format!("{{containers: [{{name: agent, {fields}}}]}}"))
    }

    const WHO: &str = "DaemonSet ns/carrick-worker";

    #[test]
    fn each_loosened_bolt_is_found() {
        let bolts = "privileged: false, allowPrivilegeEscalation: false, readOnlyRootFilesystem: true, runAsUser: 0, \
                     capabilities: {drop: [ALL], add: [NET_ADMIN, BPF, PERFMON]}";
        let good = container(&format!("securityContext: {{{bolts}}}"));
        check(are_not_privileged, &good, &[]);
        for (from, to, problem) in [
            ("privileged: false", "privileged: true", "privileged is true"),
            ("Escalation: false", "Escalation: true", "allowPrivilegeEscalation is true"),
            ("readOnlyRootFilesystem: true, ", "", "readOnlyRootFilesystem is null"),
            ("drop: [ALL], ", "", "capabilities/drop is null"),
            ("BPF", "SYS_ADMIN", r#"capabilities/add is ["NET_ADMIN","SYS_ADMIN","PERFMON"]"#),
        ] {
            let expected = format!("{WHO} \"agent\": /securityContext/{problem}");
            check(are_not_privileged, &good.replacen(from, to, 1), &[&expected]);
        }
        let init = good.replace("containers", "initContainers").replace("runAsUser: 0", "runAsUser: 1");
        check(are_not_privileged, &init, &[&format!("{WHO} \"agent\": /securityContext/runAsUser is 1")]);
    }

    #[test]
    fn a_pod_that_could_be_evicted_or_lacks_bounds_is_found() {
        let resources = "resources: {requests: {cpu: 1, memory: 1}, limits: {memory: 1}}";
        let pod = format!(
            "{{hostNetwork: true, dnsPolicy: Default, securityContext: {{seccompProfile: {{type: RuntimeDefault}}}}, \
             priorityClassName: system-node-critical, tolerations: [{{operator: Exists}}], \
             nodeSelector: {{kubernetes.io/os: linux}}, containers: [{{name: agent, {resources}}}]}}"
        );
        let law = are_on_the_host_network_and_survive;
        check(law, &worker(&pod), &[]);
        let shares = pod.replace("hostNetwork: true", "hostNetwork: true, hostPID: true");
        check(law, &worker(&shares), &[&format!("{WHO}: /hostPID is true")]);
        let evicted = pod.replace("[{operator: Exists}]", "[]");
        check(law, &worker(&evicted), &[&format!("{WHO}: /tolerations is []")]);
        let unbound = pod.replace("limits: {memory: 1}", "limits: {}");
        check(law, &worker(&unbound), &[&format!("{WHO} \"agent\": /resources/limits/memory is not set")]);
    }

    #[test]
    fn the_node_s_other_files_are_not_theirs() {
        let pod = |path: &str, mount: &str| {
            let volume = format!("volumes: [{{name: v, hostPath: {{path: {path}}}}}]");
            worker(&format!("{{{volume}, containers: [{{name: agent, volumeMounts: [{{name: {mount}}}]}}]}}"))
        };
        check(mount_only_what_they_need, &pod("/run/carrick", "v"), &[]);
        check(mount_only_what_they_need, &pod("/run", "v"), &[&format!("{WHO}: has \"/run\" of its node")]);
        let apart = [format!("{WHO}: nothing mounts \"v\""), format!("{WHO}: has no volume \"w\"")];
        check(mount_only_what_they_need, &pod("/run/carrick", "w"), &[&apart[0], &apart[1]]);
    }

    #[test]
    fn an_image_without_a_version_is_found() {
        let image = |image: &str| container(&format!("imagePullPolicy: Always, image: {image:?}"));
        let digest = format!("r:5000/c:1@sha256:{}", "0".repeat(64));
        for good in ["carrick.dev/carrick:1.2", "r.example:5000/c:1", &digest] {
            check(run_an_image_that_is_named, &image(good), &[]);
        }
        for bad in ["", "carrick", "r.example:5000/carrick", "carrick:latest", "carrick:", "c:1@sha256:0"] {
            check(run_an_image_that_is_named, &image(bad), &[&format!("{WHO} \"agent\": its image is {bad:?}")]);
        }
    }

    #[test]
    fn every_term_of_an_affinity_counts() {
        let term = |key: &str| format!("{{matchExpressions: [{{key: {key}, operator: DoesNotExist}}]}}");
        let pod = |terms: &str| {
            let required =
                format!("{{requiredDuringSchedulingIgnoredDuringExecution: {{nodeSelectorTerms: [{terms}]}}}}");
            worker(&format!("{{affinity: {{nodeAffinity: {required}}}}}"))
        };
        let found = format!("{WHO}: is not placed by {LABEL}");
        check(one_agent_is_on_every_node, &pod(&term(LABEL)), &[]);
        check(one_agent_is_on_every_node, &pod(""), &[&found]);
        check(one_agent_is_on_every_node, &pod(&format!("{}, {}", term(LABEL), term("zone"))), &[&found]);
        check(one_agent_is_on_every_node, &pod(&term(LABEL)).replace("DoesNotExist", "Exists"), &[&found]);
    }
}
