//! `kubectl carrick status` and `kubectl carrick plan`: runs kubectl.

use std::process::{Command, Output, Stdio};

use anyhow::{Context, bail, ensure};

use crate::{
    args::{Agents, Format},
    kubectl::{Agent, Answer, Question, agents, asking, document, listing, reach, tables, told},
};

/// Agents that are asked at the same time.
const AT_ONCE: usize = 8;

pub(super) fn run(question: Question, args: &Agents) -> anyhow::Result<bool> {
    let agents = find(args)?;
    if agents.is_empty() {
        let node = args.node.as_ref().map(|node| format!(" on node {node}")).unwrap_or_default();
        bail!("no agent in namespace {}{node}: is the chart installed there? -n names another", args.namespace);
    }
    let mut answers = Vec::new();
    for some in agents.chunks(AT_ONCE) {
        // All are begun before the first is waited for.
        let begun: Vec<_> = some.iter().map(|agent| begin(question, agent, args)).collect();
        for (agent, begun) in some.iter().zip(begun) {
            let answer = begun.and_then(|asked| answer(agent, asked))?;
            eprint!("{}", told(&answer));
            answers.push(answer);
        }
    }
    let (format, alone) = (args.output.output, args.node.is_some());
    if format == Format::Table {
        print!("{}", tables(&answers, alone));
    } else {
        let document = document(&answers, alone).context("an agent says what is no JSON: is it of another version?")?;
        super::print(format, &document, String::new)?;
    }
    Ok(answers.iter().all(|answer| answer.well))
}

fn kubectl(args: &Agents, words: Vec<String>) -> Command {
    let mut command = Command::new("kubectl");
    command.args(reach(&args.access, &args.namespace)).args(words).stdin(Stdio::null());
    if let Some(paths) = args.access.given() {
        command.env("KUBECONFIG", paths);
    }
    command
}

fn find(args: &Agents) -> anyhow::Result<Vec<Agent>> {
    let out = kubectl(args, listing(args.node.as_ref())).output().context(NO_KUBECTL)?;
    ensure!(out.status.success(), "cannot list the agents' pods: {}", text(&out.stderr).trim_end());
    agents(&out.stdout).context("cannot read kubectl's list of pods")
}

const NO_KUBECTL: &str = "cannot run kubectl: is it in the PATH?";

/// Begins to ask; `None`: there is nobody.
fn begin(question: Question, agent: &Agent, args: &Agents) -> anyhow::Result<Option<std::process::Child>> {
    if agent.absent.is_some() {
        return Ok(None);
    }
    let mut command = kubectl(args, asking(agent, question, args.output.output));
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    child.map(Some).context(NO_KUBECTL)
}

fn answer(agent: &Agent, asked: Option<std::process::Child>) -> anyhow::Result<Answer> {
    let node = agent.node.clone();
    let Some(child) = asked else {
        let said = agent.absent.clone().unwrap_or_default();
        return Ok(Answer { node, well: false, out: String::new(), said });
    };
    let Output { status, stdout, stderr } = child.wait_with_output().context("cannot wait for kubectl")?;
    Ok(Answer { node, well: status.success(), out: text(&stdout), said: text(&stderr) })
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
