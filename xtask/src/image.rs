//! `cargo xtask image`: the container image that ships, and the list of what is in it.
//!
//! The image holds `carrick`, linked statically, `nft` with the libraries that it loads, and the few files that the C
//! library and `nft` look names up in: no shell, no package manager. Invariant: two builds of one tree on one system give
//! one digest, in whichever folder; `--check-reproducible` shows it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    elf,
    oci::{Arch, Image, Written},
    workspace,
};

mod build;
mod sbom;

use build::Package;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The processor that it is for. For another than this machine's a cross compiler is needed, and --root.
    #[arg(long, value_enum, default_value_t = Arch::HOST)]
    arch: Arch,
    /// Where the archive and the list of its contents go; target/image unless given.
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// The image's name; carrick.dev/carrick:VERSION unless given.
    #[arg(long, value_name = "HOST/PATH:TAG")]
    reference: Option<String>,
    /// The Debian that nft is taken from.
    #[arg(long, value_name = "DIR", default_value = "/")]
    root: PathBuf,
    /// Builds once more, from a copy of the tree in another folder, and compares the digests.
    #[arg(long)]
    check_reproducible: bool,
}

impl Default for Args {
    fn default() -> Args {
        Args { arch: Arch::HOST, output: None, reference: None, root: "/".into(), check_reproducible: false }
    }
}

/// What the chart names by itself.
pub const REPOSITORY: &str = "carrick.dev/carrick";
/// Bytes that a node may have to pull: the budget.
const AT_MOST: usize = 25_000_000;
const CARRICK: &str = "/usr/bin/carrick";
const NFT: &str = "/usr/sbin/nft";

/// What the programs look names up in. `nft` writes the number of a protocol that it knows no name of, and the agent would
/// not know its own table again. The kubelet brings hosts and resolv.conf.
const FILES: [(&str, &str); 4] = [
    ("/etc/group", "root:x:0:\n"),
    ("/etc/nsswitch.conf", "hosts: files dns\n"),
    ("/etc/passwd", "root:x:0:0:root:/:/sbin/nologin\n"),
    ("/etc/protocols", "icmp 1\ntcp 6\nudp 17\nipv6-icmp 58\n"),
];

/// The image for this machine, without an archive or a list of its contents. Its tag says what is in it, so that an image
/// of the same name is the same. And the `carrick` in it: that which is given, with what it loads, or this tree's. `build`:
/// what tells it from others of the same programs, for upgrades.
pub fn local(carrick: Option<&Path>, build: &str) -> Result<(Image, PathBuf)> {
    let missing = build::missing(Arch::HOST, Path::new(NFT));
    ensure!(missing.is_empty(), "cannot build for {}:\n{}", Arch::HOST.name(), missing.join("\n"));
    let (args, package) = (Args::default(), Package::read()?);
    let (mut image, program) = match carrick {
        Some(carrick) => (pack(&args, &package, carrick)?.image, carrick.to_owned()),
        None => {
            let built = build::carrick(workspace::root(), &workspace::target_dir()?, Arch::HOST)?;
            (assemble(&args, &package, &built)?.0, built)
        }
    };
    image.file("/etc/carrick-build", 0o644, build)?;
    let tag = image.content()?.hex();
    Ok((image.renamed(&format!("{REPOSITORY}:{}", &tag[..12]))?, program))
}

/// Builds and writes it. True if it is as small as it should be, and, if asked, the same twice.
pub fn run(args: &Args) -> Result<bool> {
    let missing = build::missing(args.arch, &elf::below(&args.root, Path::new(NFT)));
    ensure!(missing.is_empty(), "cannot build for {}:\n{}", args.arch.name(), missing.join("\n"));
    let package = Package::read()?;
    let target = workspace::target_dir()?;
    let carrick = build::carrick(workspace::root(), &target, args.arch)?;
    let (image, sources) = assemble(args, &package, &carrick)?;
    let out = args.output.clone().unwrap_or_else(|| target.join("image"));
    fs::create_dir_all(&out).with_context(|| format!("make {}", out.display()))?;
    let name = format!("carrick-{}-{}", package.version, args.arch.name());
    let (archive, list) = (out.join(format!("{name}.tar")), out.join(format!("{name}.cdx.json")));
    let written = image.write(&archive)?;
    let components = sbom::components(args.arch, &args.root, &sources)?;
    let document = sbom::document(image.reference(), &written.digest, &components)?;
    fs::write(&list, document).with_context(|| format!("write {}", list.display()))?;
    println!("{}", summary(&image, &written, &archive, &list, components.len()));
    let small = written.compressed <= AT_MOST;
    if !small {
        eprintln!("larger than the {} MB that a node should have to pull", megabytes(AT_MOST));
    }
    Ok(small && (!args.check_reproducible || same_elsewhere(args, &package, &written)?))
}

