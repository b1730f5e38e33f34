//! Switches and flags, as values; laws have their tests beside them.

use super::*;

#[test]
fn switches_are_found_by_their_paths_and_combined() {
    let values = serde_saphyr::from_str("{a: {b: true, c: x}, d: false, e: [true]}").unwrap();
    let mut switches = Switches::new();
    find_switches(&values, "", &mut switches);
    assert_eq!(switches, Switches::from([("a.b".to_owned(), true), ("d".to_owned(), false)]));
    let shown: Vec<String> = combinations(&switches).iter().map(show).collect();
    assert_eq!(shown, ["[]", "[a.b]", "[d]", "[a.b d]"]);
}

const REFERENCE: &str = "Joins.

Usage: carrick [OPTIONS] <COMMAND>

----------------
Runs it

Usage: carrick agent [OPTIONS] --cluster-name <NAME>

Options:
      --cluster-name <NAME>
          Unlike --other, this
  -o, --output <OUTPUT>
----------------
Makes it

Usage: carrick keys gen [OPTIONS]

Options:
      --hop
";

#[test]
fn flags_are_read_from_the_reference() {
    let flags = flags::read(REFERENCE);
    let shown: Vec<String> = flags.iter().map(|(name, flags)| format!("{name}: {flags:?}")).collect();
    assert_eq!(shown, [": {}", r#"agent: {"cluster-name", "output"}"#, r#"keys gen: {"hop"}"#]);
    assert!(flags::unknown(&flags, &["agent", "--cluster-name=mn", "--output=json"]).is_empty());
    assert_eq!(
        flags::unknown(&flags, &["agent", "--other=1", "mn"]),
        ["carrick agent has no --other", "carrick agent has no mn"]
    );
    assert_eq!(flags::unknown(&flags, &["serve"]), ["carrick has no subcommand serve"]);
    assert_eq!(flags::unknown(&flags, &[]), ["no subcommand is given"]);
}

/// A chart of this tree installs this tree's programs.
#[test]
fn the_chart_has_the_workspace_s_version() {
    let chart = read_yaml(&workspace::root().join("manifests/carrick/Chart.yaml")).unwrap();
    assert_eq!(
        (chart["version"].as_str(), chart["appVersion"].as_str()),
        (Some(env!("CARGO_PKG_VERSION")), Some(env!("CARGO_PKG_VERSION")))
    );
}
