//! The events of `bench failover`, as they are kept in a file, one a line, behind a line that says what was measured.
//!
//! Invariant: a run that was ended at any instant loses at most the event that it was in.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use lab::Cni;
use serde::{Deserialize, Serialize};

use crate::bench::{
    report::{Budget, Measured},
    saved::{self, Machine},
    statistics::percentile,
};

/// What happens to a gateway, a link or an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A gateway node is switched off.
    Kill,
    /// The link between two gateways is cut.
    Cut,
    /// `carrick drain` on a gateway, whose agent and tunnel are then ended.
    Drain,
    /// An agent is ended and started again.
    Restart,
}

impl Kind {
    pub const ALL: [Kind; 4] = [Kind::Kill, Kind::Cut, Kind::Drain, Kind::Restart];

    pub fn name(self) -> &'static str {
        match self {
            Kind::Kill => "gateway off",
            Kind::Cut => "link cut",
            Kind::Drain => "drain",
            Kind::Restart => "agent restart",
        }
    }

    /// Nobody plans it: it may lose packets.
    pub fn is_failure(self) -> bool {
        matches!(self, Kind::Kill | Kind::Cut)
    }
}

/// What one event did to a flow of 1000 packets a second, there and back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    pub kind: Kind,
    /// Whom it happened to.
    pub to: String,
    /// The longest time without an answer.
    pub gap_ms: u64,
    /// Packets that never came back.
    pub lost: u64,
    /// The same, while what was broken became whole again; `None` where nothing was.
    pub mended: Option<Mended>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mended {
    pub gap_ms: u64,
    pub lost: u64,
    /// Until probes had found every way again, and the flow took its old one.
    pub after_ms: u64,
}

/// What the events of a file have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    pub machine: Machine,
    /// A fingerprint of the `carrick` that was measured.
    pub build: String,
}

/// Events so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Log {
    pub subject: Subject,
    pub events: Vec<Event>,
}

/// A log, and the file that it grows in.
#[derive(Debug)]
pub struct LogFile {
    pub log: Log,
    path: PathBuf,
    file: File,
}

impl Subject {
    pub fn of(carrick: &Path) -> Result<Subject> {
        let binary = fs::read(carrick).with_context(|| carrick.display().to_string())?;
        Ok(Subject { machine: Machine::read()?, build: format!("{:016x}", fnv1a(&binary)) })
    }
}

/// FNV-1a, 64 bits.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

impl Log {
    /// Reads the whole lines; what follows the last of them was being written when the run ended.
    fn parse(text: &str) -> Result<Log> {
        let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
        let mut lines = whole.lines();
        let subject = serde_json::from_str(lines.next().context("it is empty")?).context("line 1")?;
        let event = |(i, line)| serde_json::from_str(line).with_context(|| format!("line {}", i + 2));
        Ok(Log { subject, events: lines.enumerate().map(event).collect::<Result<_>>()? })
    }

    fn text(&self) -> Result<String> {
        let mut text = line(&self.subject)?;
        for event in &self.events {
            text += &line(event)?;
        }
        Ok(text)
    }

    /// What is kept of runs under that network plugin.
    pub fn read(cni: Cni) -> Result<Log> {
        let path = path(cni)?;
        let shown = path.display();
        let text = fs::read_to_string(&path).with_context(|| format!("{shown}: run `cargo xtask bench failover`"))?;
        Log::parse(&text).with_context(|| format!("{shown}: run `cargo xtask bench failover --fresh`"))
    }

    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Event> + Clone {
        self.events.iter().filter(move |event| event.kind == kind)
    }

    /// What comes next, and its number among its kind: the kind of which the smallest share has been; `None` if there have
    /// been as many as wanted of each.
    pub fn next(&self, wanted: &[(Kind, usize)]) -> Option<(Kind, usize)> {
        let left = wanted.iter().map(|(kind, wanted)| (*kind, self.of(*kind).count(), *wanted));
        let left = left.filter(|(_, done, wanted)| done < wanted);
        let next = left.min_by(|(_, a, of_a), (_, b, of_b)| (a * of_b).cmp(&(b * of_a)));
        next.map(|(kind, done, _)| (kind, done))
    }

