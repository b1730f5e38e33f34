//! The agent: one loop, a closed list of causes, and the same whole pass for each of them.

mod office;
mod prober;
mod rows;

use std::{
    collections::BTreeSet,
    future::Future,
    io,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot},
    time::{MissedTickBehavior, interval, sleep_until, timeout_at},
};
use tracing::{debug, info, warn};

use self::{office::Office, prober::Probing};
use crate::{
    args,
    causes::with_cause,
    dial::Dialer,
    gateway::{Known, Said, Standing},
    intent::Intent,
    kernel::{
        self, Linux, Secrets,
        bpf::Bpf,
        events::{self, Event},
        facts,
    },
    names::Ordinal,
    overlay::Overlay,
    probe::Report,
    reconcile::{Kernel, Outcome, Reading, reconcile},
    resolve::{Resolved, Resolver},
    run_dir::{Lock, LockError},
    source::{self, Snapshot},
    state::State,
    status::Status,
    status_socket::{self, Request},
    survey::{Found, Keys, Survey, View, node_name, survey},
    tunnel::client::Client,
};

/// Damage is repaired by event; this catches what no event tells of.
const RESYNC: Duration = Duration::from_secs(30);
/// Events come in bursts.
const DEBOUNCE: Duration = Duration::from_millis(50);
/// How often it is seen whether the programs are still attached: to detach one sends no event.
const POLL: Duration = Duration::from_millis(500);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error("--wireguard kernel is not supported yet: use `userspace`, and run `carrick tunnel` beside the agent")]
    NoKernelWireGuard,
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error(transparent)]
    Privileges(#[from] kernel::Unprivileged),
    #[error(transparent)]
    Source(#[from] source::ConnectError),
    #[error("cannot open netlink sockets")]
    Netlink(#[source] std::io::Error),
    #[error("the BPF programs in this binary are broken")]
    Bpf(#[source] std::io::Error),
    #[error("cannot serve {}", path.display())]
    Socket { path: PathBuf, source: std::io::Error },
}

/// Why a pass runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The objects changed.
    Intent,
    /// Something of ours in the kernel changed, or the tunnel came or went.
    Kernel,
    /// A name, an address or a path MTU changed.
    Facts,
    /// Nothing in particular.
    Resync,
}

/// The backend that is asked for, if it is there.
pub fn check_backend(backend: &args::Backend) -> Result<(), AgentError> {
    match backend.wireguard {
        args::WireGuard::Kernel => Err(AgentError::NoKernelWireGuard),
        args::WireGuard::Auto | args::WireGuard::Userspace => Ok(()),
    }
}

/// Runs until `shutdown` resolves. What is in the kernel stays.
pub async fn run(args: args::Node, shutdown: impl Future<Output = ()>) -> Result<(), AgentError> {
    check_backend(&args.backend)?;
    kernel::check_privileges()?;
    kernel::memory::keep_little();
    let run_dir = args.backend.run_dir.clone();
    let _lock = Lock::take(&run_dir, "agent")?;
    let (ask, mut asked) = mpsc::channel(8);
    let socket = status_socket::path(&run_dir);
    let _server = status_socket::serve(&socket, ask).map_err(|source| AgentError::Socket { path: socket, source })?;
    let origin = args.origin(node_name(&args));
    let mut snapshots = source::follow(&origin).await?;
    let mut events = events::Watch::new().map_err(AgentError::Netlink)?;
    let (resolver, mut resolved) = Resolver::new();
    let client = Client::new(&run_dir);
    let mut tunnel = client.watch();
    let (probing, mut reports) = Probing::new(args.backend.probe_port);
    let (office, mut said) = Office::new(&origin, &args);
    let mut agent = Agent::new(args, client, resolver, probing, office)?;
    let mut polls = interval(POLL);
    polls.set_missed_tick_behavior(MissedTickBehavior::Delay);
    info!(cluster = %agent.args.cluster_name, node = agent.node, "started");
    tokio::pin!(shutdown);

    loop {
        let mut reply: Option<oneshot::Sender<Status>> = None;
        let cause = tokio::select! {
            () = &mut shutdown => break,
            changed = snapshots.changed() => {
                changed.expect("the follower outlives us");
                agent.learns(&snapshots.borrow_and_update())
            }
            event = events.next(), if Instant::now() >= agent.quiet_until => Some(cause_of(event)),
            () = tunnel.changed() => Some(Cause::Kernel),
            changed = resolved.changed() => { changed.expect("the agent holds the resolver"); Some(Cause::Facts) }
            Some((request, sender)) = asked.recv() => {
                agent.asked(request);
                reply = Some(sender);
                Some(Cause::Resync)
            }
            () = sleep_until(agent.next_pass.into()) => Some(Cause::Resync),
            changed = reports.changed() => {
                changed.expect("the agent holds a sender");
                agent.hears(reports.borrow_and_update().as_ref())
            }
            changed = said.changed() => {
                changed.expect("whoever speaks outlives us");
                agent.stands(said.borrow_and_update().clone());
                Some(Cause::Intent)
            }
            _ = polls.tick(), if Instant::now() >= agent.quiet_until => agent.looks().await,
        };
        let Some(cause) = cause else { continue };
        if matches!(cause, Cause::Kernel | Cause::Facts) {
            let quiet = tokio::time::Instant::now() + DEBOUNCE;
            while timeout_at(quiet, events.next()).await.is_ok() {}
        }
        let snapshot = snapshots.borrow_and_update().clone();
        // Cloned out of their channel first: a pass makes the resolver write to it.
        let names = resolved.borrow_and_update().clone();
        let status = agent.pass(cause, snapshot, &names).await;
        events.set_native(agent.native.clone());
        if let Some(reply) = reply {
            // Whoever asked may have gone.
            drop(reply.send(status));
        }
    }
    info!("stopped; the data plane stays");
    Ok(())
}

fn cause_of(event: Event) -> Cause {
    match event {
        Event::Facts => Cause::Facts,
        Event::Ours | Event::Overrun => Cause::Kernel,
    }
}

/// How long events wait after so many contested passes in a row: the first few repairs are immediate.
fn calm(contested: u32) -> Duration {
    match contested {
        0..=3 => Duration::ZERO,
        _ => Duration::from_secs(1 << (contested - 4).min(5)).min(LAST_RETRY),
    }
}

/// What lives from one pass to the next. None of it is the kernel's state: that is read each time.
struct Agent {
    args: args::Node,
    node: String,
    kernel: Linux<Client>,
    facts: facts::Reader,
    resolver: Resolver,
    dialer: Dialer,
    keys: Keys,
    /// The view of the snapshot that it was made from.
    view: Option<(Arc<Snapshot>, View)>,
    started: Instant,
    next_pass: Instant,
    retry: Duration,
    /// Passes in a row that an event caused and that wrote or failed: somebody undoes what we do, or our own failing
    /// makes the event.
    contested: u32,
    /// Until then events wait.
    quiet_until: Instant,
    /// What was last said, so that it is said once.
    told: BTreeSet<String>,
    /// Somebody wants this gateway drained.
    drain: bool,
    probing: Probing,
    report: Option<Report>,
    office: Office,
    /// The native devices as of the last pass.
    native: BTreeSet<String>,
}

impl Agent {
    fn new(
        args: args::Node,
        client: Client,
        resolver: Resolver,
        probing: Probing,
        office: Office,
    ) -> Result<Agent, AgentError> {
        let bpf = Bpf::new(&args.backend.bpffs, &args.backend.run_dir).map_err(AgentError::Bpf)?;
        let kernel = Linux::new(client, Secrets::default(), bpf).map_err(AgentError::Netlink)?;
        let facts = facts::Reader::new().map_err(AgentError::Netlink)?;
        let now = Instant::now();
        Ok(Agent {
            node: node_name(&args).to_string(),
            args,
            kernel,
            facts,
            resolver,
            dialer: Dialer::default(),
            keys: Keys::default(),
            view: None,
            started: now,
            // The folder's first snapshot comes before that.
            next_pass: now + FIRST_RETRY,
            retry: FIRST_RETRY,
            contested: 0,
            quiet_until: now,
            told: BTreeSet::new(),
            drain: false,
            probing,
            report: None,
            office,
            native: BTreeSet::new(),
        })
    }

    fn asked(&mut self, request: Request) {
        match request {
            Request::Status => {}
            Request::Drain => self.drain = true,
            Request::Undrain => self.drain = false,
        }
        self.inform();
    }

    /// Takes over a snapshot that asks for what the last one did; any other is for a pass. Only whoever deals with the API
    /// server uses statuses, and a gateway's own come back to it.
    fn learns(&mut self, followed: &source::Followed) -> Option<Cause> {
        let (Some((last, _)), Ok(snapshot)) = (&mut self.view, followed) else { return Some(Cause::Intent) };
        if !last.ask_the_same(snapshot) {
            return Some(Cause::Intent);
        }
        *last = Arc::clone(snapshot);
        self.inform();
        None
    }

    /// Takes over what the prober says. A pass is needed where path MTUs change, which routes carry.
    fn hears(&mut self, report: Option<&Report>) -> Option<Cause> {
        let news = prober::are_news(self.report.as_ref(), report);
        self.report = report.cloned();
        self.inform();
        news.then_some(Cause::Facts)
    }

    /// Takes over where this node stands.
    fn stands(&mut self, said: Said) {
        if let Standing::Gateway(held) = &said.standing
            && !matches!(&self.office.said.standing, Standing::Gateway(before) if before.spec == held.spec)
        {
            info!(slot = held.spec.ordinal, key = held.spec.public_key, "holds a slot");
        }
        self.office.said = said;
        self.view = None;
    }

    /// Tells whoever deals with the API server what is known.
    fn inform(&self) {
        let (Some(tell), Some((snapshot, view))) = (&self.office.tell, &self.view) else { return };
        let made = (&view.intent, &*view.rejected);
        let known = Known::new(&node_name(&self.args), &snapshot.objects, made, self.report.as_ref(), self.drain);
        source::send_news(tell, known);
    }

    /// A pass is needed where a program is not attached any more. An error is for that pass to meet.
    async fn looks(&mut self) -> Option<Cause> {
        let attached = self.kernel.still_attached().await.unwrap_or(false);
        (!attached).then_some(Cause::Kernel)
    }

    /// Puts the prober on the maps of now, and tells it whom to probe.
    fn probe(&mut self, intent: &Intent, desired: &State, reading: &Reading) -> io::Result<()> {
        let generation = self.kernel.health_generation()?;
        if !self.probing.works_on(generation) {
            self.kernel.forget_known()?;
            let maps = self.kernel.health()?.zip(self.kernel.health()?);
            self.probing.work_on(maps)?;
        }
        let overlay = Overlay::new(&self.args.mesh_domain);
        let severed = reading.severed(desired);
        self.probing.want(prober::wanted(intent, overlay, desired, &severed, self.drain));
        Ok(())
    }

    async fn pass(&mut self, cause: Cause, followed: source::Followed, resolved: &Resolved) -> Status {
        let began = Instant::now();
        self.next_pass = began + RESYNC;
        let snapshot = match followed {
            Ok(snapshot) => snapshot,
            Err(missing) => {
                let problem = format!("{missing}; nothing is changed until it can be read");
                let status = Status { problems: vec![problem], ..self.blank() };
                self.tell(&status);
                return status;
            }
        };
        if self.view.as_ref().is_none_or(|(of, _)| !Arc::ptr_eq(of, &snapshot)) {
            let amended = self.office.amended(&node_name(&self.args), &snapshot);
            let view = View::new(amended.as_ref().unwrap_or(&snapshot), &self.args);
            self.resolver.follow(&view.endpoint_names());
            self.view = Some((snapshot, view));
        }
        let (_, view) = self.view.as_ref().expect("set above");
        self.keys.refresh(&self.args, &view.intent, self.office.keys());
        let internal = view.intent.addresses_of(&node_name(&self.args));
        self.kernel.set_secrets(self.keys.secrets());
        let node = match self.facts.read(&internal).await {
            Ok(node) => node,
            Err(error) => return self.unable(format!("cannot read this node's links and addresses: {error}")),
        };
        self.native = node.native.keys().cloned().collect();
        let mut reading = self.kernel.read().await;
        let (snapshot, view) = self.view.take().expect("set above");
        let clock = (&mut self.dialer, self.started.elapsed());
        let mtus = prober::mtus(&view.intent, self.report.as_ref());
        let found = Found { node: &node, resolved, reading: &reading, mtus };
        let survey = survey(&view, &self.keys, found, &self.args, clock);
        reading.excuse_absent_tunnel(&survey.desired);
        let outcome = reconcile(&survey.desired, survey.complete, &reading, &mut self.kernel).await;
        let probing = self.probe(&view.intent, &survey.desired, &reading);
        let forgotten = self.kernel.forget_masqueraded().await;
        self.schedule(cause, &survey, &reading, &outcome);
        for op in &outcome.applied {
            info!("{op:#}");
        }
        debug!(?cause, took = ?began.elapsed(), applied = outcome.applied.len(), "pass");
        let mut status = self.status(&view, &survey, &reading, &outcome, &node, resolved);
        status.failures.extend(probing.err().map(|error| format!("cannot probe: {error}")));
        status.failures.extend(forgotten.err().map(|error| error.to_string()));
        self.view = Some((snapshot, view));
        // The kernel comes first.
        self.inform();
        self.tell(&status);
        if cause == Cause::Resync {
            kernel::memory::give_back();
        }
        status
    }

    /// A pass that cannot even begin. Nothing is changed.
    fn unable(&mut self, failure: String) -> Status {
        self.next_pass = Instant::now() + FIRST_RETRY;
        self.inform();
        let status = Status { synced: true, failures: vec![failure], ..self.blank() };
        self.tell(&status);
        status
    }

    fn schedule(&mut self, cause: Cause, survey: &Survey, reading: &Reading, outcome: &Outcome) {
        let now = Instant::now();
        let failed = !outcome.failed.is_empty() || !reading.failed.is_empty();
        self.retry = if failed { (self.retry * 2).min(LAST_RETRY) } else { FIRST_RETRY };
        if failed {
            self.next_pass = self.next_pass.min(now + self.retry);
        }
        if let Some(again) = survey.again {
            self.next_pass = self.next_pass.min(self.started + again);
        }
        let wrote = !outcome.applied.is_empty() || !outcome.failed.is_empty();
        match cause {
            Cause::Kernel | Cause::Facts if wrote => self.contested += 1,
            _ if !wrote => self.contested = 0,
            _ => {}
        }
        self.quiet_until = now + calm(self.contested);
        if self.contested > 0 {
            self.next_pass = self.next_pass.min(self.quiet_until.max(now + FIRST_RETRY));
        }
    }

    fn blank(&self) -> Status {
        Status {
            cluster: self.args.cluster_name.to_string(),
            node: self.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            wireguard: "userspace".to_owned(),
            ..Status::default()
        }
    }

    fn status(
        &self,
        view: &View,
        survey: &Survey,
        reading: &Reading,
        outcome: &Outcome,
        node: &facts::Node,
        resolved: &Resolved,
    ) -> Status {
        let peers = rows::peers(view, survey, reading);
        let read = reading.failed.iter().map(|error| with_cause(error));
        let failures: Vec<String> = read.chain(outcome.failed.iter().map(|error| with_cause(error))).collect();
        let unresolved = resolved
            .failed
            .iter()
            .map(|(name, why)| format!("endpoint {name} does not resolve: {why}; it is asked again"));
        let mut problems = view.problems.clone();
        problems.extend(self.keys.problems.iter().cloned().chain(unresolved));
        problems.extend(node.conditions.iter().map(ToString::to_string));
        problems.extend(rows::taken_from_us(survey, node));
        problems.extend(prober::problems(&view.intent, self.report.as_ref()));
        problems.extend(self.office.said.problems.iter().cloned());
        let members = prober::members(&view.intent, self.report.as_ref());
        let slot = view.intent.slot_of(&node_name(&self.args)).map(Ordinal::get);
        let (sent, network_plugin, drops) = self.probing.counts().unwrap_or_else(|error| {
            problems.push(format!("cannot read what the programs count: {error}"));
            Default::default()
        });
        Status {
            synced: true,
            last_known_good_age_seconds: self.kept_since().map(|age| age.as_secs()),
            serving: self.keys.are_complete() && failures.is_empty(),
            ready: survey.complete && survey.rejected.is_empty() && failures.is_empty() && outcome.withheld == 0,
            connected: !members.is_empty() && members.iter().all(|member| member.reached),
            slot,
            drain: prober::drain(slot.is_some(), self.drain, self.report.as_ref()),
            native: rows::natives(node),
            network_plugin,
            members,
            sent,
            drops,
            forged_answers: self.report.as_ref().map_or(0, |report| report.forged),
            peers,
            routes: rows::routes(view),
            rejections: view.rejected.iter().chain(&survey.rejected).map(ToString::to_string).collect(),
            problems,
            failures,
            withheld: outcome.withheld,
            ..self.blank()
        }
    }

    fn kept_since(&self) -> Option<Duration> {
        self.args.api.kube.then(|| source::age(&self.args.state.state_dir))?
    }

    /// Logs what is new since the last pass: trouble as it comes, and when it is gone.
    fn tell(&mut self, status: &Status) {
        let lists = [("refused", &status.rejections), ("problem", &status.problems), ("failed", &status.failures)];
        let now: BTreeSet<String> =
            lists.iter().flat_map(|(what, list)| list.iter().map(move |one| format!("{what}: {one}"))).collect();
        now.difference(&self.told).for_each(|new| warn!("{new}"));
        self.told.difference(&now).for_each(|old| info!("no longer {old}"));
        self.told = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fight_over_the_kernel_is_fought_ever_more_slowly() {
        let seconds: Vec<u64> = (0..12).map(|contested| calm(contested).as_secs()).collect();
        assert_eq!(seconds, [0, 0, 0, 0, 1, 2, 4, 8, 16, 30, 30, 30]);
    }
}