/// The image, and the files of `args.root` that are in it.
fn assemble(args: &Args, package: &Package, carrick: &Path) -> Result<(Image, Vec<PathBuf>)> {
    let Packed { image, sources, beside } = pack(args, package, carrick)?;
    ensure!(beside.is_empty(), "{} is not static: it loads {beside:?}", carrick.display());
    Ok((image, sources))
}

struct Packed {
    image: Image,
    /// Files of `args.root` for `nft`,
    sources: Vec<PathBuf>,
    /// and for `carrick`.
    beside: Vec<PathBuf>,
}

fn pack(args: &Args, package: &Package, carrick: &Path) -> Result<Packed> {
    let reference = args.reference.clone().unwrap_or_else(|| format!("{REPOSITORY}:{}", package.version));
    let mut image = Image::new(&reference, args.arch)?;
    image.created = created()?;
    image.entrypoint = vec![CARRICK.into()];
    image.env = vec!["PATH=/usr/sbin:/usr/bin".into()];
    image.labels = package.labels();
    let beside = image.program(CARRICK, carrick, &args.root)?;
    let mut sources = image.program(NFT, &elf::below(&args.root, Path::new(NFT)), &args.root)?;
    sources.push(NFT.into());
    for (path, text) in FILES {
        image.file(path, 0o644, text)?;
    }
    image.folder("/run", 0o755)?;
    image.folder("/tmp", 0o1777)?;
    Ok(Packed { image, sources, beside })
}

/// SOURCE_DATE_EPOCH (reproducible-builds.org), else 0: the clock would give every build a digest of its own.
fn created() -> Result<i64> {
    match env::var("SOURCE_DATE_EPOCH") {
        Ok(seconds) => seconds.parse().with_context(|| format!("SOURCE_DATE_EPOCH={seconds}")),
        Err(env::VarError::NotPresent) => Ok(0),
        Err(error) => bail!("SOURCE_DATE_EPOCH: {error}"),
    }
}

fn summary(image: &Image, written: &Written, archive: &Path, list: &Path, components: usize) -> String {
    format!(
        "image    {} (linux/{})\ndigest   {}\nsize     {} MB compressed\narchive  {}\ncontents {} ({components} components)",
        image.reference(),
        image.architecture.name(),
        written.digest,
        megabytes(written.compressed),
        archive.display(),
        list.display(),
    )
}

/// With one digit after the point, rounded up.
fn megabytes(bytes: usize) -> String {
    let tenths = bytes.div_ceil(100_000);
    format!("{}.{}", tenths / 10, tenths % 10)
}

/// Builds a copy of the tree in another folder; whether its image has the same digest.
fn same_elsewhere(args: &Args, package: &Package, first: &Written) -> Result<bool> {
    let folder = env::temp_dir().join(format!("carrick-image-{}", std::process::id()));
    fs::create_dir(&folder).with_context(|| format!("make {}", folder.display()))?;
    let second = second_digest(args, package, first, &folder);
    fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    let (same, text) = second?;
    println!("again    {text}");
    Ok(same)
}

fn second_digest(args: &Args, package: &Package, first: &Written, folder: &Path) -> Result<(bool, String)> {
    let tree = folder.join("another-tree");
    copy_tree(workspace::root(), &tree)?;
    let carrick = build::carrick(&tree, &folder.join("built"), args.arch)?;
    let (image, _) = assemble(args, package, &carrick)?;
    let (_, second) = image.archive()?;
    let same = second.digest == first.digest;
    Ok((same, format!("{}, {}", second.digest, if same { "the same" } else { "NOT the same" })))
}

/// The files that git knows, and those that it does not ignore.
fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let list = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"];
    let output = Command::new("git").args(list).current_dir(from).output().context("git ls-files")?;
    ensure!(output.status.success(), "git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).context("a file name is not UTF-8")?;
    for name in names.split_terminator('\0').filter(|name| from.join(name).is_file()) {
        let copy = to.join(name);
        if let Some(parent) = copy.parent() {
            fs::create_dir_all(parent).with_context(|| format!("make {}", parent.display()))?;
        }
        fs::copy(from.join(name), &copy).with_context(|| format!("copy {name}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_rounded_up() {
        let shown = [0, 1, 99_999, 100_000, 24_900_001, AT_MOST, AT_MOST + 1].map(megabytes);
        assert_eq!(shown, ["0.0", "0.1", "0.1", "0.1", "25.0", "25.0", "25.1"]);
    }

    #[test]
    fn nft_knows_the_protocols_that_the_agent_names() {
        let numbers: Vec<_> = FILES[3].1.lines().map(|line| line.split_once(' ').unwrap()).collect();
        assert_eq!(numbers, [("icmp", "1"), ("tcp", "6"), ("udp", "17"), ("ipv6-icmp", "58")]);
    }
}
