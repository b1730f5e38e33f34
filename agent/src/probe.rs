//! The prober: a task that sends what [`Health`] asks for, tells it what comes back, and writes its verdict to the maps.
//!
//! Invariants: it alone writes the health maps, and only what differs. It writes nothing before it has read what they
//! hold and has been told whom to probe, so a restart changes nothing. No failure ends it: what cannot be sent is lost
//! like anything else on a network, and what cannot be written is tried again.

mod socket;
#[cfg(test)]
mod tests;
mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{self, BufReader, Read},
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant},
};

use ebpf::{Answer, Reach};
use tokio::{io::unix::AsyncFd, net::UdpSocket, sync::watch, time::sleep_until};
use tracing::{info, warn};

use crate::{
    health::{Adopted, Alarm, Drain, FAST, Health, Seen, Target, Targets, Verdict},
    names::MemberId,
};

/// Between two looks at when members last had traffic. The ring tells of those that had none.
const LOOK: Duration = Duration::from_secs(1);
/// Between two attempts at what failed.
const RETRY: Duration = Duration::from_secs(1);
/// Between two times that the prober stands by what it wrote: six fit into [`ebpf::CLAIM_NS`].
const STAND_BY: Duration = Duration::from_millis(300);
/// Between two readings of the maps, which somebody else may have emptied.
const RESYNC: Duration = Duration::from_secs(30);
/// Answers taken in one step, so that a flood cannot keep the prober from its own asks.
const MOST_ANSWERS: usize = 4096;
/// No UDP payload is longer.
const MAX_PAYLOAD: usize = 65_535;

/// The maps of health, as the programs see them.
pub trait HealthMaps {
    /// `HEALTH`, without the entries that are all zero.
    fn read_reach(&self) -> io::Result<BTreeMap<MemberId, Reach>>;

    /// `ANSWER`; all zero if it was never written.
    fn read_answer(&self) -> io::Result<Answer>;

    fn write_reach(&mut self, member: MemberId, reach: Reach) -> io::Result<()>;

    fn write_answer(&mut self, answer: &Answer) -> io::Result<()>;

    /// What was written holds for [`ebpf::CLAIM_NS`] from now on.
    fn stand_by(&mut self) -> io::Result<()>;

    /// How long ago a packet towards the member was last steered, by `TRAFFIC`; `None`: never.
    fn last_traffic(&self, member: MemberId) -> io::Result<Option<Duration>>;

    /// How many packets this node has passed on for peers and for other nodes so far, without probes and without what
    /// its own pods sent. Only asked for during a drain.
    fn passed_on(&self) -> io::Result<u64>;

    /// Readable, as epoll sees it, when `WAKE` holds something new.
    fn wake_fd(&self) -> BorrowedFd<'_>;

    /// Takes the oldest member out of `WAKE`.
    fn next_wake(&mut self) -> Option<MemberId>;
}

/// What the agent wants of the prober.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// This node's overlay address: its slot's on a gateway, its own on a worker. It need not exist yet.
    pub overlay: Option<Ipv6Addr>,
    pub targets: Targets,
    pub drain: bool,
}

/// What the prober knows, for status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub verdict: Verdict,
    pub seen: BTreeMap<Target, Seen>,
    pub drain: Drain,
    /// Answers to nothing that was asked of their sender.
    pub forged: u64,
    /// What does not work, each with its reason.
    pub problems: BTreeSet<String>,
}

/// Probes until the sender of `wanted` is gone. The maps stay as they are. `port` is both source and destination.
pub async fn run(
    mut maps: impl HealthMaps,
    port: u16,
    mut wanted: watch::Receiver<Option<Wanted>>,
    reports: watch::Sender<Option<Report>>,
) -> io::Result<()> {
    let wakes = socket::watch(maps.wake_fd().try_clone_to_owned()?)?;
    let started = Instant::now();
    let mut prober = Prober::new(port)?;
    wanted.mark_changed();
    loop {
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                prober.wanted = wanted.borrow_and_update().clone().map(Arc::new);
                prober.changed = true;
            }
            () = readable(prober.socket.as_ref()) => {}
            () = woken(&wakes) => {}
            () = sleep_until((started + prober.next()).into()) => {}
        }
        prober.step(started.elapsed(), &mut maps);
        if std::mem::take(&mut prober.news) {
            reports.send_replace(prober.report());
        }
    }
}

async fn readable(socket: Option<&UdpSocket>) {
    match socket {
        // An error is for the next receive to meet.
        Some(socket) => drop(socket.readable().await),
        None => std::future::pending().await,
    }
}

