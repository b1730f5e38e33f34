//! The prober on real sockets, each test in a network namespace of its own. They need root. The maps are a model; the
//! other side answers in place, as the programs do.

#![allow(clippy::unwrap_used)]

use std::{
    collections::VecDeque,
    fs::File,
    io::Write,
    os::fd::AsFd,
    sync::{Arc, Mutex},
};

use tokio::{task::JoinHandle, time::sleep};

use super::*;
use crate::{
    health::NO_ANSWER,
    kernel::tests::{in_netns, sh},
    names::Ordinal,
};

const PORT: u16 = 27455;

/// What the test and the prober share.
#[derive(Debug, Default)]
struct Held {
    reach: BTreeMap<MemberId, Reach>,
    answer: Option<Answer>,
    written: Vec<(MemberId, Reach)>,
    wakes: VecDeque<MemberId>,
    refuse: bool,
    /// How often the prober stood by what it wrote.
    stood_by: usize,
}

#[derive(Debug)]
struct Model {
    held: Arc<Mutex<Held>>,
    ring: OwnedFd,
}

impl HealthMaps for Model {
    fn read_reach(&self) -> io::Result<BTreeMap<MemberId, Reach>> {
        Ok(self.held.lock().unwrap().reach.clone())
    }

    fn read_answer(&self) -> io::Result<Answer> {
        Ok(self.held.lock().unwrap().answer.unwrap_or(NO_ANSWER))
    }

    fn write_reach(&mut self, member: MemberId, reach: Reach) -> io::Result<()> {
        let mut held = self.held.lock().unwrap();
        if held.refuse {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        held.reach.insert(member, reach);
        held.written.push((member, reach));
        Ok(())
    }

    fn write_answer(&mut self, answer: &Answer) -> io::Result<()> {
        self.held.lock().unwrap().answer = Some(*answer);
        Ok(())
    }

    fn stand_by(&mut self) -> io::Result<()> {
        self.held.lock().unwrap().stood_by += 1;
        Ok(())
    }

    fn last_traffic(&self, _: MemberId) -> io::Result<Option<Duration>> {
        Ok(Some(Duration::ZERO))
    }

    fn passed_on(&self) -> io::Result<u64> {
        Ok(0)
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    fn next_wake(&mut self) -> Option<MemberId> {
        self.held.lock().unwrap().wakes.pop_front()
    }
}

fn address(n: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0, 0, 1, 0, 0, 0, n)
}

fn slot(n: i64) -> Ordinal {
    Ordinal::new(n).unwrap()
}

fn member(n: i64) -> MemberId {
    MemberId::new(n).unwrap()
}

/// A worker of a cluster with slots 0 and 1, at addresses 1 and 2.
fn wanted(members: &[i64]) -> Wanted {
    let targets = Targets {
        gateway: false,
        probing: true,
        own: [(slot(0), address(1)), (slot(1), address(2))].into(),
        members: members.iter().map(|id| (member(*id), BTreeMap::new())).collect(),
        severed: BTreeSet::new(),
        hop_mtu: 1430,
        tunnel_mtu: 1420,
    };
    Wanted { overlay: Some(address(100)), targets, drain: false }
}

/// A gateway that reaches members 2 and 3, until it is aborted.
async fn gateway(n: u16) -> JoinHandle<()> {
    sh(&format!("ip address add {}/128 dev lo nodad", address(n)));
    let socket = socket::bind(address(n), PORT).unwrap();
    tokio::spawn(async move {
        let said = Answer { mtu: 1400u16.to_be_bytes(), members: [0b1100; 512], ..NO_ANSWER };
        let mut bytes = vec![0; 2000];
        loop {
            let (len, from) = socket.recv_from(&mut bytes).await.unwrap();
            wire::answer_in_place(&mut bytes[..len], &said);
            socket.send_to(&bytes[..len], from).await.unwrap();
        }
    })
}

struct Running {
    held: Arc<Mutex<Held>>,
    ring: File,
    wanted: watch::Sender<Option<Wanted>>,
    reports: watch::Receiver<Option<Report>>,
    task: JoinHandle<io::Result<()>>,
}

fn start(first: Wanted) -> Running {
    let (read, write) = nix::unistd::pipe().unwrap();
    let held = Arc::new(Mutex::new(Held::default()));
    let model = Model { held: held.clone(), ring: read };
    let (wanted, receiver) = watch::channel(Some(first));
    let (sender, reports) = watch::channel(None);
    let task = tokio::spawn(run(model, PORT, receiver, sender));
    Running { held, ring: write.into(), wanted, reports, task }
}

/// Waits for what must become the case.
async fn until(what: &str, mut case: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if case() {
            return;
        }
        sleep(Duration::from_millis(10)).await;
    }
    panic!("never came: {what}");
}

