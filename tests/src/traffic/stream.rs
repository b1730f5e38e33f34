//! One TCP stream that runs through faults: a modest, steady writer, and a reader that notes when it stood still.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle, sleep},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{Namespace, Pod};

/// Written at once, every [`INTERVAL`]: 4 MB/s.
const CHUNK: usize = 8 << 10;
const INTERVAL: Duration = Duration::from_millis(2);
/// A stream that stands still for so long has not survived.
const LIMIT: Duration = Duration::from_secs(30);

/// A running stream.
#[derive(Debug)]
pub struct Stream {
    stop: Arc<AtomicBool>,
    arrived: Arc<AtomicU64>,
    writer: JoinHandle<io::Result<u64>>,
    reader: JoinHandle<(Received, io::Result<()>)>,
    ends: [TcpStream; 2],
}

/// What became of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Bytes that arrived, in order.
    pub bytes: u64,
    /// The longest time without an arrival while it was written to.
    pub longest_stall_ms: u64,
    /// Why it did not survive: an error of either side, or bytes that are missing or wrong.
    pub failure: Option<String>,
}

impl Report {
    /// Whether every byte arrived and both sides saw an orderly end.
    pub fn survived(&self) -> bool {
        self.failure.is_none()
    }
}

#[derive(Debug, Default)]
struct Received {
    bytes: u64,
    longest_stall: Duration,
}

impl Stream {
    /// Connects from `from` to `address` of `to`, where nobody listens yet, and begins to write.
    pub fn start(from: &Namespace, to: &Namespace, address: SocketAddr) -> Result<Stream> {
        let listener = to.run(|| TcpListener::bind(address).with_context(|| format!("bind {address}")))?;
        let address = listener.local_addr()?;
        let connect = || TcpStream::connect_timeout(&address, LIMIT).with_context(|| format!("connect to {address}"));
        let writer = from.run(connect)?;
        // It is in the backlog already.
        let (reader, _) = listener.accept().context("accept")?;
        writer.set_write_timeout(Some(LIMIT))?;
        writer.set_read_timeout(Some(LIMIT))?;
        reader.set_read_timeout(Some(LIMIT))?;
        let ends = [writer.try_clone()?, reader.try_clone()?];
        let (stop, arrived) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let stopped = (stop.clone(), stop.clone());
        let counted = arrived.clone();
        Ok(Stream {
            stop,
            arrived,
            writer: thread::spawn(move || write(writer, &stopped.0)),
            reader: thread::spawn(move || read(reader, &stopped.1, &counted)),
            ends,
        })
    }

    /// From pod to pod by their first addresses, on a port that nobody has.
    pub fn between(from: &Pod, to: &Pod) -> Result<Stream> {
        Stream::start(&from.host, &to.host, (to.ip(), 0).into())
    }

    /// Bytes that have arrived so far.
    pub fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    /// Gives up a stream that cannot end in order, because nothing carries it any more.
    pub fn abandon(self) -> io::Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        self.ends.iter().try_for_each(|end| end.shutdown(Shutdown::Both))?;
        self.stop();
        Ok(())
    }

    /// Stops writing, waits for the orderly end, and tells.
    pub fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        // The reader's own is then its last: its end is what the writer waits for.
        drop(self.ends);
        let written = self.writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let (received, read) = self.reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let failure = match (written, read) {
            (Err(error), _) => Some(format!("write: {error}")),
            (_, Err(error)) => Some(format!("read: {error}")),
            (Ok(sent), Ok(())) if sent != received.bytes => Some(format!("{} of {sent} bytes arrived", received.bytes)),
            (Ok(_), Ok(())) => None,
        };
        let longest_stall_ms = u64::try_from(received.longest_stall.as_millis()).unwrap_or(u64::MAX);
        Report { bytes: received.bytes, longest_stall_ms, failure }
    }
}

/// The byte at that place of every stream.
fn pattern(at: u64) -> u8 {
    (at % 251) as u8
}

fn write(mut stream: TcpStream, stop: &AtomicBool) -> io::Result<u64> {
    let mut sent = 0;
    let mut next = Instant::now();
    while !stop.load(Ordering::Relaxed) {
        let chunk: Vec<u8> = (sent..sent + CHUNK as u64).map(pattern).collect();
        stream.write_all(&chunk)?;
        sent += CHUNK as u64;
        // What a fault held up is not made up for.
        next = (next + INTERVAL).max(Instant::now());
        sleep(next.saturating_duration_since(Instant::now()));
    }
    stream.shutdown(Shutdown::Write)?;
    // The other side closes when it has read everything.
    while stream.read(&mut [0])? > 0 {}
    Ok(sent)
}

fn read(mut stream: TcpStream, stop: &AtomicBool, arrived: &AtomicU64) -> (Received, io::Result<()>) {
    let mut received = Received::default();
    let mut chunk = vec![0; CHUNK];
    let mut before = Instant::now();
    loop {
        let result = stream.read(&mut chunk);
        if !stop.load(Ordering::Relaxed) {
            received.longest_stall = received.longest_stall.max(before.elapsed());
        }
        before = Instant::now();
        match result {
            Ok(0) => return (received, Ok(())),
            Ok(length) => {
                let right = (received.bytes..).zip(&chunk[..length]).all(|(at, byte)| pattern(at) == *byte);
                if !right {
                    let text = format!("wrong bytes after the first {}", received.bytes);
                    return (received, Err(io::Error::other(text)));
                }
                received.bytes += length as u64;
                arrived.store(received.bytes, Ordering::Relaxed);
            }
            Err(error) => return (received, Err(error)),
        }
    }
}