    /// What is said of each kind that has happened.
    pub fn results(&self) -> Vec<Measured> {
        Kind::ALL.iter().flat_map(|kind| self.results_of(*kind)).collect()
    }

    fn results_of(&self, kind: Kind) -> Vec<Measured> {
        let events = self.of(kind);
        let count = events.clone().count();
        if count == 0 {
            return Vec::new();
        }
        let gaps = || events.clone().map(|event| event.gap_ms as f64);
        let lost: u64 = events.clone().map(|event| event.lost).sum();
        let one = |what: &str, value, unit| Measured::new(&format!("{}, {what}", kind.name()), value, unit);
        let limit = |limit, result| Measured { budget: Some(Budget::AtMost(limit)), ..result };
        let mut results = vec![one("events", count as f64, ""), one("gap p50", percentile(50, gaps()), "ms")];
        if kind.is_failure() {
            results.push(limit(999.0, one("gap p99", percentile(99, gaps()), "ms")));
        }
        results.push(one("gap max", percentile(100, gaps()), "ms"));
        if kind.is_failure() {
            results.push(one("lost p50", percentile(50, events.clone().map(|event| event.lost as f64)), "packets"));
        } else {
            results.push(limit(0.0, one("lost in all", lost as f64, "packets")));
        }
        let mended = || events.clone().filter_map(|event| event.mended.as_ref());
        if mended().next().is_some() {
            let lost: u64 = mended().map(|mended| mended.lost).sum();
            let after = percentile(50, mended().map(|mended| mended.after_ms as f64));
            results.push(one("mended, lost in all", lost as f64, "packets"));
            results.push(one("mended, old way again after p50", after / 1e3, "s"));
        }
        results
    }
}

fn path(cni: Cni) -> Result<PathBuf> {
    saved::path(&format!("failover-{}.jsonl", cni.word()))
}

fn line(value: &impl Serialize) -> Result<String> {
    Ok(serde_json::to_string(value)? + "\n")
}

impl LogFile {
    /// Goes on where the last run stopped. What another build, kernel or machine did is not mixed in: that needs `fresh`.
    pub fn open(cni: Cni, subject: Subject, fresh: bool) -> Result<LogFile> {
        let path = path(cni)?;
        let begun = !fresh && path.exists();
        let log = if begun { known(subject, Log::read(cni)?)? } else { Log { subject, events: Vec::new() } };
        // Whole lines alone, in one step.
        let new = path.with_extension("new");
        fs::write(&new, log.text()?).with_context(|| format!("write {}", new.display()))?;
        fs::rename(&new, &path).with_context(|| format!("replace {}", path.display()))?;
        let file = File::options().append(true).open(&path).with_context(|| path.display().to_string())?;
        Ok(LogFile { log, path, file })
    }

    pub fn add(&mut self, event: Event) -> Result<()> {
        self.file.write_all(line(&event)?.as_bytes()).with_context(|| format!("write {}", self.path.display()))?;
        self.log.events.push(event);
        Ok(())
    }
}

