//! Container images as values, and the archive that container engines import.
//!
//! The archive is an OCI image layout (image-spec 1.0) that also holds the `manifest.json` of `docker save`: `ctr images
//! import`, `docker load`, `podman load` and `skopeo` read it. The image has one layer.
//!
//! Invariant: the archive is a function of the [`Image`]: the same value gives the same bytes, wherever and whenever.

use std::{
    collections::BTreeMap,
    fmt, fs,
    io::{self, Write},
    path::{Component, Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compression, GzBuilder};
use serde::{Serialize, Serializer};
use sha2::{Digest as _, Sha256};

use crate::elf;
pub use crate::elf::Arch;

#[cfg(test)]
mod tests;

/// An image: what runs, with what, under which name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    reference: String,
    pub architecture: Arch,
    /// Program and first arguments; the first is an absolute path.
    pub entrypoint: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    pub labels: BTreeMap<String, String>,
    /// Seconds since 1970 that the image says it was made at. The files' times are always 0.
    pub created: i64,
    /// By path from the root, without a slash in front. Every entry's parents are folders of the map.
    files: BTreeMap<PathBuf, Entry>,
}

/// One path of the layer. All belong to root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    Folder { mode: u32 },
    File { mode: u32, bytes: Vec<u8> },
    Link { to: PathBuf },
}

/// What was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    /// The manifest's: what a registry, `crictl images --digests` and `image@sha256:...` call the image's digest.
    pub digest: Digest,
    /// Bytes of the compressed layer: what a node pulls, but for 1 kB.
    pub compressed: usize,
}