async fn woken(wakes: &AsyncFd<OwnedFd>) {
    match wakes.readable().await {
        // All that the ring holds is read in the step that follows.
        Ok(mut ready) => ready.clear_ready(),
        Err(_) => std::future::pending().await,
    }
}

struct Prober {
    port: u16,
    wanted: Option<Arc<Wanted>>,
    /// Whether `wanted` is news.
    changed: bool,
    /// Only once the maps have been read, and somebody to probe is known.
    health: Option<Health>,
    socket: Option<UdpSocket>,
    overlay: Option<Ipv6Addr>,
    /// What the maps hold, as of the last reading and what was written since.
    held: BTreeMap<MemberId, Reach>,
    answer: Option<Answer>,
    look: Duration,
    retry: Duration,
    resync: Duration,
    stand_by: Duration,
    random: Random,
    buffer: Vec<u8>,
    problems: BTreeMap<Effect, String>,
    alarms: BTreeSet<Alarm>,
    /// Whether there is something to report.
    news: bool,
}

/// What may fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Effect {
    Read,
    Write,
    StandBy,
    Traffic,
    Bind,
}

impl Prober {
    fn new(port: u16) -> io::Result<Prober> {
        Ok(Prober {
            port,
            wanted: None,
            changed: false,
            health: None,
            socket: None,
            overlay: None,
            held: BTreeMap::new(),
            answer: None,
            look: Duration::ZERO,
            retry: Duration::ZERO,
            resync: Duration::ZERO,
            stand_by: Duration::ZERO,
            random: Random::new()?,
            buffer: vec![0; MAX_PAYLOAD],
            problems: BTreeMap::new(),
            alarms: BTreeSet::new(),
            news: false,
        })
    }

    fn next(&self) -> Duration {
        let probing = self.health.as_ref().filter(|_| self.socket.is_some()).map(Health::next);
        let retry = (!self.problems.is_empty()).then_some(self.retry);
        let stand_by = self.probes().then_some(self.stand_by);
        let all = [probing, retry, stand_by, Some(self.look)];
        all.into_iter().flatten().min().unwrap_or(self.look)
    }

    /// First everything that has arrived, then conclusions, then what is to be written and sent.
    fn step(&mut self, now: Duration, maps: &mut impl HealthMaps) {
        let retry = now >= self.retry;
        if retry {
            self.retry = now + RETRY;
        }
        let Some(wanted) = self.wanted.clone() else {
            self.look = now + LOOK;
            return;
        };
        if now >= self.resync && (retry || !self.problems.contains_key(&Effect::Read)) {
            self.read(now, maps);
        }
        self.receive(now);
        let Some(health) = &mut self.health else {
            self.look = now + LOOK;
            return;
        };
        if self.changed {
            health.targets(now, &wanted.targets);
            health.drain(now, wanted.drain);
        }
        while let Some(member) = maps.next_wake() {
            health.woken(now, member);
        }
        if now >= self.look || self.changed {
            self.look(now, &wanted.targets, maps);
        }
        if retry || self.changed {
            self.bind(wanted.overlay);
        }
        self.changed = false;
        let Some(health) = &mut self.health else { return };
        if now >= health.next() {
            health.tick(now);
            self.write(maps);
            self.send(now);
        } else if retry {
            self.write(maps);
        }
        if self.probes() && now >= self.stand_by {
            self.stand_by = now + STAND_BY;
            let stood_by = maps.stand_by();
            self.note(Effect::StandBy, "cannot say that the prober runs", stood_by);
        }
    }

    /// Whether it measures anything.
    fn probes(&self) -> bool {
        self.health.is_some() && self.socket.is_some()
    }

    /// What the maps hold. The first reading is what the prober begins with.
    fn read(&mut self, now: Duration, maps: &impl HealthMaps) {
        let read = maps.read_reach().and_then(|reach| Ok((reach, maps.read_answer()?)));
        let read = self.note(Effect::Read, "cannot read the health maps", read);
        let Some((reach, answer)) = read else { return };
        self.resync = now + RESYNC;
        (self.held, self.answer) = (reach.clone(), Some(answer));
        if self.health.is_none() {
            self.health = Some(Health::new(now, Adopted { reach, answer }));
            self.changed = true;
        }
    }

    /// When members last had traffic.
    fn look(&mut self, now: Duration, targets: &Targets, maps: &impl HealthMaps) {
        let Some(health) = &mut self.health else { return };
        self.news = true;
        let draining = health.draining() == Drain::Waiting;
        self.look = now + if draining { FAST } else { LOOK };
        let mut looked = Ok(());
        for member in targets.members.keys() {
            match maps.last_traffic(*member) {
                Ok(Some(ago)) => health.steered(now, now.saturating_sub(ago), *member),
                Ok(None) => {}
                Err(err) => looked = Err(err),
            }
        }
        if draining {
            match maps.passed_on() {
                Ok(packets) => health.passed_on(now, packets),
                Err(err) => looked = Err(err),
            }
        }
        self.note(Effect::Traffic, "cannot read how much traffic there is", looked);
    }

