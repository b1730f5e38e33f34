//! TCP throughput: one side writes as fast as it can, the other reads and counts.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{Namespace, sys};

const CHUNK: usize = 128 << 10;
/// A stream that stands still for so long has failed.
const STALL: Duration = Duration::from_secs(10);

#[derive(Clone, Debug, PartialEq)]
pub struct Throughput {
    /// That arrived.
    pub bytes: u64,
    /// From the first write to the last arrival.
    pub seconds: f64,
    /// Segments sent again, all streams.
    pub retransmits: u64,
}

impl Throughput {
    pub fn megabits_per_second(&self) -> f64 {
        self.bytes as f64 * 8.0 / 1e6 / self.seconds
    }
}

/// Sends from `from` to `address` of `to` over `streams` connections for that long.
pub fn throughput(
    from: &Namespace,
    to: &Namespace,
    address: SocketAddr,
    streams: usize,
    duration: Duration,
) -> Result<Throughput> {
    let listener = to.run(|| TcpListener::bind(address).with_context(|| format!("bind {address}")))?;
    let connect = || {
        let connect = || TcpStream::connect_timeout(&address, STALL).with_context(|| format!("connect to {address}"));
        let writer = from.run(connect)?;
        // It is in the backlog already.
        let (reader, _) = listener.accept().context("accept")?;
        writer.set_write_timeout(Some(STALL))?;
        reader.set_read_timeout(Some(STALL))?;
        Ok((writer, reader))
    };
    let pairs = (0..streams).map(|_| connect()).collect::<Result<Vec<_>>>()?;

    let start = Instant::now();
    let results: Vec<_> = thread::scope(|scope| {
        let start_pair = |(writer, reader)| {
            (scope.spawn(move || write(writer, start + duration)), scope.spawn(move || read(reader)))
        };
        let threads: Vec<_> = pairs.into_iter().map(start_pair).collect();
        threads.into_iter().map(|(writer, reader)| (writer.join(), reader.join())).collect()
    });
    let seconds = start.elapsed().as_secs_f64();

    let mut total = Throughput { bytes: 0, seconds, retransmits: 0 };
    for (written, read) in results {
        let written = written.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let read = read.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        total.retransmits += u64::from(written.context("write")?);
        total.bytes += read.context("read")?;
    }
    Ok(total)
}

/// Writes until the deadline; returns the retransmits.
fn write(mut stream: TcpStream, deadline: Instant) -> io::Result<u32> {
    let chunk = vec![0x5a; CHUNK];
    while Instant::now() < deadline {
        stream.write_all(&chunk)?;
    }
    stream.shutdown(Shutdown::Write)?;
    // The other side closes when it has read everything.
    while stream.read(&mut [0])? > 0 {}
    sys::tcp_retransmits(stream.as_fd())
}

/// Reads to the end; returns the bytes.
fn read(mut stream: TcpStream) -> io::Result<u64> {
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    loop {
        match stream.read(&mut chunk)? {
            0 => return Ok(bytes),
            n => bytes += n as u64,
        }
    }
}
