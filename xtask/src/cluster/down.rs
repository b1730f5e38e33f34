//! Removes the clusters, whoever made them and however far they came.

use std::{fs, io::ErrorKind, path::Path};

use ::lab::guard;
use anyhow::{Context, Result, ensure};

use super::{
    NAME,
    cgroup::{self, Hierarchy},
    record,
};

/// Where the control groups are written down before they are made.
const CGROUPS: &str = "cgroups.json";

/// Writes down which control groups [`down`] is to remove.
pub fn remember(cgroups: &[Hierarchy]) -> Result<()> {
    let path = record::folder()?.join(CGROUPS);
    fs::write(&path, serde_json::to_vec_pretty(cgroups)?).with_context(|| format!("write {}", path.display()))
}

/// Whether processes of the clusters may run.
pub fn lab_exists() -> Result<bool> {
    Ok(guard::list()?.iter().any(|lab| lab.name == NAME))
}

/// Removes processes, with them their namespaces, mounts and links; then control groups; then files. True if there was
/// anything.
pub fn down() -> Result<bool> {
    let ran = lab_exists()?;
    if ran {
        guard::down(NAME)?;
    }
    Ok(files()? || ran)
}

/// Removes control groups and files. True if there were any.
pub fn files() -> Result<bool> {
    let folder = record::folder()?;
    if !folder.exists() {
        return Ok(false);
    }
    cgroup::remove_all(&cgroups(&folder)?)?;
    // Machines mount in namespaces of their own. If something is mounted here after all, it is not ours to delete.
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    ensure!(!is_mounted_below(&mounts, &folder), "something is mounted below {}", folder.display());
    fs::remove_dir_all(&folder).with_context(|| format!("remove {}", folder.display()))?;
    Ok(true)
}

/// Those that were written down, else those that this process would make.
fn cgroups(folder: &Path) -> Result<Vec<Hierarchy>> {
    let path = folder.join(CGROUPS);
    match fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| path.display().to_string()),
        Err(error) if error.kind() == ErrorKind::NotFound => cgroup::here(),
        Err(error) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// Whether proc_pid_mountinfo(5) has a mount point inside that folder: its fifth field.
fn is_mounted_below(mountinfo: &str, folder: &Path) -> bool {
    mountinfo.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| Path::new(point).starts_with(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_below_is_seen() {
        let mountinfo =
            "22 1 254:0 / / rw - ext4 /dev/vda rw\n40 22 0:30 / /a/cluster/machines/x rw - tmpfs tmpfs rw\n";
        assert!(is_mounted_below(mountinfo, Path::new("/a/cluster")));
        assert!(!is_mounted_below(mountinfo, Path::new("/a/clu")));
    }
}
