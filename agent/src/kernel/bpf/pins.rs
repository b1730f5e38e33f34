//! Where our BPF objects live in bpffs: `carrick/v<ABI>/` with `maps/`, `links/` and one `programs-<build>/`.
//!
//! Invariant: a map's pin is made before any program that uses it is pinned, and programs are unpinned before a map is
//! made anew; so programs whose folder is whole use the maps that are pinned.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fs::{self, DirBuilder},
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::DirBuilderExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sys::statfs::{BPF_FS_MAGIC, statfs},
};

use super::sys::{self, Kind};
use crate::state::{Attachment, Program};

/// Ends the name of a link's pin that is about to replace another. No program is called so.
const NEXT: &str = "-next";

#[derive(Clone, Debug)]
pub(super) struct Pins {
    bpffs: PathBuf,
    abi: u32,
}

impl Pins {
    pub(super) fn new(bpffs: &Path, abi: u32) -> Pins {
        Pins { bpffs: bpffs.to_owned(), abi }
    }

    pub(super) fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    fn root(&self) -> PathBuf {
        self.bpffs.join("carrick")
    }

    fn dir(&self) -> PathBuf {
        self.root().join(format!("v{}", self.abi))
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.dir().join("maps").join(name)
    }

    fn programs(&self, build: &str) -> PathBuf {
        self.dir().join(format!("programs-{build}"))
    }

    fn links(&self) -> PathBuf {
        self.dir().join("links")
    }

    pub(super) fn link(&self, attachment: &Attachment) -> PathBuf {
        self.links().join(link_name(attachment))
    }

