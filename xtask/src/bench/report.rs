//! What a benchmark found, as values; printed as a table or for a machine.

use std::{borrow::Cow, fmt};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::statistics::{median, middle_half};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    #[default]
    Table,
    /// `{"ok", "results": [{"name", "value", "middleHalf", "unit", "budget", "ok"}]}`
    Json,
}

/// A limit that is part of the design.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Budget {
    AtLeast(f64),
    AtMost(f64),
}

/// One measured value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    pub name: String,
    pub value: f64,
    /// Where `value` is the median of rounds: between what the middle half of them lie.
    pub middle_half: Option<[f64; 2]>,
    pub unit: Cow<'static, str>,
    pub budget: Option<Budget>,
}

impl Budget {
    pub fn limit(self) -> f64 {
        match self {
            Budget::AtLeast(limit) | Budget::AtMost(limit) => limit,
        }
    }

    fn holds(self, value: f64) -> bool {
        match self {
            Budget::AtLeast(limit) => value >= limit,
            Budget::AtMost(limit) => value <= limit,
        }
    }
}

impl fmt::Display for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Budget::AtLeast(limit) => write!(f, ">= {limit}"),
            Budget::AtMost(limit) => write!(f, "<= {limit}"),
        }
    }
}

impl Measured {
    /// Without a budget.
    pub fn new(name: &str, value: f64, unit: &'static str) -> Measured {
        Measured { name: name.to_owned(), value, middle_half: None, unit: unit.into(), budget: None }
    }

    /// The median of rounds, without a budget.
    pub fn of_rounds(name: &str, rounds: impl Iterator<Item = f64> + Clone, unit: &'static str) -> Measured {
        let middle_half = Some(middle_half(rounds.clone()));
        Measured { middle_half, ..Measured::new(name, median(rounds), unit) }
    }

    /// As a person reads it; nothing where `value` is not of rounds.
    pub fn spread(&self) -> String {
        self.middle_half.map_or_else(String::new, |[low, high]| format!("{} to {}", digits(low), digits(high)))
    }

    /// Whether the budget holds; without one, always.
    pub fn ok(&self) -> bool {
        self.budget.is_none_or(|budget| budget.holds(self.value))
    }

    /// By how much the budget is missed, in percent of it.
    pub fn verdict(&self) -> String {
        match self.budget {
            None => String::new(),
            Some(_) if self.ok() => "ok".to_owned(),
            Some(Budget::AtMost(0.0)) => "MISSED".to_owned(),
            Some(Budget::AtLeast(limit) | Budget::AtMost(limit)) => {
                format!("MISSED by {:.1} %", (self.value / limit - 1.0).abs() * 100.0)
            }
        }
    }
}

/// Whether every budget holds. Nothing measured is no success.
pub fn ok(results: &[Measured]) -> bool {
    !results.is_empty() && results.iter().all(Measured::ok)
}

pub fn print(results: &[Measured], output: Output) {
    match output {
        Output::Table => print!("{}", table(results)),
        Output::Json => println!("{}", json(results)),
    }
}

fn table(results: &[Measured]) -> String {
    let widest = |length: fn(&Measured) -> usize| results.iter().map(length).max().unwrap_or(0);
    let [width, spread] = [widest(|result| result.name.len()), widest(|result| result.spread().len())];
    let mut text = String::new();
    for result in results {
        let budget = result.budget.map_or_else(String::new, |budget| budget.to_string());
        let (name, value, unit, verdict) = (&result.name, digits(result.value), &result.unit, result.verdict());
        let line =
            format!("{name:width$}  {value:>10} {unit:<10}  {:spread$}  {budget:<7}  {verdict}", result.spread());
        text += &format!("{}\n", line.trim_end());
    }
    text
}

/// Three significant digits, and no fewer than the whole part has; a whole number without decimals.
pub fn digits(value: f64) -> String {
    let decimals = match value.abs() {
        whole if whole.fract() == 0.0 => 0,
        size if size < 1.0 => 3,
        size if size < 10.0 => 2,
        size if size < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

fn json(results: &[Measured]) -> Value {
    let rows: Vec<Value> = results
        .iter()
        .map(|result| {
            json!({
                "name": result.name,
                "value": result.value,
                "middleHalf": result.middle_half,
                "unit": result.unit,
                "budget": result.budget.map(|budget| budget.to_string()),
                "ok": result.ok(),
            })
        })
        .collect();
    json!({"ok": ok(results), "results": rows})
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn results() -> Vec<Measured> {
        let measured = |name: &str, value, unit, budget| Measured { budget, ..Measured::new(name, value, unit) };
        vec![
            Measured { middle_half: Some([2.0, 2.41]), ..measured("tcp carrick", 2.3456, "Gb/s", None) },
            measured("tcp vs gotatun", 2.0, "x", Some(Budget::AtLeast(2.0))),
            measured("tcp vs wireguard-go", 0.9499, "x", Some(Budget::AtLeast(1.0))),
            measured("retransmits", 48.0, "", Some(Budget::AtMost(0.0))),
            measured("memory, 100 peers", 50.0, "MiB", Some(Budget::AtMost(40.0))),
        ]
    }

    #[test]
    fn the_table_names_what_is_missed_and_by_how_much() {
        expect![[r#"
            tcp carrick                2.35 Gb/s        2 to 2.41
            tcp vs gotatun                2 x                      >= 2     ok
            tcp vs wireguard-go       0.950 x                      >= 1     MISSED by 5.0 %
            retransmits                  48                        <= 0     MISSED
            memory, 100 peers            50 MiB                    <= 40    MISSED by 25.0 %
        "#]]
        .assert_eq(&table(&results()));
    }

    #[test]
    fn json_has_the_documented_fields() {
        expect![[r#"{"ok":false,"results":[{"budget":">= 2","middleHalf":null,"name":"tcp vs gotatun","ok":true,"unit":"x","value":2.0},{"budget":">= 1","middleHalf":null,"name":"tcp vs wireguard-go","ok":false,"unit":"x","value":0.9499}]}"#]].assert_eq(&json(&results()[1..3]).to_string());
    }

    #[test]
    fn one_missed_budget_or_nothing_measured_is_no_success() {
        assert!(ok(&results()[..2]));
        assert!(!ok(&results()));
        assert!(!ok(&[]));
    }
}
