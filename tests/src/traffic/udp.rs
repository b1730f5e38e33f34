//! Numbered UDP: a sender at a fixed rate, a receiver that sends each packet back, and a count of what came.
//!
//! One flow is one pair of sockets, so every packet of it meets the same conntrack entries, as an application's would.

use std::{
    collections::BTreeSet,
    io,
    net::{SocketAddr, UdpSocket},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::sys::socket::{setsockopt, sockopt};

use super::any;
use crate::{Namespace, Pod};

/// Bytes of payload: the number, big-endian, and padding.
const PAYLOAD: usize = 64;
/// Of each socket, in bytes: a test that the machine holds up for seconds still finds what arrived meanwhile.
const BUFFER: usize = 8 << 20;
/// How long the last packets may be on their way.
const STRAGGLERS: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(20);

/// A running flow.
#[derive(Debug)]
pub struct Flow {
    start: Instant,
    stop_sending: Arc<AtomicBool>,
    stop_receiving: Arc<AtomicBool>,
    sender: JoinHandle<Sent>,
    receivers: [JoinHandle<io::Result<()>>; 2],
    there: Arrivals,
    back: Arrivals,
}

/// (number, time since the flow's start) of each packet, in the order of their arrival.
type Arrivals = Arc<Mutex<Vec<(u64, Duration)>>>;

#[derive(Debug)]
struct Sent {
    packets: u64,
    refused: u64,
    ended: Duration,
}

/// What became of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub sent: u64,
    /// Of these, how many the sender's own kernel refused to send: no route, or told that nobody answers.
    pub refused: u64,
    pub there: Count,
    /// There and back again.
    pub back: Count,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Count {
    /// Different packets.
    pub received: u64,
    pub lost: u64,
    /// Arrivals beyond the first of a packet.
    pub duplicates: u64,
    /// Packets that arrived after one with a higher number.
    pub reordered: u64,
    /// The longest time without an arrival, from the start of sending to its end.
    pub longest_gap_ms: u64,
}

impl Flow {
    /// Begins to send one packet every `interval` from `from` to `address` of `to`.
    pub fn start(from: &Namespace, to: &Namespace, address: SocketAddr, interval: Duration) -> Result<Flow> {
        let echo = to.run(|| UdpSocket::bind(address).with_context(|| format!("bind {address}")))?;
        let address = echo.local_addr()?;
        let socket = from.run(|| UdpSocket::bind(any(address.ip())).context("bind"))?;
        for socket in [&echo, &socket] {
            socket.set_read_timeout(Some(TICK))?;
            setsockopt(socket, sockopt::RcvBufForce, &BUFFER).context("SO_RCVBUFFORCE")?;
        }
        let receiver = socket.try_clone()?;

        let start = Instant::now();
        let (stop_sending, stop_receiving) = (Arc::<AtomicBool>::default(), Arc::<AtomicBool>::default());
        let (there, back) = (Arrivals::default(), Arrivals::default());
        let sender = {
            let stop = stop_sending.clone();
            thread::spawn(move || send(&socket, address, start, interval, &stop))
        };
        let receivers = [
            {
                let (arrivals, stop) = (there.clone(), stop_receiving.clone());
                thread::spawn(move || receive(&echo, true, start, &arrivals, &stop))
            },
            {
                let (arrivals, stop) = (back.clone(), stop_receiving.clone());
                thread::spawn(move || receive(&receiver, false, start, &arrivals, &stop))
            },
        ];
        Ok(Flow { start, stop_sending, stop_receiving, sender, receivers, there, back })
    }

    /// 1 kHz from pod to pod by their first addresses, to a port that nobody has.
    pub fn between(from: &Pod, to: &Pod) -> Result<Flow> {
        Flow::start(&from.host, &to.host, (to.ip(), 0).into(), Duration::from_millis(1))
    }

    /// Packets that have come back so far.
    pub fn answered(&self) -> u64 {
        distinct(&lock(&self.back))
    }

    /// When the first packet came back.
    pub fn first_answer(&self) -> Option<Instant> {
        lock(&self.back).first().map(|(_, at)| self.start + *at)
    }

    /// Stops sending, waits for the last packets, and counts.
    pub fn stop(self) -> Result<Report> {
        self.stop_sending.store(true, Ordering::Relaxed);
        let sent = self.sender.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let wait_until = Instant::now() + STRAGGLERS;
        while Instant::now() < wait_until && distinct(&lock(&self.back)) < sent.packets {
            sleep(TICK);
        }
        self.stop_receiving.store(true, Ordering::Relaxed);
        for receiver in self.receivers {
            receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("receive")?;
        }
        let count = |arrivals: &Arrivals| count(sent.packets, sent.ended, &lock(arrivals));
        Ok(Report { sent: sent.packets, refused: sent.refused, there: count(&self.there), back: count(&self.back) })
    }
}

fn send(socket: &UdpSocket, to: SocketAddr, start: Instant, interval: Duration, stop: &AtomicBool) -> Sent {
    let mut sent = Sent { packets: 0, refused: 0, ended: Duration::ZERO };
    let mut payload = [0; PAYLOAD];
    let mut next = start;
    while !stop.load(Ordering::Relaxed) {
        payload[..8].copy_from_slice(&sent.packets.to_be_bytes());
        // A packet that cannot be sent is a lost packet: counted, not fatal.
        if socket.send_to(&payload, to).is_err() {
            sent.refused += 1;
        }
        sent.packets += 1;
        next += interval;
        sleep(next.saturating_duration_since(Instant::now()));
    }
    sent.ended = start.elapsed();
    sent
}

fn receive(socket: &UdpSocket, echo: bool, start: Instant, arrivals: &Arrivals, stop: &AtomicBool) -> io::Result<()> {
    let mut payload = [0; PAYLOAD];
    while !stop.load(Ordering::Relaxed) {
        let (length, from) = match socket.recv_from(&mut payload) {
            Ok(received) => received,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => continue,
            Err(error) => return Err(error),
        };
        let Some(number) = payload[..length].first_chunk() else { continue };
        lock(arrivals).push((u64::from_be_bytes(*number), start.elapsed()));
        if echo {
            // An answer that cannot be sent is missed, and counted, by the other side.
            drop(socket.send_to(&payload[..length], from));
        }
    }
    Ok(())
}

fn lock(arrivals: &Arrivals) -> std::sync::MutexGuard<'_, Vec<(u64, Duration)>> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

fn distinct(arrivals: &[(u64, Duration)]) -> u64 {
    arrivals.iter().map(|(number, _)| number).collect::<BTreeSet<_>>().len() as u64
}

fn count(sent: u64, ended: Duration, arrivals: &[(u64, Duration)]) -> Count {
    let mut seen = BTreeSet::new();
    let (mut duplicates, mut reordered) = (0, 0);
    let (mut longest_gap, mut before) = (Duration::ZERO, Duration::ZERO);
    for (number, at) in arrivals {
        reordered += u64::from(seen.last().is_some_and(|highest| highest > number) && !seen.contains(number));
        duplicates += u64::from(!seen.insert(*number));
        longest_gap = longest_gap.max(at.saturating_sub(before));
        before = *at;
    }
    longest_gap = longest_gap.max(ended.saturating_sub(before));
    let received = seen.len() as u64;
    let longest_gap_ms = u64::try_from(longest_gap.as_millis()).unwrap_or(u64::MAX);
    Count { received, lost: sent.saturating_sub(received), duplicates, reordered, longest_gap_ms }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(sent: u64, ended_ms: u64, arrivals: &[(u64, u64)], expected: [u64; 5]) {
        let arrivals: Vec<_> = arrivals.iter().map(|(number, ms)| (*number, Duration::from_millis(*ms))).collect();
        let count = count(sent, Duration::from_millis(ended_ms), &arrivals);
        let Count { received, lost, duplicates, reordered, longest_gap_ms } = count;
        assert_eq!([received, lost, duplicates, reordered, longest_gap_ms], expected, "{arrivals:?}");
    }

    #[test]
    fn arrivals_are_counted() {
        // received, lost, duplicates, reordered, longest gap
        check(0, 0, &[], [0, 0, 0, 0, 0]);
        check(3, 3, &[(0, 0), (1, 1), (2, 2)], [3, 0, 0, 0, 1]);
        check(3, 9, &[], [0, 3, 0, 0, 9]);
        check(3, 3, &[(0, 0), (0, 1), (2, 2)], [2, 1, 1, 0, 1]);
        check(3, 3, &[(1, 0), (0, 1), (0, 2), (2, 3)], [3, 0, 1, 1, 1]);
        check(4, 40, &[(3, 25), (2, 26), (1, 27)], [3, 1, 0, 2, 25]);
        check(4, 40, &[(0, 1), (1, 2)], [2, 2, 0, 0, 38]);
        check(2, 10, &[(0, 1), (1, 15)], [2, 0, 0, 0, 14]);
    }
}