    /// The address may come later than we do, or change.
    fn bind(&mut self, overlay: Option<Ipv6Addr>) {
        if overlay != self.overlay {
            (self.socket, self.overlay) = (None, overlay);
            self.problems.remove(&Effect::Bind);
        }
        if let (None, Some(address)) = (&self.socket, overlay) {
            let bound = socket::bind(address, self.port);
            let what = format!("cannot probe from [{address}]:{}", self.port);
            self.socket = self.note(Effect::Bind, &what, bound);
        }
    }

    fn receive(&mut self, now: Duration) {
        let (Some(health), Some(socket)) = (&mut self.health, &self.socket) else { return };
        for _ in 0..MOST_ANSWERS {
            match socket.try_recv_from(&mut self.buffer) {
                Ok((len, SocketAddr::V6(from))) if from.port() == self.port => {
                    if let Some((nonce, said)) = wire::answer(&self.buffer[..len]) {
                        health.answered(now, *from.ip(), nonce, len, &said);
                    }
                }
                Ok(_) => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => return,
                // An error that an ICMP message brought: it belongs to a packet that was sent.
                Err(_) => {}
            }
        }
    }

    fn send(&mut self, now: Duration) {
        let (Some(health), Some(socket)) = (&mut self.health, &self.socket) else { return };
        for ask in health.due(now, || self.random.next()) {
            let to = SocketAddrV6::new(ask.to, self.port, 0, 0);
            // What cannot be sent is lost, which its answer will not say either.
            drop(socket.try_send_to(&wire::ask(ask.nonce, ask.len), to.into()));
        }
    }

    /// Writes what differs.
    fn write(&mut self, maps: &mut impl HealthMaps) {
        let Some(health) = &self.health else { return };
        let verdict = health.verdict().clone();
        let mut written = Ok(());
        if self.answer != Some(verdict.answer) {
            written = maps.write_answer(&verdict.answer);
            self.answer = written.is_ok().then_some(verdict.answer);
            self.news = true;
        }
        let stale: Vec<_> = self.held.keys().filter(|member| !verdict.reach.contains_key(member)).copied().collect();
        let gone = stale.into_iter().map(|member| (member, Reach::default()));
        for (member, reach) in verdict.reach.iter().map(|(member, reach)| (*member, *reach)).chain(gone) {
            if self.held.get(&member).copied().unwrap_or_default() == reach {
                continue;
            }
            self.news = true;
            match maps.write_reach(member, reach) {
                Ok(()) => {
                    let Reach { via, links, mtu, .. } = reach;
                    info!(%member, via = format_args!("{via:#b}"), links = format_args!("{links:#b}"), mtu, "reach");
                    self.held.insert(member, reach);
                }
                Err(err) => written = Err(err),
            }
        }
        self.held.retain(|_, reach| *reach != Reach::default());
        self.note(Effect::Write, "cannot write the health maps", written);
        for alarm in verdict.alarms.difference(&self.alarms) {
            warn!(?alarm, "health");
        }
        for alarm in self.alarms.difference(&verdict.alarms) {
            info!(?alarm, "over");
        }
        self.news |= self.alarms != verdict.alarms;
        self.alarms = verdict.alarms;
    }

    /// Remembers a failure until the same effect succeeds.
    fn note<T>(&mut self, effect: Effect, what: &str, result: io::Result<T>) -> Option<T> {
        match result {
            Ok(value) => {
                self.problems.remove(&effect);
                Some(value)
            }
            Err(err) => {
                let problem = format!("{what}: {err}");
                if self.problems.get(&effect) != Some(&problem) {
                    warn!("{problem}");
                }
                self.problems.insert(effect, problem);
                None
            }
        }
    }

    fn report(&self) -> Option<Report> {
        let health = self.health.as_ref()?;
        Some(Report {
            verdict: health.verdict().clone(),
            seen: health.seen(),
            drain: health.draining(),
            forged: health.forged(),
            problems: self.problems.values().cloned().collect(),
        })
    }
}

/// Numbers that nobody can guess, from the kernel, many at a time.
struct Random(BufReader<File>);

impl Random {
    fn new() -> io::Result<Random> {
        Ok(Random(BufReader::with_capacity(4096, File::open("/dev/urandom")?)))
    }

    fn next(&mut self) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact(&mut bytes).expect("an open /dev/urandom never fails (random(4))");
        u64::from_ne_bytes(bytes)
    }
}
