//! Requests to the kernel's netfilter (include/uapi/linux/netfilter/nfnetlink.h), over one blocking socket.

use std::io;

use netlink_packet_core::{NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlaBuffer, NlasIterator};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::rtnl::is;

const NLMSG_HEADER: usize = 16;
/// Bytes before the attributes of a message.
pub(super) const NFGENMSG: usize = 4;

pub(super) fn connect() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_NETFILTER)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

/// Reads the answers to one request, up to its end.
pub(super) fn receive(socket: &Socket, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    loop {
        let (datagram, _) = match socket.recv_from_full() {
            Err(error) if is(&error, &[libc::EINTR]) => continue,
            received => received?,
        };
        let mut rest = datagram.as_slice();
        while rest.len() >= NLMSG_HEADER {
            let message = NetlinkBuffer::new_checked(rest).map_err(malformed)?;
            let payload = message.payload();
            match message.message_type() {
                NLMSG_DONE | NLMSG_ERROR => {
                    let code = payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                    return if code < 0 { Err(io::Error::from_raw_os_error(-code)) } else { Ok(()) };
                }
                _ => each(payload),
            }
            let aligned = (message.length() as usize).next_multiple_of(4);
            rest = rest.get(aligned..).unwrap_or_default();
        }
    }
}

pub(super) fn message(kind: u16, flags: u16, family: u8, attributes: &[u8]) -> Vec<u8> {
    let length = u32::try_from(NLMSG_HEADER + NFGENMSG + attributes.len()).unwrap_or(u32::MAX);
    let mut message = Vec::new();
    message.extend(length.to_ne_bytes());
    message.extend(kind.to_ne_bytes());
    message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // Sequence and port: one request at a time is under way.
    message.extend([0; 8]);
    message.extend([family, 0, 0, 0]);
    message.extend(attributes);
    message
}

pub(super) fn nlas(buffer: &[u8]) -> impl Iterator<Item = NlaBuffer<&[u8]>> {
    NlasIterator::new(buffer).map_while(Result::ok)
}

fn malformed(error: netlink_packet_core::DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
