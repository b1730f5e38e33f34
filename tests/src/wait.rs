//! Waiting for something to become true, with an answer to "for what?" while it lasts and when it fails.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

const POLL: Duration = Duration::from_millis(20);
/// Characters of what is seen that are shown while waiting.
const SHOWN: usize = 200;

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
            eprintln!("waiting for {what}, {} s of at most {}: {}", waited.as_secs(), limit.as_secs(), short(&seen));
            report_at += Duration::from_secs(5);
        }
        sleep(POLL);
    }
}

/// What of it fits a line or two.
fn short(seen: &str) -> String {
    let line = seen.lines().next().unwrap_or_default();
    let cut: String = line.chars().take(SHOWN).collect();
    if cut.len() < seen.trim_end().len() { format!("{cut} ...") } else { cut }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_texts_are_cut() {
        assert_eq!(short("no answer\n"), "no answer");
        assert_eq!(short("first\nsecond"), "first ...");
        assert_eq!(short(&"x".repeat(SHOWN + 1)), format!("{} ...", "x".repeat(SHOWN)));
    }
}
