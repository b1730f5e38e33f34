//! The control groups of the clusters' machines: one below one folder of ours, in every hierarchy that this machine has.
//!
//! Of a machine's own it sees nothing above: it has a cgroup namespace, and what it makes lies inside.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde::{Deserialize, Serialize};

const MOUNTED: &str = "/sys/fs/cgroup";
const OURS: &str = "carrick-cluster";
/// How long the kernel may take to let go of the groups of processes that were killed.
const END_LIMIT: Duration = Duration::from_secs(30);

/// One hierarchy of this machine, and where our groups lie in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hierarchy {
    /// Its folder below `/sys/fs/cgroup`, as in `cpu,cpuacct`; empty for version 2.
    name: String,
    /// The parent of every machine's group.
    pub folder: PathBuf,
}

/// The hierarchies in which this process is limited, from `/proc/self/cgroup`: those of version 1 if there are any, else
/// the one of version 2. Ours lie below our own group, but at the root in version 2, where a group has either processes
/// or children with controllers.
fn hierarchies(proc_self_cgroup: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in proc_self_cgroup.lines() {
        // `4:memory:/path`, `9:name=systemd:/path`; version 2 has no controllers here: `0::/path`.
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(own)) = (fields.next(), fields.next()) else { continue };
        if !controllers.is_empty() {
            let name = controllers.strip_prefix("name=").unwrap_or(controllers);
            let folder = Path::new(MOUNTED).join(name).join(own.trim_start_matches('/')).join(OURS);
            found.push(Hierarchy { name: name.to_owned(), folder });
        }
    }
    if found.is_empty() {
        found.push(Hierarchy { name: String::new(), folder: Path::new(MOUNTED).join(OURS) });
    }
    found
}

/// Where groups of ours would be made by this process.
pub fn here() -> Result<Vec<Hierarchy>> {
    Ok(hierarchies(&fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?))
}

/// Makes a machine's group in each hierarchy.
pub fn make(hierarchies: &[Hierarchy], machine: &str) -> Result<()> {
    for Hierarchy { name, folder } in hierarchies {
        let group = folder.join(machine);
        fs::create_dir_all(&group).with_context(|| format!("make {}", group.display()))?;
        if name == "cpuset" {
            // A new group has no processors, and nothing can enter it.
            inherit_cpuset(folder)?;
            inherit_cpuset(&group)?;
        }
        if name.is_empty() {
            enable_controllers(Path::new(MOUNTED))?;
            enable_controllers(folder)?;
        }
    }
    Ok(())
}

fn inherit_cpuset(group: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let of_parent = group.with_file_name(file);
        let value = fs::read(&of_parent).with_context(|| of_parent.display().to_string())?;
        write(&group.join(file), &value)?;
    }
    Ok(())
}

fn enable_controllers(group: &Path) -> Result<()> {
    let path = group.join("cgroup.controllers");
    let controllers = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    let each = |controller: &str| write(&group.join("cgroup.subtree_control"), format!("+{controller}").as_bytes());
    controllers.split_whitespace().try_for_each(each)
}

fn write(path: &Path, value: &[u8]) -> Result<()> {
    fs::write(path, value).with_context(|| format!("write {}", path.display()))
}

/// Puts this process into a machine's groups, as their root: it sees nothing above.
pub fn enter(hierarchies: &[Hierarchy], machine: &str) -> Result<()> {
    for Hierarchy { folder, .. } in hierarchies {
        write(&folder.join(machine).join("cgroup.procs"), b"0")?;
    }
    unshare(CloneFlags::CLONE_NEWCGROUP).context("unshare the cgroup namespace")
}

