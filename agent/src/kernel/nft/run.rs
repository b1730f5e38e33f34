//! Runs `nft`, and not for longer than a transaction can take.

use std::{
    io::{self, Write as _},
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// A transaction takes milliseconds; one that hangs must not hang the agent.
const LIMIT: Duration = Duration::from_secs(10);

/// Why the nft table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("nft is not installed: install the package `nftables`")]
    Missing,
    #[error("cannot run nft")]
    Run(#[source] io::Error),
    #[error("cannot ask which generation of tables stands")]
    Generation(#[source] io::Error),
    #[error("nft did not end within {} s and was killed", LIMIT.as_secs())]
    Hung,
    #[error("nft {action}: {stderr}")]
    Failed { action: &'static str, stderr: String },
    #[error("nft lists the table in a form that is not understood")]
    Json(#[from] serde_json::Error),
    #[error(
        "nft lists the table otherwise than it was written: is this version of nft (`nft --version`) newer than carrick?"
    )]
    Changed,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = if matches!(error, Error::Hung) { io::ErrorKind::TimedOut } else { io::ErrorKind::Other };
        io::Error::new(kind, error)
    }
}

pub(super) fn run(program: &str, args: &[&str], stdin: &str) -> Result<Output, Error> {
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| if error.kind() == io::ErrorKind::NotFound { Error::Missing } else { Error::Run(error) })?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (ended, watched) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        let hangs = watched.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
        hangs.then(|| kill(pid, Signal::SIGKILL))
    });
    let fed = child.stdin.take().map_or(Ok(()), |mut pipe| pipe.write_all(stdin.as_bytes()));
    let output = child.wait_with_output();
    drop(ended);
    if matches!(watchdog.join(), Ok(Some(_))) {
        return Err(Error::Hung);
    }
    match fed {
        // It has stopped reading: what it says about that comes with its output.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Run(error)),
        _ => output.map_err(Error::Run),
    }
}

pub(super) fn succeed(action: &'static str, output: Output) -> Result<Output, Error> {
    if output.status.success() {
        return Ok(output);
    }
    // After its first lines nft repeats the input, which may be long.
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Error::Failed { action, stderr: stderr.lines().take(4).collect::<Vec<_>>().join("; ") })
}
