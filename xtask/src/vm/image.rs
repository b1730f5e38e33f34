//! An initial RAM disk: a cpio archive in the format that the kernel reads ("newc",
//! Documentation/driver-api/early-userspace/buffer-format.rst).

use std::{collections::BTreeSet, fs, path::Path};

use anyhow::{Context, Result};

const FILE: u32 = 0o100_000;
const FOLDER: u32 = 0o040_000;

/// Files and folders; the parents of each are made.
#[derive(Debug, Default)]
pub struct Image {
    bytes: Vec<u8>,
    made: BTreeSet<String>,
}

impl Image {
    pub fn folder(&mut self, path: &str) {
        let path = path.trim_start_matches('/');
        if path.is_empty() || !self.made.insert(path.to_owned()) {
            return;
        }
        self.parent(path);
        self.entry(path, FOLDER | 0o755, &[]);
    }

    /// A path that is there already stays as it is.
    pub fn file(&mut self, path: &str, mode: u32, bytes: &[u8]) {
        let path = path.trim_start_matches('/');
        if self.made.insert(path.to_owned()) {
            self.parent(path);
            self.entry(path, FILE | mode, bytes);
        }
    }

    /// A file of this machine that is run.
    pub fn program(&mut self, path: &str, source: &Path) -> Result<()> {
        let bytes = fs::read(source).with_context(|| format!("read {}", source.display()))?;
        self.file(path, 0o755, &bytes);
        Ok(())
    }

    pub fn into_bytes(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn parent(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.folder(parent);
        }
    }

    /// A header of hexadecimal fields, the name, the bytes; name and bytes end at a multiple of four.
    fn entry(&mut self, name: &str, mode: u32, bytes: &[u8]) {
        let inode = self.made.len();
        let [links, uid, gid, time, major, minor] = [1, 0, 0, 0, 0, 0];
        let (size, name_size) = (bytes.len(), name.len() + 1);
        let header = format!(
            "070701{inode:08x}{mode:08x}{uid:08x}{gid:08x}{links:08x}{time:08x}{size:08x}{major:08x}{minor:08x}\
             {major:08x}{minor:08x}{name_size:08x}{check:08x}{name}\0",
            check = 0
        );
        self.bytes.extend(header.as_bytes());
        self.align();
        self.bytes.extend(bytes);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_come_first_and_once() {
        let mut image = Image::default();
        image.file("/a/b/c", 0o640, b"hello");
        image.file("/a/b/c", 0o640, b"again");
        image.file("/a/d", 0o755, b"");
        image.folder("a");
        let names: Vec<_> = entries(&image.into_bytes()).into_iter().map(|(name, ..)| name).collect();
        assert_eq!(names, ["a", "a/b", "a/b/c", "a/d", "TRAILER!!!"]);
    }

    #[test]
    fn an_entry_is_what_it_was_given() {
        let mut image = Image::default();
        image.file("c", 0o640, b"hello");
        assert_eq!(entries(&image.into_bytes())[0], ("c".to_owned(), 0o100_640, b"hello".to_vec()));
    }

    /// As the kernel's `init/initramfs.c` reads it.
    fn entries(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        while !archive.is_empty() {
            let header = std::str::from_utf8(&archive[..110]).unwrap();
            assert_eq!(&header[..6], "070701");
            let field = |index: usize| u32::from_str_radix(&header[6 + 8 * index..][..8], 16).unwrap();
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let data = (110 + name_size).next_multiple_of(4);
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            entries.push((name, mode, archive[data..data + size].to_vec()));
            archive = &archive[(data + size).next_multiple_of(4)..];
        }
        entries
    }
}