fn via(running: &Running) -> u8 {
    running.held.lock().unwrap().reach.get(&member(2)).map_or(0, |reach| reach.via)
}

#[test]
fn the_maps_follow_what_answers_and_only_what_differs_is_written() {
    in_netns(|| async {
        let running = start(wanted(&[2, 3, 4]));
        let problem = || running.reports.borrow().as_ref().is_some_and(|report| !report.problems.is_empty());
        until("a problem: there is no address yet", problem).await;
        let stood_by = || running.held.lock().unwrap().stood_by;
        assert_eq!(stood_by(), 0, "it measures nothing");
        let [first, second] = [gateway(1).await, gateway(2).await];
        sh(&format!("ip address add {}/128 dev lo nodad", address(100)));
        until("both gateways", || via(&running) == 0b11).await;
        until("no problem", || !problem()).await;
        let reach = Reach { via: 0b11, links: 0, mtu: 1400, ..Reach::default() };
        until("the size", || running.held.lock().unwrap().reach.get(&member(2)) == Some(&reach)).await;

        let before = stood_by();
        until("the prober to stand by its word, again and again", || stood_by() > before + 3).await;
        first.abort();
        until("one gateway", || via(&running) == 0b10).await;
        second.abort();
        let alarm = |report: &Option<Report>| {
            report.as_ref().is_some_and(|report| report.verdict.alarms.contains(&Alarm::NoGatewayAnswers))
        };
        until("the alarm", || alarm(&running.reports.borrow())).await;
        assert_ne!(via(&running), 0, "the last set stays");

        running.wanted.send(Some(wanted(&[3]))).unwrap();
        until("the member is gone", || via(&running) == 0).await;
        let held = running.held.lock().unwrap();
        let mut last = BTreeMap::new();
        for (member, reach) in &held.written {
            assert_ne!(last.insert(*member, *reach).unwrap_or_default(), *reach, "written twice: {:?}", held.written);
        }
        assert_eq!(running.reports.borrow().as_ref().unwrap().forged, 0);
    });
}

#[test]
fn what_could_not_be_written_is_written_later() {
    in_netns(|| async {
        sh(&format!("ip address add {}/128 dev lo nodad", address(100)));
        let running = start(wanted(&[2]));
        running.held.lock().unwrap().refuse = true;
        let _gateway = gateway(1).await;
        until("a problem", || running.reports.borrow().as_ref().is_some_and(|report| !report.problems.is_empty()))
            .await;
        running.held.lock().unwrap().refuse = false;
        until("the gateway", || via(&running) == 0b01).await;
    });
}

#[test]
fn the_ring_is_read_when_it_says_so_and_the_task_ends_with_its_commander() {
    in_netns(|| async {
        sh(&format!("ip address add {}/128 dev lo nodad", address(100)));
        let mut running = start(wanted(&[2]));
        running.held.lock().unwrap().wakes.extend([member(2), member(4000)]);
        running.ring.write_all(b"x").unwrap();
        until("an empty ring", || running.held.lock().unwrap().wakes.is_empty()).await;
        drop(running.wanted);
        running.task.await.unwrap().unwrap();
    });
}
