//! What the agent and the tunnel say to each other over `tunnel.sock`.
//!
//! Both sides greet with 8 bytes (magic, oldest and newest version that they speak), then the agent asks and the
//! tunnel answers, one frame each: a length (u32, bytes) and a body. Integers are big-endian. Private keys are in no
//! type that can be printed or serialized by accident, and every buffer that holds one is wiped.

mod wire;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    ops::RangeInclusive,
    time::{Duration, SystemTime},
};

use ipnetwork::IpNetwork;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zeroize::Zeroizing;

use self::wire::{In, Out};
use crate::{
    kernel::{WgDevice, WgPeer},
    keys::{PresharedKey, PrivateKey, PskId, PublicKey},
    names::Device,
    reconcile::Pair,
    state::Peer,
};

/// The versions of the protocol that this build speaks.
pub(super) const VERSIONS: RangeInclusive<u16> = 1..=1;

/// The largest request: a peer that gains about 50 000 prefixes.
pub(super) const MAX_REQUEST: usize = 1 << 20;
/// The largest answer: 8 devices of 1000 peers with some 100 prefixes each.
pub(super) const MAX_ANSWER: usize = 16 << 20;

const MAGIC: [u8; 4] = *b"CRKT";

#[derive(Debug)]
pub(super) enum Request {
    Read,
    SetDevice { device: Device, port: u16, key: PrivateKey },
    SetPeer { device: Device, key: PublicKey, peer: PeerConfig, gained: Vec<IpNetwork> },
    DropAllowedIps { device: Device, key: PublicKey, lost: Vec<IpNetwork> },
    RemovePeer { device: Device, key: PublicKey },
    DelDevice { device: Device },
}

/// What [`Request::SetPeer`] wants of a peer.
#[derive(Debug)]
pub(super) struct PeerConfig {
    /// `None` leaves what is there: the peer may have roamed.
    pub endpoint: Option<SocketAddr>,
    /// Seconds; 0 is off.
    pub keepalive: u16,
    pub psk: Option<PresharedKey>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    Devices(BTreeMap<Device, Reading>),
    Refused { kind: Refusal, message: String },
}

/// One device, as the tunnel sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reading {
    pub device: WgDevice,
    /// Datagrams that the kernel dropped because this device's socket was full (UdpRcvbufErrors, of one socket).
    pub socket_drops: u32,
}

/// Why the tunnel did not do it; as much of [`io::ErrorKind`] as the agent acts upon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Other,
    NotFound,
    PermissionDenied,
    AddrInUse,
    InvalidInput,
}

/// A frame that says nothing we understand. Never holds any of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed {0}")]
pub(super) struct Malformed(&'static str);

impl From<Malformed> for io::Error {
    fn from(err: Malformed) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, err)
    }
}

impl Refusal {
    const ALL: [(Refusal, u8, io::ErrorKind); 5] = [
        (Refusal::Other, 0, io::ErrorKind::Other),
        (Refusal::NotFound, 1, io::ErrorKind::NotFound),
        (Refusal::PermissionDenied, 2, io::ErrorKind::PermissionDenied),
        (Refusal::AddrInUse, 3, io::ErrorKind::AddrInUse),
        (Refusal::InvalidInput, 4, io::ErrorKind::InvalidInput),
    ];

    pub(super) fn of(kind: io::ErrorKind) -> Refusal {
        Refusal::ALL.into_iter().find(|(.., k)| *k == kind).map_or(Refusal::Other, |(refusal, ..)| refusal)
    }

    pub(super) fn kind(self) -> io::ErrorKind {
        Refusal::ALL.into_iter().find(|(refusal, ..)| *refusal == self).map_or(io::ErrorKind::Other, |(.., kind)| kind)
    }

    fn code(self) -> u8 {
        Refusal::ALL.into_iter().find(|(refusal, ..)| *refusal == self).map_or(0, |(_, code, _)| code)
    }

