//! One peer: gotatun's Noise state machine, and what the kernel's WireGuard keeps beside it.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use bytes::BytesMut;
use gotatun::{
    noise::{Tunn, TunnResult, errors::WireGuardError},
    packet::{Packet, WgData, WgHandshakeInit, WgHandshakeResp, WgKind},
    tun::MtuWatcher,
};

use super::{device::Identity, proto::PeerConfig, udp::Endpoint};
use crate::{
    keys::{PskId, PublicKey},
    reconcile::Pair,
    state,
};

/// Packets that wait for a session, of each peer. gotatun would keep 256: with many dead peers that is a lot of memory.
const MAX_WAITING: usize = 32;
/// How long an answered handshake has to be confirmed before we begin one ourselves (whitepaper §6.1).
const REKEY_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Peer {
    pub(super) key: PublicKey,
    state: Mutex<PeerState>,
}

pub(super) struct PeerState {
    tunn: Tunn,
    endpoint: Option<Endpoint>,
    keepalive: u16,
    psk: Option<PskId>,
    /// Copies of what waits for a session. gotatun's queue cannot hold them: it would send over an unconfirmed one.
    waiting: Vec<Packet>,
    /// A handshake is wanted now, if there is no session: there is a new address to try, or a new key.
    dial: bool,
    slots: Slots,
    /// When the last handshake was answered.
    answered: Option<Instant>,
    /// As in the kernel: when the initiator's response came, or the responder's session was confirmed by a first packet.
    last_handshake: Option<SystemTime>,
    /// Bytes of authentic messages, with their headers (gotatun counts what was in them).
    rx_bytes: u64,
}

/// gotatun's ring of sessions, which it does not show: a new session goes to the next slot, and what we send goes over
/// the current one. Slots are counted as gotatun does (`Tunn::put_session`, `set_current_session`).
///
/// An initiator may send at once. A responder must not before it has heard over the new session (whitepaper §5.4.5), so
/// gotatun leaves the current slot alone; but the very first session, and every eighth, falls into it.
#[derive(Debug, Default)]
struct Slots {
    /// The number of each session that we answered and have heard nothing over.
    unconfirmed: [Option<u32>; 8],
    current: usize,
    next: usize,
}

impl Slots {
    fn advance(&mut self) -> usize {
        let slot = self.next;
        self.next = (slot + 1) % self.unconfirmed.len();
        slot
    }

    fn answered(&mut self, session: u32) {
        let slot = self.advance();
        self.unconfirmed[slot] = Some(session);
    }

    fn established(&mut self) {
        self.current = self.advance();
        self.unconfirmed[self.current] = None;
    }

    /// Whether this confirms the session.
    fn heard(&mut self, session: u32) -> bool {
        let Some(slot) = self.unconfirmed.iter().position(|index| *index == Some(session)) else { return false };
        self.unconfirmed[slot] = None;
        self.current = slot;
        true
    }

    fn may_send(&self) -> bool {
        self.unconfirmed[self.current].is_none()
    }
}

