//! What a demo shows: one line for each thing that was tried.

use serde::Serialize;
use serde_json::{Value, json};

use super::{Output, say};

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    pub name: String,
    pub ok: bool,
    /// A number or a text.
    pub value: Value,
    /// Of the value; empty for a text.
    pub unit: &'static str,
}

/// The lines so far.
#[derive(Debug, Default)]
pub struct Table {
    /// What is being tried: the name of the failed check, should it fail with an error.
    step: &'static str,
    checks: Vec<Check>,
}

impl Table {
    pub fn begin(&mut self, step: &'static str) {
        self.step = step;
        say(step);
    }

    pub fn step(&self) -> &'static str {
        self.step
    }

    pub fn hold(&mut self, name: impl Into<String>, ok: bool, value: impl Into<Value>, unit: &'static str) {
        self.checks.push(Check { name: name.into(), ok, value: value.into(), unit });
    }

    /// Holds against the step that it came in its way.
    pub fn fail(&mut self, error: &anyhow::Error) {
        self.hold(self.step, false, format!("{error:#}"), "");
    }

    pub fn is_ok(&self) -> bool {
        self.checks.iter().all(|check| check.ok)
    }

    pub fn print(&self, output: Output) {
        match output {
            Output::Table => print!("{}", table(&self.checks)),
            Output::Json => println!("{}", json!({ "ok": self.is_ok(), "checks": self.checks })),
        }
    }
}

/// With one digit after the point.
pub fn tenths(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}

fn table(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
    let row = |Check { name, ok, value, unit }: &Check| {
        let result = if *ok { "ok    " } else { "FAILED" };
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        format!("{result}  {name:width$}  {}\n", format!("{value} {unit}").trim_end())
    };
    checks.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_shows_every_check() {
        let check = |name: &str, ok, value, unit| Check { name: name.to_owned(), ok, value, unit };
        let checks = [
            check("ping", true, json!(0.25), "ms"),
            check("client seen", false, json!("10.44.0.2"), ""),
            check("lost", true, json!(0), "packets"),
        ];
        assert_eq!(
            table(&checks),
            "ok      ping         0.25 ms\nFAILED  client seen  10.44.0.2\nok      lost         0 packets\n"
        );
        assert_eq!(
            json!({ "checks": checks }).to_string(),
            r#"{"checks":[{"name":"ping","ok":true,"unit":"ms","value":0.25},{"name":"client seen","ok":false,"unit":"","value":"10.44.0.2"},{"name":"lost","ok":true,"unit":"packets","value":0}]}"#
        );
    }
}
