//! What the image was made of, as a CycloneDX 1.5 document: crates, compilers, and the Debian packages of copied files.
//!
//! Invariant: it lists what is in the image, not what built it: no build scripts, no procedural macros, no tests.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::build;
use crate::{
    bpf_tools, elf,
    oci::{Arch, Digest},
    workspace,
};

/// A crate, a package, a compiler's library.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Component {
    name: String,
    version: String,
    /// A package URL (github.com/package-url/purl-spec).
    purl: String,
    /// An SPDX expression, where one is told.
    license: Option<String>,
}

/// Everything in the image for `arch`; `sources` are the files of the Debian at `root` that it holds.
pub fn components(arch: Arch, root: &Path, sources: &[PathBuf]) -> Result<Vec<Component>> {
    let mut components = BTreeSet::new();
    components.extend(crates("agent", arch.target())?);
    // Of the programs that are embedded.
    components.extend(crates("ebpf", "bpfel-unknown-none")?);
    components.insert(compiler(build::rustc())?);
    components.insert(compiler(Command::new(bpf_tools::compiler().map_err(anyhow::Error::msg)?))?);
    for source in sources {
        components.insert(package_of(source, root)?);
    }
    // What the static binary is linked with; for another processor it comes from this machine's cross packages.
    for library in ["libc.a", "libgcc_eh.a"] {
        let path = build::stdout(Command::new(build::compiler(arch)).arg(format!("-print-file-name={library}")))?;
        let path = Path::new(path.trim()).canonicalize().with_context(|| library.to_owned())?;
        components.insert(package_of(&path, Path::new("/"))?);
    }
    Ok(components.into_iter().collect())
}

/// The crates that are linked into `package` on `target`.
fn crates(package: &str, target: &str) -> Result<Vec<Component>> {
    let mut command = workspace::cargo();
    command.args(["tree", "--locked", "--package", package, "--target", target, "--edges", "normal,no-proc-macro"]);
    command.args(["--prefix", "none", "--format", "{p}|{l}"]);
    parse_tree(&build::stdout(&mut command)?)
}

/// Lines of `name v1.2.3 (where from)|licence`, with ` (*)` where one comes again.
fn parse_tree(tree: &str) -> Result<Vec<Component>> {
    let parse = |line: &str| {
        let (package, license) = line.strip_suffix(" (*)").unwrap_or(line).split_once('|')?;
        let mut words = package.split(' ');
        let (name, version) = (words.next()?.to_owned(), words.next()?.strip_prefix('v')?.to_owned());
        let purl = format!("pkg:cargo/{name}@{}", escaped(&version));
        // The old way to say "or".
        let license = (!license.is_empty()).then(|| license.replace(" / ", " OR ").replace('/', " OR "));
        Some(Component { name, version, purl, license })
    };
    tree.lines().map(|line| parse(line).with_context(|| format!("cargo tree: {line}"))).collect()
}

/// The compiler's own library, which is in all that it builds.
fn compiler(mut rustc: Command) -> Result<Component> {
    let version = build::stdout(rustc.arg("-vV"))?;
    let release = version.lines().find_map(|line| line.strip_prefix("release: "));
    let version = release.context("rustc -vV names no release")?.to_owned();
    let purl = format!("pkg:generic/rust@{}", escaped(&version));
    Ok(Component { name: "rust".into(), version, purl, license: Some("MIT OR Apache-2.0".into()) })
}

/// The Debian package that the file at `path` of `root` belongs to.
fn package_of(path: &Path, root: &Path) -> Result<Component> {
    let query = || {
        let mut command = Command::new("dpkg-query");
        command.arg("--admindir").arg(elf::below(root, Path::new("/var/lib/dpkg")));
        command
    };
    // Packages have a file by either name, and one of the folders is a link to the other.
    let other = path.strip_prefix("/usr").map_or_else(
        |_| Path::new("/usr").join(path.strip_prefix("/").unwrap_or(path)),
        |rest| Path::new("/").join(rest),
    );
    let owner = [path, &other].into_iter().find_map(|path| build::stdout(query().arg("--search").arg(path)).ok());
    let owner = owner.with_context(|| format!("{} belongs to no Debian package", path.display()))?;
    let package = parse_owner(&owner).with_context(|| format!("dpkg-query --search: {owner}"))?;
    let format = "--showformat=${Package}\t${Version}\t${Architecture}";
    parse_package(&build::stdout(query().args(["--show", format, package]))?)
}

/// Of `package:arch, package:arch: /path`, the first. Diversions are told in lines of their own.
fn parse_owner(said: &str) -> Option<&str> {
    let line = said.lines().find(|line| !line.starts_with("diversion by "))?;
    line.split_once(": ")?.0.split(", ").next()
}

