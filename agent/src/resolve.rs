//! Endpoint names to addresses, off the loop: every name has its own task, so a dead one delays nobody while fewer than
//! [`AT_ONCE`] are being asked for.
//!
//! Invariant: what a name once resolved to stays until it resolves to something else. A name server that is down
//! takes no endpoint away.

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::{IpAddr, ToSocketAddrs},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

/// How long an answer is used before it is asked for again. `getaddrinfo` tells no TTL.
const REFRESH: Duration = Duration::from_secs(30);
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(10);
/// Threads that may wait for name servers: of those that the runtime has (512), all other blocking work needs some.
const AT_ONCE: usize = 32;

/// What the names stand for, as far as is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resolved {
    /// In the resolver's order of preference (RFC 6724).
    pub addresses: BTreeMap<String, Vec<IpAddr>>,
    /// Names whose last look-up failed, with why.
    pub failed: BTreeMap<String, String>,
}

/// Keeps names resolved. Dropping it ends the look-ups.
#[derive(Debug)]
pub struct Resolver {
    tasks: BTreeMap<String, AbortHandle>,
    threads: Arc<Semaphore>,
    results: watch::Sender<Resolved>,
}

impl Resolver {
    pub fn new() -> (Resolver, watch::Receiver<Resolved>) {
        let (results, receiver) = watch::channel(Resolved::default());
        (Resolver { tasks: BTreeMap::new(), threads: Arc::new(Semaphore::new(AT_ONCE)), results }, receiver)
    }

    /// Follows exactly these names from now on; the others are forgotten.
    pub fn follow(&mut self, names: &BTreeSet<String>) {
        let gone: Vec<String> = self.tasks.keys().filter(|name| !names.contains(*name)).cloned().collect();
        for name in gone {
            if let Some(task) = self.tasks.remove(&name) {
                task.abort();
            }
            self.results.send_if_modified(|resolved| {
                let known = resolved.addresses.remove(&name).is_some();
                resolved.failed.remove(&name).is_some() || known
            });
        }
        for name in names {
            if !self.tasks.contains_key(name) {
                let task = tokio::spawn(keep_resolved(name.clone(), self.threads.clone(), self.results.clone()));
                self.tasks.insert(name.clone(), task.abort_handle());
            }
        }
    }
}

impl Drop for Resolver {
    fn drop(&mut self) {
        self.tasks.values().for_each(AbortHandle::abort);
    }
}

async fn keep_resolved(name: String, threads: Arc<Semaphore>, results: watch::Sender<Resolved>) {
    let mut retry = FIRST_RETRY;
    loop {
        let answer = look_up(&name, &threads).await;
        let wait;
        (wait, retry) = pause(answer.is_ok(), retry);
        results.send_if_modified(|resolved| record(resolved, &name, answer));
        sleep(wait).await;
    }
}

/// How long to wait after an answer or a failure, and how long after the next failure.
fn pause(answered: bool, retry: Duration) -> (Duration, Duration) {
    if answered { (REFRESH, FIRST_RETRY) } else { (retry, (retry * 2).min(LAST_RETRY)) }
}

async fn look_up(name: &str, threads: &Arc<Semaphore>) -> io::Result<Vec<IpAddr>> {
    let asked = name.to_owned();
    let found = bounded(threads, move || (asked, 0).to_socket_addrs()).await?;
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 10 s");
    let found = timeout(PATIENCE, found).await.map_err(late)?.map_err(io::Error::other)??;
    let mut addresses = Vec::new();
    for address in found.map(|found| found.ip()) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    if addresses.is_empty() { Err(io::Error::other("it has no address")) } else { Ok(addresses) }
}

/// Waits for its turn and begins. Nothing ends a thread that hangs in `getaddrinfo`: it counts until it really returns,
/// also when nobody waits for it any more.
async fn bounded<T: Send + 'static>(
    threads: &Arc<Semaphore>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let turn = threads.clone().acquire_owned().await.map_err(io::Error::other)?;
    Ok(spawn_blocking(move || {
        let _turn = turn;
        work()
    }))
}

/// Notes an answer; whether it changed anything.
fn record(resolved: &mut Resolved, name: &str, answer: io::Result<Vec<IpAddr>>) -> bool {
    match answer {
        Ok(addresses) => {
            let recovered = resolved.failed.remove(name).is_some();
            let before = resolved.addresses.insert(name.to_owned(), addresses);
            recovered || before.as_ref() != resolved.addresses.get(name)
        }
        Err(error) => {
            let error = error.to_string();
            resolved.failed.insert(name.to_owned(), error.clone()) != Some(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use expect_test::expect;

    #[test]
    fn a_failed_look_up_keeps_the_last_answer_and_only_changes_are_told() {
        let mut resolved = Resolved::default();
        let address = |n: u8| IpAddr::from([192, 0, 2, n]);
        let dead = || Err(io::Error::other("no such name"));
        let mut told = String::new();
        for answer in [dead(), dead(), Ok(vec![address(1)]), Ok(vec![address(1)]), dead(), Ok(vec![address(2)])] {
            let changed = record(&mut resolved, "gw", answer);
            told += &format!("{changed} {:?} {:?}\n", resolved.addresses.get("gw"), resolved.failed.get("gw"));
        }
        expect![[r#"
            true None Some("no such name")
            false None Some("no such name")
            true Some([192.0.2.1]) None
            false Some([192.0.2.1]) None
            true Some([192.0.2.1]) Some("no such name")
            true Some([192.0.2.2]) None
        "#]]
        .assert_eq(&told);
    }

    #[test]
    fn a_dead_name_is_asked_for_less_and_less_until_it_answers() {
        let mut retry = FIRST_RETRY;
        let mut waits = Vec::new();
        for answered in [[false; 8].as_slice(), &[true, true], &[false; 2]].concat() {
            let wait;
            (wait, retry) = pause(answered, retry);
            waits.push(wait.as_secs());
        }
        assert_eq!(waits, [1, 2, 4, 8, 16, 32, 60, 60, 30, 30, 1, 2]);
    }

    #[tokio::test]
    async fn a_look_up_that_nobody_waits_for_still_takes_its_turn() {
        let threads = Arc::new(Semaphore::new(2));
        let (release, hang) = std::sync::mpsc::channel::<()>();
        let (begin, begun) = tokio::sync::oneshot::channel();
        let work = move || (begin.send(()), hang.recv());
        drop(bounded(&threads, work).await.expect("it has its turn"));
        begun.await.expect("it begins");
        for n in 0..10 {
            let other = bounded(&threads, move || n).await.expect("there is another turn");
            assert_eq!(other.await.expect("it ends"), n);
        }
        assert_eq!(threads.available_permits(), 1, "the one that hangs still counts");
        drop(release);
        drop(threads.acquire_many(2).await.expect("it has returned"));
    }

    #[tokio::test]
    async fn a_dead_name_delays_no_other_and_a_forgotten_one_leaves_nothing() {
        let (mut resolver, mut results) = Resolver::new();
        let names = ["dead.invalid", "localhost"].map(String::from);
        resolver.follow(&names.clone().into());
        let found = results.wait_for(|resolved| resolved.addresses.contains_key("localhost")).await;
        assert!(found.expect("the resolver lives").addresses["localhost"].iter().all(IpAddr::is_loopback));
        results.wait_for(|resolved| resolved.failed.contains_key("dead.invalid")).await.expect("the resolver lives");
        resolver.follow(&BTreeSet::new());
        assert_eq!(*results.borrow(), Resolved::default());
    }
}
