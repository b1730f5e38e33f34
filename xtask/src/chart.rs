//! `cargo xtask chart`: the Helm chart is linted, and rendered with every combination of its switches and with values of
//! every other kind; what comes out is held to [`laws`], and what must be refused has to be.
//!
//! Invariant: a switch that values.yaml gets is tried both ways without this file knowing of it.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use anyhow::{Context, bail};
use serde_json::{Value, json};

use crate::{process::Ended, tools, workspace};

mod flags;
mod laws;
mod pods;
mod rights;
mod rollout;
#[cfg(test)]
mod tests;

#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints what breaks a law; true if nothing does.
pub fn run(_: &Args) -> anyhow::Result<bool> {
    let ended = check()?;
    print!("{}", ended.output);
    Ok(ended.success)
}

/// Where the chart is installed to in these renderings.
const NAMESPACE: &str = "carrick";
/// The oldest Kubernetes that the chart takes: what is rendered must do without anything newer.
const KUBERNETES: &str = "1.30.0";
/// What has no default.
const REQUIRED: &str = r#"cluster.name="mn""#;
/// A switch, by its path in values.yaml, and how it stands.
type Switches = BTreeMap<String, bool>;

/// What the values are besides switches: each line is a `--set-json`.
const CASES: [&[&str]; 4] = [
    &[],
    &[
        r#"image={"repository":"registry.example:5000/carrick","tag":"1.2","pullSecrets":[{"name":"registry"}]}"#,
        r#"tunnel.image={"tag":"1.1"}"#,
        r#"worker={"maxUnavailable":2}"#,
        r#"cluster.localCIDRs=["10.96.0.0/12","fd00:96::/112"]"#,
        r#"extraEnv=[{"name":"RUST_LOG","value":"debug"}]"#,
    ],
    &[
        r#"image={"digest":"sha256:0000000000000000000000000000000000000000000000000000000000000000"}"#,
        r#"gateways={"slots":1,"presharedKeys":["va","de"]}"#,
        r#"hop.existingSecret="sealed""#,
        r#"logFormat="human""#,
        r#"nodeSelector={"mesh":"yes"}"#,
    ],
    &[r#"affinity={"nodeAffinity":{"requiredDuringSchedulingIgnoredDuringExecution":{"nodeSelectorTerms":[
        {"matchExpressions":[{"key":"zone","operator":"In","values":["a"]}]},
        {"matchFields":[{"key":"metadata.name","operator":"In","values":["n1"]}]}]}}}"#],
];