    /// A code of a later version is `Other`: the message says the rest.
    fn from_code(code: u8) -> Refusal {
        Refusal::ALL.into_iter().find(|(_, c, _)| *c == code).map_or(Refusal::Other, |(refusal, ..)| refusal)
    }
}

/// The first thing that either side sends.
pub(super) fn greeting(versions: &RangeInclusive<u16>) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&MAGIC);
    bytes[4..6].copy_from_slice(&versions.start().to_be_bytes());
    bytes[6..].copy_from_slice(&versions.end().to_be_bytes());
    bytes
}

/// The newest version that both sides speak; `theirs` is the other side's greeting.
pub(super) fn agree(ours: &RangeInclusive<u16>, theirs: [u8; 8]) -> Result<u16, String> {
    let [m0, m1, m2, m3, o0, o1, n0, n1] = theirs;
    if [m0, m1, m2, m3] != MAGIC {
        return Err("it is no carrick tunnel or agent".to_owned());
    }
    let (oldest, newest) = (u16::from_be_bytes([o0, o1]), u16::from_be_bytes([n0, n1]));
    let common = newest.min(*ours.end());
    if common < oldest.max(*ours.start()) {
        let (start, end) = (ours.start(), ours.end());
        return Err(format!(
            "it speaks versions {oldest} to {newest} of the tunnel protocol, this side {start} to {end}: \
             run agent and tunnel from the same release"
        ));
    }
    Ok(common)
}

/// Sends our greeting, reads theirs, and agrees.
pub(super) async fn greet(stream: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> io::Result<u16> {
    stream.write_all(&greeting(&VERSIONS)).await?;
    let mut theirs = [0; 8];
    stream.read_exact(&mut theirs).await?;
    agree(&VERSIONS, theirs).map_err(|why| io::Error::new(io::ErrorKind::Unsupported, why))
}

pub(super) async fn write_frame(stream: &mut (impl AsyncWrite + Unpin), body: &[u8]) -> io::Result<()> {
    let len = u32::try_from(body.len()).map_err(|_| Malformed("frame: longer than 4 GiB"))?;
    stream.write_all(&len.to_be_bytes()).await?;
    stream.write_all(body).await?;
    stream.flush().await
}

/// A frame, or why there is none.
pub(super) enum Frame {
    Body(Zeroizing<Vec<u8>>),
    /// Longer than allowed; its bytes have been read past.
    Oversized,
    /// The other side closed between two frames.
    End,
}

pub(super) async fn read_frame(stream: &mut (impl AsyncRead + Unpin), max: usize) -> io::Result<Frame> {
    let mut len = [0; 4];
    if stream.read(&mut len[..1]).await? == 0 {
        return Ok(Frame::End);
    }
    stream.read_exact(&mut len[1..]).await?;
    let len = u32::from_be_bytes(len) as usize;
    if len > max {
        tokio::io::copy(&mut stream.take(len as u64), &mut tokio::io::sink()).await?;
        return Ok(Frame::Oversized);
    }
    let mut body = Zeroizing::new(vec![0; len]);
    stream.read_exact(&mut body).await?;
    Ok(Frame::Body(body))
}

impl Request {
    pub(super) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let nets = match self {
            Request::SetPeer { gained, .. } => gained.len(),
            Request::DropAllowedIps { lost, .. } => lost.len(),
            _ => 0,
        };
        let mut out = Out::with_capacity(128 + 18 * nets);
        match self {
            Request::Read => out.u8(0),
            Request::SetDevice { device, port, key } => {
                out.u8(1);
                out.device(*device);
                out.u16(*port);
                out.bytes(key.as_bytes());
            }
            Request::SetPeer { device, key, peer, gained } => {
                out.u8(2);
                out.device(*device);
                out.bytes(key.as_bytes());
                out.endpoint(peer.endpoint);
                out.u16(peer.keepalive);
                out.option(peer.psk.as_ref(), |out, psk| out.bytes(psk.as_bytes()));
                out.nets(gained.iter());
            }
            Request::DropAllowedIps { device, key, lost } => {
                out.u8(3);
                out.device(*device);
                out.bytes(key.as_bytes());
                out.nets(lost.iter());
            }
            Request::RemovePeer { device, key } => {
                out.u8(4);
                out.device(*device);
                out.bytes(key.as_bytes());
            }
            Request::DelDevice { device } => {
                out.u8(5);
                out.device(*device);
            }
        }
        out.0
    }

    pub(super) fn decode(body: &[u8]) -> Result<Request, Malformed> {
        let mut input = In(body);
        let request = match input.u8("request: empty")? {
            0 => Request::Read,
            1 => {
                let (device, port) = (input.device()?, input.port()?);
                let key = Zeroizing::new(input.take("private key")?);
                Request::SetDevice { device, port, key: PrivateKey::new(*key) }
            }
            2 => {
                let (device, key) = (input.device()?, input.public()?);
                let (endpoint, keepalive) = (input.endpoint()?, input.u16("keepalive")?);
                let psk = input.option(|input| input.take("preshared key").map(Zeroizing::new))?;
                let peer = PeerConfig { endpoint, keepalive, psk: psk.map(|psk| PresharedKey::new(*psk)) };
                Request::SetPeer { device, key, peer, gained: input.nets()? }
            }
            3 => Request::DropAllowedIps { device: input.device()?, key: input.public()?, lost: input.nets()? },
            4 => Request::RemovePeer { device: input.device()?, key: input.public()? },
            5 => Request::DelDevice { device: input.device()? },
            _ => return Err(Malformed("request: of no known kind")),
        };
        input.end(request)
    }
}

