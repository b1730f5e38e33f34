//! Which address of a peer to dial, and when to try the next one.
//!
//! Pure: time is an argument. A pair with a live session is never touched, because its peer may have roamed. A pair
//! without an endpoint dials where its peer was last, else the first address; one that sends and gets no handshake
//! moves on, in order and around.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use crate::{facts::Facts, intent::Intent, keys::PublicKey, names::Device, plan::addresses_of};

type Key = (Device, PublicKey);

/// WireGuard uses no session beyond this age (REJECT_AFTER_TIME, whitepaper §6.1).
pub const SESSION: Duration = Duration::from_secs(180);

/// How long a pair sends in vain before it counts as dead.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long each further address is given.
const HOLD: Duration = Duration::from_secs(10);

/// What a reading says of one pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub endpoint: Option<SocketAddr>,
    /// Age of the last handshake; `None`: there was none.
    pub handshake: Option<Duration>,
    /// Bytes sent, handshakes included.
    pub tx_bytes: u64,
}

impl Seen {
    fn alive(&self) -> bool {
        self.handshake.is_some_and(|age| age < SESSION)
    }
}

/// Remembers, of each pair without a session, since when its present address is on trial; and where its peer was when
/// it last had one. A WireGuard that starts anew has forgotten that, and behind a NAT there is no other way to know.
#[derive(Debug, Default)]
pub struct Dialer {
    trials: BTreeMap<Key, Trial>,
    last: BTreeMap<Key, SocketAddr>,
}

/// An address on trial.
#[derive(Clone, Copy, Debug)]
struct Trial {
    /// When sending to it in vain began; `None`: nothing has been sent.
    since: Option<Duration>,
    patience: Duration,
    /// Bytes sent, at the beginning and when last looked at.
    tx_bytes: [u64; 2],
}

/// What to write now, and when to look again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Dial {
    pub now: BTreeMap<Key, SocketAddr>,
    pub again: Option<Duration>,
}

impl Dialer {
    /// `now`: time on any clock that only goes forward. `candidates`: each pair's addresses, in order.
    pub fn decide(
        &mut self,
        now: Duration,
        candidates: &BTreeMap<Key, Vec<SocketAddr>>,
        seen: &BTreeMap<Key, Seen>,
    ) -> Dial {
        self.trials.retain(|pair, _| candidates.contains_key(pair));
        self.last.retain(|pair, _| candidates.contains_key(pair));
        let mut dial = Dial::default();
        for (pair, addresses) in candidates {
            let seen = seen.get(pair);
            if let Some(alive) = seen.filter(|seen| seen.alive()) {
                self.trials.remove(pair);
                self.last.extend(alive.endpoint.map(|endpoint| (*pair, endpoint)));
                continue;
            }
            let Some(first) = self.last.get(pair).or(addresses.first()) else { continue };
            let tx_bytes = seen.map_or(0, |seen| seen.tx_bytes);
            let started = |patience| Trial { since: Some(now), patience, tx_bytes: [tx_bytes; 2] };
            let Some(current) = seen.and_then(|seen| seen.endpoint) else {
                self.trials.insert(*pair, started(PATIENCE));
                dial.now.insert(*pair, *first);
                look_again(&mut dial, now + PATIENCE);
                continue;
            };
            let idle = Trial { since: None, ..started(PATIENCE) };
            let trial = self.trials.entry(*pair).or_insert(idle);
            let [from, last] = trial.tx_bytes;
            trial.tx_bytes[1] = tx_bytes;
            match trial.since {
                None if tx_bytes > last => *trial = started(PATIENCE),
                None => {}
                Some(since) if now < since + trial.patience => {}
                Some(_) if tx_bytes == from => *trial = idle,
                Some(_) => {
                    *trial = started(HOLD);
                    let next = after(addresses, current).or(addresses.first().copied()).unwrap_or(current);
                    if next != current {
                        dial.now.insert(*pair, next);
                    }
                }
            }
            look_again(&mut dial, trial.since.map_or(now + HOLD, |since| since + trial.patience));
        }
        dial
    }
}

fn look_again(dial: &mut Dial, at: Duration) {
    dial.again = Some(dial.again.map_or(at, |again| again.min(at)));
}

/// The address that follows `current`, around; `None` if it is not among them.
fn after(addresses: &[SocketAddr], current: SocketAddr) -> Option<SocketAddr> {
    let at = addresses.iter().position(|address| *address == current)?;
    addresses.get((at + 1) % addresses.len()).copied()
}

