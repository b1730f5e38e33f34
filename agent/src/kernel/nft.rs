//! The nftables table `inet carrick`: rendered whole, replaced in one transaction, read back and compared whole.
//!
//! Chain `keep_source` runs just before the CNI's masquerade (NAT postrouting, priority srcnat - 1) and maps the source of
//! what goes from an own range to a remote one to itself: a connection that has a mapping is skipped by every later NAT
//! chain (net/netfilter/nf_nat_core.c `nf_nat_inet_fn`).
//! Chain `admit` sees what comes out of a tunnel before connection tracking does (prerouting, priority raw), so a
//! packet that was never offered leaves no entry behind, and before any DNAT, so it judges the destination that was sent.
//!
//! The rules look into sets of concatenated ranges, which must not overlap (net/netfilter/nft_set_pipapo.c refuses
//! most overlaps). The pairs as they were wanted may, so they are kept beside, in sets that no rule uses: `*_wanted`.
//!
//! Invariant: a table reads as an [`Nft`] only if every chain, rule and set in it is what [`render`] writes for that value.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{self, Write as _},
    net::IpAddr,
    process::{Command, Output, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use ipnetwork::IpNetwork;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

use super::prefix;
use crate::{names::DEVICE_PREFIX, state::Nft};

/// The table's name; its family is `inet`.
pub(super) const TABLE: &str = "carrick";

const NFT: &str = "nft";
/// A transaction takes milliseconds; one that hangs must not hang the agent.
const LIMIT: Duration = Duration::from_secs(10);

type Pairs = BTreeSet<(IpNetwork, IpNetwork)>;

/// The sets of one address family.
struct Sets {
    ipv4: bool,
    address: &'static str,
    keep: &'static str,
    keep_wanted: &'static str,
    admit: &'static str,
    admit_wanted: &'static str,
}

const FAMILIES: [Sets; 2] = [
    Sets {
        ipv4: true,
        address: "ipv4_addr",
        keep: "keep4",
        keep_wanted: "keep4_wanted",
        admit: "admit4",
        admit_wanted: "admit4_wanted",
    },
    Sets {
        ipv4: false,
        address: "ipv6_addr",
        keep: "keep6",
        keep_wanted: "keep6_wanted",
        admit: "admit6",
        admit_wanted: "admit6_wanted",
    },
];

/// Why the nft table could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("nft is not installed: install the package `nftables`")]
    Missing,
    #[error("cannot run nft")]
    Run(#[source] io::Error),
    #[error("nft did not end within {} s and was killed", LIMIT.as_secs())]
    Hung,
    #[error("nft {action}: {stderr}")]
    Failed { action: &'static str, stderr: String },
    #[error("nft lists the table in a form that is not understood")]
    Json(#[from] serde_json::Error),
    #[error(
        "nft lists the table otherwise than it was written: is this version of nft (`nft --version`) newer than carrick?"
    )]
    Changed,
}

impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        let kind = if matches!(error, Error::Hung) { io::ErrorKind::TimedOut } else { io::ErrorKind::Other };
        io::Error::new(kind, error)
    }
}

/// The table, if it is there and undamaged.
pub(super) fn read() -> Result<Option<Nft>, Error> {
    let listed = run(NFT, &["--json", "list", "table", "inet", TABLE], "")?;
    if listed.status.success() {
        return parse(&String::from_utf8_lossy(&listed.stdout));
    }
    // Its message for a missing table is for people; the list of tables says the same to programs.
    let tables = succeed("list tables", run(NFT, &["--json", "list", "tables", "inet"], "")?)?;
    if names_ours(&serde_json::from_slice(&tables.stdout)?) {
        succeed("list table inet carrick", listed)?;
    }
    Ok(None)
}

