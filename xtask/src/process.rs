//! Child processes of `xtask`: each in a process group of its own, with its output kept and its progress shown.
//!
//! Invariant: no group outlives its [`run`], nor a Ctrl-C: a child is first asked (SIGINT), then killed.

use std::{
    collections::BTreeSet,
    io::{BufRead, BufReader, IsTerminal, PipeReader, Write},
    os::unix::process::CommandExt,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

/// How long an interrupted child may clean up before it is killed.
const GRACE: Duration = Duration::from_secs(15);
/// How often a step that goes on is reported where no terminal can show it live.
const REPORT_EVERY: Duration = Duration::from_secs(30);

static INTERRUPTED: AtomicBool = AtomicBool::new(false);
static GROUPS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From now on Ctrl-C (also SIGTERM and SIGHUP) interrupts every group that [`run`] has started; whoever waits for
/// something else asks [`check_interrupted`]. A second one kills, and ends us. To be called once.
pub fn pass_on_interrupts() -> anyhow::Result<()> {
    ctrlc::set_handler(|| {
        let again = INTERRUPTED.swap(true, Ordering::SeqCst);
        for group in locked(&GROUPS).iter() {
            signal_group(*group, if again { Signal::SIGKILL } else { Signal::SIGINT });
        }
        if again {
            std::process::exit(130);
        }
    })
    .context("cannot handle SIGINT")
}

/// An error once Ctrl-C was pressed.
pub fn check_interrupted() -> anyhow::Result<()> {
    if interrupted() { bail!("interrupted") } else { Ok(()) }
}

/// Whether Ctrl-C was pressed.
pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::SeqCst)
}

/// A group that is gone already needs no signal: ESRCH is the only way this fails for our own children.
fn signal_group(group: i32, signal: Signal) {
    killpg(Pid::from_raw(group), signal).ok();
}

/// How a step ended.
#[derive(Debug)]
pub struct Ended {
    pub success: bool,
    /// What it wrote to stdout and stderr, interleaved as written.
    pub output: String,
}

/// Runs `command` to its end, showing `name`, how long it takes, and its last line of output as it goes.
///
/// An error means that it could not be run, or Ctrl-C. A failure of the command itself is in [`Ended::success`].
pub fn run(name: &str, command: &mut Command) -> anyhow::Result<Ended> {
    check_interrupted()?;
    let started = Instant::now();
    let mut progress = Progress::start(name);
    let (reader, writer) = std::io::pipe().context("pipe")?;
    command.stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer).process_group(0);
    let program = command.get_program().to_string_lossy().into_owned();
    let mut child = command.spawn().with_context(|| format!("{name}: cannot run {program}"))?;
    // The command holds our copies of the pipe's writing end: while they are open, the reader sees no end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let group = i32::try_from(child.id()).context("a process id beyond i32")?;
    locked(&GROUPS).insert(group);
    if interrupted() {
        signal_group(group, Signal::SIGINT);
    }
    let output = Arc::new(Mutex::new(Vec::new()));
    let drained = drain(reader, Arc::clone(&output));
    let ended = wait(&mut child, group, || progress.tick(started.elapsed(), &last_line(&locked(&output))));
    // Whatever the child has left behind in its group ends with it.
    signal_group(group, Signal::SIGKILL);
    locked(&GROUPS).remove(&group);
    let success = ended.with_context(|| format!("{name}: wait"))?.success();
    // A process that left the group may still hold the pipe: what it writes later is not ours to wait for.
    drained.recv_timeout(Duration::from_secs(2)).ok();
    progress.end(started.elapsed(), success);
    check_interrupted()?;
    let output = String::from_utf8_lossy(&locked(&output)).into_owned();
    Ok(Ended { success, output })
}

/// Collects what the child writes; the receiver hears when the pipe is at its end.
fn drain(reader: PipeReader, output: Arc<Mutex<Vec<u8>>>) -> mpsc::Receiver<()> {
    let (done, drained) = mpsc::channel();
    thread::spawn(move || {
        let mut reader = BufReader::new(reader);
        let mut line = Vec::new();
        while matches!(reader.read_until(b'\n', &mut line), Ok(1..)) {
            locked(&output).append(&mut line);
        }
        done.send(()).ok();
    });
    drained
}

