//! Traffic from one pod to another, and what it cost. Sockets are made inside the nodes, and used from here.

use std::{
    fs,
    io::ErrorKind,
    net::{IpAddr, UdpSocket},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Host, traffic::tcp::throughput};
use nix::{
    sys::socket::{setsockopt, sockopt},
    unistd::{SysconfVar, sysconf},
};

use super::ends::End;

const TCP_PORT: u16 = 5201;
/// Of a flood, left out of the measurement: until the buffers are full.
const WARM_UP: Duration = Duration::from_millis(500);
/// Of a small UDP packet, in bytes.
const PAYLOAD: usize = 64;

/// A round trip that takes longer has failed.
const ROUND_TRIP_LIMIT: Duration = Duration::from_secs(2);

/// One TCP stream.
#[derive(Clone, Copy, Debug)]
pub struct Tcp {
    pub bits_per_second: f64,
    /// Segments that were sent again.
    pub retransmits: u64,
    /// Of the watched processes, user and system.
    pub cpu_seconds_per_gib: f64,
}

/// A flood of small UDP packets.
#[derive(Clone, Copy, Debug)]
pub struct Udp {
    pub packets_per_second: f64,
    /// Received over sent, 0 to 1.
    pub delivered: f64,
}

/// Sends from one pod to the other for so long; `pids` are the processes whose time is counted.
pub fn tcp(from: &End, to: &End, duration: Duration, pids: &[u32]) -> Result<Tcp> {
    let cpu = cpu_seconds(pids)?;
    let flow = throughput(&from.host, &to.host, (to.pod, TCP_PORT).into(), 1, duration)?;
    let cpu = cpu_seconds(pids)? - cpu;
    ensure!(flow.bytes > 0, "no byte arrived in {:.1} s", flow.seconds);
    Ok(Tcp {
        bits_per_second: flow.megabits_per_second() * 1e6,
        retransmits: flow.retransmits,
        cpu_seconds_per_gib: cpu / (flow.bytes as f64 / f64::from(1 << 30)),
    })
}

/// Sends as many small packets as the sender can for so long.
pub fn udp(from: &End, to: &End, duration: Duration) -> Result<Udp> {
    let receiver = to.host.run(|| Ok(UdpSocket::bind((to.pod, 0))?))?;
    let sender = from.host.run(|| Ok(UdpSocket::bind((from.pod, 0))?))?;
    sender.connect(receiver.local_addr()?)?;
    setsockopt(&receiver, sockopt::RcvBufForce, &(8 << 20)).context("SO_RCVBUFFORCE")?;
    receiver.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (sent, received, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));

    let ((sent_before, received_before), (sent, received), seconds) = thread::scope(|scope| {
        let sending = scope.spawn(|| -> std::io::Result<()> {
            while !stop.load(Relaxed) {
                match sender.send(&[0; PAYLOAD]) {
                    Ok(_) => sent.fetch_add(1, Relaxed),
                    // The device's queue is full: the packet was not sent.
                    Err(error) if error.raw_os_error() == Some(nix::libc::ENOBUFS) => 0,
                    Err(error) => return Err(error),
                };
            }
            Ok(())
        });
        let receiving = scope.spawn(|| -> std::io::Result<()> {
            let mut packet = [0; 2 * PAYLOAD];
            while !stop.load(Relaxed) {
                match receiver.recv(&mut packet) {
                    Ok(_) => received.fetch_add(1, Relaxed),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
                    Err(error) => return Err(error),
                };
            }
            Ok(())
        });
        let measured = measure(duration, || Ok((sent.load(Relaxed), received.load(Relaxed))));
        stop.store(true, Relaxed);
        for thread in [sending, receiving] {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).context("UDP")?;
        }
        measured
    })?;
    let (sent, received) = ((sent - sent_before) as f64, (received - received_before) as f64);
    ensure!(received > 0.0, "none of {sent} packets arrived");
    Ok(Udp { packets_per_second: received / seconds, delivered: received / sent })
}

/// Takes a sample after the warm-up and one `duration` later; returns both, and the seconds between them.
fn measure<T>(duration: Duration, sample: impl Fn() -> Result<T>) -> Result<(T, T, f64)> {
    thread::sleep(WARM_UP);
    let (first, start) = (sample()?, Instant::now());
    thread::sleep(duration);
    let (last, seconds) = (sample()?, start.elapsed().as_secs_f64());
    Ok((first, last, seconds))
}

