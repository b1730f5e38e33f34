//! Waiting for something to become true, with an answer to "for what?" while it lasts and when it fails.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

const POLL: Duration = Duration::from_millis(20);

/// Asks until `attempt` succeeds; its error is what was seen instead. Says on stderr, after one second and then every
/// five, what it waits for. Fails after `limit` with what was seen last.
pub fn wait_for<T>(what: &str, limit: Duration, mut attempt: impl FnMut() -> Result<T, String>) -> Result<T> {
    let start = Instant::now();
    let mut report_at = Duration::from_secs(1);
    loop {
        let seen = match attempt() {
            Ok(value) => return Ok(value),
            Err(seen) => seen,
        };
        let waited = start.elapsed();
        if waited >= limit {
            bail!("{what}: not within {} s; last seen: {seen}", limit.as_secs_f32());
        }
        if waited >= report_at {
            eprintln!("waiting for {what}, {} s of at most {}: {seen}", waited.as_secs(), limit.as_secs());
            report_at += Duration::from_secs(5);
        }
        sleep(POLL);
    }
}