/// Replaces the table in one transaction, or deletes it, and makes sure that it reads back as it was written.
pub(super) fn write(wanted: Option<&Nft>) -> Result<(), Error> {
    let text = wanted.map_or_else(|| blank_slate().to_owned(), render);
    succeed("-f", run(NFT, &["-f", "-"], &text)?)?;
    if read()?.as_ref() == wanted { Ok(()) } else { Err(Error::Changed) }
}

fn run(program: &str, args: &[&str], stdin: &str) -> Result<Output, Error> {
    let mut child = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| if error.kind() == io::ErrorKind::NotFound { Error::Missing } else { Error::Run(error) })?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (ended, watched) = mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        let hangs = watched.recv_timeout(LIMIT) == Err(mpsc::RecvTimeoutError::Timeout);
        hangs.then(|| kill(pid, Signal::SIGKILL))
    });
    let fed = child.stdin.take().map_or(Ok(()), |mut pipe| pipe.write_all(stdin.as_bytes()));
    let output = child.wait_with_output();
    drop(ended);
    if matches!(watchdog.join(), Ok(Some(_))) {
        return Err(Error::Hung);
    }
    match fed {
        // It has stopped reading: what it says about that comes with its output.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Run(error)),
        _ => output.map_err(Error::Run),
    }
}

fn succeed(action: &'static str, output: Output) -> Result<Output, Error> {
    if output.status.success() {
        return Ok(output);
    }
    // After its first lines nft repeats the input, which may be long.
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Error::Failed { action, stderr: stderr.lines().take(4).collect::<Vec<_>>().join("; ") })
}

fn names_ours(list: &Value) -> bool {
    objects(list).iter().any(|(kind, table)| *kind == "table" && table["name"] == TABLE && table["family"] == "inet")
}

/// Declared first so that deleting it cannot fail.
fn blank_slate() -> &'static str {
    "table inet carrick {}\ndelete table inet carrick\n"
}

/// What `nft -f -` is given for that value. A pair of two address families means nothing and is left out.
pub fn render(nft: &Nft) -> String {
    let mut text = blank_slate().to_owned();
    text.push_str("table inet carrick {\n");
    for family in &FAMILIES {
        let (keep, admit) = (family.select(&nft.keep_source), Pairs::new());
        let address = family.address;
        for (set, pairs) in [(family.keep, disjoint(&keep)), (family.admit, disjoint(&admit))] {
            let elements = pairs.iter().map(|(a, b)| format!("{a} . {b}"));
            set_text(&mut text, set, &format!("{address} . {address}; flags interval"), elements);
        }
        for (set, pairs) in [(family.keep_wanted, keep), (family.admit_wanted, admit)] {
            let one = |n: &IpNetwork| format!("{} . {}", n.network(), n.prefix());
            let elements = pairs.iter().map(|(a, b)| format!("{} . {}", one(a), one(b)));
            set_text(&mut text, set, &format!("{address} . mark . {address} . mark"), elements);
        }
    }
    text.push_str(CHAINS);
    text.push_str("}\n");
    text
}

fn set_text(text: &mut String, set: &str, kind: &str, elements: impl Iterator<Item = String>) {
    let elements: Vec<String> = elements.collect();
    let elements =
        if elements.is_empty() { String::new() } else { format!(" elements = {{ {} }};", elements.join(", ")) };
    // Writing to a String cannot fail.
    let _infallible = writeln!(text, "  set {set} {{ type {kind};{elements} }}");
}

const CHAINS: &str = r#"  chain keep_source {
    type nat hook postrouting priority 99; policy accept;
    ip saddr . ip daddr @keep4 snat ip to ip saddr comment "own to remote: the source stays"
    ip6 saddr . ip6 daddr @keep6 snat ip6 to ip6 saddr comment "own to remote: the source stays"
  }
  chain admit {
    type filter hook prerouting priority -300; policy accept;
    iifname != "carrick-wg*" accept comment "not out of a tunnel"
    ip saddr . ip daddr @admit4 accept comment "offered"
    ip6 saddr . ip6 daddr @admit6 accept comment "offered"
    counter drop comment "never offered to its sender"
  }
