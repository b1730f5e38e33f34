//! The life of a lab: its name, its directory, its processes, and its end.
//!
//! Invariant: when the process that made a lab ends, in whatever way (also SIGKILL), the lab ends: no process, namespace,
//! link or file of it stays. A small shell beside the lab holds this up. It sees its input end once the maker and every
//! child that the maker has forked but not yet started are gone; then it kills whatever carries the lab's mark in its
//! environment and removes the lab's directory. Links and namespaces go with the last process in them.
//! An orderly end takes the same way.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

/// The environment variable that marks the processes of a lab; its value is the lab's name.
pub const MARK: &str = "CARRICK_LAB";

/// Where labs keep their files, one directory each. Only root can write to /run.
const ROOT: &str = "/run/carrick-lab";

/// Makes the directory, and waits for the maker's word or end. Arguments, here and below: the mark with its value, the
/// directory. The directory above goes with the last lab, perhaps just now: then it is made again.
const WAIT: &str = r#"
trap '' INT TERM HUP PIPE
tries=0
until mkdir -m 700 "$2" 2>/dev/null
do
    tries=$((tries + 1))
    [ ! -e "$2" ] && [ $tries -lt 1000 ] && mkdir -p -m 700 "${2%/*}" || exit 1
done
echo made
read -r word && [ "$word" = keep ] && exit 0
"#;

/// Ends the processes and removes the directory, and the one above if no lab is left.
const SWEEP: &str = r#"
trap '' INT TERM HUP PIPE
while
    pids=$(grep -lzxF -e "$1" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3)
    [ -n "$pids" ]
do
    kill -9 $pids 2>/dev/null
    sleep 0.01
done
while [ -e "$2" ]
do
    rm -rf "$2"
done
rmdir "${2%/*}" 2>/dev/null || :
"#;

/// A lab that is alive. Shared by everything that starts processes in it.
#[derive(Debug)]
pub struct Guard {
    name: String,
    dir: PathBuf,
    /// `None` once the lab has ended or was kept: nothing can be started any more.
    sweeper: Mutex<Option<Sweeper>>,
}

#[derive(Debug)]
struct Sweeper {
    child: Child,
    /// Its end is what the sweeper waits for.
    input: ChildStdin,
}

/// What `lab list` and `lab enter` need to know, kept in the lab's directory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Record {
    pub name: String,
    pub hosts: Vec<HostRecord>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct HostRecord {
    pub name: String,
    /// A process that lives in the host's namespaces as long as the lab does.
    pub pid: u32,
    /// In CIDR notation.
    pub addresses: Vec<String>,
}

impl Guard {
    /// Begins a lab. `name` gets a suffix that no other lab has; [`Guard::named`] takes it as it is.
    pub fn unique(name: &str) -> Result<Arc<Guard>> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let unique = format!("{name}-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            if !Path::new(ROOT).join(&unique).exists() {
                return Guard::named(&unique);
            }
        }
    }

    /// Begins a lab of exactly that name: letters, digits, '-' and '_'. Fails if there is one.
    pub fn named(name: &str) -> Result<Arc<Guard>> {
        ensure!(nix::unistd::geteuid().is_root(), "the lab makes network namespaces: run it as root");
        let dir = directory(name)?;
        // The sweeper makes the directory: from the first moment, what there is has somebody who removes it.
        let mut sweeper = shell(&[WAIT, SWEEP].concat(), name, &dir);
        let mut child = sweeper.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("sh")?;
        let (input, output) = (child.stdin.take(), child.stdout.take());
        let input = input.context("the sweeper has no input")?;
        let mut said = String::new();
        BufReader::new(output.context("the sweeper has no output")?).read_line(&mut said)?;
        if said != "made\n" {
            child.wait().context("wait for the sweeper")?;
            bail!("cannot make {}; if there is a lab named {name}: cargo xtask lab down {name}", dir.display());
        }
        Ok(Arc::new(Guard { name: name.to_owned(), dir, sweeper: Mutex::new(Some(Sweeper { child, input })) }))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where all files of the lab lie.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts a process that ends with the lab: marked, and in a process group of its own, so that a Ctrl-C reaches only
    /// the maker, which then ends the lab in order. The caller waits for it.
    #[allow(clippy::zombie_processes)]
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        let sweeper = self.lock();
        ensure!(sweeper.is_some(), "the lab {} has ended", self.name);
        command.env(MARK, &self.name).process_group(0);
        command.spawn().with_context(|| format!("{command:?}"))
    }

    /// Ends the lab and returns when nothing of it is left. Nothing can be started afterwards. Harmless when repeated.
    pub fn end(&self) -> Result<()> {
        // Held until it is over: whoever else ends it, or would start something, waits.
        let mut sweeper = self.lock();
        let Some(Sweeper { mut child, input }) = sweeper.take() else { return Ok(()) };
        drop(input);
        let status = child.wait().context("wait for the sweeper")?;
        ensure!(status.success(), "the sweeper of lab {} ended with {status}: cargo xtask lab down {0}", self.name);
        Ok(())
    }

    /// Lets the lab outlive this process, until [`down`].
    pub fn keep(&self) -> Result<()> {
        let Some(Sweeper { mut child, mut input }) = self.lock().take() else {
            bail!("the lab {} has ended", self.name)
        };
        input.write_all(b"keep\n").context("tell the sweeper to keep the lab")?;
        let status = child.wait().context("wait for the sweeper")?;
        ensure!(status.success(), "the sweeper ended with {status}");
        Ok(())
    }

    /// Writes down what [`list`] returns.
    pub fn record(&self, hosts: Vec<HostRecord>) -> Result<()> {
        let record = Record { name: self.name.clone(), hosts };
        let path = self.dir.join("lab.json");
        fs::write(&path, serde_json::to_vec_pretty(&record)?).with_context(|| format!("write {}", path.display()))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Sweeper>> {
        self.sweeper.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Err(error) = self.end() {
            eprintln!("{error:#}");
        }
    }
}