/// Every pair's addresses: its endpoints in order, names by what they resolved to, each at the port that answers this
/// node's slot. A worker dials nobody.
pub fn candidates(intent: &Intent, facts: &Facts) -> BTreeMap<Key, Vec<SocketAddr>> {
    let Some(slot) = intent.slot_of(&facts.node) else { return BTreeMap::new() };
    let gateways = intent.others().flat_map(|(_, member)| &member.gateways);
    gateways
        .map(|(ordinal, gateway)| {
            let addresses = gateway.endpoints.iter().flat_map(|endpoint| {
                let port = endpoint.port + u16::from(slot.get());
                addresses_of(&endpoint.host, &facts.resolved).into_iter().map(move |ip| SocketAddr::new(ip, port))
            });
            ((Device(*ordinal), gateway.key), addresses.collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{model::key, names::Ordinal};
    use expect_test::{Expect, expect};

    const PAIR: fn() -> Key = || (Device(Ordinal::ZERO), key(1));

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([192, 0, 2, n], 27473))
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    /// Plays one pair for a minute and a half, looked at each second. `peer`: what the pair shows at a second, given
    /// the endpoint that was last written.
    fn check(addresses: &[u8], peer: impl Fn(u64, Option<SocketAddr>) -> Option<Seen>, expected: Expect) {
        let candidates = [(PAIR(), addresses.iter().copied().map(address).collect())].into();
        let (mut dialer, mut written, mut told) = (Dialer::default(), None, String::new());
        for second in 0..90 {
            let seen = peer(second, written).map(|seen| (PAIR(), seen)).into_iter().collect();
            let dial = dialer.decide(seconds(second), &candidates, &seen);
            if let Some(next) = dial.now.get(&PAIR()) {
                written = Some(*next);
                told += &format!("{second} s: {next}\n");
            }
        }
        expected.assert_eq(&told);
    }

    /// Sends for ever and is never answered.
    fn silent(second: u64, endpoint: Option<SocketAddr>) -> Option<Seen> {
        Some(Seen { endpoint, handshake: None, tx_bytes: second * 148 })
    }

    #[test]
    fn a_silent_peer_is_tried_at_each_address_in_turn() {
        check(
            &[1, 2, 3],
            silent,
            expect![[r#"
                0 s: 192.0.2.1:27473
                15 s: 192.0.2.2:27473
                25 s: 192.0.2.3:27473
                35 s: 192.0.2.1:27473
                45 s: 192.0.2.2:27473
                55 s: 192.0.2.3:27473
                65 s: 192.0.2.1:27473
                75 s: 192.0.2.2:27473
                85 s: 192.0.2.3:27473
            "#]],
        );
    }

    #[test]
    fn the_only_address_is_written_once() {
        check(&[1], silent, expect!["0 s: 192.0.2.1:27473\n"]);
    }

    #[test]
    fn a_pair_that_does_not_send_is_left_alone() {
        let idle = |_, endpoint| Some(Seen { endpoint, handshake: Some(seconds(500)), tx_bytes: 7 });
        check(&[1, 2], idle, expect!["0 s: 192.0.2.1:27473\n"]);
    }

    /// Its first packet after an hour asks for a handshake, which takes a moment; that alone is no reason to move.
    #[test]
    fn a_pair_that_begins_to_send_is_given_its_time() {
        let woken = |second: u64, _| {
            let handshake = if second < 45 { seconds(3600) } else { seconds(second - 45) };
            Some(Seen {
                endpoint: Some(address(1)),
                handshake: Some(handshake),
                tx_bytes: 1000 + second.saturating_sub(40),
            })
        };
        check(&[1, 2], woken, expect![""]);
    }

    #[test]
    fn a_roamed_endpoint_with_a_session_is_never_overwritten() {
        let roamed = |second: u64, _| {
            Some(Seen { endpoint: Some(address(99)), handshake: Some(seconds(second)), tx_bytes: second * 1000 })
        };
        check(&[1, 2], roamed, expect![""]);
    }

    #[test]
    fn a_roamed_endpoint_whose_session_died_goes_back_to_the_first_address() {
        let dead = |second: u64, written: Option<SocketAddr>| {
            let endpoint = written.or(Some(address(99)));
            Some(Seen { endpoint, handshake: Some(seconds(150 + second)), tx_bytes: second * 1000 })
        };
        check(
            &[1, 2],
            dead,
            expect![[r#"
                46 s: 192.0.2.1:27473
                56 s: 192.0.2.2:27473
                66 s: 192.0.2.1:27473
                76 s: 192.0.2.2:27473
                86 s: 192.0.2.1:27473
            "#]],
        );
    }

    /// A WireGuard that was restarted at second 10, and knows nothing any more.
    #[test]
    fn a_pair_that_lost_its_endpoint_dials_where_its_peer_was_last() {
        let restarted = |second: u64, written: Option<SocketAddr>| match second {
            0..10 => Some(Seen { endpoint: Some(address(99)), handshake: Some(seconds(1)), tx_bytes: 1 }),
            _ => Some(Seen { endpoint: written, handshake: None, tx_bytes: second }),
        };
        check(&[], restarted, expect!["10 s: 192.0.2.99:27473\n"]);
        check(
            &[1, 2],
            restarted,
            expect![[r#"
                10 s: 192.0.2.99:27473
                25 s: 192.0.2.1:27473
                35 s: 192.0.2.2:27473
                45 s: 192.0.2.1:27473
                55 s: 192.0.2.2:27473
                65 s: 192.0.2.1:27473
                75 s: 192.0.2.2:27473
                85 s: 192.0.2.1:27473
            "#]],
        );
    }

    #[test]
    fn a_peer_that_is_not_made_yet_is_dialled_until_it_has_its_endpoint() {
        let late = |second: u64, written: Option<SocketAddr>| {
            (second > 2).then(|| Seen { endpoint: written, handshake: Some(seconds(1)), tx_bytes: 0 })
        };
        check(
            &[1, 2],
            late,
            expect![[r#"
                0 s: 192.0.2.1:27473
                1 s: 192.0.2.1:27473
                2 s: 192.0.2.1:27473
            "#]],
        );
    }
}
