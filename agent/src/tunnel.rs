//! The userspace WireGuard process, for kernels without the module: every device of a node, and the socket over which
//! the agent tells it what they should be.
//!
//! It keeps nothing on disk. It comes back empty after a restart, takes over the TUNs that it finds, and is filled by
//! the agent. The cryptography and the Noise state machine are gotatun's ([`gotatun::noise`]); the data path around
//! them is ours, because gotatun's own device has no segmentation offload and lets a prefix have two owners.
//!
//! Invariant: no request but a new key, a removed peer or a removed device ends a session.
//!
//! | module | owns |
//! |---|---|
//! | [`proto`], [`client`] | the socket's language, and the agent's end of it |
//! | [`device`], [`peer`], [`allowed`] | what is configured; changes are atomic |
//! | [`gate`] | what a flood of handshakes may cost |
//! | [`forward`], [`offload`], [`udp`], [`tun`] | the way of a packet |
//! | [`uapi`] | `wg show` |
//!
//! A link's MTU may be up to 65 400 bytes. Memory is about 400 KiB for each device and 20 KiB for each peer, and
//! 45 KiB more for a peer that traffic waits for.

#![allow(unsafe_code)]

mod allowed;
pub mod client;
mod device;
mod forward;
mod gate;
mod offload;
mod peer;
mod proto;
#[cfg(test)]
mod tests;
mod tun;
mod uapi;
mod udp;

use std::{
    collections::BTreeMap,
    future::Future,
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{net::UnixStream, sync::Mutex, task::JoinSet};

use self::{
    device::Device,
    proto::{Answer, Frame, Request},
    uapi::Uapi,
};
use crate::{
    kernel,
    keys::PrivateKey,
    names,
    run_dir::{Lock, LockError, listen},
};

/// The socket's name in the run directory.
pub const SOCKET: &str = "tunnel.sock";
const TUN_NODE: &str = "/dev/net/tun";

/// What a log filter must hold: below this level gotatun tells of keys and of every packet.
pub const LOG_CAP: &str = "gotatun=warn";

/// How often it is looked whether a device's link was deleted by somebody.
const REAP: Duration = Duration::from_millis(500);

/// Where the tunnel's files are.
#[derive(Clone, Debug)]
pub struct TunnelOptions {
    /// Holds `tunnel.sock` and `tunnel.lock`.
    pub run_dir: PathBuf,
    /// Where `wg` looks for sockets.
    pub uapi_dir: PathBuf,
}

impl Default for TunnelOptions {
    fn default() -> Self {
        TunnelOptions { run_dir: "/run/carrick".into(), uapi_dir: "/var/run/wireguard".into() }
    }
}

/// Why the tunnel cannot run.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    #[error(
        "{} does not exist: load the module (`modprobe tun`), or in a pod mount it from the host (a hostPath of type CharDevice)",
        .0.display()
    )]
    NoTun(PathBuf),
    #[error("{} is no character device: remove it and run `modprobe tun`", .0.display())]
    NotTun(PathBuf),
    #[error(transparent)]
    Privileges(#[from] kernel::Unprivileged),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("{}: {source}", .path.display())]
    Path { path: PathBuf, source: io::Error },
}

/// A multi-threaded runtime for [`serve`]; `None`: as many threads as there are processors.
pub fn runtime(threads: Option<usize>) -> io::Result<tokio::runtime::Runtime> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = threads {
        builder.worker_threads(threads.max(1));
    }
    builder.enable_all().thread_name("tunnel").build()
}

/// Runs the tunnel until `shutdown` resolves. The links stay; the sockets do not.
///
/// # Errors
///
/// Before anything is changed: no `/dev/net/tun`, no CAP_NET_ADMIN, or another tunnel in the same run directory.
pub async fn serve(options: TunnelOptions, shutdown: impl Future<Output = ()>) -> Result<(), TunnelError> {
    tun::check_node(Path::new(TUN_NODE))?;
    kernel::check_privileges()?;
    let _lock = Lock::take(&options.run_dir, "tunnel")?;
    let uapi_dir = options.uapi_dir.clone();
    let uapi_dir_is_ours = !uapi_dir.exists();
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&uapi_dir).map_err(at(&uapi_dir))?;
    let socket = options.run_dir.join(SOCKET);
    let listener = listen(&socket).map_err(at(&socket))?;
    tracing::info!(socket = %socket.display(), "tunnel runs");

    let tunnel = Arc::new(Mutex::new(Tunnel { uapi_dir: options.uapi_dir, devices: BTreeMap::new() }));
    let mut connections = JoinSet::new();
    tokio::pin!(shutdown);
    let mut reap = tokio::time::interval(REAP);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            _ = reap.tick() => tunnel.lock().await.reap(),
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => { connections.spawn(converse(stream, tunnel.clone())); }
                Err(err) => {
                    tracing::warn!(%err, "cannot accept the agent");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    connections.shutdown().await;
    for (_, Running { device, .. }) in std::mem::take(&mut tunnel.lock().await.devices) {
        device.stop().await;
    }
    if uapi_dir_is_ours && std::fs::read_dir(&uapi_dir).is_ok_and(|mut entries| entries.next().is_none()) {
        std::fs::remove_dir(&uapi_dir).map_err(at(&uapi_dir))?;
    }
    std::fs::remove_file(&socket).map_err(at(&socket))
}