"#;

/// The value that a table of ours holds, from `nft --json list table inet carrick`; `None` if anything in it is not as
/// [`render`] writes it. An error is text that is no listing at all.
pub fn parse(json: &str) -> Result<Option<Nft>, Error> {
    let listing: Value = serde_json::from_str(json)?;
    let mut skeleton: Vec<(String, Value)> = Vec::new();
    let mut elements: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    for (kind, object) in objects(&listing) {
        let mut object = normal(object);
        let owner = if kind == "rule" { &object["chain"] } else { &object["name"] };
        let owner = owner.as_str().unwrap_or_default().to_owned();
        let found = if kind == "set" { object.as_object_mut().and_then(|set| set.remove("elem")) } else { None };
        if let Some(Value::Array(found)) = found {
            elements.insert(owner.clone(), found);
        }
        skeleton.push((format!("{kind} {owner}"), object));
    }
    // Stable: the order of a chain's rules counts, that of sets and chains does not.
    skeleton.sort_by(|a, b| a.0.cmp(&b.0));
    if skeleton != self::skeleton() {
        return Ok(None);
    }
    Ok(contents(&elements))
}

/// The value that the sets hold; `None` if those that rules use do not follow from those that were wanted.
fn contents(elements: &BTreeMap<String, Vec<Value>>) -> Option<Nft> {
    let none = Vec::new();
    let mut nft = Nft::default();
    for family in &FAMILIES {
        for (used, wanted, pairs) in [
            (family.keep, family.keep_wanted, &mut nft.keep_source),
            (family.admit, family.admit_wanted, &mut Pairs::new()),
        ] {
            let wanted = elements.get(wanted).unwrap_or(&none).iter().map(wanted_pair).collect::<Option<Pairs>>()?;
            let used = elements.get(used).unwrap_or(&none).iter().map(used_pair).collect::<Option<Pairs>>()?;
            if used != disjoint(&wanted) {
                return None;
            }
            pairs.extend(wanted);
        }
    }
    Some(nft)
}

fn used_pair(element: &Value) -> Option<(IpNetwork, IpNetwork)> {
    let network = |value: &Value| match value {
        Value::String(address) => address.parse::<IpAddr>().ok().map(IpNetwork::from),
        _ => {
            let prefix = value.get("prefix")?;
            IpNetwork::new(prefix["addr"].as_str()?.parse().ok()?, prefix["len"].as_u64()?.try_into().ok()?).ok()
        }
    };
    let [a, b] = element.get("concat")?.as_array()?.as_slice() else { return None };
    Some((network(a)?, network(b)?))
}

fn wanted_pair(element: &Value) -> Option<(IpNetwork, IpNetwork)> {
    let network = |address: &Value, prefix: &Value| {
        IpNetwork::new(address.as_str()?.parse().ok()?, prefix.as_u64()?.try_into().ok()?).ok()
    };
    let [a, a_prefix, b, b_prefix] = element.get("concat")?.as_array()?.as_slice() else { return None };
    Some((network(a, a_prefix)?, network(b, b_prefix)?))
}

/// The objects of a listing: (kind, object).
fn objects(listing: &Value) -> Vec<(&str, &Value)> {
    let entries = listing["nftables"].as_array().map(Vec::as_slice).unwrap_or_default();
    let entries = entries.iter().filter_map(Value::as_object).flatten();
    entries.map(|(kind, object)| (kind.as_str(), object)).filter(|(kind, _)| *kind != "metainfo").collect()
}

/// Without what differs from one listing to the next, and from one version of nft to the next: handles, counts, and lists
/// of one flag, which newer versions print as the flag.
fn normal(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(key, _)| !["handle", "packets", "bytes"].contains(&key.as_str()));
            let field = |(key, value): (&String, &Value)| match value {
                Value::String(_) if key == "flags" => (key.clone(), json!([value])),
                _ => (key.clone(), normal(value)),
            };
            Value::Object(kept.map(field).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(normal).collect()),
        other => other.clone(),
    }
}

