//! The agent's end of `tunnel.sock`.

use std::{
    collections::BTreeMap,
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use ipnetwork::IpNetwork;
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    time::{sleep, timeout},
};

use super::proto::{self, Answer, Frame, PeerConfig, Reading, Request};
use crate::{
    kernel::{WgDevice, WireGuard},
    keys::{PresharedKey, PrivateKey, PublicKey},
    names::Device,
    state::Peer,
};

/// How long a call may take. The tunnel answers in microseconds; one that hangs must not hang the agent.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How often a tunnel that is gone is looked for.
const RETRY: Duration = Duration::from_millis(200);

/// The tunnel process as a [`WireGuard`] backend. Every call connects anew if the connection is gone.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
    stream: Option<UnixStream>,
    /// Per device, datagrams that had been lost at the last reading because its UDP socket was full.
    socket_drops: BTreeMap<Device, u32>,
}

impl Client {
    /// A client of the tunnel with this run directory. Does not connect yet.
    pub fn new(run_dir: &Path) -> Client {
        Client { path: run_dir.join(super::SOCKET), timeout: TIMEOUT, stream: None, socket_drops: BTreeMap::new() }
    }

    /// Tells when the tunnel goes or comes, over a connection of its own.
    pub fn watch(&self) -> Watch {
        Watch { path: self.path.clone(), stream: None }
    }

    #[cfg(test)]
    pub(super) fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// One request and its answer. All requests say how things should be, so one that may or may not have arrived
    /// before the connection broke is sent again.
    async fn call(&mut self, request: Request) -> io::Result<Answer> {
        let body = request.encode();
        let reused = self.stream.is_some();
        let answer = match timeout(self.timeout, self.exchange(&body)).await {
            Ok(Err(err)) if reused && is_broken(&err) => {
                self.stream = None;
                timeout(self.timeout, self.exchange(&body)).await
            }
            answer => answer,
        };
        let answer = answer.unwrap_or_else(|_| {
            let why = format!("no answer within {:?}; is it hanging or stopped?", self.timeout);
            Err(io::Error::new(io::ErrorKind::TimedOut, why))
        });
        match answer {
            Ok(Answer::Refused { kind, message }) => Err(io::Error::new(kind.kind(), message)),
            Ok(answer) => Ok(answer),
            Err(err) => {
                // What is left in the stream may be the answer to this request.
                self.stream = None;
                Err(io::Error::new(err.kind(), format!("tunnel at {}: {err}", self.path.display())))
            }
        }
    }

    async fn exchange(&mut self, body: &[u8]) -> io::Result<Answer> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(connect(&self.path).await?),
        };
        proto::write_frame(stream, body).await?;
        match proto::read_frame(stream, proto::MAX_ANSWER).await? {
            Frame::Body(body) => Ok(Answer::decode(&body)?),
            Frame::Oversized => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is too long")),
            Frame::End => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    async fn done(&mut self, request: Request) -> io::Result<()> {
        match self.call(request).await? {
            Answer::Done => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "the tunnel answered another question")),
        }
    }
}

fn is_broken(err: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(err.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

async fn connect(path: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(path).await.map_err(|err| match err.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
            io::Error::new(err.kind(), "`carrick tunnel` does not run")
        }
        _ => err,
    })?;
    proto::greet(&mut stream).await?;
    Ok(stream)
}

impl WireGuard for Client {
    async fn read(&mut self) -> io::Result<BTreeMap<Device, WgDevice>> {
        let Answer::Devices(devices) = self.call(Request::Read).await? else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the tunnel answered another question"));
        };
        for (device, reading) in &devices {
            let drops = reading.socket_drops;
            if self.socket_drops.insert(*device, drops).is_some_and(|before| drops > before) {
                tracing::warn!(%device, drops, "the tunnel loses datagrams: it gets too little processor time");
            }
        }
        Ok(devices.into_iter().map(|(name, Reading { device, .. })| (name, device)).collect())
    }

    async fn set_device(&mut self, device: Device, port: u16, key: &PrivateKey) -> io::Result<()> {
        self.done(Request::SetDevice { device, port, key: key.clone() }).await
    }

    async fn set_peer(
        &mut self,
        device: Device,
        key: &PublicKey,
        peer: &Peer,
        psk: Option<&PresharedKey>,
        gained: &[IpNetwork],
    ) -> io::Result<()> {
        if peer.psk != psk.map(PresharedKey::id) {
            let why = format!("peer {key}: the preshared key is not the one that was planned");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        let peer = PeerConfig { endpoint: peer.endpoint, keepalive: peer.keepalive, psk: psk.cloned() };
        self.done(Request::SetPeer { device, key: *key, peer, gained: gained.to_vec() }).await
    }

    async fn drop_allowed_ips(&mut self, device: Device, key: &PublicKey, lost: &[IpNetwork]) -> io::Result<()> {
        self.done(Request::DropAllowedIps { device, key: *key, lost: lost.to_vec() }).await
    }

    async fn remove_peer(&mut self, device: Device, key: &PublicKey) -> io::Result<()> {
        self.done(Request::RemovePeer { device, key: *key }).await
    }

    async fn del_device(&mut self, device: Device) -> io::Result<()> {
        match self.done(Request::DelDevice { device }).await {
            // A tunnel that does not run holds no device.
            Err(err) if matches!(err.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => Ok(()),
            done => done,
        }
    }
}

/// Sees the tunnel process come and go.
#[derive(Debug)]
pub struct Watch {
    path: PathBuf,
    stream: Option<UnixStream>,
}

impl Watch {
    /// Whether the tunnel was there when last looked at.
    pub fn is_up(&self) -> bool {
        self.stream.is_some()
    }

    /// Resolves when the tunnel has come (also the first time that it is found there) or gone. Cancel-safe.
    pub async fn changed(&mut self) {
        if let Some(stream) = &mut self.stream {
            // The tunnel sends nothing unasked: whatever ends this read is the end.
            while matches!(stream.read(&mut [0; 16]).await, Ok(1..)) {}
            self.stream = None;
            return;
        }
        loop {
            if let Ok(Ok(stream)) = timeout(TIMEOUT, connect(&self.path)).await {
                self.stream = Some(stream);
                return;
            }
            sleep(RETRY).await;
        }
    }
}