/// Mounts the hierarchies at `at`, as this process's cgroup namespace shows them.
pub fn mount_all(hierarchies: &[Hierarchy], at: &Path) -> Result<()> {
    let mounted = |what: &str| format!("mount {what} at {}", at.display());
    if hierarchies.iter().any(|hierarchy| hierarchy.name.is_empty()) {
        mount(Some("cgroup2"), at, Some("cgroup2"), MsFlags::empty(), None::<&str>)
            .with_context(|| mounted("cgroup2"))?;
        // A group with controllers for its children has no processes of its own: the daemons move aside.
        let daemons = at.join("daemons");
        fs::create_dir_all(&daemons).with_context(|| daemons.display().to_string())?;
        write(&daemons.join("cgroup.procs"), b"0")?;
        return enable_controllers(at);
    }
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("mode=0755")).with_context(|| mounted("tmpfs"))?;
    for Hierarchy { name, .. } in hierarchies {
        let folder = at.join(name);
        fs::create_dir(&folder).with_context(|| folder.display().to_string())?;
        let options = if name == "systemd" { "none,name=systemd" } else { name };
        mount(Some("cgroup"), &folder, Some("cgroup"), MsFlags::empty(), Some(options))
            .with_context(|| mounted(name))?;
        // `cpu,cpuacct` is looked for as `cpu` and as `cpuacct`.
        for controller in name.split(',').filter(|controller| controller != name) {
            std::os::unix::fs::symlink(name, at.join(controller)).with_context(|| controller.to_owned())?;
        }
    }
    Ok(())
}

/// Bytes of anonymous memory that a machine's processes hold together.
pub fn memory(hierarchies: &[Hierarchy], machine: &str) -> Result<u64> {
    let memory = hierarchies.iter().find(|hierarchy| hierarchy.name.is_empty() || hierarchy.name == "memory");
    let path = memory.context("no memory cgroups")?.folder.join(machine).join("memory.stat");
    let stat = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    anonymous(&stat).with_context(|| format!("{}: no anonymous memory in it", path.display()))
}

/// `total_rss` of version 1, `anon` of version 2.
fn anonymous(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("total_rss ").or_else(|| line.strip_prefix("anon "))?.parse().ok())
}

/// Removes what is below a machine's groups: what its kubelet has made. They themselves stay.
pub fn clear(hierarchies: &[Hierarchy], machine: &str) -> Result<()> {
    for Hierarchy { folder, .. } in hierarchies {
        let group = folder.join(machine);
        for child in children(&group).with_context(|| group.display().to_string())? {
            remove(&child)?;
        }
    }
    Ok(())
}

/// Removes every machine's groups, and their parents. What is not there is removed already.
pub fn remove_all(hierarchies: &[Hierarchy]) -> Result<()> {
    hierarchies.iter().filter(|hierarchy| hierarchy.folder.exists()).try_for_each(|hierarchy| remove(&hierarchy.folder))
}

/// Removes a group with all below it, once the killed processes in it are gone.
fn remove(group: &Path) -> Result<()> {
    let started = Instant::now();
    while let Err(error) = remove_now(group) {
        if started.elapsed() > END_LIMIT {
            bail!("remove {}: {error}", group.display());
        }
        thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn remove_now(group: &Path) -> io::Result<()> {
    for child in children(group)? {
        remove_now(&child)?;
    }
    fs::remove_dir(group)
}

fn children(group: &Path) -> io::Result<Vec<PathBuf>> {
    let mut folders = Vec::new();
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            folders.push(entry.path());
        }
    }
    Ok(folders)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn check(proc_self_cgroup: &str, expected: expect_test::Expect) {
        let line = |h: &Hierarchy| format!("{:?} {}\n", h.name, h.folder.display());
        expected.assert_eq(&hierarchies(proc_self_cgroup).iter().map(line).collect::<String>());
    }

    #[test]
    fn version_1_is_used_where_it_has_controllers() {
        check(
            "9:name=systemd:/\n4:memory:/user/a:b\n2:cpu,cpuacct:/\n0::/\n",
            expect![[r#"
                "systemd" /sys/fs/cgroup/systemd/carrick-cluster
                "memory" /sys/fs/cgroup/memory/user/a:b/carrick-cluster
                "cpu,cpuacct" /sys/fs/cgroup/cpu,cpuacct/carrick-cluster
            "#]],
        );
    }

    #[test]
    fn version_2_is_used_where_it_is_alone() {
        check(
            "0::/user.slice/user-0.slice/session-1.scope\n",
            expect![[r#"
                "" /sys/fs/cgroup/carrick-cluster
            "#]],
        );
    }

    #[test]
    fn anonymous_memory_is_that_of_the_whole_tree() {
        assert_eq!(anonymous("cache 1\nrss 2\ntotal_cache 3\ntotal_rss 4\n"), Some(4));
        assert_eq!(anonymous("anon 5\nfile 6\n"), Some(5));
        assert_eq!(anonymous("file 6\n"), None);
    }
}
