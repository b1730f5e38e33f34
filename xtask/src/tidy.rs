//! The rules of this tree that no compiler knows, as a table.
//!
//! Invariant: a rule is a pure function of the [`Tree`], so each is shown to catch what it forbids by a test.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use anyhow::Context;

use crate::{process::Ended, workspace};

#[cfg(test)]
mod tests;

#[derive(Debug, clap::Args)]
pub struct Args {}

/// Prints what breaks a rule; true if nothing does.
pub fn run(_: &Args) -> anyhow::Result<bool> {
    let ended = check(workspace::root())?.into_ended();
    print!("{}", ended.output);
    Ok(ended.success)
}

/// Checks the tree below `root`.
pub fn check(root: &Path) -> anyhow::Result<Report> {
    let tree = Tree::read(root)?;
    Ok(Report { files: tree.files.len(), violations: violations(&tree) })
}

/// One rule.
struct Rule {
    name: &'static str,
    applies: fn(&str) -> bool,
    /// The lines (from 1) that break it, and how.
    find: fn(&Tree, &File) -> Vec<(usize, String)>,
}

const RULES: &[Rule] = &[
    Rule { name: "pure", applies: |path| is_pure(path) && !is_test(path), find: |_, file| words_in_code(file, IMPURE) },
    Rule {
        name: "unsafe",
        applies: |path| is_rust(path) && !may_be_unsafe(path),
        find: |_, file| words_in_code(file, &["unsafe"]),
    },
    Rule { name: "file length", applies: |path| is_rust(path) && !is_test(path), find: too_long },
    Rule { name: "module doc", applies: is_rust, find: no_module_doc },
    Rule { name: "leftover", applies: |path| !path.starts_with(OURSELVES), find: |_, file| words(file, LEFTOVERS) },
    Rule { name: "white space", applies: is_text, find: white_space },
    Rule { name: "link", applies: |path| path.ends_with(".md"), find: dead_links },
];

/// What the pure modules must not mention: effects, clocks and the environment are arguments there.
const IMPURE: &[&str] = &["tokio", "kube::", "rtnetlink", "aya", "std::env", "env::var", "SystemTime", "Instant"];
/// The modules that decide. Everything they know is an argument. Their tests may make arguments of whatever they like.
const PURE: &[&str] = &["intent", "state", "plan", "diff", "health"];
/// Where `unsafe` may stand: what speaks to the kernel, in the agent, in the programs, and in the lab.
const UNSAFE: &[&str] =
    &["agent/src/kernel", "agent/src/probe/", "agent/src/tunnel", "ebpf/src/", "tests/src/sys.rs", OURSELVES];
/// The rules name what they forbid.
const OURSELVES: &str = "xtask/src/tidy";
const LEFTOVERS: &[&str] = &["TODO", "FIXME", "XXX", "dbg!"];
const MAX_LINES: usize = 500;
const TEXT: &[&str] = &["md", "rs", "sh", "toml", "tpl", "txt", "yaml", "yml"];

fn is_rust(path: &str) -> bool {
    path.ends_with(".rs")
}

fn is_text(path: &str) -> bool {
    path.rsplit_once('.').is_some_and(|(_, extension)| TEXT.contains(&extension)) || path == ".ci/run"
}

fn is_test(path: &str) -> bool {
    path.starts_with("tests/it/") || path.ends_with("/tests.rs") || path.contains("/tests/")
}

fn is_pure(path: &str) -> bool {
    let module = path.strip_prefix("agent/src/").and_then(|path| path.split(['/', '.']).next());
    is_rust(path) && module.is_some_and(|module| PURE.contains(&module))
}

fn may_be_unsafe(path: &str) -> bool {
    UNSAFE.iter().any(|folder| path.starts_with(folder))
}

/// A file of the tree; `path` is relative, with `/`.
struct File {
    path: String,
    text: String,
}

/// Every file of the repository, also those that are no text (then empty).
struct Tree {
    files: BTreeMap<String, File>,
}

impl Tree {
    /// Reads all but what git and cargo keep for themselves.
    fn read(root: &Path) -> anyhow::Result<Tree> {
        let mut tree = Tree { files: BTreeMap::new() };
        tree.read_folder(root, "")?;
        Ok(tree)
    }

    fn read_folder(&mut self, folder: &Path, prefix: &str) -> anyhow::Result<()> {
        for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
            let entry = entry?;
            let name = entry.file_name().into_string().ok().context("a file name is not UTF-8")?;
            let (full, path) = (entry.path(), format!("{prefix}{name}"));
            if entry.file_type()?.is_dir() {
                let foreign = name == ".git" || name == "target" || full.join("CACHEDIR.TAG").exists();
                if !foreign {
                    self.read_folder(&full, &format!("{path}/"))?;
                }
            } else if path != ".git" {
                let bytes = fs::read(&full).with_context(|| format!("read {}", full.display()))?;
                self.add(&path, &String::from_utf8(bytes).unwrap_or_default());
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &str, text: &str) {
        self.files.insert(path.to_owned(), File { path: path.to_owned(), text: text.to_owned() });
    }

    /// Whether there is such a file or folder.
    fn has(&self, path: &str) -> bool {
        let folder = format!("{path}/");
        path.is_empty() || self.files.contains_key(path) || self.files.keys().any(|file| file.starts_with(&folder))
    }
}

/// One line that breaks one rule.
#[derive(Debug, PartialEq, Eq)]
struct Violation {
    path: String,
    line: usize,
    rule: &'static str,
    problem: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: {}", self.path, self.line, self.rule, self.problem)
    }
}