impl Answer {
    pub(super) fn refused(err: &io::Error) -> Answer {
        Answer::Refused { kind: Refusal::of(err.kind()), message: err.to_string() }
    }

    pub(super) fn encode(&self) -> Zeroizing<Vec<u8>> {
        let mut out = Out::with_capacity(64);
        match self {
            Answer::Done => out.u8(0),
            Answer::Devices(devices) => {
                out.u8(1);
                out.count(devices.len());
                for (device, reading) in devices {
                    out.device(*device);
                    out.bytes(reading.device.key.as_bytes());
                    out.u16(reading.device.port);
                    out.u32(reading.socket_drops);
                    out.count(reading.device.peers.len());
                    for (key, peer) in &reading.device.peers {
                        out.bytes(key.as_bytes());
                        out.peer(peer);
                    }
                }
            }
            Answer::Refused { kind, message } => {
                out.u8(2);
                out.u8(kind.code());
                out.count(message.len());
                out.bytes(message.as_bytes());
            }
        }
        out.0
    }

    pub(super) fn decode(body: &[u8]) -> Result<Answer, Malformed> {
        let mut input = In(body);
        let answer = match input.u8("answer: empty")? {
            0 => Answer::Done,
            1 => {
                let mut devices = BTreeMap::new();
                for _ in 0..input.u32("number of devices")? {
                    devices.insert(input.device()?, input.reading()?);
                }
                Answer::Devices(devices)
            }
            2 => {
                let kind = Refusal::from_code(input.u8("refusal")?);
                let len = input.u32("length of the message")? as usize;
                let (message, rest) = input.0.split_at_checked(len).ok_or(Malformed("message"))?;
                input.0 = rest;
                Answer::Refused { kind, message: String::from_utf8_lossy(message).into_owned() }
            }
            _ => return Err(Malformed("answer: of no known kind")),
        };
        input.end(answer)
    }
}

impl Out {
    fn peer(&mut self, WgPeer { peer, allowed_ips, pair }: &WgPeer) {
        self.endpoint(peer.endpoint);
        self.u16(peer.keepalive);
        self.option(peer.psk, |out, psk| out.bytes(psk.as_bytes()));
        self.nets(allowed_ips.iter());
        let since_epoch = pair.last_handshake.and_then(|at| at.duration_since(SystemTime::UNIX_EPOCH).ok());
        self.option(since_epoch, |out, since_epoch| {
            out.u64(since_epoch.as_secs());
            out.u32(since_epoch.subsec_nanos());
        });
        self.u64(pair.rx_bytes);
        self.u64(pair.tx_bytes);
    }
}

