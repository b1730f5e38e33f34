//! The archive as its readers see it.

use std::io::Read;

use expect_test::expect;
use flate2::read::GzDecoder;
use serde_json::Value;

use super::*;

fn image() -> Image {
    let mut image = Image::new("registry.example/tools/hello:1.2", Arch::Amd64).unwrap();
    image.file("/usr/bin/hello", 0o755, *b"hello").unwrap();
    image.folder("/tmp", 0o1777).unwrap();
    image.link("/bin", "usr/bin").unwrap();
    image.file(format!("/{}name", "long/".repeat(30)), 0o644, *b"").unwrap();
    image.entrypoint = vec!["/usr/bin/hello".into(), "--loud".into()];
    image.env = vec!["PATH=/usr/bin".into()];
    image.labels.insert("org.opencontainers.image.title".into(), "hello".into());
    image
}

/// Mode, owner, time, path and contents of each entry, as written.
fn entries(archive: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut archive = tar::Archive::new(archive);
    let entries = archive.entries().unwrap().map(|entry| {
        let mut entry = entry.unwrap();
        let header = entry.header().clone();
        let kind = match header.entry_type() {
            tar::EntryType::Directory => 'd',
            tar::EntryType::Regular => '-',
            tar::EntryType::Symlink => 'l',
            other => panic!("{other:?}"),
        };
        let (mode, uid, gid) = (header.mode().unwrap(), header.uid().unwrap(), header.gid().unwrap());
        let (user, group) = (header.username().unwrap().unwrap(), header.groupname().unwrap().unwrap());
        let path = String::from_utf8(entry.path_bytes().into_owned()).unwrap();
        let to = entry.link_name().unwrap().map(|to| format!(" -> {}", to.display())).unwrap_or_default();
        let time = header.mtime().unwrap();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        (format!("{kind}{mode:04o} {uid}/{gid} {user:?}/{group:?} {time} {path}{to}"), bytes)
    });
    entries.collect()
}

fn listing(archive: &[u8]) -> String {
    entries(archive).into_iter().map(|(line, _)| line + "\n").collect()
}

/// The files of the archive by their path.
fn files(archive: &[u8]) -> BTreeMap<String, Vec<u8>> {
    let path = |line: String| line.rsplit_once(' ').unwrap().1.to_owned();
    entries(archive).into_iter().map(|(line, bytes)| (path(line), bytes)).collect()
}

fn unzip(bytes: &[u8]) -> Vec<u8> {
    let mut unzipped = Vec::new();
    GzDecoder::new(bytes).read_to_end(&mut unzipped).unwrap();
    unzipped
}

/// With one line for the folders of the long name.
fn shortened(listing: &str) -> String {
    let listing = listing.replace(&"long/".repeat(30), "LONG/");
    listing.lines().filter(|line| !line.contains(" long/")).map(|line| format!("{line}\n")).collect()
}

