//! What stands before the public-key work of a handshake: who floods a device gets cookies, then nothing.
//!
//! Invariant: in a second, at most [`MAX_PER_SECOND`] initiations cost a Diffie-Hellman, and data costs nothing here.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use gotatun::{
    noise::{TunnResult, rate_limiter::RateLimiter},
    packet::{Packet, WgKind},
    x25519,
};

/// Handshakes per second and source address before a cookie is asked for (whitepaper §5.3).
const PER_ADDRESS: u64 = 100;
/// Initiations per second of all addresses before everybody is asked for a cookie. One costs a third of a millisecond.
const UNDER_LOAD: u32 = 200;
/// Initiations per second that are let through, cookie or not.
const MAX_PER_SECOND: u32 = 1000;
/// Cookies per second that are given to initiators. Each is a system call.
const MAX_COOKIES: u32 = 2000;
/// An initiation's first byte.
const INITIATION: u8 = 1;

/// Checks a device's incoming messages.
pub(super) struct Gate {
    per_address: Arc<RateLimiter>,
    /// Asks always.
    strict: RateLimiter,
}

/// What came in the current second, counted by the one task that receives.
#[derive(Debug)]
pub(super) struct Load {
    since: Instant,
    /// With the device's public key, so by somebody who knows it.
    initiations: u32,
    passed: u32,
    cookies: u32,
}

impl Gate {
    pub(super) fn new(public: &x25519::PublicKey) -> Gate {
        let per_address = Arc::new(RateLimiter::new(public, PER_ADDRESS));
        Gate { per_address, strict: RateLimiter::new(public, 0) }
    }

    /// What gotatun wants to have of each peer; it only resets it.
    pub(super) fn limiter(&self) -> Arc<RateLimiter> {
        self.per_address.clone()
    }

    /// Begins a new second, if it is time. To be called at least each second.
    pub(super) fn tick(&self) {
        self.per_address.try_reset_count();
        self.strict.try_reset_count();
    }

    /// The message, if it is to be looked at; otherwise what is to be answered, if anything.
    pub(super) fn admit(&self, load: &mut Load, packet: Packet, from: SocketAddr) -> Result<WgKind, Option<WgKind>> {
        if packet.first() != Some(&INITIATION) {
            return self.per_address.verify_packet(from, packet).map_err(cookie);
        }
        load.tick(Instant::now());
        let limiter = if load.initiations < UNDER_LOAD { &self.per_address } else { &self.strict };
        let admitted = limiter.verify_packet(from, packet).map_err(cookie);
        let (count, most) = match &admitted {
            Ok(_) => (&mut load.passed, MAX_PER_SECOND),
            Err(Some(_)) => (&mut load.cookies, MAX_COOKIES),
            // One with a wrong MAC is cheap, and must not make it harder for others.
            Err(None) => return admitted,
        };
        load.initiations = load.initiations.saturating_add(1);
        if *count >= most {
            return Err(None);
        }
        *count += 1;
        admitted
    }
}

fn cookie(refused: TunnResult) -> Option<WgKind> {
    match refused {
        TunnResult::WriteToNetwork(cookie) => Some(cookie),
        _ => None,
    }
}

impl Load {
    pub(super) fn new(now: Instant) -> Load {
        Load { since: now, initiations: 0, passed: 0, cookies: 0 }
    }

    fn tick(&mut self, now: Instant) {
        if now.saturating_duration_since(self.since) >= Duration::from_secs(1) {
            *self = Load::new(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use bytes::BytesMut;
    use gotatun::noise::{Tunn, index_table::IndexTable};

    use super::*;

    fn public(secret: u8) -> x25519::PublicKey {
        x25519::PublicKey::from(&x25519::StaticSecret::from([secret; 32]))
    }

    fn initiator(of: u8) -> Tunn {
        let limiter = Arc::new(RateLimiter::new(&public(9), 1));
        let secret = x25519::StaticSecret::from([9; 32]);
        Tunn::new(secret, public(of), None, None, IndexTable::from_os_rng(), limiter)
    }

    fn initiation(tunn: &mut Tunn) -> Packet {
        tunn.format_handshake_initiation(true).unwrap().into()
    }

    fn copy(packet: &Packet) -> Packet {
        Packet::from_bytes(BytesMut::from(&packet[..]))
    }

    fn address(n: u32) -> SocketAddr {
        (Ipv4Addr::from(0x0a00_0000 + n), 1).into()
    }

    /// How many were (let through, answered with a cookie, dropped).
    fn count(outcomes: impl Iterator<Item = Result<WgKind, Option<WgKind>>>) -> (u32, u32, u32) {
        outcomes.fold((0, 0, 0), |(passed, cookies, dropped), outcome| match outcome {
            Ok(_) => (passed + 1, cookies, dropped),
            Err(Some(_)) => (passed, cookies + 1, dropped),
            Err(None) => (passed, cookies, dropped + 1),
        })
    }

    /// A second that does not end: whether the machine is fast makes no difference.
    fn endless() -> Load {
        Load::new(Instant::now() + Duration::from_secs(3600))
    }

    #[test]
    fn a_flood_gets_cookies_then_nothing_and_who_has_a_cookie_passes() {
        let (gate, mut load) = (Gate::new(&public(1)), endless());
        let strangers = initiation(&mut initiator(1));
        let flood = (0..20_000).map(|n| gate.admit(&mut load, copy(&strangers), address(n % 230)));
        assert_eq!(count(flood), (UNDER_LOAD, MAX_COOKIES, 20_000 - UNDER_LOAD - MAX_COOKIES));

        load.cookies = 0;
        let (mut peer, from) = (initiator(1), address(500));
        let Err(Some(cookie)) = gate.admit(&mut load, initiation(&mut peer), from) else { panic!("no cookie") };
        peer.handle_incoming_packet(cookie);
        let with_cookie = initiation(&mut peer);
        assert!(gate.admit(&mut load, copy(&with_cookie), address(501)).is_err(), "another's cookie");
        let again = (0..20_000).map(|_| gate.admit(&mut load, copy(&with_cookie), from));
        let passed = MAX_PER_SECOND - UNDER_LOAD;
        assert_eq!(count(again), (passed, 0, 20_000 - passed));

        load.tick(load.since + Duration::from_secs(1));
        gate.admit(&mut load, initiation(&mut peer), from).unwrap();
    }

    #[test]
    fn one_address_is_asked_for_a_cookie_before_all_are() {
        let (gate, mut load) = (Gate::new(&public(1)), endless());
        let message = initiation(&mut initiator(1));
        let outcomes = (0..150).map(|_| gate.admit(&mut load, copy(&message), address(1)));
        assert_eq!(count(outcomes), (100, 50, 0));
    }

    #[test]
    fn what_is_not_for_this_key_is_no_load() {
        let (gate, mut load) = (Gate::new(&public(1)), endless());
        let message = initiation(&mut initiator(2));
        let outcomes = (0..20_000).map(|n| gate.admit(&mut load, copy(&message), address(n % 230)));
        assert_eq!(count(outcomes), (0, 0, 20_000));
        gate.admit(&mut load, initiation(&mut initiator(1)), address(1)).unwrap();
    }
}