/// Whether a packet gets from one pod to the other and its answer back; an error says what was seen.
pub fn reaches(from: &End, to: &End) -> Result<()> {
    answers(&from.host, from.pod.into(), to.pod.into())
}

/// Whether a packet that `from` sends by `source` gets to an address, where nothing listens, and its answer back.
pub fn answers(from: &Host, source: IpAddr, to: IpAddr) -> Result<()> {
    let socket = from.run(|| Ok(UdpSocket::bind((source, 0))?))?;
    socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    socket.connect((to, 9))?;
    socket.send(&[0])?;
    // The far side's refusal is the answer.
    match socket.recv(&mut [0]) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error).context("no answer"),
        Ok(_) => Ok(()),
    }
}

/// Who asks, and who answers: hosts, and their addresses.
pub type Ends<'a> = [(&'a Host, IpAddr); 2];

/// The times of so many UDP round trips between each pair, by pair. Each begins when the one before has ended, and
/// the pairs take turns: whatever the machine does to one it does to the other.
pub fn round_trips(pairs: &[Ends<'_>], count: usize) -> Result<Vec<Vec<Duration>>> {
    let mut ends = Vec::new();
    for [(from, asks), (to, answers)] in pairs {
        let echo = to.run(|| Ok(UdpSocket::bind((*answers, 0))?))?;
        let asker = from.run(|| Ok(UdpSocket::bind((*asks, 0))?))?;
        asker.connect(echo.local_addr()?)?;
        asker.set_read_timeout(Some(ROUND_TRIP_LIMIT))?;
        echo.set_read_timeout(Some(ROUND_TRIP_LIMIT))?;
        ends.push((asker, echo));
    }
    thread::scope(|scope| {
        let echoing: Vec<_> = ends.iter().map(|(_, echo)| scope.spawn(|| answer(echo, count))).collect();
        let mut times = vec![Vec::with_capacity(count); ends.len()];
        let mut turns = (0..count).flat_map(|_| ends.iter().enumerate());
        let asked = turns.try_for_each(|(pair, (asker, _))| ask(asker).map(|time| times[pair].push(time)));
        let join = |thread: thread::ScopedJoinHandle<'_, _>| {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        let echoed: std::io::Result<Vec<()>> = echoing.into_iter().map(join).collect();
        // A question without an answer is why the other side waits in vain.
        asked.context("a round trip")?;
        echoed.context("echo")?;
        Ok(times)
    })
}

fn ask(asker: &UdpSocket) -> std::io::Result<Duration> {
    let sent = Instant::now();
    asker.send(&[0; PAYLOAD])?;
    asker.recv(&mut [0; PAYLOAD])?;
    Ok(sent.elapsed())
}

fn answer(echo: &UdpSocket, count: usize) -> std::io::Result<()> {
    let mut packet = [0; PAYLOAD];
    for _ in 0..count {
        let (length, asker) = echo.recv_from(&mut packet)?;
        echo.send_to(&packet[..length], asker)?;
    }
    Ok(())
}

/// User and system time of these processes, all threads.
fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    let ticks_per_second = sysconf(SysconfVar::CLK_TCK)?.context("no CLK_TCK")?;
    let mut ticks = 0;
    for pid in pids {
        let path = format!("/proc/{pid}/stat");
        let stat = fs::read_to_string(&path).with_context(|| path.clone())?;
        ticks += cpu_ticks(&stat).with_context(|| format!("{path}: {stat}"))?;
    }
    Ok(ticks as f64 / ticks_per_second as f64)
}

/// Fields 14 (utime) and 15 (stime) of proc_pid_stat(5); the second, in parentheses, may hold anything.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

/// The most memory that a process ever had resident (VmHWM), in bytes.
pub fn peak_memory(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let line =
        text.lines().find_map(|line| line.strip_prefix("VmHWM:")).with_context(|| format!("{path}: no VmHWM"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{path}: VmHWM {line}"))?;
    Ok(kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_in_parentheses_does_not_shift_the_fields() {
        let stat = "42 (a ) b) S 1 42 42 0 -1 4194560 100 0 0 0 250 50 7 7 20 0 1 0 1 1 1";
        assert_eq!(cpu_ticks(stat), Some(300));
    }

    #[test]
    fn our_own_costs_can_be_read() {
        let us = std::process::id();
        assert!(cpu_seconds(&[us]).is_ok());
        assert!(peak_memory(us).unwrap() > 100 << 10);
    }
}
