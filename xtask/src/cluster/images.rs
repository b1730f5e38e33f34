//! The images of the clusters' pods. Nothing is pulled: they are written from programs of this machine and imported.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::{
    oci::{Arch, Image},
    tools,
};

/// What holds a pod's namespaces.
pub const PAUSE: &str = "carrick.test/pause:1";
pub const COREDNS: &str = "carrick.test/coredns:1.15.0";
/// A shell with the usual programs, for pods that try something.
pub const BUSYBOX: &str = "carrick.test/busybox:1";

/// Debian's, linked statically.
const BUSYBOX_PROGRAM: &str = "/usr/bin/busybox";
const APPLETS: &[&str] = &[
    "cat",
    "cp",
    "echo",
    "env",
    "grep",
    "head",
    "hostname",
    "httpd",
    "id",
    "ip",
    "ls",
    "mkdir",
    "mount",
    "nc",
    "nslookup",
    "ping",
    "ps",
    "rm",
    "sed",
    "seq",
    "sh",
    "sleep",
    "stat",
    "tail",
    "test",
    "time",
    "touch",
    "traceroute",
    "wget",
];
/// As the first process of a pod it must handle SIGTERM by itself.
const WAIT: &str = "#!/bin/sh\ntrap 'exit 0' TERM INT\nwhile :; do sleep 3600 & wait $!; done\n";

/// Where archives lie that nodes see at the same path.
pub fn dir() -> Result<PathBuf> {
    Ok(tools::cache_dir()?.join("images"))
}

/// Writes the archives that every node is given, into `dir`.
pub fn write(dir: &Path) -> Result<Vec<PathBuf>> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    // One that is there is the one that would be written: CoreDNS' version is in its name, and it takes a while.
    let coredns = dir.join(format!("{}.tar", COREDNS.replace(['/', ':'], "_")));
    if !coredns.exists() {
        let mut image = Image::new(COREDNS, Arch::HOST)?;
        image.program("/coredns", &tools::COREDNS.path()?, Path::new("/"))?;
        image.entrypoint = vec!["/coredns".to_owned()];
        image.write(&coredns)?;
    }
    let [pause, busybox] = ["pause.tar", "busybox.tar"].map(|file| dir.join(file));
    with_busybox(PAUSE, &["/bin/wait"])?.write(&pause)?;
    with_busybox(BUSYBOX, &["/bin/sh"])?.write(&busybox)?;
    Ok(vec![pause, coredns, busybox])
}

fn with_busybox(reference: &str, entrypoint: &[&str]) -> Result<Image> {
    let mut image = Image::new(reference, Arch::HOST)?;
    image.program("/bin/busybox", Path::new(BUSYBOX_PROGRAM), Path::new("/"))?;
    for applet in APPLETS {
        image.link(Path::new("/bin").join(applet), "busybox")?;
    }
    image.file("/bin/wait", 0o755, WAIT)?;
    image.file("/etc/passwd", 0o644, "root:x:0:0:root:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")?;
    image.folder("/tmp", 0o1777)?;
    image.entrypoint = entrypoint.iter().map(|&part| part.to_owned()).collect();
    image.env = vec!["PATH=/bin".to_owned()];
    Ok(image)
}