fn known(subject: Subject, log: Log) -> Result<Log> {
    let Subject { machine, build } = &log.subject;
    ensure!(
        log.subject == subject,
        "the events so far are of another build or machine ({build}, {machine}): `--fresh` begins anew"
    );
    Ok(log)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn subject() -> Subject {
        let machine = Machine { processor: "Some CPU".to_owned(), cores: 2, kernel: "6.18.0".to_owned() };
        Subject { machine, build: "0123456789abcdef".to_owned() }
    }

    fn event(kind: Kind, gap_ms: u64, lost: u64) -> Event {
        let mended = kind.is_failure().then_some(Mended { gap_ms: 2, lost: 0, after_ms: 4500 });
        Event { kind, to: "mn-0".to_owned(), gap_ms, lost, mended }
    }

    fn log(events: Vec<Event>) -> Log {
        Log { subject: subject(), events }
    }

    #[test]
    fn a_log_ended_anywhere_reads_as_its_whole_lines() {
        let log = log(vec![event(Kind::Kill, 612, 611), event(Kind::Drain, 3, 0)]);
        let text = log.text().unwrap();
        expect![[r#"
            {"machine":{"processor":"Some CPU","cores":2,"kernel":"6.18.0"},"build":"0123456789abcdef"}
            {"kind":"kill","to":"mn-0","gap_ms":612,"lost":611,"mended":{"gap_ms":2,"lost":0,"after_ms":4500}}
            {"kind":"drain","to":"mn-0","gap_ms":3,"lost":0,"mended":null}
        "#]]
        .assert_eq(&text);
        let header = text.find('\n').unwrap() + 1;
        for end in header..=text.len() {
            let whole = text[..end].matches('\n').count() - 1;
            assert_eq!(Log::parse(&text[..end]).unwrap().events, log.events[..whole]);
        }
        assert!((0..header).all(|end| Log::parse(&text[..end]).is_err()));
    }

    #[test]
    fn a_damaged_line_is_an_error() {
        let text = log(vec![event(Kind::Kill, 612, 611)]).text().unwrap();
        assert!(Log::parse(&text.replace("612", "")).is_err());
    }

    #[test]
    fn events_of_another_build_are_not_mixed_in() {
        let other = Subject { build: "0".to_owned(), ..subject() };
        assert!(known(subject(), log(Vec::new())).is_ok());
        assert!(known(other, log(Vec::new())).is_err());
    }

    #[test]
    fn every_kind_ends_with_as_many_as_wanted_and_shares_stay_alike() {
        let wanted = [(Kind::Kill, 50), (Kind::Cut, 50), (Kind::Drain, 10), (Kind::Restart, 0)];
        let mut log = log(Vec::new());
        while let Some((kind, number)) = log.next(&wanted) {
            assert_eq!(log.of(kind).count(), number);
            log.events.push(event(kind, 1, 0));
            let shares = wanted[..3].iter().map(|(kind, wanted)| log.of(*kind).count() as f64 / *wanted as f64);
            let (low, high) = shares.fold((1.0_f64, 0.0_f64), |(low, high), share| (low.min(share), high.max(share)));
            assert!(high - low <= 0.1 + 1e-9, "{low} to {high}");
        }
        assert_eq!(wanted.map(|(kind, _)| log.of(kind).count()), [50, 50, 10, 0]);
        assert!(log.events.iter().take(10).any(|event| event.kind == Kind::Drain));
    }

    #[test]
    fn budgets_are_of_the_99th_percentile_and_of_planned_loss() {
        let mut events: Vec<Event> = (0..49).map(|i| event(Kind::Kill, 500 + i, 500)).collect();
        events.push(event(Kind::Kill, 1000, 980));
        events.extend([event(Kind::Drain, 3, 0), event(Kind::Drain, 4, 1)]);
        let results = log(events).results();
        let shown: Vec<String> = results
            .iter()
            .map(|result| {
                let budget = result.budget.map_or_else(String::new, |budget| budget.to_string());
                let line = format!("{}: {} {} {budget} {}", result.name, result.value, result.unit, result.verdict());
                line.trim_end().to_owned()
            })
            .collect();
        expect![[r#"
            gateway off, events: 50
            gateway off, gap p50: 524 ms
            gateway off, gap p99: 1000 ms <= 999 MISSED by 0.1 %
            gateway off, gap max: 1000 ms
            gateway off, lost p50: 500 packets
            gateway off, mended, lost in all: 0 packets
            gateway off, mended, old way again after p50: 4.5 s
            drain, events: 2
            drain, gap p50: 3 ms
            drain, gap max: 4 ms
            drain, lost in all: 1 packets <= 0 MISSED"#]]
        .assert_eq(&shown.join("\n"));
    }
}
