//! `kubectl carrick status` and `plan`, but for running kubectl: what to ask it, and what its answers mean. Pure.
//!
//! Invariant: an agent's pod is asked what its own container was told, so that a plan made there is that agent's.

use std::{collections::BTreeMap, env::split_paths, ffi::OsString};

use k8s_openapi::api::core::v1::Pod;
use serde::Deserialize;
use serde_json::Value;

use crate::{
    args::{Access, Format},
    names::NodeName,
};

const CONTAINER: &str = "agent";
const AGENTS: &str = "app.kubernetes.io/name=carrick,app.kubernetes.io/component in (worker,gateway)";
/// kubectl's last word on a command that did not end well: that one has said why.
const ENDED: &str = "command terminated with exit code ";

/// What an agent is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Question {
    Status,
    Plan,
}

/// Where an agent is to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    pub node: String,
    pub pod: String,
    /// Of its container.
    arguments: Vec<String>,
    /// Why it cannot be asked.
    pub absent: Option<String>,
}

/// What came of asking one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    pub node: String,
    /// It ended with exit code 0.
    pub well: bool,
    pub out: String,
    /// What it said beside that, and kubectl too.
    pub said: String,
}

/// kubectl's flags for reaching the cluster. Several kubeconfigs only its environment can name.
pub fn reach(access: &Access, namespace: &str) -> Vec<OsString> {
    let one = access.given().filter(|paths| split_paths(paths).count() == 1);
    let flag = |name: &str, value: &OsString| {
        let mut flag = OsString::from(name);
        flag.push(value);
        flag
    };
    let kubeconfig = one.map(|path| flag("--kubeconfig=", path));
    let context = access.context.as_ref().map(|context| format!("--context={context}").into());
    kubeconfig.into_iter().chain(context).chain([format!("--namespace={namespace}").into()]).collect()
}

/// kubectl's words for the agents' pods, as [`agents`] reads them.
pub fn listing(node: Option<&NodeName>) -> Vec<String> {
    let node = node.map(|node| format!("--field-selector=spec.nodeName={node}"));
    let words = ["get", "pods", "--output=json", "--selector", AGENTS].map(str::to_owned);
    words.into_iter().chain(node).collect()
}

#[derive(Deserialize)]
struct Pods {
    items: Vec<Pod>,
}

/// Of a list of pods, by node. One that is being deleted is nobody's.
pub fn agents(list: &[u8]) -> Result<Vec<Agent>, serde_json::Error> {
    let pods: Pods = serde_json::from_slice(list)?;
    let mut agents: Vec<Agent> =
        pods.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none()).map(agent).collect();
    agents.sort_by(|a, b| (&a.node, &a.pod).cmp(&(&b.node, &b.pod)));
    Ok(agents)
}

fn agent(pod: Pod) -> Agent {
    let name = pod.metadata.name.unwrap_or_default();
    let phase = pod.status.and_then(|status| status.phase).unwrap_or_default();
    let spec = pod.spec.unwrap_or_default();
    let arguments = spec.containers.into_iter().find(|container| container.name == CONTAINER);
    let arguments = arguments.and_then(|container| container.args).unwrap_or_default();
    let absent = match arguments.first().map(String::as_str) {
        Some("agent") if phase == "Running" => None,
        Some("agent") => Some(format!("pod {name} is {phase}: `kubectl describe` it")),
        Some("cleanup") => Some(format!("pod {name} takes Carrick out of the node: no agent runs there")),
        _ => Some(format!("pod {name} is none of this version's chart")),
    };
    // What is not scheduled yet has no node.
    let node = spec.node_name.unwrap_or_else(|| "(no node yet)".to_owned());
    Agent { node, pod: name, arguments, absent }
}

/// kubectl's words for asking an agent.
pub fn asking(agent: &Agent, question: Question, format: Format) -> Vec<String> {
    let words = match question {
        Question::Status => vec!["status".to_owned()],
        // The agent's own arguments, but for what it is.
        Question::Plan => [&["plan".to_owned()], agent.arguments.get(1..).unwrap_or_default()].concat(),
    };
    let exec = ["exec", &agent.pod, "--container", CONTAINER, "--", "carrick"].map(str::to_owned);
    // One document of several is made of JSON.
    let format = if format == Format::Table { "table" } else { "json" };
    exec.into_iter().chain(words).chain([format!("--output={format}")]).collect()
}

/// What is printed of tables.
pub fn tables(answers: &[Answer], alone: bool) -> String {
    if alone {
        return answers.iter().map(|answer| answer.out.as_str()).collect();
    }
    let table = |answer: &Answer| format!("==> {} <==\n{}", answer.node, answer.out);
    answers.iter().map(table).collect::<Vec<_>>().join("\n")
}

/// One document of all answers. Whoever gave none is left out.
pub fn document(answers: &[Answer], alone: bool) -> Result<Value, serde_json::Error> {
    let given = answers.iter().filter(|answer| !answer.out.trim().is_empty());
    let documents = given.map(|answer| Ok((answer.node.clone(), serde_json::from_str(&answer.out)?)));
    let mut documents: BTreeMap<String, Value> = documents.collect::<Result<_, serde_json::Error>>()?;
    Ok(match documents.pop_first() {
        Some((_, only)) if alone => only,
        first => documents.into_iter().chain(first).collect(),
    })
}

