//! One rtnetlink socket, and the two things done with it: ask and change.
//!
//! Requests are strict (`NETLINK_GET_STRICT_CHK`): the kernel filters a dump by what the request says, and refuses a
//! request that it would only half understand.

use std::{io, time::Duration};

use futures::StreamExt;
use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;

/// The kernel answers within microseconds; past this the answer is lost.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often a dump is begun again because what it lists changed meanwhile.
const DUMP_ATTEMPTS: u32 = 8;

/// A connection to the rtnetlink of the network namespace in which it was made.
#[derive(Clone, Debug)]
pub(super) struct Rtnl {
    handle: rtnetlink::Handle,
}

impl Rtnl {
    /// Connects. Must be called on a tokio runtime, which drives the socket for as long as the value lives.
    pub(super) fn new() -> io::Result<Rtnl> {
        let (mut connection, handle, _) = rtnetlink::new_connection_with_strict_check()?;
        // The code of a failed dump is in its last message.
        connection.set_forward_done(true);
        tokio::spawn(connection);
        Ok(Rtnl { handle })
    }

    /// Everything that matches; begins again if the list changed meanwhile.
    pub(super) async fn dump(&self, message: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_ATTEMPTS {
            if let Some(answers) = self.request(message.clone(), NLM_F_DUMP).await? {
                return Ok(answers);
            }
        }
        Err(io::Error::other(format!("the list changed during each of {DUMP_ATTEMPTS} readings")))
    }

    /// The one object that the message names; `None` where it does not exist.
    pub(super) async fn get(&self, message: RouteNetlinkMessage) -> io::Result<Option<RouteNetlinkMessage>> {
        // Without an ACK an answer that cannot be decoded would be waited for.
        match self.request(message, NLM_F_ACK).await {
            Ok(answers) => Ok(answers.and_then(|answers| answers.into_iter().next())),
            Err(error) if is(&error, &[libc::ENODEV, libc::ENOENT]) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Makes a change and waits until it is made. `flags` are those of `NLM_F_CREATE` and its kin.
    pub(super) async fn change(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.request(message, NLM_F_ACK | flags).await.map(|_| ())
    }

    /// The answers, or `None` if the kernel says that they do not fit together.
    async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let closed = || io::Error::other("the rtnetlink connection has ended");
        let mut answers = self.handle.clone().request(request).map_err(|_| closed())?;
        let collect = async {
            let (mut found, mut consistent, mut ended) = (Vec::new(), true, flags & NLM_F_DUMP != NLM_F_DUMP);
            while let Some(answer) = answers.next().await {
                consistent &= answer.header.flags & NLM_F_DUMP_INTR == 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => found.push(message),
                    NetlinkPayload::Error(error) => return Err(error.to_io()),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => ended = true,
                    NetlinkPayload::Overrun(_) => return Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
                    _ => {}
                }
            }
            if ended { Ok(consistent.then_some(found)) } else { Err(closed()) }
        };
        tokio::time::timeout(PATIENCE, collect).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
    }
}

/// Whether it is one of these errnos.
pub(super) fn is(error: &io::Error, errnos: &[i32]) -> bool {
    error.raw_os_error().is_some_and(|errno| errnos.contains(&errno))
}

/// Deleting what is not there is what was wanted.
pub(super) fn absent_is_done(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is(&error, &[libc::ENOENT, libc::ESRCH, libc::ENODEV, libc::EADDRNOTAVAIL]) => Ok(()),
        other => other,
    }
}