fn parse_package(line: &str) -> Result<Component> {
    let fields: Vec<_> = line.trim().split('\t').collect();
    ensure!(fields.len() == 3, "dpkg-query --show: {line}");
    let (name, version, arch) = (fields[0].to_owned(), fields[1].to_owned(), fields[2]);
    let purl = format!("pkg:deb/debian/{}@{}?arch={arch}", escaped(&name), escaped(&version));
    Ok(Component { name, version, purl, license: None })
}

/// What may not stand in a part of a package URL.
fn escaped(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || ".-_~".contains(c);
    text.chars().map(|c| if plain(c) { c.to_string() } else { format!("%{:02X}", u32::from(c)) }).collect()
}

/// The document, for the image of this name and digest. Without a time: it is as reproducible as the image.
pub fn document(image: &str, digest: &Digest, components: &[Component]) -> Result<String> {
    let version = digest.to_string();
    let entry = |component: &Component| Entry {
        kind: "library",
        bom_ref: Some(component.purl.clone()),
        name: component.name.clone(),
        version: component.version.clone(),
        licenses: component.license.iter().map(|expression| License { expression: expression.clone() }).collect(),
        purl: Some(component.purl.clone()),
    };
    let subject =
        Entry { kind: "container", bom_ref: None, name: image.to_owned(), version, licenses: Vec::new(), purl: None };
    let document = Document {
        bom_format: "CycloneDX",
        spec_version: "1.5",
        version: 1,
        metadata: Metadata { component: subject },
        components: components.iter().map(entry).collect(),
    };
    Ok(serde_json::to_string_pretty(&document)? + "\n")
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    bom_format: &'static str,
    spec_version: &'static str,
    version: u32,
    metadata: Metadata,
    components: Vec<Entry>,
}

#[derive(Serialize)]
struct Metadata {
    component: Entry,
}

#[derive(Serialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: &'static str,
    #[serde(rename = "bom-ref", skip_serializing_if = "Option::is_none")]
    bom_ref: Option<String>,
    name: String,
    version: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    licenses: Vec<License>,
    #[serde(skip_serializing_if = "Option::is_none")]
    purl: Option<String>,
}

#[derive(Serialize)]
struct License {
    expression: String,
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn the_document_lists_crates_and_packages() {
        let mut components = parse_tree(
            "agent v0.1.0 (/tree/agent)|Apache-2.0\n\
             wireguard-go v0.0.0+rc.1|MIT/Apache-2.0 (*)\n",
        )
        .unwrap();
        components.push(parse_package("libstdc++6\t1:2.36-9+deb12u14\tamd64\n").unwrap());
        expect![[r#"
            {
              "bomFormat": "CycloneDX",
              "specVersion": "1.5",
              "version": 1,
              "metadata": {
                "component": {
                  "type": "container",
                  "name": "carrick.dev/carrick:0.1.0",
                  "version": "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
                }
              },
              "components": [
                {
                  "type": "library",
                  "bom-ref": "pkg:cargo/agent@0.1.0",
                  "name": "agent",
                  "version": "0.1.0",
                  "licenses": [
                    {
                      "expression": "Apache-2.0"
                    }
                  ],
                  "purl": "pkg:cargo/agent@0.1.0"
                },
                {
                  "type": "library",
                  "bom-ref": "pkg:cargo/wireguard-go@0.0.0%2Brc.1",
                  "name": "wireguard-go",
                  "version": "0.0.0+rc.1",
                  "licenses": [
                    {
                      "expression": "MIT OR Apache-2.0"
                    }
                  ],
                  "purl": "pkg:cargo/wireguard-go@0.0.0%2Brc.1"
                },
                {
                  "type": "library",
                  "bom-ref": "pkg:deb/debian/libstdc%2B%2B6@1%3A2.36-9%2Bdeb12u14?arch=amd64",
                  "name": "libstdc++6",
                  "version": "1:2.36-9+deb12u14",
                  "purl": "pkg:deb/debian/libstdc%2B%2B6@1%3A2.36-9%2Bdeb12u14?arch=amd64"
                }
              ]
            }
        "#]]
        .assert_eq(&document("carrick.dev/carrick:0.1.0", &Digest::of(b""), &components).unwrap());
    }

    #[test]
    fn the_owner_of_a_file_may_be_of_an_architecture() {
        assert_eq!(parse_owner("libc6:amd64: /lib64/ld-linux-x86-64.so.2\n"), Some("libc6:amd64"));
        assert_eq!(parse_owner("nftables: /usr/sbin/nft\n"), Some("nftables"));
        assert_eq!(parse_owner("libc6:amd64, libc6:i386: /usr/share/a\n"), Some("libc6:amd64"));
        assert_eq!(parse_owner("diversion by x from: /a\ndiversion by x to: /a.x\ny: /a\n"), Some("y"));
        assert_eq!(parse_owner(""), None);
    }

    #[test]
    fn a_line_that_is_not_understood_is_an_error() {
        assert!(parse_tree("agent v0.1.0|MIT\n[build-dependencies]\n").is_err());
        assert!(parse_package("libc6\t2.36").is_err());
    }
}
