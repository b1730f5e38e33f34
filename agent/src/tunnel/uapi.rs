//! WireGuard's standard socket (<https://www.wireguard.com/xplatform/>), for `wg show`: reading only.
//!
//! `set` is refused: it would change peers behind the agent, which puts back what it wants within seconds.

use std::{
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, SystemTime},
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
};
use zeroize::Zeroizing;

use super::{device::Shared, listen};

/// The longest request that is read, bytes; `get=1` has 5.
const MAX_REQUEST: u64 = 64 << 10;

/// The socket of one device. Removed when dropped.
#[derive(Debug)]
pub(super) struct Uapi {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Uapi {
    /// Does not keep the device alive.
    pub(super) fn start(dir: &Path, shared: &Arc<Shared>) -> io::Result<Uapi> {
        let path = dir.join(format!("{}.sock", shared.name));
        let listener = listen(&path)?;
        Ok(Uapi { path, task: tokio::spawn(accept(listener, Arc::downgrade(shared))) })
    }
}

impl Drop for Uapi {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(err) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %err, "cannot remove");
        }
    }
}

async fn accept(listener: UnixListener, shared: Weak<Shared>) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    if let Err(err) = answer(stream, || shared.upgrade().map(|shared| get(&shared))).await {
                        tracing::debug!(%err, "wg");
                    }
                });
            }
            Err(err) => {
                tracing::warn!(%err, "cannot accept wg");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// A request ends with an empty line; so does the answer.
async fn answer(mut stream: UnixStream, get: impl Fn() -> Option<Zeroizing<String>>) -> io::Result<()> {
    let (read, mut write) = stream.split();
    let mut lines = BufReader::new(read.take(MAX_REQUEST)).lines();
    let mut first = None;
    // A `set` may carry a key, so no line but the first is kept.
    while let Some(line) = lines.next_line().await?.map(Zeroizing::new) {
        if !line.is_empty() {
            first.get_or_insert(line);
            continue;
        }
        let request = first.take();
        match request.as_ref().map(|line| line.as_str()) {
            None => {}
            Some("get=1") => match get() {
                Some(text) => write.write_all(text.as_bytes()).await?,
                None => return Ok(()),
            },
            Some("set=1") => write.write_all(format!("errno={}\n\n", libc::EOPNOTSUPP).as_bytes()).await?,
            Some(_) => write.write_all(format!("errno={}\n\n", libc::EPROTO).as_bytes()).await?,
        }
    }
    Ok(())
}

/// What `get=1` is answered. With the private key, as everywhere: `wg` computes the public one from it.
fn get(shared: &Shared) -> Zeroizing<String> {
    let peers = shared.peers();
    let mut text = Zeroizing::new(String::with_capacity(256 + peers.len() * 512));
    let table = shared.table();
    let secret = Zeroizing::new(table.identity.secret.to_bytes());
    hex(&mut text, "private_key", &*secret);
    drop(table);
    line(&mut text, "listen_port", shared.port.load(Ordering::Relaxed));
    for (peer, allowed_ips) in peers {
        let mut state = peer.lock();
        let (config, pair) = state.read();
        hex(&mut text, "public_key", peer.key.as_bytes());
        if let Some(psk) = state.tunn().preshared_key().map(Zeroizing::new) {
            hex(&mut text, "preshared_key", &*psk);
        }
        drop(state);
        if let Some(endpoint) = config.endpoint {
            line(&mut text, "endpoint", endpoint);
        }
        if let Some(at) = pair.last_handshake.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok()) {
            line(&mut text, "last_handshake_time_sec", at.as_secs());
            line(&mut text, "last_handshake_time_nsec", at.subsec_nanos());
        }
        line(&mut text, "rx_bytes", pair.rx_bytes);
        line(&mut text, "tx_bytes", pair.tx_bytes);
        line(&mut text, "persistent_keepalive_interval", config.keepalive);
        for prefix in allowed_ips {
            line(&mut text, "allowed_ip", prefix);
        }
    }
    line(&mut text, "protocol_version", 1);
    text.push_str("errno=0\n\n");
    text
}

fn line(text: &mut String, key: &str, value: impl std::fmt::Display) {
    writeln!(text, "{key}={value}").expect("writing to a string cannot fail");
}

fn hex(text: &mut String, key: &str, bytes: &[u8]) {
    text.push_str(key);
    text.push('=');
    for byte in bytes {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
    }
    text.push('\n');
}
