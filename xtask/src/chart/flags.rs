//! The flags that `carrick` has, as `docs/cli.txt` says, which a test holds to the program.

use std::collections::{BTreeMap, BTreeSet};

/// The long flags of each subcommand, without `--`.
pub(super) type Flags = BTreeMap<String, BTreeSet<String>>;

/// Reads the reference: pages between lines of dashes, each with one line `Usage: carrick SUBCOMMAND ...`.
pub(super) fn read(reference: &str) -> Flags {
    let page = |page: &str| {
        let usage = page.lines().find_map(|line| line.strip_prefix("Usage: carrick "))?;
        let words: Vec<&str> = usage.split(' ').take_while(|word| word.starts_with(char::is_lowercase)).collect();
        let flags = page.lines().filter(|line| line.starts_with("  ")).filter_map(long_flag).collect();
        Some((words.join(" "), flags))
    };
    reference.split("\n----------------\n").filter_map(page).collect()
}

/// Of `  -o, --output <OUTPUT>` or `      --undo`: the line of a flag's help begins otherwise.
fn long_flag(line: &str) -> Option<String> {
    let line = line.trim_start();
    let line =
        line.split_once(", ").filter(|(short, _)| short.len() == 2 && short.starts_with('-')).map_or(line, |l| l.1);
    Some(line.strip_prefix("--")?.split(' ').next()?.to_owned())
}

/// Whether the program takes these words.
pub(super) fn unknown(flags: &Flags, arguments: &[&str]) -> Vec<String> {
    let Some(subcommand) = arguments.first() else { return vec!["no subcommand is given".to_owned()] };
    let Some(known) = flags.get(*subcommand) else { return vec![format!("carrick has no subcommand {subcommand}")] };
    let names = arguments[1..].iter().map(|argument| argument.split('=').next().unwrap_or_default());
    let strange = names.filter(|name| !known.contains(name.strip_prefix("--").unwrap_or_default()));
    strange.map(|name| format!("carrick {subcommand} has no {name}")).collect()
}