fn wait(child: &mut Child, group: i32, mut tick: impl FnMut()) -> std::io::Result<ExitStatus> {
    let mut interrupted_at = None;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if interrupted() && interrupted_at.get_or_insert_with(Instant::now).elapsed() > GRACE {
            signal_group(group, Signal::SIGKILL);
        }
        tick();
        thread::sleep(Duration::from_millis(50));
    }
}

fn last_line(output: &[u8]) -> String {
    let line = output.split(|byte| *byte == b'\n').rev().find(|line| !line.is_empty()).unwrap_or_default();
    String::from_utf8_lossy(line).trim().to_owned()
}

/// One step's lines on stderr: live on a terminal, otherwise at the start, every half minute, and at the end.
struct Progress {
    name: String,
    live: bool,
    shown_at: Duration,
}

impl Progress {
    fn start(name: &str) -> Progress {
        let progress =
            Progress { name: name.to_owned(), live: std::io::stderr().is_terminal(), shown_at: Duration::ZERO };
        if !progress.live {
            eprintln!("{name} ...");
        }
        progress
    }

    fn tick(&mut self, elapsed: Duration, last_line: &str) {
        let every = if self.live { Duration::from_millis(500) } else { REPORT_EVERY };
        if elapsed.saturating_sub(self.shown_at) < every {
            return;
        }
        self.shown_at = elapsed;
        let line = plain(last_line, 80);
        if self.live {
            eprint!("\r\x1b[K{} ... {} s  {line}", self.name, elapsed.as_secs());
            std::io::stderr().flush().ok();
        } else {
            eprintln!("{} ... {} s  {line}", self.name, elapsed.as_secs());
        }
    }

    fn end(&self, elapsed: Duration, success: bool) {
        let clear = if self.live { "\r\x1b[K" } else { "" };
        let verdict = if success { "ok" } else { "FAILED" };
        eprintln!("{clear}{} {verdict} ({:.1} s)", self.name, elapsed.as_secs_f64());
    }
}

/// At most `width` characters of `line`, without the escape sequences that would colour or move what follows.
fn plain(line: &str, width: usize) -> String {
    let mut text = String::new();
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        if c == '\x1b' {
            chars.by_ref().find(char::is_ascii_alphabetic);
        } else if !c.is_control() {
            text.push(c);
        }
    }
    text.chars().take(width).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str) -> Ended {
        run("sh", Command::new("sh").args(["-c", script])).unwrap()
    }

    #[test]
    fn both_streams_are_kept_in_order() {
        let ended = sh("echo one; echo two >&2; printf three");
        assert_eq!((ended.success, ended.output.as_str()), (true, "one\ntwo\nthree"));
    }

    #[test]
    fn a_failure_is_no_error() {
        let ended = sh("echo bad; exit 3");
        assert_eq!((ended.success, ended.output.as_str()), (false, "bad\n"));
    }

    #[test]
    fn what_cannot_be_run_is_named() {
        let error = run("step", &mut Command::new("/no/such/program")).unwrap_err();
        assert_eq!(format!("{error}"), "step: cannot run /no/such/program");
    }

    #[test]
    fn a_group_ends_with_its_leader() {
        let ended = sh("sleep 1000 & echo $!");
        let left: i32 = ended.output.trim().parse().unwrap();
        // A killed process is on its way out for a moment, and then waits for init to reap it.
        let gone = || !std::fs::read_to_string(format!("/proc/{left}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
        assert!((0..500).any(|_| gone() || (thread::sleep(Duration::from_millis(10)), false).1));
    }

    #[test]
    fn escape_sequences_and_long_lines_are_cut() {
        assert_eq!(plain("\x1b[1m\x1b[32m   Compiling\x1b[0m ring v0.17", 80), "   Compiling ring v0.17");
        assert_eq!(plain("abcdef", 3), "abc");
    }
}