/// What a check of the whole tree found.
pub struct Report {
    files: usize,
    violations: Vec<Violation>,
}

impl Report {
    /// As the outcome of a step. A tree without files is a failure: then we looked in the wrong place.
    pub fn into_ended(self) -> Ended {
        let mut output: String = self.violations.iter().map(|violation| format!("{violation}\n")).collect();
        output += &format!("tidy: {} files, {} violations\n", self.files, self.violations.len());
        Ended { success: self.files > 0 && self.violations.is_empty(), output }
    }
}

fn violations(tree: &Tree) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in tree.files.values() {
        for rule in RULES.iter().filter(|rule| (rule.applies)(&file.path)) {
            found.extend((rule.find)(tree, file).into_iter().map(|(line, problem)| Violation {
                path: file.path.clone(),
                line,
                rule: rule.name,
                problem,
            }));
        }
    }
    found
}

fn lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(index, line)| (index + 1, line))
}

fn words(file: &File, forbidden: &[&str]) -> Vec<(usize, String)> {
    lines(&file.text).flat_map(|(number, line)| mentions(line, forbidden).map(move |word| (number, word))).collect()
}

/// As [`words`], leaving comments out.
fn words_in_code(file: &File, forbidden: &[&str]) -> Vec<(usize, String)> {
    let code = |line: &str| line.trim_start().starts_with("//") || line.is_empty();
    lines(&file.text)
        .filter(|(_, line)| !code(line))
        .map(|(number, line)| (number, line.split_once(" // ").map_or(line, |(code, _)| code)))
        .flat_map(|(number, line)| mentions(line, forbidden).map(move |word| (number, word)))
        .collect()
}

fn mentions<'a>(line: &'a str, forbidden: &'a [&str]) -> impl Iterator<Item = String> + 'a {
    forbidden.iter().filter(|word| has_word(line, word)).map(|word| format!("mentions {word}"))
}

/// Whether `word` stands in `line` and is not a part of a longer one, as of `--a-word-in-an-option`.
fn has_word(line: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        let after = line[at + word.len()..].chars().next();
        let ends = !word.ends_with(part) || !after.is_some_and(|c| part(c) || c == '-');
        ends && !line[..at].ends_with(part)
    })
}

/// Tests in the same file do not count.
fn too_long(_: &Tree, file: &File) -> Vec<(usize, String)> {
    let all: Vec<&str> = file.text.lines().collect();
    let tests = all.windows(2).position(|pair| pair[0] == "#[cfg(test)]" && pair[1].starts_with("mod tests {"));
    let length = tests.unwrap_or(all.len());
    if length > MAX_LINES { vec![(length, format!("{length} lines, {MAX_LINES} are enough"))] } else { Vec::new() }
}

fn no_module_doc(_: &Tree, file: &File) -> Vec<(usize, String)> {
    if file.text.starts_with("//! ") { Vec::new() } else { vec![(1, "does not open with //!".to_owned())] }
}

fn white_space(_: &Tree, file: &File) -> Vec<(usize, String)> {
    let mut found: Vec<_> = lines(&file.text)
        .filter(|(_, line)| line.ends_with([' ', '\t']))
        .map(|(number, _)| (number, "trailing white space".to_owned()))
        .collect();
    if file.text.contains('\r') {
        found.push((1, "carriage returns".to_owned()));
    }
    if !file.text.is_empty() && !file.text.ends_with('\n') {
        found.push((file.text.lines().count(), "no newline at the end".to_owned()));
    }
    found
}

/// Relative links of Markdown, outside of code.
fn dead_links(tree: &Tree, file: &File) -> Vec<(usize, String)> {
    let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
    let mut in_code = false;
    let mut dead = Vec::new();
    for (number, line) in lines(&file.text) {
        in_code ^= line.trim_start().starts_with("```");
        if in_code {
            continue;
        }
        for target in line.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target) {
            let path = target.split('#').next().unwrap_or_default();
            if !target.contains(':') && !resolve(folder, path).is_some_and(|path| tree.has(&path)) {
                dead.push((number, format!("{target} does not exist")));
            }
        }
    }
    dead
}

/// `target` as seen from `folder`, relative to the root; `None` if it leaves the tree.
fn resolve(folder: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = folder.split('/').filter(|part| !part.is_empty()).collect();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            name => parts.push(name),
        }
    }
    Some(parts.join("/"))
}
