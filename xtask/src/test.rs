//! Every check, in the order in which a failure is cheapest to see; `.ci/run` calls exactly this.
//!
//! Invariant: nothing counts as passed that did not run. A step whose precondition failed is a failure, so is an ignored
//! test, and so is a run without any test.

use std::{fmt, fs, path::Path, process::Command};

use anyhow::Context;
use clap::ValueEnum;

use crate::{chart, process, tidy, tools, vm, workspace};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Runs only these steps and what they need, in the usual order.
    #[arg(value_name = "STEP", value_parser = clap::builder::PossibleValuesParser::new(STEPS.map(|step| step.name)))]
    steps: Vec<String>,
}

/// One check.
struct Step {
    name: &'static str,
    /// The step without whose success this one means nothing.
    needs: Option<&'static str>,
    run: fn() -> anyhow::Result<process::Ended>,
}

impl Step {
    /// By its own name, or because a step that was asked for needs it; all are where none is named.
    fn is_asked_for(&self, names: &[String]) -> bool {
        let asked = |step: &Step| names.iter().any(|name| name == step.name);
        names.is_empty() || asked(self) || STEPS.iter().any(|step| step.needs == Some(self.name) && asked(step))
    }
}

/// Packets for the programs in each guest: what is looked for there is that the kernel takes them.
const GUEST_CASES: u32 = 200;