/// A SHA-256.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn of(bytes: &[u8]) -> Digest {
        Digest(Sha256::digest(bytes).into())
    }

    /// 64 hexadecimal digits.
    pub fn hex(&self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl Image {
    /// An empty image. `reference` is a whole one, `host/path:tag`: the kubelet makes `docker.io/library/NAME:latest` of a
    /// short one before it looks for an image, and would not find it under the name that it was imported by.
    pub fn new(reference: &str, architecture: Arch) -> Result<Image> {
        Ok(Image {
            reference: whole(reference)?,
            architecture,
            entrypoint: Vec::new(),
            env: Vec::new(),
            labels: BTreeMap::new(),
            created: 0,
            files: BTreeMap::new(),
        })
    }

    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// The same image by another name.
    pub fn renamed(self, reference: &str) -> Result<Image> {
        Ok(Image { reference: whole(reference)?, ..self })
    }

    /// Of its files, whatever its name.
    pub fn content(&self) -> Result<Digest> {
        Ok(Digest::of(&self.layer().context("pack the layer")?))
    }

    /// A folder at the absolute path `at`. Folders above an entry are made by themselves, with mode 0755.
    pub fn folder(&mut self, at: impl AsRef<Path>, mode: u32) -> Result<()> {
        self.insert(at.as_ref(), Entry::Folder { mode })
    }

    /// A file at the absolute path `at`.
    pub fn file(&mut self, at: impl AsRef<Path>, mode: u32, bytes: impl Into<Vec<u8>>) -> Result<()> {
        self.insert(at.as_ref(), Entry::File { mode, bytes: bytes.into() })
    }

    /// A symbolic link at the absolute path `at`.
    pub fn link(&mut self, at: impl AsRef<Path>, to: impl Into<PathBuf>) -> Result<()> {
        self.insert(at.as_ref(), Entry::Link { to: to.into() })
    }

    /// The program `source` at the absolute path `at`, and every library that it loads, where it looks for it.
    ///
    /// The libraries are taken from the tree `root`, `/` for this machine's; their paths in it are returned.
    pub fn program(&mut self, at: impl AsRef<Path>, source: &Path, root: &Path) -> Result<Vec<PathBuf>> {
        let named = || source.display().to_string();
        let bytes = fs::read(source).with_context(named)?;
        let libraries = elf::loaded_by(&bytes, self.architecture, root).with_context(named)?;
        self.file(at, 0o755, bytes)?;
        let paths = libraries.keys().cloned().collect();
        for (path, bytes) in libraries {
            self.file(path, 0o755, bytes)?;
        }
        Ok(paths)
    }

    /// Puts the same entry twice as once; anything else in the place of an entry is an error.
    fn insert(&mut self, at: &Path, entry: Entry) -> Result<()> {
        let named = || at.display().to_string();
        let path = at.strip_prefix("/").with_context(named)?;
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        ensure!(plain && path.parent().is_some(), "{}: not a plain absolute path", at.display());
        for parent in path.ancestors().skip(1).filter(|parent| parent.parent().is_some()) {
            match self.files.get(parent) {
                None => self.files.insert(parent.to_owned(), Entry::Folder { mode: 0o755 }),
                Some(Entry::Folder { .. }) => break,
                Some(_) => bail!("{}: below /{}, which is no folder", at.display(), parent.display()),
            };
        }
        match (self.files.get(path), &entry) {
            (None, _) | (Some(Entry::Folder { .. }), Entry::Folder { .. }) => {
                self.files.insert(path.to_owned(), entry);
            }
            (Some(there), _) => ensure!(*there == entry, "{}: twice, and not the same", at.display()),
        }
        Ok(())
    }

    /// Writes the archive to `out`, whole or not at all.
    pub fn write(&self, out: &Path) -> Result<Written> {
        let (bytes, written) = self.archive()?;
        let mut partial = out.as_os_str().to_owned();
        partial.push(".partial");
        fs::write(&partial, bytes).with_context(|| format!("write {}", partial.display()))?;
        fs::rename(&partial, out).with_context(|| format!("write {}", out.display()))?;
        Ok(written)
    }

    /// The archive's bytes.
    pub fn archive(&self) -> Result<(Vec<u8>, Written)> {
        let layer = self.layer().context("pack the layer")?;
        let created = jiff::Timestamp::from_second(self.created).context("the time of creation")?.to_string();
        let zipped = Blob::new("application/vnd.oci.image.layer.v1.tar+gzip", gzip(&layer).context("compress")?);
        let config =
            Blob::json("application/vnd.oci.image.config.v1+json", &self.config(&created, Digest::of(&layer)))?;
        let manifest = Manifest {
            schema_version: 2,
            media_type: "application/vnd.oci.image.manifest.v1+json",
            config: config.descriptor(),
            layers: [zipped.descriptor()],
        };
        let manifest = Blob::json(manifest.media_type, &manifest)?;
        let written = Written { digest: manifest.digest, compressed: zipped.bytes.len() };
        let index = Index {
            schema_version: 2,
            media_type: "application/vnd.oci.image.index.v1+json",
            manifests: [self.named(&manifest)],
        };
        let saved = [Saved { config: config.path(), repo_tags: [&self.reference], layers: [zipped.path()] }];
        let mut files: BTreeMap<PathBuf, Entry> = BTreeMap::new();
        let mut add = |path: String, bytes: Vec<u8>| files.insert(path.into(), Entry::File { mode: 0o644, bytes });
        add("index.json".into(), serde_json::to_vec(&index)?);
        add("manifest.json".into(), serde_json::to_vec(&saved)?);
        add("oci-layout".into(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
        for blob in [zipped, config, manifest] {
            add(blob.path(), blob.bytes);
        }
        for folder in ["blobs", "blobs/sha256"] {
            files.insert(folder.into(), Entry::Folder { mode: 0o755 });
        }
        Ok((tar(&files).context("pack the archive")?, written))
    }

    fn layer(&self) -> io::Result<Vec<u8>> {
        tar(&self.files)
    }

    fn config<'a>(&'a self, created: &'a str, layer: Digest) -> Config<'a> {
        Config {
            created,
            architecture: self.architecture.name(),
            os: "linux",
            config: Run { entrypoint: &self.entrypoint, env: &self.env, labels: &self.labels, working_dir: "/" },
            rootfs: RootFs { kind: "layers", diff_ids: [layer] },
            history: [History { created, created_by: "cargo xtask" }],
        }
    }

    /// The manifest as the index lists it: with the name that it is imported by.
    fn named(&self, manifest: &Blob) -> Descriptor {
        let tag = self.reference.rsplit_once(':').map(|(_, tag)| tag.to_owned()).unwrap_or_default();
        let annotations = BTreeMap::from([
            ("io.containerd.image.name", self.reference.clone()),
            ("org.opencontainers.image.ref.name", tag),
        ]);
        let platform = Platform { architecture: self.architecture.name(), os: "linux" };
        Descriptor { platform: Some(platform), annotations: Some(annotations), ..manifest.descriptor() }
    }
}

fn whole(reference: &str) -> Result<String> {
    let (path, tag) = reference.rsplit_once(':').unwrap_or_default();
    let host = path.split_once('/').map(|(host, _)| host).unwrap_or_default();
    ensure!(
        !tag.is_empty() && !tag.contains('/') && (host.contains(['.', ':']) || host == "localhost"),
        "{reference}: not of the form host/path:tag"
    );
    Ok(reference.to_owned())
}

/// Entries in the order of the map, in which a folder stands before what is in it. Nothing of this machine gets in.
fn tar(files: &BTreeMap<PathBuf, Entry>) -> io::Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, entry) in files {
        let mut header = tar::Header::new_gnu();
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        match entry {
            Entry::Folder { mode } => {
                header.set_entry_type(tar::EntryType::Directory);
                header.set_mode(*mode);
                // A folder's name ends with a slash.
                tar.append_data(&mut header, path.join(""), io::empty())?;
            }
            Entry::File { mode, bytes } => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_mode(*mode);
                header.set_size(bytes.len() as u64);
                tar.append_data(&mut header, path, bytes.as_slice())?;
            }
            Entry::Link { to } => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_mode(0o777);
                tar.append_link(&mut header, path, to)?;
            }
        }
    }
    tar.into_inner()
}