/// The labs that there are, by name: kept ones, and those of running tests.
pub fn list() -> Result<Vec<Record>> {
    let Ok(entries) = fs::read_dir(ROOT) else { return Ok(Vec::new()) };
    let mut labs = Vec::new();
    for entry in entries {
        let name = entry?.file_name().to_string_lossy().into_owned();
        labs.push(load(&name)?);
    }
    labs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(labs)
}

/// The lab of that name; without hosts while it is still being made.
pub fn load(name: &str) -> Result<Record> {
    let dir = directory(name)?;
    ensure!(dir.exists(), "there is no lab named {name}: cargo xtask lab list");
    match fs::read(dir.join("lab.json")) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| format!("{}/lab.json", dir.display())),
        Err(_) => Ok(Record { name: name.to_owned(), hosts: Vec::new() }),
    }
}

/// Ends the lab of that name, whoever made it.
pub fn down(name: &str) -> Result<()> {
    let dir = directory(name)?;
    ensure!(dir.exists(), "there is no lab named {name}: cargo xtask lab list");
    let status = shell(SWEEP, name, &dir).stdin(Stdio::null()).status().context("sh")?;
    ensure!(status.success(), "the sweeper of lab {name} ended with {status}");
    Ok(())
}

/// Processes of that lab, by id. Empty once it has ended.
pub fn processes(name: &str) -> Result<Vec<u32>> {
    let mark = format!("{MARK}={name}");
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // A process may end while we look: then it is none of the lab's.
        let environ = fs::read(entry.path().join("environ")).unwrap_or_default();
        if environ.split(|byte| *byte == 0).any(|variable| variable == mark.as_bytes()) {
            found.push(pid);
        }
    }
    Ok(found)
}

fn shell(script: &str, name: &str, dir: &Path) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", script, "sweep"]).arg(format!("{MARK}={name}")).arg(dir);
    command.env_remove(MARK).current_dir("/").process_group(0).stdout(Stdio::null());
    command
}

fn directory(name: &str) -> Result<PathBuf> {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    ensure!(!name.is_empty() && name.chars().all(good), "lab name {name:?}: use letters, digits, '-' and '_'");
    Ok(Path::new(ROOT).join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes and ends a lab's directory with nothing in it; whether it was there.
    fn make_and_end(name: &str, dir: &Path) -> bool {
        let mut sweeper = shell(&[WAIT, SWEEP].concat(), name, dir);
        let mut child = sweeper.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut said = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut said).unwrap();
        let made = said == "made\n" && dir.is_dir();
        drop(child.stdin.take());
        child.wait().unwrap().success() && made
    }

    #[test]
    fn labs_that_come_and_go_at_once_leave_nothing_behind() {
        let root = std::env::temp_dir().join(format!("carrick-guard-{}", std::process::id()));
        std::thread::scope(|scope| {
            for lab in 0..8 {
                let name = format!("guard-{}-{lab}", std::process::id());
                let dir = root.join(&name);
                scope.spawn(move || (0..10).for_each(|_| assert!(make_and_end(&name, &dir))));
            }
        });
        assert!(!root.exists());
    }

    #[test]
    fn no_lab_takes_the_directory_of_another() {
        let root = std::env::temp_dir().join(format!("carrick-taken-{}", std::process::id()));
        let (name, dir) = (format!("taken-{}", std::process::id()), root.join("lab"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("lab.json"), "").unwrap();
        assert!(!make_and_end(&name, &dir));
        assert!(dir.join("lab.json").exists());
        fs::remove_dir_all(&root).unwrap();
    }
}
