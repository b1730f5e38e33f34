//! What is rendered, and what the kernel makes of it.

use proptest::prelude::*;

use super::*;
use crate::kernel::tests::{any_nft, any_prefix, in_netns, sh};

fn any_pairs() -> impl Strategy<Value = Pairs> {
    proptest::collection::btree_set((any_prefix(true), any_prefix(true)), 0..20)
}

fn holds(pairs: &Pairs, (source, destination): (IpAddr, IpAddr)) -> usize {
    pairs.iter().filter(|(a, b)| a.contains(source) && b.contains(destination)).count()
}

proptest! {
    #[test]
    fn disjoint_pairs_cover_the_same_addresses_once(pairs in any_pairs()) {
        let split = disjoint(&pairs);
        let corners = |pairs: &Pairs| {
            let ends = |n: &IpNetwork| [n.network(), n.broadcast()];
            pairs.iter().flat_map(|(a, b)| ends(a).map(|x| ends(b).map(|y| (x, y)))).flatten().collect::<Vec<_>>()
        };
        for point in corners(&pairs).into_iter().chain(corners(&split)) {
            prop_assert_eq!(holds(&split, point), usize::from(holds(&pairs, point) > 0), "{:?}", point);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn the_kernel_takes_and_returns_every_table(nft in any_nft()) {
        let (written, read) = in_netns(|| async { (write(Some(nft.clone()), None), list()) });
        prop_assert!(written.is_ok(), "{:?}\n{}", written, render(&nft));
        prop_assert_eq!(read.unwrap(), Some(nft));
    }

    /// Step by step, and where somebody was there in between.
    #[test]
    fn one_table_becomes_the_other(from in any_nft(), to in any_nft(), ports in any::<bool>(), meddled in any::<bool>()) {
        let to = if ports { to } else { Nft { hop_port: from.hop_port, hop_sources: from.hop_sources, ..to } };
        let (written, read) = in_netns(|| async {
            let seen = write(Some(from.clone()), None).unwrap();
            if meddled {
                sh("nft flush ruleset");
            } else if let Some(steps) = steps(&from, &to) {
                // It must not be by the other way that it comes out right.
                succeed("steps", run(NFT, &["--check", "-f", "-"], &steps).unwrap()).unwrap();
            }
            (write(Some(to.clone()), Some(seen)), list())
        });
        prop_assert!(written.is_ok(), "{:?}\n{:?}", written, steps(&from, &to));
        // Where there is nothing to write nobody looks: the next reading does.
        let nothing_to_write = steps(&from, &to).is_some_and(|steps| steps.is_empty());
        prop_assert!(read.unwrap() == Some(to) || (meddled && nothing_to_write));
    }
}

#[test]
fn what_nothing_overlaps_stays_as_it_is() {
    let net = |text: &str| text.parse::<IpNetwork>().unwrap();
    let wanted = Pairs::from([
        (net("10.44.0.0/16"), net("10.42.0.0/16")),
        (net("10.44.0.0/16"), net("10.42.7.0/24")),
        (net("10.44.3.0/24"), net("10.42.0.0/15")),
    ]);
    let rest = Pairs::from([(net("10.44.0.0/16"), net("10.42.0.0/16")), (net("10.44.3.0/24"), net("10.43.0.0/16"))]);
    assert_eq!(disjoint(&wanted), rest);
}

#[test]
fn rendered_table() {
    let net = |text: &str| text.parse::<IpNetwork>().unwrap();
    let nft = Nft {
        keep_source: BTreeSet::from([(net("10.42.0.0/16"), net("10.44.0.0/16"))]),
        nodes: ["10.0.0.2", "10.0.0.3", "fd00::2"].map(|node| node.parse().unwrap()).into(),
        hop_port: 27472,
        hop_sources: (27456, 27471),
        native: ["eth0", "eth1.7"].map(str::to_owned).into(),
    };
    expect_test::expect![[r#"
        table inet carrick {}
        delete table inet carrick
        table inet carrick {
          set keep4 { type ipv4_addr . ipv4_addr; flags interval; elements = { 10.42.0.0/16 . 10.44.0.0/16 }; }
          set keep4_wanted { type ipv4_addr . mark . ipv4_addr . mark; elements = { 10.42.0.0 . 16 . 10.44.0.0 . 16 }; }
          set nodes4 { type ipv4_addr; size 16384; elements = { 10.0.0.2, 10.0.0.3 }; }
          set keep6 { type ipv6_addr . ipv6_addr; flags interval; }
          set keep6_wanted { type ipv6_addr . mark . ipv6_addr . mark; }
          set nodes6 { type ipv6_addr; size 16384; elements = { fd00::2 }; }
          set native { type ifname; size 256; elements = { "eth0", "eth1.7" }; }
          set hop_wanted { type inet_service . inet_service . inet_service; elements = { 27472 . 27456 . 27471 }; }
          chain keep_source {
            type nat hook postrouting priority 99; policy accept;
            ip saddr . ip daddr @keep4 snat ip to ip saddr comment "own to remote: the source stays"
            ip6 saddr . ip6 daddr @keep6 snat ip6 to ip6 saddr comment "own to remote: the source stays"
          }
          chain hop_in {
            type filter hook prerouting priority -300; policy accept;
            udp dport 27472 goto hop_guard
          }
          chain hop_guard {
            iifname @native udp sport 27456-27471 ip saddr @nodes4 notrack accept comment "the hop"
            iifname @native udp sport 27456-27471 ip6 saddr @nodes6 notrack accept comment "the hop"
            iifname @native accept
            ip daddr @nodes4 counter drop comment "forwarded: forged"
            ip6 daddr @nodes6 counter drop comment "forwarded: forged"
            fib daddr type local counter drop comment "from here: forged"
          }
          chain hop_out {
            type filter hook output priority -300; policy accept;
            udp dport 27472 goto hop_untracked
          }
          chain hop_untracked {
            udp sport 27456-27471 ip daddr @nodes4 notrack accept comment "the hop"
            udp sport 27456-27471 ip6 daddr @nodes6 notrack accept comment "the hop"
          }
        }
    "#]]
    .assert_eq(&render(&nft));
}

#[test]
fn what_was_seen_stands_until_somebody_changes_anything() {
    let nft = Nft { hop_port: 1, hop_sources: (2, 3), ..Nft::default() };
    in_netns(|| async {
        let written = write(Some(nft.clone()), None).unwrap();
        let seen = read(Some(written)).unwrap();
        assert!(seen.generation != 0 && seen.table() == Some(&nft));
        // It is not asked again: this could not be read.
        let other = Nft { hop_port: 9, ..nft.clone() };
        let kept = read(Some(Seen { table: Some(other.clone()), ..seen })).unwrap();
        assert_eq!(kept.table(), Some(&other));
        sh("nft add table ip others");
        let seen = read(Some(kept)).unwrap();
        assert_eq!(seen.table(), Some(&nft));
        sh("nft delete table inet carrick");
        assert_eq!(read(Some(seen)).unwrap().table(), None);
    });
}

#[test]
fn what_nobody_else_was_there_for_is_not_read_again() {
    let less = Nft { hop_port: 1, hop_sources: (2, 3), ..Nft::default() };
    let more = Nft { native: BTreeSet::from(["eth0".to_owned()]), ..less.clone() };
    in_netns(|| async {
        let replaced = write(Some(less.clone()), None).unwrap();
        assert_eq!(replaced.generation, generation().unwrap());
        let stepped = write(Some(more.clone()), Some(replaced)).unwrap();
        assert_eq!((stepped.generation, list().unwrap()), (generation().unwrap(), Some(more.clone())));
        sh("nft add table ip others");
        let disturbed = write(Some(less.clone()), Some(stepped)).unwrap();
        assert_eq!((disturbed.generation, list().unwrap()), (0, Some(less.clone())));
    });
}

#[test]
fn a_range_more_and_a_range_less_are_two_elements() {
    let net = |text: &str| text.parse::<IpNetwork>().unwrap();
    let pair = |remote| (net("10.42.0.0/16"), net(remote));
    let kept = BTreeSet::from([pair("10.44.0.0/16"), pair("10.45.0.0/16")]);
    let from = Nft { keep_source: kept, ..Nft::default() };
    let to = Nft { keep_source: BTreeSet::from([pair("10.45.0.0/16"), pair("10.46.0.0/16")]), ..Nft::default() };
    expect_test::expect![[r#"
        delete element inet carrick keep4 { 10.42.0.0/16 . 10.44.0.0/16 }
        delete element inet carrick keep4_wanted { 10.42.0.0 . 16 . 10.44.0.0 . 16 }
        add element inet carrick keep4 { 10.42.0.0/16 . 10.46.0.0/16 }
        add element inet carrick keep4_wanted { 10.42.0.0 . 16 . 10.46.0.0 . 16 }
    "#]]
    .assert_eq(&steps(&from, &to).unwrap());
    assert_eq!(steps(&from, &from).unwrap(), "");
    assert_eq!(steps(&from, &Nft { hop_port: 1, ..to }), None);
}

#[test]
fn errors_name_the_package_and_repeat_what_nft_says() {
    assert!(matches!(run("no-such-nft", &[], ""), Err(Error::Missing)));
    assert_eq!(Error::Missing.to_string(), "nft is not installed: install the package `nftables`");
    let refused = in_netns(|| async { succeed("-f", run(NFT, &["-f", "-"], "table inet carrick { nonsense }")?) });
    let message = refused.unwrap_err().to_string();
    assert!(message.starts_with("nft -f: ") && message.contains("syntax error"), "{message}");
}

#[test]
fn a_missing_table_is_none_and_text_that_is_no_listing_an_error() {
    in_netns(|| async {
        assert_eq!(list().unwrap(), None);
        sh("nft add table ip carrick; nft add table inet carrick2");
        assert_eq!(list().unwrap(), None);
    });
    assert!(matches!(parse("table inet carrick {}"), Err(Error::Json(_))));
    assert_eq!(parse("{}").unwrap(), None);
}