/// What is told of an answer beside it, by node.
pub fn told(answer: &Answer) -> String {
    let lines = answer.said.lines().filter(|line| !line.starts_with(ENDED));
    lines.map(|line| format!("{}: {line}\n", answer.node)).collect()
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use serde_json::json;

    use super::*;

    fn shown(words: impl IntoIterator<Item = impl Into<OsString>>) -> String {
        let words = words.into_iter().map(|word| word.into().into_string().unwrap());
        words.map(|word| if word.contains(' ') { format!("'{word}'") } else { word }).collect::<Vec<_>>().join(" ")
    }

    fn pod(name: &str, node: &str, phase: &str, arguments: &[&str]) -> Value {
        let containers = json!([{"name": "sidecar", "args": ["agent"]}, {"name": "agent", "args": arguments}]);
        json!({"metadata": {"name": name}, "spec": {"nodeName": node, "containers": containers}, "status": {"phase": phase}})
    }

    fn listed(pods: &[Value]) -> Vec<Agent> {
        agents(json!({"apiVersion": "v1", "kind": "List", "items": pods}).to_string().as_bytes()).unwrap()
    }

    #[test]
    fn kubectl_is_told_what_we_were_told() {
        let access = |kubeconfig: Option<&str>, context: Option<&str>| Access {
            kubeconfig: kubeconfig.map(OsString::from),
            context: context.map(str::to_owned),
        };
        let cases = [
            access(None, None),
            access(Some(""), None),
            access(Some("/home/me/mn.conf"), Some("mn")),
            access(Some("a:b"), None),
        ];
        let told: String = cases.iter().map(|access| shown(reach(access, "carrick")) + "\n").collect();
        expect![[r#"
            --namespace=carrick
            --namespace=carrick
            --kubeconfig=/home/me/mn.conf --context=mn --namespace=carrick
            --namespace=carrick
        "#]]
        .assert_eq(&told);
        expect!["get pods --output=json --selector 'app.kubernetes.io/name=carrick,app.kubernetes.io/component in (worker,gateway)'"]
            .assert_eq(&shown(listing(None)));
        expect!["get pods --output=json --selector 'app.kubernetes.io/name=carrick,app.kubernetes.io/component in (worker,gateway)' --field-selector=spec.nodeName=mn-0"]
            .assert_eq(&shown(listing(Some(&"mn-0".parse().unwrap()))));
    }

    #[test]
    fn agents_are_asked_in_their_pods_or_it_is_said_why_not() {
        let mut leaving = pod("carrick-worker-z", "n1", "Running", &["agent"]);
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        let agents = listed(&[
            pod("carrick-worker-b", "n1", "Running", &["agent", "--kube", "--cluster-name=mn", "--bpffs=/bpf"]),
            leaving,
            pod("carrick-gateway-a", "n0", "Running", &["agent", "--kube", "--gateway-slots=8"]),
            pod("carrick-worker-c", "n2", "Pending", &["agent", "--kube"]),
            pod("carrick-worker-d", "n3", "Running", &["cleanup", "--wait"]),
            pod("other", "n4", "Running", &[]),
        ]);
        let mut told = String::new();
        for agent in &agents {
            let asked = |question| shown(asking(agent, question, Format::Yaml));
            told += &match &agent.absent {
                Some(why) => format!("{}: {why}\n", agent.node),
                None => {
                    format!("{}: {}\n{}: {}\n", agent.node, asked(Question::Status), agent.node, asked(Question::Plan))
                }
            };
        }
        expect![[r#"
            n0: exec carrick-gateway-a --container agent -- carrick status --output=json
            n0: exec carrick-gateway-a --container agent -- carrick plan --kube --gateway-slots=8 --output=json
            n1: exec carrick-worker-b --container agent -- carrick status --output=json
            n1: exec carrick-worker-b --container agent -- carrick plan --kube --cluster-name=mn --bpffs=/bpf --output=json
            n2: pod carrick-worker-c is Pending: `kubectl describe` it
            n3: pod carrick-worker-d takes Carrick out of the node: no agent runs there
            n4: pod other is none of this version's chart
        "#]].assert_eq(&told);
    }

    #[test]
    fn answers_of_several_are_told_apart_and_one_s_is_its_own() {
        let answer = |node: &str, out: &str, said: &str| Answer {
            node: node.to_owned(),
            well: said.is_empty(),
            out: out.to_owned(),
            said: said.to_owned(),
        };
        let ended = "command terminated with exit code 1\n";
        let tables_of = [answer("n0", "all well\n", ""), answer("n1", "not ready\n", ended)];
        expect![[r#"
            ==> n0 <==
            all well

            ==> n1 <==
            not ready
        "#]]
        .assert_eq(&tables(&tables_of, false));
        expect!["all well\n"].assert_eq(&tables(&tables_of[..1], true));
        assert_eq!(told(&tables_of[1]), "");
        let mute = answer("n2", "", &format!("no agent answers\n{ended}"));
        assert_eq!(told(&mute), "n2: no agent answers\n");
        let answers = [answer("n1", "{\"ready\": true}", ""), answer("n0", "{\"ready\": false}", ended), mute];
        let documents = [document(&answers, false), document(&answers[..1], true), document(&answers[2..], true)];
        let text = documents.map(|document| document.unwrap().to_string()).join("\n");
        expect![[r#"
            {"n0":{"ready":false},"n1":{"ready":true}}
            {"ready":true}
            {}"#]]
        .assert_eq(&text);
    }
}
