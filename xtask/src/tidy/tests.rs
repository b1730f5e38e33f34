//! Each rule on a tree that breaks it, and on one that looks as if it did.

use super::*;

fn check(files: &[(&str, &str)], expected: &[&str]) {
    let mut tree = Tree { files: BTreeMap::new() };
    for (path, text) in files {
        tree.add(path, text);
    }
    let found: Vec<_> = violations(&tree).iter().map(Violation::to_string).collect();
    assert_eq!(found, expected);
}

fn rust(code: &str) -> String {
    format!("//! Doc.\n\n{code}\n")
}

#[test]
fn pure_modules_mention_no_effect() {
    let code = rust("use std::time::Instant;\nuse tokio::fs;\nlet home = std::env::var(\"HOME\");");
    let problems = [
        "3: pure: mentions Instant",
        "4: pure: mentions tokio",
        "5: pure: mentions std::env",
        "5: pure: mentions env::var",
    ];
    for path in [
        "agent/src/plan.rs",
        "agent/src/plan/peers.rs",
        "agent/src/intent.rs",
        "agent/src/diff.rs",
        "agent/src/state/x.rs",
    ] {
        let expected: Vec<_> = problems.iter().map(|problem| format!("{path}:{problem}")).collect();
        check(&[(path, &code)], &expected.iter().map(String::as_str).collect::<Vec<_>>());
    }
    check(&[("agent/src/source.rs", &code), ("agent/src/planner.rs", &code), ("agent/src/plan/tests.rs", &code)], &[]);
    let prose = rust("// Instantly, or at the Instant that tokio says.\nlet layable = Instants; // aya");
    check(&[("agent/src/plan.rs", &prose)], &[]);
}

#[test]
fn unsafe_stays_where_the_kernel_is() {
    let code = rust("unsafe { f() }");
    check(&[("agent/src/dns.rs", &code)], &["agent/src/dns.rs:3: unsafe: mentions unsafe"]);
    check(&[("agent/src/kernel/bpf.rs", &code), ("agent/src/tunnel/io.rs", &code), ("ebpf/src/lib.rs", &code)], &[]);
    check(&[("agent/src/dns.rs", &rust("#![deny(unsafe_code)]\n// unsafe is not needed"))], &[]);
    check(&[("agent/src/dns.rs", &rust("run(\"--unsafe-mode\")"))], &[]);
}

#[test]
fn files_end_at_500_lines_before_their_tests() {
    let lines = |count: usize| rust(&vec!["f();"; count - 2].join("\n"));
    check(&[("a.rs", &lines(500))], &[]);
    check(&[("a.rs", &lines(501))], &["a.rs:501: file length: 501 lines, 500 are enough"]);
    let with_tests = format!("{}#[cfg(test)]\nmod tests {{\n{}}}\n", lines(499), "f();\n".repeat(100));
    check(&[("a.rs", &with_tests), ("b/tests.rs", &lines(900)), ("tests/it/main.rs", &lines(900))], &[]);
    let declared = format!("//! Doc.\n#[cfg(test)]\nmod tests;\n{}", "f();\n".repeat(500));
    check(&[("a.rs", &declared)], &["a.rs:503: file length: 503 lines, 500 are enough"]);
}

#[test]
fn modules_open_with_what_they_own() {
    check(&[("a.rs", "use std::fs;\n")], &["a.rs:1: module doc: does not open with //!"]);
    check(&[("a.rs", "//! Owns it.\n")], &[]);
}

#[test]
fn nothing_is_left_over() {
    check(
        &[("a.md", "TODO: write\n"), ("b.rs", &rust("dbg!(x);"))],
        &["a.md:1: leftover: mentions TODO", "b.rs:3: leftover: mentions dbg!"],
    );
    check(
        &[("c.sh", "f # FIXME\n"), ("d.yaml", "XXX: 1\n")],
        &["c.sh:1: leftover: mentions FIXME", "d.yaml:1: leftover: mentions XXX"],
    );
    check(&[("c.sh", "mktemp -d /tmp/XXXXXX\n"), ("e.md", "TODOS\n")], &[]);
}

#[test]
fn lines_end_where_they_end() {
    check(
        &[("a.toml", "a = 1 \n"), ("b.md", "text")],
        &["a.toml:1: white space: trailing white space", "b.md:1: white space: no newline at the end"],
    );
    check(&[("a.yaml", "a: 1\r\n")], &["a.yaml:1: white space: carriage returns"]);
    check(&[("a.toml", "a = 1\n"), ("empty.txt", ""), ("LICENSE", "as it came ")], &[]);
}

#[test]
fn relative_links_resolve() {
    let page = "[a](../README.md) [b](#here) [c](https://x.y/z) [d](img/a.png)\n[e](gone.md) [f](../../out.md)\n```\n[g](code)\n```\n";
    check(
        &[("README.md", "[docs](docs/) [page](./docs/page.md#top)\n"), ("docs/page.md", page), ("docs/img/a.png", "")],
        &["docs/page.md:2: link: gone.md does not exist", "docs/page.md:2: link: ../../out.md does not exist"],
    );
}

#[test]
fn an_empty_tree_is_no_success() {
    assert!(!Report { files: 0, violations: Vec::new() }.into_ended().success);
    assert!(Report { files: 1, violations: Vec::new() }.into_ended().success);
}