/// Values that must be refused, each with something that the refusal says.
const REFUSED: [(&str, &str); 7] = [
    (r#"cluster.name="""#, "cluster.name is required"),
    (r#"cluster.name="Not_A_Label""#, "/cluster/name"),
    (r#"cluster.nmae="mn""#, "nmae"),
    (r#"gateways.slots=9"#, "/gateways/slots"),
    (r#"wireguard.port=65529"#, "/wireguard/port"),
    (r#"image.digest="latest""#, "/image/digest"),
    (r#"uninstall="yes""#, "/uninstall"),
];

/// Lints, renders, checks. A chart without a rendering is a failure: then we looked in the wrong place.
pub fn check() -> anyhow::Result<Ended> {
    let chart = Chart::open()?;
    let mut problems = chart.lint()?;
    let switches = chart.switches()?;
    let flags = flags::read(&fs::read_to_string(workspace::root().join("docs/cli.txt")).context("read docs/cli.txt")?);
    let (mut renderings, mut objects) = (0, 0);
    for case in CASES {
        for switches in combinations(&switches) {
            let rendering = laws::Rendering { objects: chart.render(case, &switches)?, switches, flags: &flags };
            let found = laws::violations(&rendering);
            let values = |found: String| format!("{} {case:?}: {found}", show(&rendering.switches));
            problems.extend(found.into_iter().map(values));
            renderings += 1;
            objects += rendering.objects.len();
        }
    }
    for (values, because) in REFUSED {
        problems.extend(chart.refuses(values, because)?);
    }
    let mut output: String = problems.iter().map(|problem| format!("{problem}\n")).collect();
    let count = problems.len();
    output += &format!("chart: {renderings} renderings, {objects} objects, {count} problems\n");
    Ok(Ended { success: renderings > 0 && objects > 0 && problems.is_empty(), output })
}

/// What an API server has to take: the objects of every case, and of every case with one switch turned, each once, in a List.
pub fn objects() -> anyhow::Result<Value> {
    let chart = Chart::open()?;
    let defaults = chart.switches()?;
    let turned = defaults.iter().map(|(name, on)| {
        let mut switches = defaults.clone();
        switches.insert(name.clone(), !on);
        switches
    });
    let mut items: Vec<Value> = Vec::new();
    for switches in turned.chain([defaults.clone()]) {
        for case in CASES {
            for object in chart.render(case, &switches)? {
                if !items.contains(&object) {
                    items.push(object);
                }
            }
        }
    }
    Ok(json!({"apiVersion": "v1", "kind": "List", "items": items}))
}

/// A chart's folder, and the program that reads it.
struct Chart {
    helm: PathBuf,
    path: PathBuf,
}

impl Chart {
    fn open() -> anyhow::Result<Chart> {
        Ok(Chart { helm: tools::HELM.path()?, path: workspace::root().join("manifests/carrick") })
    }

    /// As values.yaml has them.
    fn switches(&self) -> anyhow::Result<Switches> {
        let mut switches = Switches::new();
        find_switches(&read_yaml(&self.path.join("values.yaml"))?, "", &mut switches);
        Ok(switches)
    }

    fn helm(&self, arguments: &[&str]) -> anyhow::Result<Output> {
        let mut command = Command::new(&self.helm);
        let output = command.args(arguments).output();
        output.with_context(|| format!("run {}", self.helm.display()))
    }

    fn path(&self) -> anyhow::Result<&str> {
        self.path.to_str().context("the chart's path is not UTF-8")
    }

    /// What helm itself finds.
    fn lint(&self) -> anyhow::Result<Vec<String>> {
        let output = self.helm(&[
            "lint",
            "--strict",
            "--quiet",
            self.path()?,
            "--kube-version",
            KUBERNETES,
            "--set-json",
            REQUIRED,
        ])?;
        let text = String::from_utf8_lossy(&output.stdout);
        Ok(if output.status.success() { Vec::new() } else { vec![format!("helm lint: {text}")] })
    }

    fn template(&self, values: &[&str], switches: &Switches) -> anyhow::Result<Output> {
        let mut arguments = vec!["template", "carrick", self.path()?, "--namespace", NAMESPACE];
        arguments.extend(["--kube-version", KUBERNETES, "--set-json", REQUIRED]);
        arguments.extend(values.iter().flat_map(|value| ["--set-json", value]));
        let switches: Vec<String> = switches.iter().map(|(path, on)| format!("{path}={on}")).collect();
        arguments.extend(switches.iter().flat_map(|switch| ["--set", switch.as_str()]));
        self.helm(&arguments)
    }

    fn render(&self, values: &[&str], switches: &Switches) -> anyhow::Result<Vec<Value>> {
        let output = self.template(values, switches)?;
        if !output.status.success() {
            bail!("{} {values:?}: {}", show(switches), String::from_utf8_lossy(&output.stderr));
        }
        let text = String::from_utf8(output.stdout).context("helm writes UTF-8")?;
        serde_saphyr::from_multiple(&text).context("helm writes YAML")
    }

    /// Something, unless these values are refused, and that with these words.
    fn refuses(&self, values: &str, because: &str) -> anyhow::Result<Option<String>> {
        let output = self.template(&[values], &Switches::new())?;
        let said = String::from_utf8_lossy(&output.stderr);
        let refused = !output.status.success() && said.contains(because);
        Ok((!refused).then(|| format!("{values} must be refused with {because:?}, but helm says: {said}")))
    }
}

fn read_yaml(path: &Path) -> anyhow::Result<Value> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("read {}", path.display()))
}

/// Every true or false of the values, by its path as `--set` takes it.
fn find_switches(values: &Value, path: &str, found: &mut Switches) {
    match values {
        Value::Bool(on) => _ = found.insert(path.to_owned(), *on),
        Value::Object(fields) => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                find_switches(value, &path, found);
            }
        }
        _ => {}
    }
}

/// All 2^n settings of n switches.
fn combinations(switches: &Switches) -> Vec<Switches> {
    let mut all = vec![Switches::new()];
    for name in switches.keys() {
        let with = |on: bool| move |mut set: Switches| (set.insert(name.clone(), on), set).1;
        all = all.iter().cloned().map(with(false)).chain(all.iter().cloned().map(with(true))).collect();
    }
    all
}

/// The names of those that are on.
fn show(switches: &Switches) -> String {
    let on: Vec<&str> = switches.iter().filter(|(_, on)| **on).map(|(name, _)| name.as_str()).collect();
    format!("[{}]", on.join(" "))
}