#[test]
fn the_layer_is_in_order_and_says_nothing_of_this_machine() {
    let layer = image().layer().unwrap();
    expect![[r#"
        l0777 0/0 ""/"" 0 bin -> usr/bin
        d0755 0/0 ""/"" 0 LONG/
        -0644 0/0 ""/"" 0 LONG/name
        d1777 0/0 ""/"" 0 tmp/
        d0755 0/0 ""/"" 0 usr/
        d0755 0/0 ""/"" 0 usr/bin/
        -0755 0/0 ""/"" 0 usr/bin/hello
    "#]]
    .assert_eq(&shortened(&listing(&layer)));
}

#[test]
fn the_archive_is_both_an_oci_layout_and_dockers() {
    let (archive, _) = image().archive().unwrap();
    let mut names = listing(&archive);
    let files = files(&archive);
    let json = |path: &str| serde_json::from_slice::<Value>(&files[path]).unwrap();
    let saved = json("manifest.json");
    // The digest of what was compressed is the compressor's business.
    for (name, path) in [("CONFIG", &saved[0]["Config"]), ("LAYER", &saved[0]["Layers"][0])] {
        names = names.replace(path.as_str().unwrap(), &format!("blobs/sha256/{name}"));
    }
    let manifest = json("index.json")["manifests"][0]["digest"].as_str().unwrap().replace("sha256:", "");
    let mut names: Vec<_> = names.lines().map(|line| line.replace(&manifest, "MANIFEST")).collect();
    names.sort();
    expect![[r#"
        -0644 0/0 ""/"" 0 blobs/sha256/CONFIG
        -0644 0/0 ""/"" 0 blobs/sha256/LAYER
        -0644 0/0 ""/"" 0 blobs/sha256/MANIFEST
        -0644 0/0 ""/"" 0 index.json
        -0644 0/0 ""/"" 0 manifest.json
        -0644 0/0 ""/"" 0 oci-layout
        d0755 0/0 ""/"" 0 blobs/
        d0755 0/0 ""/"" 0 blobs/sha256/"#]]
    .assert_eq(&names.join("\n"));
    let config = String::from_utf8(files[saved[0]["Config"].as_str().unwrap()].clone()).unwrap();
    expect![[r#"
        {"created":"1970-01-01T00:00:00Z",
        "architecture":"amd64",
        "os":"linux",
        "config":{"Entrypoint":["/usr/bin/hello",
        "--loud"],
        "Env":["PATH=/usr/bin"],
        "Labels":{"org.opencontainers.image.title":"hello"},
        "WorkingDir":"/"},
        "rootfs":{"type":"layers",
        "diff_ids":["sha256:dad7490da44ed5aeda658eef52cf506492cdb8f555b8434c6482056907410986"]},
        "history":[{"created":"1970-01-01T00:00:00Z",
        "created_by":"cargo xtask"}]}"#]]
    .assert_eq(&config.replace(",\"", ",\n\""));
}

#[test]
fn every_digest_and_size_is_of_the_bytes_it_names() {
    let (archive, written) = image().archive().unwrap();
    let files = files(&archive);
    for (path, bytes) in &files {
        if let Some(hex) = path.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) {
            assert_eq!(Digest::of(bytes).hex(), hex);
        }
    }
    let blob = |descriptor: &Value| {
        let bytes = &files[&format!("blobs/sha256/{}", descriptor["digest"].as_str().unwrap().replace("sha256:", ""))];
        assert_eq!(descriptor["size"], bytes.len());
        bytes.clone()
    };
    let index: Value = serde_json::from_slice(&files["index.json"]).unwrap();
    assert_eq!(index["manifests"][0]["digest"], written.digest.to_string());
    let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])).unwrap();
    let config: Value = serde_json::from_slice(&blob(&manifest["config"])).unwrap();
    let layer = blob(&manifest["layers"][0]);
    assert_eq!(written.compressed, layer.len());
    assert_eq!(config["rootfs"]["diff_ids"][0], Digest::of(&unzip(&layer)).to_string());
    assert_eq!(unzip(&layer), image().layer().unwrap());
    let saved: Value = serde_json::from_slice(&files["manifest.json"]).unwrap();
    assert_eq!(files[saved[0]["Layers"][0].as_str().unwrap()], layer);
    assert_eq!(serde_json::from_slice::<Value>(&files[saved[0]["Config"].as_str().unwrap()]).unwrap(), config);
    assert_eq!(saved[0]["RepoTags"][0], index["manifests"][0]["annotations"]["io.containerd.image.name"]);
}

#[test]
fn the_same_value_gives_the_same_bytes() {
    let mut otherwise = Image::new("registry.example/tools/hello:1.2", Arch::Amd64).unwrap();
    otherwise.labels = image().labels;
    otherwise.env = image().env;
    otherwise.entrypoint = image().entrypoint;
    for (path, entry) in image().files.into_iter().rev() {
        otherwise.insert(&Path::new("/").join(path), entry).unwrap();
    }
    assert_eq!(otherwise.archive().unwrap(), image().archive().unwrap());
}

#[test]
fn whatever_differs_has_another_digest() {
    let mut others = [image(), image(), image(), image()];
    others[0].file("/etc/hosts", 0o644, *b"").unwrap();
    others[1].folder("/tmp", 0o755).unwrap();
    others[2].created = 1;
    others[3].architecture = Arch::Arm64;
    let mut digests: Vec<_> = others.iter().chain([&image()]).map(|image| image.archive().unwrap().1.digest).collect();
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), 5);
}

#[test]
fn gzips_header_has_neither_time_nor_name_nor_system() {
    // RFC 1952: magic, deflate, no flags, no time, neither fastest nor best, unknown system.
    assert_eq!(gzip(b"hello").unwrap()[..10], [0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255]);
}

#[test]
fn what_is_written_is_the_archive_and_nothing_else() {
    let folder = std::env::temp_dir().join(format!("carrick-oci-{}", std::process::id()));
    fs::create_dir(&folder).unwrap();
    let written = image().write(&folder.join("image.tar")).unwrap();
    let names: Vec<_> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let bytes = fs::read(folder.join("image.tar")).unwrap();
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(names, ["image.tar"]);
    assert_eq!((bytes, written), image().archive().unwrap());
}

#[test]
fn an_entry_never_takes_anothers_place() {
    let mut image = image();
    let mut check = |at: &str, expected: &str| {
        let error = image.file(at, 0o644, *b"other").unwrap_err();
        assert_eq!(error.to_string(), expected);
    };
    check("/usr/bin/hello", "/usr/bin/hello: twice, and not the same");
    check("/usr", "/usr: twice, and not the same");
    check("/bin/other", "/bin/other: below /bin, which is no folder");
    check("/usr/../etc/passwd", "/usr/../etc/passwd: not a plain absolute path");
    check("/", "/: not a plain absolute path");
    check("relative", "relative");
    let before = image.clone();
    image.file("/usr/bin/hello", 0o755, *b"hello").unwrap();
    assert_eq!(image, before);
}

#[test]
fn only_a_whole_reference_names_an_image() {
    for good in ["carrick.dev/carrick:0.1.0", "localhost/pause:1", "[::1]:5000/a/b:c", "127.0.0.1:5000/a:b"] {
        assert!(Image::new(good, Arch::Amd64).is_ok(), "{good}");
    }
    for bad in ["", "pause", "pause:1", "library/pause:1", "carrick.dev/carrick", "carrick.dev:5000/carrick", "a.b/c:"]
    {
        assert!(Image::new(bad, Arch::Amd64).is_err(), "{bad}");
    }
}
