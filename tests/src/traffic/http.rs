//! A tiny HTTP server whose only page says whom it sees, and a client.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{Shutdown, shutdown};

use crate::Namespace;

const LIMIT: Duration = Duration::from_secs(5);
/// The page is this and the client's address.
const GREETING: &str = "you are ";

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start(host: &Namespace, address: SocketAddr) -> Result<Server> {
        let listener = host.run(|| TcpListener::bind(address).with_context(|| format!("bind {address}")))?;
        let accepting = listener.try_clone()?;
        let thread = thread::spawn(move || {
            // Ends when the socket is shut down. A client that fails gets no page, and says so.
            while let Ok((stream, peer)) = accepting.accept() {
                drop(answer(stream, peer));
            }
        });
        Ok(Server { listener, thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Wakes the accept.
        if let Err(error) = shutdown(self.listener.as_raw_fd(), Shutdown::Both) {
            eprintln!("stop the HTTP server: {error}");
        } else if let Some(Err(_)) = self.thread.take().map(JoinHandle::join) {
            eprintln!("the HTTP server panicked");
        }
    }
}

/// Fetches the page from inside `host`; returns whom the server saw.
pub fn get(host: &Namespace, address: SocketAddr) -> Result<IpAddr> {
    let mut stream =
        host.run(|| TcpStream::connect_timeout(&address, LIMIT).with_context(|| format!("connect to {address}")))?;
    stream.set_read_timeout(Some(LIMIT))?;
    write!(stream, "GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut response = String::new();
    stream.read_to_string(&mut response).with_context(|| format!("read from {address}"))?;
    ensure!(response.starts_with("HTTP/1.1 200 "), "{address} answered {response:?}");
    let (_, body) = response.split_once("\r\n\r\n").with_context(|| format!("{address} answered {response:?}"))?;
    let seen = body.trim().strip_prefix(GREETING).with_context(|| format!("{address} answered {response:?}"))?;
    seen.parse().with_context(|| format!("the page says {body:?}"))
}

fn answer(stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(LIMIT))?;
    let mut request = BufReader::new(&stream);
    let mut line = String::new();
    // The request ends with an empty line.
    while request.read_line(&mut line)? > 2 {
        line.clear();
    }
    let page = format!("{GREETING}{}\n", peer.ip().to_canonical());
    let length = page.len();
    write!(&stream, "HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{page}")
}