impl In<'_> {
    fn reading(&mut self) -> Result<Reading, Malformed> {
        let (key, port, socket_drops) = (self.known_public()?, self.u16("port")?, self.u32("socket drops")?);
        let mut peers = BTreeMap::new();
        for _ in 0..self.u32("number of peers")? {
            peers.insert(self.known_public()?, self.peer()?);
        }
        Ok(Reading { device: WgDevice { key, port, peers }, socket_drops })
    }

    fn peer(&mut self) -> Result<WgPeer, Malformed> {
        let (endpoint, keepalive) = (self.endpoint()?, self.u16("keepalive")?);
        let psk = self.option(|input| input.take("preshared key's id").map(PskId::from_bytes))?;
        let allowed_ips: BTreeSet<IpNetwork> = self.nets()?;
        let since_epoch = self.option(|input| {
            let (secs, nanos) = (input.u64("handshake")?, input.u32("handshake")?);
            if nanos < 1_000_000_000 { Ok(Duration::new(secs, nanos)) } else { Err(Malformed("handshake")) }
        })?;
        let last_handshake = match since_epoch {
            Some(since_epoch) => Some(SystemTime::UNIX_EPOCH.checked_add(since_epoch).ok_or(Malformed("handshake"))?),
            None => None,
        };
        let pair = Pair { last_handshake, rx_bytes: self.u64("rx bytes")?, tx_bytes: self.u64("tx bytes")? };
        Ok(WgPeer { peer: Peer { endpoint, keepalive, psk }, allowed_ips, pair })
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use proptest::prelude::*;

    use super::*;
    use crate::names::Ordinal;

    fn any_device() -> impl Strategy<Value = Device> {
        (0i64..8).prop_map(|n| Device(Ordinal::new(n).unwrap()))
    }

    fn any_public() -> impl Strategy<Value = PublicKey> {
        any::<[u8; 32]>().prop_map(|secret| PrivateKey::new(secret).public())
    }

    fn any_ip() -> impl Strategy<Value = IpAddr> {
        prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), any::<[u8; 16]>().prop_map(IpAddr::from)]
    }

    fn any_nets() -> impl Strategy<Value = Vec<IpNetwork>> {
        let net = (any_ip(), any::<u8>()).prop_map(|(ip, len)| {
            let len = len % if ip.is_ipv4() { 33 } else { 129 };
            IpNetwork::new(ip, len).unwrap()
        });
        prop::collection::vec(net, 0..6)
    }

    fn any_endpoint() -> impl Strategy<Value = Option<SocketAddr>> {
        prop::option::of((any_ip(), 1u16..).prop_map(|(ip, port)| SocketAddr::new(ip, port)))
    }

    fn any_request() -> impl Strategy<Value = Request> {
        let config = (any_endpoint(), any::<u16>(), prop::option::of(any::<[u8; 32]>()))
            .prop_map(|(endpoint, keepalive, psk)| PeerConfig { endpoint, keepalive, psk: psk.map(PresharedKey::new) });
        prop_oneof![
            Just(()).prop_map(|()| Request::Read),
            (any_device(), 1u16.., any::<[u8; 32]>()).prop_map(|(device, port, key)| Request::SetDevice {
                device,
                port,
                key: PrivateKey::new(key)
            }),
            (any_device(), any_public(), config, any_nets()).prop_map(|(device, key, peer, gained)| Request::SetPeer {
                device,
                key,
                peer,
                gained
            }),
            (any_device(), any_public(), any_nets()).prop_map(|(device, key, lost)| Request::DropAllowedIps {
                device,
                key,
                lost
            }),
            (any_device(), any_public()).prop_map(|(device, key)| Request::RemovePeer { device, key }),
            any_device().prop_map(|device| Request::DelDevice { device }),
        ]
    }

    fn any_answer() -> impl Strategy<Value = Answer> {
        let pair = (prop::option::of((0u64..1 << 40, 0u32..1_000_000_000)), any::<u64>(), any::<u64>()).prop_map(
            |(at, rx_bytes, tx_bytes)| Pair {
                last_handshake: at.map(|(secs, nanos)| SystemTime::UNIX_EPOCH + Duration::new(secs, nanos)),
                rx_bytes,
                tx_bytes,
            },
        );
        let psk = prop::option::of(any::<[u8; 8]>().prop_map(PskId::from_bytes));
        let peer =
            (any_endpoint(), any::<u16>(), psk, any_nets(), pair).prop_map(|(endpoint, keepalive, psk, nets, pair)| {
                WgPeer { peer: Peer { endpoint, keepalive, psk }, allowed_ips: nets.into_iter().collect(), pair }
            });
        let reading =
            (any_public(), any::<u16>(), prop::collection::btree_map(any_public(), peer, 0..4), any::<u32>()).prop_map(
                |(key, port, peers, socket_drops)| Reading { device: WgDevice { key, port, peers }, socket_drops },
            );
        let kind = prop::sample::select(Refusal::ALL.map(|(refusal, ..)| refusal).to_vec());
        prop_oneof![
            Just(()).prop_map(|()| Answer::Done),
            prop::collection::btree_map(any_device(), reading, 0..4).prop_map(Answer::Devices),
            (kind, ".*").prop_map(|(kind, message)| Answer::Refused { kind, message }),
        ]
    }

    proptest! {
        // Requests hold keys and therefore have no `Eq`: their encodings are compared.
        #[test]
        fn requests_survive_the_way(request in any_request()) {
            let body = request.encode();
            prop_assert!(body.len() <= body.capacity());
            prop_assert_eq!(Request::decode(&body).unwrap().encode(), body);
        }

        #[test]
        fn answers_survive_the_way(answer in any_answer()) {
            prop_assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }

        #[test]
        fn a_cut_or_longer_frame_is_malformed(request in any_request(), cut in any::<prop::sample::Index>()) {
            let body = request.encode();
            prop_assert!(Request::decode(&body[..cut.index(body.len())]).is_err());
            prop_assert!(Request::decode(&[&body[..], &[0]].concat()).is_err());
        }

        #[test]
        fn garbage_is_refused_or_means_what_it_says(kind in 0u8..8, rest in prop::collection::vec(any::<u8>(), 0..200)) {
            let body = [&[kind][..], &rest].concat();
            if let Ok(request) = Request::decode(&body) {
                prop_assert_eq!(&**request.encode(), &body[..]);
            }
            if let Ok(answer) = Answer::decode(&body) {
                prop_assert_eq!(Answer::decode(&answer.encode()), Ok(answer));
            }
        }

        #[test]
        fn a_request_never_prints_its_keys(key in any::<[u8; 32]>()) {
            let device = Device(Ordinal::ZERO);
            let shown = format!("{:?}", Request::SetDevice { device, port: 1, key: PrivateKey::new(key) });
            prop_assert_eq!(shown, "SetDevice { device: Device(Ordinal(0)), port: 1, key: PrivateKey(..) }");
        }
    }

    #[test]
    fn versions_agree_on_the_newest_common_one() {
        assert_eq!(agree(&(1..=3), greeting(&(2..=5))), Ok(3));
        assert_eq!(agree(&(2..=5), greeting(&(1..=3))), Ok(3));
        assert_eq!(agree(&(1..=1), greeting(&(1..=1))), Ok(1));
        assert!(agree(&(1..=2), greeting(&(3..=4))).unwrap_err().contains("versions 3 to 4"));
        assert!(agree(&(3..=4), greeting(&(1..=2))).unwrap_err().contains("this side 3 to 4"));
        assert!(agree(&(1..=1), *b"GET / HT").unwrap_err().contains("no carrick tunnel"));
    }
}