/// Everything in our table but the elements of its sets, as [`parse`] lays it out.
fn skeleton() -> Vec<(String, Value)> {
    let mut all = vec![
        chain("admit", "filter", "prerouting", -300),
        chain("keep_source", "nat", "postrouting", 99),
        rule(
            "admit",
            "not out of a tunnel",
            json!([
                {"match": {"op": "!=", "left": {"meta": {"key": "iifname"}}, "right": format!("{DEVICE_PREFIX}*")}},
                {"accept": null},
            ]),
        ),
        rule("admit", "offered", json!([pair_in("ip", "@admit4"), {"accept": null}])),
        rule("admit", "offered", json!([pair_in("ip6", "@admit6"), {"accept": null}])),
        rule("admit", "never offered to its sender", json!([{"counter": {}}, {"drop": null}])),
        rule("keep_source", "own to remote: the source stays", json!([pair_in("ip", "@keep4"), keep("ip")])),
        rule("keep_source", "own to remote: the source stays", json!([pair_in("ip6", "@keep6"), keep("ip6")])),
        ("table carrick".to_owned(), json!({"family": "inet", "name": TABLE})),
    ];
    for family in &FAMILIES {
        let address = family.address;
        for name in [family.keep, family.admit] {
            let set = json!({"family": "inet", "table": TABLE, "name": name, "type": [address, address], "flags": ["interval"]});
            all.push((format!("set {name}"), set));
        }
        for name in [family.keep_wanted, family.admit_wanted] {
            let set =
                json!({"family": "inet", "table": TABLE, "name": name, "type": [address, "mark", address, "mark"]});
            all.push((format!("set {name}"), set));
        }
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn chain(name: &str, kind: &str, hook: &str, priority: i32) -> (String, Value) {
    let chain = json!({
        "family": "inet", "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
    });
    (format!("chain {name}"), chain)
}

fn rule(chain: &str, comment: &str, expression: Value) -> (String, Value) {
    let rule = json!({"family": "inet", "table": TABLE, "chain": chain, "comment": comment, "expr": expression});
    (format!("rule {chain}"), rule)
}

fn pair_in(protocol: &str, set: &str) -> Value {
    let field = |field| json!({"payload": {"protocol": protocol, "field": field}});
    json!({"match": {"op": "==", "left": {"concat": [field("saddr"), field("daddr")]}, "right": set}})
}

fn keep(protocol: &str) -> Value {
    json!({"snat": {"family": protocol, "addr": {"payload": {"protocol": protocol, "field": "saddr"}}}})
}

impl Sets {
    fn select(&self, pairs: &Pairs) -> Pairs {
        pairs.iter().filter(|(a, b)| a.is_ipv4() == self.ipv4 && b.is_ipv4() == self.ipv4).copied().collect()
    }
}

/// Pairs that cover the same (source, destination) addresses, and each of them once.
fn disjoint(pairs: &Pairs) -> Pairs {
    let lengths: BTreeSet<u8> = pairs.iter().map(|(source, _)| source.prefix()).collect();
    let mut kept: BTreeMap<IpNetwork, BTreeSet<IpNetwork>> = BTreeMap::new();
    // A range sorts before what lies in it, so only ranges that enclose `source` have been here.
    for (source, destination) in pairs {
        let mut rest = vec![*destination];
        let outer = lengths.iter().filter_map(|length| prefix::around(source.network(), *length));
        for taken in outer.take_while(|outer| outer.prefix() <= source.prefix()).filter_map(|outer| kept.get(&outer)) {
            rest = rest.into_iter().flat_map(|part| outside(part, taken)).collect();
        }
        kept.entry(*source).or_default().extend(rest);
    }
    kept.into_iter().flat_map(|(source, parts)| parts.into_iter().map(move |part| (source, part))).collect()
}

/// What is left of `part` without ranges that do not overlap one another.
fn outside(part: IpNetwork, taken: &BTreeSet<IpNetwork>) -> Vec<IpNetwork> {
    // Of such ranges at most the last that sorts before `part` can enclose it.
    let before = taken.range(..part).next_back();
    let inside = taken.range(part..).take_while(|inner| part.contains(inner.network()));
    let mut rest = vec![part];
    for taken in before.into_iter().chain(inside) {
        rest = rest.into_iter().flat_map(|part| prefix::without(part, *taken)).collect();
    }
    rest
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
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
            let (written, read) = in_netns(|| async { (write(Some(&nft)), read()) });
            prop_assert!(written.is_ok(), "{:?}\n{}", written, render(&nft));
            prop_assert_eq!(read.unwrap(), Some(nft));
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
        let rest =
            Pairs::from([(net("10.44.0.0/16"), net("10.42.0.0/16")), (net("10.44.3.0/24"), net("10.43.0.0/16"))]);
        assert_eq!(disjoint(&wanted), rest);
    }

    #[test]
    fn rendered_table() {
        let net = |text: &str| text.parse::<IpNetwork>().unwrap();
        let nft = Nft {
            keep_source: BTreeSet::from([(net("10.42.0.0/16"), net("10.44.0.0/16"))]),
            admit: BTreeSet::from([(net("10.44.0.0/16"), net("10.42.0.0/16")), (net("fd44::/48"), net("fd42::1/128"))]),
        };
        expect_test::expect![[r#"
            table inet carrick {}
            delete table inet carrick
            table inet carrick {
              set keep4 { type ipv4_addr . ipv4_addr; flags interval; elements = { 10.42.0.0/16 . 10.44.0.0/16 }; }
              set admit4 { type ipv4_addr . ipv4_addr; flags interval; elements = { 10.44.0.0/16 . 10.42.0.0/16 }; }
              set keep4_wanted { type ipv4_addr . mark . ipv4_addr . mark; elements = { 10.42.0.0 . 16 . 10.44.0.0 . 16 }; }
              set admit4_wanted { type ipv4_addr . mark . ipv4_addr . mark; elements = { 10.44.0.0 . 16 . 10.42.0.0 . 16 }; }
              set keep6 { type ipv6_addr . ipv6_addr; flags interval; }
              set admit6 { type ipv6_addr . ipv6_addr; flags interval; elements = { fd44::/48 . fd42::1/128 }; }
              set keep6_wanted { type ipv6_addr . mark . ipv6_addr . mark; }
              set admit6_wanted { type ipv6_addr . mark . ipv6_addr . mark; elements = { fd44:: . 48 . fd42::1 . 128 }; }
              chain keep_source {
                type nat hook postrouting priority 99; policy accept;
                ip saddr . ip daddr @keep4 snat ip to ip saddr comment "own to remote: the source stays"
                ip6 saddr . ip6 daddr @keep6 snat ip6 to ip6 saddr comment "own to remote: the source stays"
              }
              chain admit {
                type filter hook prerouting priority -300; policy accept;
                iifname != "carrick-wg*" accept comment "not out of a tunnel"
                ip saddr . ip daddr @admit4 accept comment "offered"
                ip6 saddr . ip6 daddr @admit6 accept comment "offered"
                counter drop comment "never offered to its sender"
              }
            }
        "#]].assert_eq(&render(&nft));
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
            assert_eq!(read().unwrap(), None);
            sh("nft add table ip carrick; nft add table inet carrick2");
            assert_eq!(read().unwrap(), None);
        });
        assert!(matches!(parse("table inet carrick {}"), Err(Error::Json(_))));
        assert_eq!(parse("{}").unwrap(), None);
    }
}
