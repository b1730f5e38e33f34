//! The root of a machine: this machine's files as they are, and over them a layer in memory that its daemons write to.
//!
//! Invariant: nothing that is mounted here is seen outside. The caller has a mount namespace of its own.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    unistd::{pivot_root, sethostname},
};

use super::{
    cgroup,
    spec::{DISKS, Spec},
};

/// What the kubelet writes unless it reads these values already, and Cilium. They are the whole machine's: they are shown
/// files.
const MACHINE_WIDE: &[(&str, &str)] = &[
    ("vm/overcommit_memory", "1"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/unprivileged_bpf_disabled", "1"),
    ("kernel/timer_migration", "0"),
];
const NONE: Option<&str> = None;

/// Makes the root and moves this process there.
pub fn enter(spec: &Spec) -> Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).context("make every mount private")?;
    let root = overlay(&spec.dir.join("root"))?;
    let at = |path: &str| root.join(path.trim_start_matches('/'));
    fs_of("proc", &at("/proc"), "")?;
    bind(Path::new("/dev"), &at("/dev"), MsFlags::MS_REC)?;
    // A sysfs of one's own shows the devices of the network namespace.
    fs_of("sysfs", &at("/sys"), "")?;
    cgroup::mount_all(&spec.cgroups, &at("/sys/fs/cgroup"))?;
    fs_of("bpf", &at("/sys/fs/bpf"), "mode=0700")?;
    fs_of("tmpfs", &at("/run"), "mode=0755")?;
    fs_of("tmpfs", &at("/tmp"), "mode=1777")?;
    for folder in ["/run/lock", "/run/netns", "/etc/cni/net.d"] {
        fs::create_dir_all(at(folder)).with_context(|| folder.to_owned())?;
    }
    for folder in &spec.shared {
        bind_folder(folder, &root.join(folder.strip_prefix("/").context("a relative path is shared")?))?;
    }
    for (disk, path) in DISKS {
        let disk = spec.dir.join(disk);
        fs::create_dir_all(&disk).with_context(|| disk.display().to_string())?;
        bind_folder(&disk, &at(path))?;
    }
    pivot(&root)?;
    show_sysctls()?;
    // Pods may ask that what they mount is seen here, too.
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_SHARED, NONE).context("share every mount")?;
    sethostname(&spec.name).context("set the host name")?;
    spec.files.iter().try_for_each(|(path, text)| write(path, text))
}

/// This machine's root, under a layer in memory. What is mounted below it is not part of it.
fn overlay(dir: &Path) -> Result<PathBuf> {
    fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    fs_of("tmpfs", dir, "size=512m,mode=0755")?;
    let [upper, work, root] = ["upper", "work", "root"].map(|name| dir.join(name));
    for folder in [&upper, &work, &root] {
        fs::create_dir(folder).with_context(|| folder.display().to_string())?;
    }
    fs_of("overlay", &root, &format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display()))?;
    Ok(root)
}

fn fs_of(kind: &str, at: &Path, options: &str) -> Result<()> {
    mount(Some(kind), at, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("mount {kind} at {}", at.display()))
}

fn bind(from: &Path, to: &Path, flags: MsFlags) -> Result<()> {
    mount(Some(from), to, NONE, MsFlags::MS_BIND | flags, NONE)
        .with_context(|| format!("bind {} to {}", from.display(), to.display()))
}

fn bind_folder(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    bind(from, to, MsFlags::empty())
}

/// Makes `root` this process's `/`, and lets go of the old one.
fn pivot(root: &Path) -> Result<()> {
    let old = root.join(".outside");
    fs::create_dir(&old).context("a place for the old root")?;
    pivot_root(root, &old).context("pivot_root")?;
    std::env::set_current_dir("/").context("enter the root")?;
    umount2("/.outside", MntFlags::MNT_DETACH).context("let go of the old root")?;
    fs::remove_dir("/.outside").context("remove the place of the old root")
}

fn show_sysctls() -> Result<()> {
    for (name, value) in MACHINE_WIDE {
        let shown = Path::new("/run/sysctl").join(name);
        write(&shown, value)?;
        bind(&shown, &Path::new("/proc/sys").join(name), MsFlags::empty())?;
    }
    Ok(())
}

/// Writes a file in the place of whatever is there, also of a link to elsewhere.
fn write(path: &Path, text: &str) -> Result<()> {
    let named = || format!("write {}", path.display());
    fs::create_dir_all(path.parent().with_context(named)?).with_context(named)?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).with_context(named),
        _ => fs::write(path, text).with_context(named),
    }
}