impl Peer {
    pub(super) fn new(key: PublicKey, tunn: Tunn, config: &PeerConfig) -> Peer {
        let state = PeerState {
            tunn,
            endpoint: config.endpoint.map(Endpoint::from),
            keepalive: config.keepalive,
            psk: config.psk.as_ref().map(|psk| psk.id()),
            waiting: Vec::new(),
            dial: config.keepalive > 0,
            slots: Slots::default(),
            answered: None,
            last_handshake: None,
            rx_bytes: 0,
        };
        Peer { key, state: Mutex::new(state) }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, PeerState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PeerState {
    /// Changes what differs and nothing else, so that a live session goes on.
    pub(super) fn configure(&mut self, config: &PeerConfig) {
        let psk = config.psk.as_ref().map(|psk| psk.id());
        if self.psk != psk {
            self.tunn.set_preshared_key(config.psk.as_ref().map(|psk| *psk.as_bytes()));
            self.psk = psk;
        }
        if self.keepalive != config.keepalive {
            self.tunn.set_persistent_keepalive(Some(config.keepalive));
            self.keepalive = config.keepalive;
        }
        if config.endpoint.is_some() && config.endpoint != self.endpoint.map(|endpoint| endpoint.peer) {
            self.endpoint = config.endpoint.map(Endpoint::from);
            self.dial = self.keepalive > 0 || !self.waiting.is_empty();
        }
    }

    pub(super) fn endpoint(&self) -> Option<Endpoint> {
        self.endpoint
    }

    /// Lets the kernel choose our address, if that is still the one.
    pub(super) fn forget_local(&mut self, stale: Endpoint) {
        if self.endpoint == Some(stale) {
            self.endpoint = Some(stale.peer.into());
        }
    }

    pub(super) fn tunn(&mut self) -> &mut Tunn {
        &mut self.tunn
    }

    /// Encrypts. Without a session the packet waits, and what is returned asks for one, if nothing has yet.
    pub(super) fn seal(&mut self, packet: Packet) -> Option<WgKind> {
        let packet = match self.encrypt(packet) {
            Ok(sealed) => return Some(sealed),
            Err(packet) => packet,
        };
        if self.waiting.len() < MAX_WAITING {
            // A copy of its own size: the packet's buffer is larger, and wanted back.
            self.waiting.push(Packet::from_bytes(BytesMut::from(&packet[..])));
        }
        self.initiate()
    }

    fn encrypt(&mut self, packet: Packet) -> Result<WgKind, Packet> {
        if !self.slots.may_send() {
            return Err(packet);
        }
        self.tunn.encapsulate_with_session(packet).map(Into::into)
    }

    /// Begins a handshake, unless one is under way, from either side.
    fn initiate(&mut self) -> Option<WgKind> {
        if self.answered.is_some_and(|at| at.elapsed() < REKEY_TIMEOUT) {
            return None;
        }
        self.tunn.format_handshake_initiation(false).map(Into::into)
    }

    /// Decrypts or answers. An authentic packet moves the endpoint to where it came from.
    pub(super) fn open(&mut self, packet: WgKind, from: Endpoint) -> TunnResult {
        let session = match &packet {
            WgKind::Data(packet) => Some(packet.header.receiver_idx.get()),
            _ => None,
        };
        let result = self.tunn.handle_incoming_packet(packet);
        let len = match &result {
            TunnResult::Done | TunnResult::Err(_) => return result,
            TunnResult::WriteToNetwork(WgKind::HandshakeResp(response)) => {
                self.slots.answered(response.sender_idx.get());
                self.answered = Some(Instant::now());
                size_of::<WgHandshakeInit>()
            }
            TunnResult::WriteToNetwork(_) => {
                self.slots.established();
                self.note_handshake();
                size_of::<WgHandshakeResp>()
            }
            TunnResult::WriteToTunnel(packet) => {
                let len = WgData::OVERHEAD + packet.len();
                if session.is_some_and(|session| self.slots.heard(session)) {
                    self.note_handshake();
                }
                len
            }
        };
        self.rx_bytes += len as u64;
        self.endpoint = Some(from);
        result
    }

    fn note_handshake(&mut self) {
        self.last_handshake = Some(SystemTime::now());
        self.answered = None;
        // Keepalives for which there was no session: the handshake has done their work.
        self.tunn.get_queued_packets(&mut MtuWatcher::new(0)).for_each(drop);
    }

    /// What waited for the session that there is now.
    pub(super) fn release(&mut self) -> Vec<WgKind> {
        if self.waiting.is_empty() || !self.has_session() {
            return Vec::new();
        }
        let waiting = std::mem::take(&mut self.waiting);
        waiting.into_iter().filter_map(|packet| self.encrypt(packet).ok()).collect()
    }

    /// Whether something can be sent.
    fn has_session(&self) -> bool {
        self.slots.may_send() && self.tunn.time_since_last_handshake().is_some()
    }

    /// Takes over the device's new key, which ends the session.
    pub(super) fn set_identity(&mut self, identity: &Identity) {
        self.tunn.set_static_private(identity.secret.clone(), identity.public, identity.gate.limiter());
        self.slots.unconfirmed = [None; 8];
        self.answered = None;
        self.last_handshake = None;
        self.dial = self.keepalive > 0 || !self.waiting.is_empty();
    }

    /// What is due: a keepalive, or a handshake. To be called four times a second.
    pub(super) fn tick(&mut self) -> Option<(WgKind, Endpoint)> {
        let to = self.endpoint?;
        let due = match self.tunn.update_timers() {
            // gotatun gives up 90 s after the peer fell silent, for good. With a keepalive the kernel goes on, and a
            // peer behind NAT must: nobody else can begin.
            Err(WireGuardError::ConnectionExpired) => {
                self.waiting.clear();
                if self.keepalive == 0 {
                    return None;
                }
                self.tunn.format_handshake_initiation(true).map(Into::into)
            }
            Err(err) => {
                tracing::debug!(?err, "timer");
                None
            }
            Ok(Some(WgKind::Data(_))) if !self.slots.may_send() => None,
            Ok(packet) => packet,
        };
        let dial = std::mem::take(&mut self.dial) && !self.tunn.has_active_session();
        let wanted = self.keepalive > 0 && !self.slots.may_send() || !self.waiting.is_empty();
        let packet = match due {
            None if dial => self.tunn.format_handshake_initiation(true).map(Into::into),
            None if wanted && !self.has_session() => self.initiate(),
            due => due,
        };
        packet.map(|packet| (packet, to))
    }

    pub(super) fn read(&mut self) -> (state::Peer, Pair) {
        let (_, tx_bytes, ..) = self.tunn.stats();
        let peer = state::Peer {
            endpoint: self.endpoint.map(|endpoint| endpoint.peer),
            keepalive: self.keepalive,
            psk: self.psk,
        };
        let pair = Pair { last_handshake: self.last_handshake, rx_bytes: self.rx_bytes, tx_bytes: tx_bytes as u64 };
        (peer, pair)
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("key", &self.key).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use gotatun::noise::index_table::IndexTable;

    use super::*;
    use crate::keys::PrivateKey;

    const FROM: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 1);

    /// Two that are each other's peer.
    fn pair() -> (Peer, Peer) {
        let keys = [1, 2].map(|n| PrivateKey::new([n; 32]));
        let peer = |own: &PrivateKey, other: &PrivateKey| {
            let Identity { secret, gate, .. } = Identity::new(own);
            let theirs = (*other.public().as_bytes()).into();
            let tunn = Tunn::new(secret, theirs, None, Some(0), IndexTable::from_os_rng(), gate.limiter());
            let config = PeerConfig { endpoint: Some(FROM), keepalive: 0, psk: None };
            Peer::new(other.public(), tunn, &config)
        };
        (peer(&keys[0], &keys[1]), peer(&keys[1], &keys[0]))
    }

    fn packet(text: &str) -> Packet {
        Packet::from_bytes(BytesMut::from(text))
    }

    fn is_connected(peer: &Peer) -> bool {
        peer.lock().read().1.last_handshake.is_some()
    }

    #[track_caller]
    fn answer(peer: &Peer, message: WgKind) -> WgKind {
        match peer.lock().open(message, FROM.into()) {
            TunnResult::WriteToNetwork(answer) => answer,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn text(peer: &Peer, message: WgKind) -> String {
        match peer.lock().open(message, FROM.into()) {
            TunnResult::WriteToTunnel(packet) => String::from_utf8(packet.to_vec()).unwrap(),
            other => panic!("{other:?}"),
        }
    }

    fn initiation(peer: &Peer) -> WgKind {
        peer.lock().tunn().format_handshake_initiation(true).unwrap().into()
    }

    #[test]
    fn a_responder_is_connected_and_sends_once_it_was_sent_to() {
        let (a, b) = pair();
        let initiation = a.lock().seal(packet("first")).unwrap();
        let response = answer(&b, initiation);
        assert!(!is_connected(&b), "only asked");
        assert!(b.lock().seal(packet("reply")).is_none(), "it waits, and asks for no other session");
        assert!(b.lock().tick().is_none() && b.lock().release().is_empty());

        let keepalive = answer(&a, response);
        assert!(is_connected(&a) && !is_connected(&b));
        let [first] = <[WgKind; 1]>::try_from(a.lock().release()).unwrap();
        assert_eq!(text(&b, keepalive), "");
        assert!(is_connected(&b));
        let [reply] = <[WgKind; 1]>::try_from(b.lock().release()).unwrap();
        assert_eq!((text(&b, first), text(&a, reply)), ("first".into(), "reply".into()));
    }

    #[test]
    fn whole_messages_are_counted() {
        let (a, b) = pair();
        let initiation = a.lock().seal(packet("first")).unwrap();
        let keepalive = answer(&a, answer(&b, initiation));
        text(&b, keepalive);
        let first = a.lock().release().remove(0);
        text(&b, first);
        let ((_, at_a), (_, at_b)) = (a.lock().read(), b.lock().read());
        assert_eq!((at_a.tx_bytes, at_b.rx_bytes), (148 + 32 + 32 + 5, 148 + 32 + 32 + 5));
        assert_eq!((at_b.tx_bytes, at_a.rx_bytes), (92, 92));
    }

    /// Up to seven initiations of which nothing comes leave the session alone, in any slot of the ring.
    #[test]
    fn traffic_goes_on_both_ways_across_rekeying() {
        let (a, b) = pair();
        let response = answer(&b, initiation(&a));
        let keepalive = answer(&a, response);
        text(&b, keepalive);
        let pass = |from: &Peer, to: &Peer, what: &str| {
            let sealed = from.lock().seal(packet(what)).unwrap();
            assert!(matches!(sealed, WgKind::Data(_)), "{what}: {sealed:?}");
            assert_eq!(text(to, sealed), what);
        };
        for round in 0..24 {
            // gotatun's clock advances with it; sessions of one instant have no order.
            assert!(a.lock().tick().is_none() && b.lock().tick().is_none());
            let unanswered = round % 7;
            for _ in 0..unanswered {
                let lost = answer(&b, initiation(&a));
                assert!(matches!(lost, WgKind::HandshakeResp(_)));
                pass(&a, &b, "over the old one");
                pass(&b, &a, "over the old one, unconfirmed");
            }
            let response = answer(&b, initiation(&a));
            b.lock().last_handshake = None;
            let late = a.lock().seal(packet("late")).unwrap();
            pass(&a, &b, "over the old one");
            assert!(!is_connected(&b), "the old session confirms nothing");
            pass(&b, &a, "over the old one");
            let keepalive = answer(&a, response);
            pass(&b, &a, "over the old one, to the new");
            assert_eq!(text(&b, keepalive), "");
            assert!(is_connected(&b));
            assert_eq!(text(&b, late), "late");
            pass(&a, &b, "over the new one");
            pass(&b, &a, "over the new one");
        }
    }

    #[test]
    fn a_session_that_is_never_confirmed_gives_way() {
        let (a, b) = pair();
        answer(&b, initiation(&a));
        assert!(b.lock().seal(packet("reply")).is_none());
        b.lock().answered = Instant::now().checked_sub(REKEY_TIMEOUT);
        let (initiation, _) = b.lock().tick().unwrap();
        let keepalive = answer(&b, answer(&a, initiation));
        assert_eq!(text(&a, keepalive), "");
        let reply = b.lock().release().remove(0);
        assert_eq!(text(&a, reply), "reply");
    }

    #[test]
    fn a_new_key_forgets_the_session_and_dials() {
        let (a, b) = pair();
        let keepalive = answer(&a, answer(&b, initiation(&a)));
        text(&b, keepalive);
        let mut state = a.lock();
        state.configure(&PeerConfig { endpoint: None, keepalive: 25, psk: None });
        state.set_identity(&Identity::new(&PrivateKey::new([3; 32])));
        assert_eq!(state.read().1.last_handshake, None);
        assert!(matches!(state.tick(), Some((WgKind::HandshakeInit(_), to)) if to == FROM.into()));
    }
}
