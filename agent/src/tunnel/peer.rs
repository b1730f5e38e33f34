//! One peer: gotatun's Noise state machine, and what the kernel's WireGuard keeps beside it.

use std::{
    net::SocketAddr,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime},
};

use bytes::BytesMut;
use gotatun::{
    noise::{Tunn, TunnResult, errors::WireGuardError},
    packet::{Packet, WgKind},
    tun::MtuWatcher,
};

use super::proto::PeerConfig;
use crate::{
    keys::{PskId, PublicKey},
    reconcile::Pair,
    state,
};

/// Packets that wait for a session, of each peer. gotatun would keep 256: with many dead peers that is a lot of memory.
const MAX_WAITING: usize = 32;

pub(super) struct Peer {
    pub(super) key: PublicKey,
    state: Mutex<PeerState>,
}

pub(super) struct PeerState {
    tunn: Tunn,
    endpoint: Option<SocketAddr>,
    keepalive: u16,
    psk: Option<PskId>,
    /// Packets in the state machine's queue.
    waiting: usize,
    /// There is a new address to try: a handshake is wanted now, if there is no session.
    dial: bool,
    /// The state machine forgets a handshake with its session; the kernel does not.
    last_handshake: Option<SystemTime>,
}

impl Peer {
    pub(super) fn new(key: PublicKey, tunn: Tunn, config: &PeerConfig) -> Peer {
        let state = PeerState {
            tunn,
            endpoint: config.endpoint,
            keepalive: config.keepalive,
            psk: config.psk.as_ref().map(|psk| psk.id()),
            waiting: 0,
            dial: config.keepalive > 0,
            last_handshake: None,
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
        if config.endpoint.is_some() && config.endpoint != self.endpoint {
            self.endpoint = config.endpoint;
            self.dial = self.keepalive > 0 || self.waiting > 0;
        }
    }

    pub(super) fn endpoint(&self) -> Option<SocketAddr> {
        self.endpoint
    }

    pub(super) fn tunn(&mut self) -> &mut Tunn {
        &mut self.tunn
    }

    /// Encrypts. Without a session the packet waits, and what is returned asks for one, if nothing has yet.
    pub(super) fn seal(&mut self, packet: Packet) -> Option<WgKind> {
        let packet = match self.tunn.encapsulate_with_session(packet) {
            Ok(sealed) => return Some(sealed.into()),
            Err(packet) => packet,
        };
        if self.waiting == MAX_WAITING {
            return self.tunn.format_handshake_initiation(false).map(Into::into);
        }
        self.waiting += 1;
        // A copy of its own size: the packet's buffer is larger, and wanted back.
        let packet = Packet::from_bytes(BytesMut::from(&packet[..]));
        self.tunn.handle_outgoing_packet(packet, None)
    }

    /// Decrypts or answers. An authentic packet moves the endpoint to where it came from.
    pub(super) fn open(&mut self, packet: WgKind, from: SocketAddr) -> TunnResult {
        let result = self.tunn.handle_incoming_packet(packet);
        if matches!(result, TunnResult::WriteToNetwork(_) | TunnResult::WriteToTunnel(_)) {
            self.endpoint = Some(from);
        }
        result
    }

    /// What waited for the session that there is now.
    pub(super) fn release(&mut self) -> Vec<WgKind> {
        if self.waiting == 0 || self.tunn.time_since_last_handshake().is_none() {
            return Vec::new();
        }
        self.waiting = 0;
        // They were padded before they had to wait: an MTU of zero adds nothing.
        self.tunn.get_queued_packets(&mut MtuWatcher::new(0)).collect()
    }

    /// What is due: a keepalive, or a handshake. To be called four times a second.
    pub(super) fn tick(&mut self) -> Option<(WgKind, SocketAddr)> {
        let to = self.endpoint?;
        let due = self.tunn.update_timers();
        self.note_handshake();
        let packet = match due {
            // gotatun gives up 90 s after the peer fell silent, for good. With a keepalive the kernel goes on, and a
            // peer behind NAT must: nobody else can begin.
            Err(WireGuardError::ConnectionExpired) => {
                self.waiting = 0;
                if self.keepalive == 0 {
                    return None;
                }
                self.tunn.format_handshake_initiation(true).map(Into::into)
            }
            Err(err) => {
                tracing::debug!(?err, "timer");
                None
            }
            Ok(packet) => packet,
        };
        let dial = std::mem::take(&mut self.dial) && !self.tunn.has_active_session();
        let packet = match packet {
            None if dial => self.tunn.format_handshake_initiation(true).map(Into::into),
            packet => packet,
        };
        packet.map(|packet| (packet, to))
    }

    fn note_handshake(&mut self) {
        let Some(at) = self.tunn.time_since_last_handshake().and_then(|age| SystemTime::now().checked_sub(age)) else {
            return;
        };
        // The same handshake, computed again, differs by the clock's resolution; the next one is seconds away.
        if self.last_handshake.is_none_or(|last| at > last + Duration::from_secs(1)) {
            self.last_handshake = Some(at);
        }
    }

    pub(super) fn read(&mut self) -> (state::Peer, Pair) {
        self.note_handshake();
        let (_, tx_bytes, rx_bytes, ..) = self.tunn.stats();
        let peer = state::Peer { endpoint: self.endpoint, keepalive: self.keepalive, psk: self.psk };
        let pair = Pair { last_handshake: self.last_handshake, rx_bytes: rx_bytes as u64, tx_bytes: tx_bytes as u64 };
        (peer, pair)
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("key", &self.key).finish_non_exhaustive()
    }
}