const STEPS: [Step; 9] = [
    Step { name: "fmt", needs: None, run: || cargo("fmt", &["fmt", "--all", "--check"]) },
    Step {
        name: "clippy",
        needs: None,
        run: || cargo("clippy", &["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]),
    },
    Step { name: "doc", needs: None, run: doc },
    Step { name: "deny", needs: None, run: deny },
    Step { name: "tidy", needs: None, run: tidy },
    Step { name: "chart", needs: None, run: chart },
    Step { name: "build", needs: None, run: || process::run("build", &mut workspace::build_carrick_command()) },
    Step { name: "test", needs: Some("build"), run: test },
    Step { name: "kernels", needs: Some("build"), run: || vm::load_on(vm::Version::value_variants(), GUEST_CASES) },
];

fn cargo(name: &str, args: &[&str]) -> anyhow::Result<process::Ended> {
    process::run(name, workspace::cargo().args(args))
}

fn doc() -> anyhow::Result<process::Ended> {
    let mut command = workspace::cargo();
    command.args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
    process::run("doc", command.env("RUSTDOCFLAGS", "-D warnings"))
}

/// Advisories are left out: they need the network at every run.
fn deny() -> anyhow::Result<process::Ended> {
    let mut command = Command::new(tools::CARGO_DENY.path()?);
    command.current_dir(workspace::root()).args(["--locked", "check", "bans", "licenses", "sources"]);
    process::run("deny (bans, licences, sources; no advisories)", &mut command)
}

fn tidy() -> anyhow::Result<process::Ended> {
    let ended = tidy::check(workspace::root())?.into_ended();
    eprintln!("tidy {}", if ended.success { "ok" } else { "FAILED" });
    Ok(ended)
}

fn chart() -> anyhow::Result<process::Ended> {
    let ended = chart::check()?;
    eprintln!("chart {}", if ended.success { "ok" } else { "FAILED" });
    Ok(ended)
}

/// All tests. Those of the lab run as fast as what ships, and find it by `CARRICK_BIN`; one after the other, so that the
/// packets that they count are not lost to each other. Those of an API server mostly wait, and run two at a time.
fn test() -> anyhow::Result<process::Ended> {
    let carrick = workspace::carrick_path()?;
    let mut servers = lab_tests(&["api::", "--test-threads", "2"]);
    name_programs(&mut servers, &carrick)?;
    let mut others = lab_tests(&["--skip", "api::", "--test-threads", "1"]);
    others.env("CARRICK_BIN", &carrick);
    let all = [
        cargo("test", &["test", "--locked", "--workspace", "--exclude", "tests", "--no-fail-fast"])?,
        process::run("test, API servers", &mut servers)?,
        process::run("test, the lab", &mut others)?,
    ];
    Ok(process::Ended {
        success: all.iter().all(|ended| ended.success),
        output: all.map(|ended| ended.output).concat(),
    })
}

/// The tests of the package `tests` that these arguments of the test harness choose.
fn lab_tests(choice: &[&str]) -> Command {
    let mut command = workspace::cargo();
    command.args(["test", "--release", "--locked", "--package", "tests", "--no-fail-fast", "--"]).args(choice);
    command
}

/// The programs that the package `tests` runs on an API server, and the variables by which it finds them.
const PROGRAMS: [(&str, &tools::Tool); 6] = [
    ("CARRICK_ETCD", &tools::ETCD),
    ("CARRICK_KINE", &tools::KINE),
    ("CARRICK_KUBE_APISERVER", &tools::KUBE_APISERVER),
    ("CARRICK_KUBECTL", &tools::KUBECTL),
    ("CARRICK_HELM", &tools::HELM),
    ("CARRICK_KSTATUS", &tools::KSTATUS),
];

/// Names all of them to it, and the `carrick` that it runs.
pub fn name_programs(command: &mut Command, carrick: &Path) -> anyhow::Result<()> {
    command.env("CARRICK_BIN", carrick);
    for (variable, tool) in PROGRAMS {
        command.env(variable, tool.path()?);
    }
    let objects = workspace::target_dir()?.join("chart.json");
    fs::write(&objects, chart::objects()?.to_string()).with_context(|| format!("write {}", objects.display()))?;
    command.env("CARRICK_CHART_OBJECTS", objects);
    Ok(())
}

/// Runs the steps, all of them even if one fails; true if all passed.
pub fn run(args: &Args) -> anyhow::Result<bool> {
    let mut failed = Vec::new();
    let mut counts = None;
    for step in STEPS.iter().filter(|step| step.is_asked_for(&args.steps)) {
        if let Some(needed) = step.needs.filter(|needed| failed.contains(needed)) {
            eprintln!("{} NOT RUN: {needed} failed", step.name);
            failed.push(step.name);
            continue;
        }
        let ended = (step.run)()?;
        let mut passed = ended.success;
        if step.name == "test" {
            let count = Counts::of(&ended.output);
            passed &= count.nothing_left_out();
            counts = Some(count);
        }
        if !passed {
            println!("{}", ended.output);
            failed.push(step.name);
        }
    }
    if let Some(counts) = counts {
        println!("tests: {counts}");
    }
    match failed.as_slice() {
        [] => println!("all checks passed"),
        failed => println!("FAILED: {}", failed.join(", ")),
    }
    Ok(failed.is_empty())
}

/// The sum over all test binaries.
#[derive(Debug, Default, PartialEq, Eq)]
struct Counts {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Counts {
    /// Sums libtest's lines `test result: ok. 12 passed; 0 failed; 0 ignored; ...`.
    fn of(output: &str) -> Counts {
        let mut counts = Counts::default();
        for line in output.lines().filter(|line| line.starts_with("test result:")) {
            let number_before = |word: &str| {
                let head = line.split_once(word).map_or("", |(head, _)| head);
                head.split_whitespace().next_back().and_then(|number| number.parse::<u64>().ok()).unwrap_or(0)
            };
            counts.passed += number_before(" passed;");
            counts.failed += number_before(" failed;");
            counts.ignored += number_before(" ignored;");
        }
        counts
    }

    fn nothing_left_out(&self) -> bool {
        self.passed > 0 && self.failed == 0 && self.ignored == 0
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed, {} ignored", self.passed, self.failed, self.ignored)?;
        if self.ignored > 0 { f.write_str(" (an ignored test is a failure)") } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RUN: &str = "running 2 tests
test a ... ok
test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
   Doc-tests lab
test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.00s
";

    #[test]
    fn results_are_summed() {
        let counts = Counts::of(RUN);
        assert_eq!(counts, Counts { passed: 15, failed: 1, ignored: 2 });
        assert_eq!(counts.to_string(), "15 passed, 1 failed, 2 ignored (an ignored test is a failure)");
    }

    #[test]
    fn a_failed_an_ignored_and_no_test_at_all_are_failures() {
        assert!(Counts { passed: 1, failed: 0, ignored: 0 }.nothing_left_out());
        assert!(!Counts { passed: 1, failed: 1, ignored: 0 }.nothing_left_out());
        assert!(!Counts { passed: 1, failed: 0, ignored: 1 }.nothing_left_out());
        assert!(!Counts::of("").nothing_left_out());
    }

    #[test]
    fn a_step_brings_what_it_needs() {
        let asked = |names: &[&str]| {
            let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
            STEPS.iter().filter(|step| step.is_asked_for(&names)).map(|step| step.name).collect::<Vec<_>>()
        };
        assert_eq!(asked(&["test"]), ["build", "test"]);
        assert_eq!(asked(&["tidy", "fmt"]), ["fmt", "tidy"]);
        assert_eq!(asked(&[]).len(), STEPS.len());
    }

    #[test]
    fn a_step_needs_only_what_runs_before_it() {
        for (index, step) in STEPS.iter().enumerate() {
            assert!(step.needs.is_none_or(|needed| STEPS[..index].iter().any(|earlier| earlier.name == needed)));
        }
    }
}