fn at(path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> TunnelError {
    let path = path.as_ref().to_owned();
    move |source| TunnelError::Path { path, source }
}

/// Answers one agent until it closes. What it sends cannot end the tunnel.
async fn converse(mut stream: UnixStream, tunnel: Arc<Mutex<Tunnel>>) {
    if let Err(err) = proto::greet(&mut stream).await {
        tracing::warn!(%err, "refused a connection");
        return;
    }
    loop {
        let answer = match proto::read_frame(&mut stream, proto::MAX_REQUEST).await {
            Ok(Frame::Body(body)) => match Request::decode(&body) {
                Ok(request) => tunnel.lock().await.handle(request).await.unwrap_or_else(|err| Answer::refused(&err)),
                Err(err) => refuse(&err.to_string()),
            },
            Ok(Frame::Oversized) => refuse("the request is too long"),
            Ok(Frame::End) => return,
            Err(err) => {
                tracing::debug!(%err, "connection lost");
                return;
            }
        };
        if let Err(err) = proto::write_frame(&mut stream, &answer.encode()).await {
            tracing::debug!(%err, "connection lost");
            return;
        }
    }
}

fn refuse(why: &str) -> Answer {
    tracing::warn!(why, "refused a request");
    Answer::refused(&io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// Every device of the node.
#[derive(Debug)]
struct Tunnel {
    uapi_dir: PathBuf,
    devices: BTreeMap<names::Device, Running>,
}

#[derive(Debug)]
struct Running {
    device: Device,
    /// Held for its socket.
    _uapi: Uapi,
}

impl Tunnel {
    async fn handle(&mut self, request: Request) -> io::Result<Answer> {
        self.reap();
        match request {
            Request::Read => {
                let readings = self.devices.iter().map(|(name, running)| (*name, running.device.read()));
                return Ok(Answer::Devices(readings.collect()));
            }
            Request::SetDevice { device, port, key } => self.set_device(device, port, &key).await?,
            Request::SetPeer { device, key, peer, gained } => self.device(device)?.set_peer(key, &peer, &gained)?,
            Request::DropAllowedIps { device, key, lost } => self.device(device)?.drop_allowed_ips(key, &lost),
            Request::RemovePeer { device, key } => self.device(device)?.remove_peer(key),
            Request::DelDevice { device } => self.del_device(device).await?,
        }
        Ok(Answer::Done)
    }

    fn device(&self, name: names::Device) -> io::Result<&Device> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("the tunnel holds no device {name}"));
        self.devices.get(&name).map(|running| &running.device).ok_or_else(missing)
    }

    async fn set_device(&mut self, name: names::Device, port: u16, key: &PrivateKey) -> io::Result<()> {
        if let Some(running) = self.devices.get_mut(&name) {
            return running.device.set(port, key).await;
        }
        let device = Device::start(name, port, key)?;
        match Uapi::start(&self.uapi_dir, device.shared()) {
            Ok(uapi) => {
                self.devices.insert(name, Running { device, _uapi: uapi });
                tracing::info!(device = %name, port, "device runs");
                Ok(())
            }
            Err(err) => {
                device.stop().await;
                Err(err)
            }
        }
    }

    async fn del_device(&mut self, name: names::Device) -> io::Result<()> {
        match self.devices.remove(&name) {
            Some(running) => running.device.delete().await,
            None => Ok(()),
        }
    }

    /// Lets go of devices whose link is gone; the agent will ask for them anew.
    fn reap(&mut self) {
        self.devices.retain(|name, running| match running.device.failure() {
            Some(Ok(err)) => {
                tracing::warn!(device = %name, %err, "the device's link is gone");
                false
            }
            Some(Err(err)) => {
                tracing::error!(device = %name, %err, "the device ended unexpectedly");
                false
            }
            None => true,
        });
    }
}
