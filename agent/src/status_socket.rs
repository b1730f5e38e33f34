//! The agent's unix socket: whoever connects says one word, gets one [`Status`] as JSON, fresh from a pass, and is hung
//! up on.
//!
//! Mode 0600: root only.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{mpsc, oneshot},
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::{run_dir::listen, status::Status};

/// A pass takes milliseconds; a hung agent must not hang who asks.
const PATIENCE: Duration = Duration::from_secs(10);
/// After a client could not be accepted.
const PAUSE: Duration = Duration::from_millis(100);

/// The longest word there is, and some room.
const WORD: u64 = 16;

/// What a client asks for. Each is answered with the status that follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    Status,
    /// Tell peers and nodes to send elsewhere.
    Drain,
    /// Take part again.
    Undrain,
}

impl Request {
    const ALL: [Request; 3] = [Request::Status, Request::Drain, Request::Undrain];

    fn word(self) -> &'static str {
        match self {
            Request::Status => "status",
            Request::Drain => "drain",
            Request::Undrain => "undrain",
        }
    }
}

/// A request, and where its answer goes.
pub type Asked = (Request, oneshot::Sender<Status>);

pub fn path(run_dir: &Path) -> PathBuf {
    run_dir.join("agent.sock")
}

/// Serves until it is dropped, which removes the socket. The caller holds the agent's lock: an old socket is nobody's.
pub fn serve(path: &Path, ask: mpsc::Sender<Asked>) -> io::Result<Server> {
    let listener = listen(path)?;
    let task = tokio::spawn(async move {
        loop {
            let (stream, _) = next(|| listener.accept()).await;
            let ask = ask.clone();
            tokio::spawn(async move {
                if let Err(error) = answer(stream, ask).await {
                    debug!(%error, "a status client went away");
                }
            });
        }
    });
    Ok(Server { path: path.to_owned(), task })
}

/// The next of what `accept` gives. An error (the process is out of descriptors, the client has gone) ends nothing.
async fn next<T, A: Future<Output = io::Result<T>>>(mut accept: impl FnMut() -> A) -> T {
    loop {
        match accept().await {
            Ok(accepted) => return accepted,
            Err(error) => {
                warn!(%error, "cannot accept a status client: trying again");
                sleep(PAUSE).await;
            }
        }
    }
}

#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
        if let Err(error) = std::fs::remove_file(&self.path) {
            debug!(%error, path = %self.path.display(), "the socket is gone already");
        }
    }
}

async fn answer(mut stream: UnixStream, ask: mpsc::Sender<Asked>) -> io::Result<()> {
    let mut word = String::new();
    timeout(PATIENCE, (&mut stream).take(WORD).read_to_string(&mut word)).await??;
    let request = Request::ALL.into_iter().find(|request| request.word() == word);
    let request = request.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no word that is known"))?;
    let (reply, status) = oneshot::channel();
    let gone = |_| io::Error::other("the agent is stopping");
    ask.send((request, reply)).await.map_err(|_| io::Error::other("the agent is stopping"))?;
    let status = status.await.map_err(gone)?;
    stream.write_all(&serde_json::to_vec(&status)?).await
}

/// Asks the agent.
pub async fn ask(path: &Path, request: Request) -> io::Result<Status> {
    let ask = async {
        let mut answer = Vec::new();
        let mut stream = UnixStream::connect(path).await?;
        stream.write_all(request.word().as_bytes()).await?;
        stream.shutdown().await?;
        stream.read_to_end(&mut answer).await?;
        serde_json::from_slice(&answer).map_err(io::Error::other)
    };
    timeout(PATIENCE, ask).await.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "no answer within 10 s"))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_client_that_cannot_be_accepted_is_not_the_last() {
        let out_of_descriptors = || Err(io::Error::from_raw_os_error(libc::EMFILE));
        let mut outcomes = [out_of_descriptors(), out_of_descriptors(), Ok("a client")].into_iter();
        let accepted = next(|| std::future::ready(outcomes.next().expect("asked no more once it has one"))).await;
        assert_eq!((accepted, outcomes.len()), ("a client", 0));
    }
}