    /// Whether it is a bpf filesystem. Where it is not, nothing of ours can be.
    pub(super) fn is_bpffs(&self) -> io::Result<bool> {
        match statfs(&self.bpffs) {
            Ok(found) => Ok(found.filesystem_type() == BPF_FS_MAGIC),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    pub(super) fn make_dirs(&self) -> io::Result<()> {
        make_dir(&self.dir().join("maps"))?;
        make_dir(&self.links())
    }

    /// Whether something is pinned as each of these maps.
    pub(super) fn has_maps<'a>(&self, names: impl IntoIterator<Item = &'a &'a str>) -> bool {
        names.into_iter().all(|name| self.map(name).exists())
    }

    /// The programs of a build; `None`: they are not all there.
    pub(super) fn open_programs(&self, build: &str) -> io::Result<Option<BTreeMap<Program, OwnedFd>>> {
        let dir = self.programs(build);
        let mut programs = BTreeMap::new();
        for program in Program::ALL {
            match sys::open(&dir.join(program.name()), Kind::Program) {
                Ok(Some(fd)) => programs.insert(program, fd),
                Ok(None) => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => return Ok(None),
                Err(error) => return Err(error),
            };
        }
        Ok(Some(programs))
    }

    pub(super) fn pin_programs(&self, build: &str, programs: &BTreeMap<Program, OwnedFd>) -> io::Result<()> {
        let dir = self.programs(build);
        remove_tree(&dir)?;
        make_dir(&dir)?;
        programs.iter().try_for_each(|(program, fd)| sys::pin(fd.as_fd(), &dir.join(program.name())))
    }

    /// Unpins the programs of every other build; of every build with `None`.
    pub(super) fn remove_programs(&self, but: Option<&str>) -> io::Result<()> {
        let kept = but.map(|build| format!("programs-{build}"));
        let stale = |name: &String| name.starts_with("programs-") && kept.as_ref() != Some(name);
        list(&self.dir())?.iter().filter(|name| stale(name)).try_for_each(|name| remove_tree(&self.dir().join(name)))
    }

    /// What is pinned as a link, with the attachment that its name says.
    pub(super) fn list_links(&self) -> io::Result<Vec<Attachment>> {
        Ok(list(&self.links())?.iter().filter_map(|name| parse_link_name(name)).collect())
    }

    /// Pins a link, in one step with whatever link is pinned there.
    pub(super) fn replace_link(&self, attachment: &Attachment, link: &OwnedFd) -> io::Result<()> {
        let path = self.link(attachment);
        let next = self.links().join(link_name(attachment) + NEXT);
        remove_file(&next)?;
        sys::pin(link.as_fd(), &next)?;
        fs::rename(next, path)
    }

    pub(super) fn remove_link(&self, attachment: &Attachment) -> io::Result<()> {
        remove_file(&self.link(attachment))
    }

    /// Removes pins among the links that are not called as one: left by a crash.
    pub(super) fn remove_strays(&self) -> io::Result<()> {
        let names = list(&self.links())?;
        let strays = names.iter().filter(|name| parse_link_name(name).is_none());
        strays.into_iter().try_for_each(|name| remove_file(&self.links().join(name)))
    }

    /// The folders of every ABI.
    pub(super) fn all(&self) -> io::Result<Vec<Pins>> {
        Ok(self.abis()?.into_iter().map(|abi| Pins { abi, ..self.clone() }).collect())
    }

    /// The folders of other ABIs, the newest first.
    pub(super) fn others(&self) -> io::Result<Vec<Pins>> {
        let mut others = self.all()?;
        others.retain(|pins| pins.abi != self.abi);
        others.sort_by_key(|pins| Reverse(pins.abi));
        Ok(others)
    }

    /// The folders of older ABIs.
    pub(super) fn older(&self) -> io::Result<Vec<Pins>> {
        Ok(self.others()?.into_iter().filter(|pins| pins.abi < self.abi).collect())
    }

    /// The newest ABI, if it is newer than ours.
    pub(super) fn newer(&self) -> io::Result<Option<u32>> {
        Ok(self.abis()?.into_iter().max().filter(|abi| *abi > self.abi))
    }

    fn abis(&self) -> io::Result<Vec<u32>> {
        let names = list(&self.root())?;
        Ok(names.iter().filter_map(|name| name.strip_prefix('v')?.parse().ok()).collect())
    }

    /// Removes everything of this ABI. What only a pin held is detached and gone.
    pub(super) fn remove(&self) -> io::Result<()> {
        remove_tree(&self.dir())
    }

    /// Removes everything of every ABI.
    pub(super) fn remove_all(&self) -> io::Result<()> {
        remove_tree(&self.root())
    }
}

/// `<link>-<program>`. bpffs takes no dots in names.
fn link_name(attachment: &Attachment) -> String {
    let link = attachment.link.replace('%', "%25").replace('.', "%2e");
    format!("{link}-{}", attachment.program.name())
}

fn parse_link_name(name: &str) -> Option<Attachment> {
    // No program's name has a dash.
    let (link, program) = name.rsplit_once('-')?;
    let program = Program::ALL.into_iter().find(|known| known.name() == program)?;
    Some(Attachment { program, link: link.replace("%2e", ".").replace("%25", "%") })
}

fn make_dir(path: &Path) -> io::Result<()> {
    let made = DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.map_err(|error| io::Error::new(error.kind(), format!("cannot make the folder {}: {error}", path.display())))
}

/// The names in a folder; none if it is not there.
fn list(path: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

fn remove_file(path: &Path) -> io::Result<()> {
    absent_is_done(fs::remove_file(path))
}

fn remove_tree(path: &Path) -> io::Result<()> {
    absent_is_done(fs::remove_dir_all(path))
}

fn absent_is_done(result: io::Result<()>) -> io::Result<()> {
    result.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Link names are what the kernel's dev_valid_name permits.
        #[test]
        fn a_pin_says_what_is_attached_where(link in "[^/:\\s\\x00]{1,15}", program in 0..Program::ALL.len()) {
            let attachment = Attachment { program: Program::ALL[program], link };
            let name = link_name(&attachment);
            prop_assert!(!name.contains('.'));
            prop_assert_eq!(parse_link_name(&(name.clone() + NEXT)), None);
            prop_assert_eq!(parse_link_name(&name), Some(attachment));
        }
    }
}