/// By miniz_oxide: zlib-rs is faster, and what it writes depends on what the processor can do.
fn gzip(bytes: &[u8]) -> io::Result<Vec<u8>> {
    const UNKNOWN_OS: u8 = 255;
    let builder = GzBuilder::new().mtime(0).operating_system(UNKNOWN_OS);
    let mut encoder = builder.write(Vec::new(), Compression::default());
    encoder.write_all(bytes)?;
    encoder.finish()
}

struct Blob {
    media_type: &'static str,
    digest: Digest,
    bytes: Vec<u8>,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Blob {
        Blob { media_type, digest: Digest::of(&bytes), bytes }
    }

    fn json(media_type: &'static str, value: &impl Serialize) -> Result<Blob> {
        Ok(Blob::new(media_type, serde_json::to_vec(value)?))
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.digest.hex())
    }

    fn descriptor(&self) -> Descriptor {
        let (media_type, digest, size) = (self.media_type, self.digest, self.bytes.len());
        Descriptor { media_type, digest, size, platform: None, annotations: None }
    }
}

// The documents are structs, not `json!`: the order of their fields is ours, whatever features serde_json was built with.

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: &'static str,
    digest: Digest,
    size: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    platform: Option<Platform>,
    #[serde(skip_serializing_if = "Option::is_none")]
    annotations: Option<BTreeMap<&'static str, String>>,
}

#[derive(Serialize)]
struct Platform {
    architecture: &'static str,
    os: &'static str,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest {
    schema_version: u8,
    media_type: &'static str,
    config: Descriptor,
    layers: [Descriptor; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Index {
    schema_version: u8,
    media_type: &'static str,
    manifests: [Descriptor; 1],
}

#[derive(Serialize)]
struct Config<'a> {
    created: &'a str,
    architecture: &'static str,
    os: &'static str,
    config: Run<'a>,
    rootfs: RootFs,
    history: [History<'a>; 1],
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Run<'a> {
    entrypoint: &'a [String],
    env: &'a [String],
    labels: &'a BTreeMap<String, String>,
    working_dir: &'static str,
}

#[derive(Serialize)]
struct RootFs {
    #[serde(rename = "type")]
    kind: &'static str,
    diff_ids: [Digest; 1],
}

#[derive(Serialize)]
struct History<'a> {
    created: &'a str,
    created_by: &'static str,
}

/// An entry of the `manifest.json` of `docker save`.
#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Saved<'a> {
    config: String,
    repo_tags: [&'a str; 1],
    layers: [String; 1],
}
