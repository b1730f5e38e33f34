//! What a packet costs in the steering programs, as the benchmark of the package `tests` measures it: loading the programs
//! needs the agent, on which nothing here depends.

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::report::{Budget, Measured};
use crate::{process, workspace};

/// What it prints in one line.
#[derive(Debug, Deserialize)]
struct Costs {
    costs: Vec<Cost>,
}

#[derive(Debug, Deserialize)]
struct Cost {
    name: String,
    /// In `REMOTE`.
    prefixes: u32,
    nanoseconds: f64,
}

/// By name and prefixes, in nanoseconds.
const BUDGETS: [(&str, u32, f64); 3] =
    [("steer into a tunnel", 4096, 150.0), ("steer over the hop", 4096, 150.0), ("steer_native, foreign", 4096, 60.0)];

pub fn measure() -> Result<Vec<Measured>> {
    let mut command = workspace::cargo();
    command.args(["bench", "--locked", "--package", "tests", "--bench", "steer"]);
    let ended = process::run("steer", &mut command)?;
    if !ended.success {
        bail!("{}\nthe benchmark of steer failed", ended.output);
    }
    results(&ended.output)
}

fn results(output: &str) -> Result<Vec<Measured>> {
    let line = output.lines().find(|line| line.starts_with('{')).context("the benchmark of steer printed no result")?;
    let Costs { costs } = serde_json::from_str(line).with_context(|| line.to_owned())?;
    let measured = |cost: &Cost| Measured {
        budget: BUDGETS
            .iter()
            .find(|(name, prefixes, _)| *name == cost.name && *prefixes == cost.prefixes)
            .map(|(_, _, limit)| Budget::AtMost(*limit)),
        ..Measured::new(&format!("{}, {} prefixes", cost.name, cost.prefixes), cost.nanoseconds, "ns")
    };
    let results: Vec<Measured> = costs.iter().map(measured).collect();
    if results.iter().filter(|result| result.budget.is_some()).count() != BUDGETS.len() {
        bail!("not everything that has a budget was measured: {line}");
    }
    Ok(results)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn budgets_are_those_of_4096_prefixes() {
        let cost = |name: &str, prefixes| format!(r#"{{"name":"{name}","prefixes":{prefixes},"nanoseconds":61.5}}"#);
        let all: Vec<String> = BUDGETS.iter().flat_map(|(name, _, _)| [16, 4096].map(|n| cost(name, n))).collect();
        let found = results(&format!("   Compiling\n{{\"costs\":[{}]}}\n", all.join(","))).unwrap();
        let budgets: Vec<_> = found.iter().map(|result| result.budget.map(Budget::limit)).collect();
        assert_eq!(budgets, [None, Some(150.0), None, Some(150.0), None, Some(60.0)]);
        assert_eq!(found[0], Measured::new("steer into a tunnel, 16 prefixes", 61.5, "ns"));
    }

    #[test]
    fn a_budget_that_was_not_measured_is_an_error() {
        assert!(results(r#"{"costs":[]}"#).is_err());
        assert!(results("nothing").is_err());
    }
}
