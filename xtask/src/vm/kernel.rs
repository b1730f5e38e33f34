//! Debian's cloud kernels: fetched once as packages, unpacked into our cache, never installed.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::Version;
use crate::tools;

/// One kernel, unpacked.
#[derive(Debug)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// What boots.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Version {
    /// What the names of its packages start with: the version goes on after it.
    fn prefix(self) -> &'static str {
        match self {
            Version::V6_1 => "linux-image-6.1.",
            Version::V6_12 => "linux-image-6.12.",
        }
    }
}

impl Kernel {
    /// The newest one of the series that apt knows.
    pub fn fetch(version: Version) -> Result<Kernel> {
        let listed = output(Command::new("apt-cache").args(["pkgnames", version.prefix()]))?;
        let package = newest(&listed).with_context(|| {
            format!("apt knows no package {}*-cloud-amd64-unsigned; run `apt-get update`", version.prefix())
        })?;
        let cache = tools::cache_dir()?.join("vm");
        let folder = cache.join(package);
        if !folder.exists() {
            fetch(package, &cache)?;
        }
        let release = package.trim_start_matches("linux-image-").trim_end_matches("-unsigned").to_owned();
        let image = folder.join(format!("boot/vmlinuz-{release}"));
        let modules = folder.join(format!("lib/modules/{release}/kernel"));
        ensure!(image.is_file() && modules.is_dir(), "{} holds no kernel: remove it", folder.display());
        Ok(Kernel { release, image, modules })
    }

    /// A module as the kernel takes it.
    pub fn module(&self, path: &str) -> Result<Vec<u8>> {
        let plain = self.modules.join(path);
        if plain.exists() {
            return fs::read(&plain).with_context(|| format!("read {}", plain.display()));
        }
        let packed = self.modules.join(format!("{path}.xz"));
        let output = Command::new("xz").arg("-dc").arg(&packed).output().context("xz")?;
        ensure!(output.status.success(), "xz -dc {}: {}", packed.display(), String::from_utf8_lossy(&output.stderr));
        Ok(output.stdout)
    }
}

/// Downloads and unpacks. The folder appears as a whole, at the end.
fn fetch(package: &str, cache: &Path) -> Result<()> {
    let partial = cache.join("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))?;
    }
    fs::create_dir_all(&partial).with_context(|| format!("make {}", partial.display()))?;
    tools::install(
        &format!("fetch {package}"),
        Command::new("apt-get").args(["download", package]).current_dir(&partial),
    )?;
    let mut entries = fs::read_dir(&partial)?;
    let archive = entries.next().context("apt-get downloaded nothing")??.path();
    let unpacked = partial.join("unpacked");
    output(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&unpacked))?;
    fs::rename(&unpacked, cache.join(package)).with_context(|| format!("move {package} into place"))?;
    fs::remove_dir_all(&partial).with_context(|| format!("remove {}", partial.display()))
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| name.clone())?;
    ensure!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// The package with the greatest version, numbers compared as numbers.
fn newest(packages: &str) -> Option<&str> {
    let numbers = |name: &str| -> Vec<u64> {
        name.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
    };
    packages.lines().filter(|name| name.ends_with("-cloud-amd64-unsigned")).max_by_key(|name| numbers(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_is_found_by_number() {
        let packages = "linux-image-6.1.0-9-cloud-amd64-unsigned
linux-image-6.1.0-56-cloud-amd64-unsigned
linux-image-6.1.0-56-cloud-amd64
linux-image-6.1.0-100-rt-amd64-unsigned
";
        assert_eq!(newest(packages), Some("linux-image-6.1.0-56-cloud-amd64-unsigned"));
        assert_eq!(newest(""), None);
    }
}
