//! The nftables table `inet carrick`: rendered whole, read back and compared whole. Where it stands, elements of its sets are
//! added and taken; all else is replaced, in one transaction.
//!
//! Chain `keep_source` runs just before the CNI's masquerade (NAT postrouting, priority srcnat - 1) and maps the source of
//! what goes from an own range to a remote one to itself: a connection that has a mapping is skipped by every later NAT
//! chain (net/netfilter/nf_nat_core.c `nf_nat_inet_fn`).
//! The hop's chains run before connection tracking does (priority raw). What does not go to the hop port, a later fragment
//! among it, which has no port, leaves them by their one rule; the chains that this leads to leave the hop's own UDP between
//! nodes untracked. `hop_guard` also drops what comes by no native device and goes to the hop port of a node, this one
//! included: it is a pod's, and a pod could forge hop packets. (What comes by a native device is judged by `from_hop`.)
//!
//! The rules look into sets of concatenated ranges, which must not overlap (net/netfilter/nft_set_pipapo.c refuses
//! most overlaps). The pairs as they were wanted may, so they are kept beside, in sets that no rule uses: `*_wanted`.
//!
//! Invariant: a table reads as an [`Nft`] only if every chain, rule and set in it is what [`render`] writes for that value.

mod run;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io,
    net::IpAddr,
};

use ebpf::capacity;
use ipnetwork::IpNetwork;
use netlink_packet_core::NLM_F_ACK;
use serde_json::{Value, json};

pub use self::run::Error;
use self::run::{run, succeed};
use super::{
    netfilter::{NFGENMSG, connect, message, nlas, receive},
    prefix,
};
use crate::state::Nft;

/// The table's name; its family is `inet`.
pub(super) const TABLE: &str = "carrick";

const NFT: &str = "nft";
/// NFT_MSG_GETGEN, and NFTA_GEN_ID of its answer (include/uapi/linux/netfilter/nf_tables.h).
const GET_GENERATION: u16 = (libc::NFNL_SUBSYS_NFTABLES as u16) << 8 | 16;
const GENERATION: u16 = 1;
type Pairs = BTreeSet<(IpNetwork, IpNetwork)>;

/// The sets of one address family.
struct Sets {
    ipv4: bool,
    address: &'static str,
    keep: &'static str,
    keep_wanted: &'static str,
    nodes: &'static str,
}

const FAMILIES: [Sets; 2] = [
    Sets { ipv4: true, address: "ipv4_addr", keep: "keep4", keep_wanted: "keep4_wanted", nodes: "nodes4" },
    Sets { ipv4: false, address: "ipv6_addr", keep: "keep6", keep_wanted: "keep6_wanted", nodes: "nodes6" },
];

/// The hop's ports, (port, first source, last source), from which the rules are written. No rule uses it.
const HOP_WANTED: &str = "hop_wanted";
const NATIVE: &str = "native";

/// The table as it was at one of the kernel's generations of all tables: each transaction, whosever, makes another. A
/// listing takes as many milliseconds as there are tens of ranges, and most passes find what the last one found.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// 0, which the kernel leaves out: somebody else was there while it was written.
    generation: u32,
    table: Option<Nft>,
}

impl Seen {
    pub(super) fn table(&self) -> Option<&Nft> {
        self.table.as_ref()
    }
}

/// The table, if it is there and undamaged: as it was seen, where nothing has changed since.
pub(super) fn read(seen: Option<Seen>) -> Result<Seen, Error> {
    // Asked before the table is: what is changed in between is another generation.
    let generation = generation().map_err(Error::Generation)?;
    match seen {
        Some(seen) if seen.generation == generation => Ok(seen),
        _ => Ok(Seen { generation, table: list()? }),
    }
}

fn generation() -> io::Result<u32> {
    let socket = connect()?;
    socket.send(&message(GET_GENERATION, NLM_F_ACK, libc::AF_UNSPEC as u8, &[]), 0)?;
    let mut found = None;
    receive(&socket, |payload| {
        let mut attributes = payload.get(NFGENMSG..).into_iter().flat_map(nlas);
        let id = attributes.find(|attribute| attribute.kind() == GENERATION);
        found = found.or(id.and_then(|id| Some(u32::from_be_bytes(*id.value().first_chunk()?))));
    })?;
    found.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "an answer without a generation"))
}

fn list() -> Result<Option<Nft>, Error> {
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

/// Changes the table in one transaction, or deletes it. One that is replaced is made sure to read back as it was written.
pub(super) fn write(wanted: Option<Nft>, seen: Option<Seen>) -> Result<Seen, Error> {
    let before = seen.as_ref().map_or(0, |seen| seen.generation);
    let stands = seen.and_then(|seen| seen.table);
    let steps = stands.zip(wanted.as_ref()).and_then(|(stands, wanted)| steps(&stands, wanted));
    match &steps {
        Some(nothing) if nothing.is_empty() => Ok(Seen { generation: before, table: wanted }),
        // Refused, if somebody was here since the table was seen.
        Some(steps) if run(NFT, &["-f", "-"], steps)?.status.success() => {
            let now = generation().map_err(Error::Generation)?;
            let ours_alone = before > 0 && now == before.wrapping_add(1);
            Ok(Seen { generation: if ours_alone { now } else { 0 }, table: wanted })
        }
        _ => replace(wanted),
    }
}

fn replace(wanted: Option<Nft>) -> Result<Seen, Error> {
    let text = wanted.as_ref().map_or_else(|| blank_slate().to_owned(), render);
    succeed("-f", run(NFT, &["-f", "-"], &text)?)?;
    let now = read(None)?;
    if now.table == wanted { Ok(now) } else { Err(Error::Changed) }
}

/// What `nft -f -` is given to make one table the other, by its sets' elements alone; `None`: its rules are others, too.
fn steps(from: &Nft, to: &Nft) -> Option<String> {
    if (from.hop_port, from.hop_sources) != (to.hop_port, to.hop_sources) {
        return None;
    }
    let [from, to] =
        [from, to].map(|nft| sets(nft).into_iter().map(|set| (set.name, set.elements.into_iter().collect())));
    let sets: Vec<(_, BTreeSet<String>, BTreeSet<String>)> =
        from.zip(to).map(|((set, a), (_, b))| (set, a, b)).collect();
    let mut text = String::new();
    let mut step = |verb: &str, set: &str, elements: Vec<&str>| {
        if !elements.is_empty() {
            // Writing to a String cannot fail.
            let _infallible = writeln!(text, "{verb} element inet {TABLE} {set} {{ {} }}", elements.join(", "));
        }
    };
    // What goes may overlap what comes.
    sets.iter().for_each(|(set, from, to)| step("delete", set, from.difference(to).map(String::as_str).collect()));
    sets.iter().for_each(|(set, from, to)| step("add", set, to.difference(from).map(String::as_str).collect()));
    Some(text)
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
    for Set { name, kind, elements } in sets(nft) {
        let elements =
            if elements.is_empty() { String::new() } else { format!(" elements = {{ {} }};", elements.join(", ")) };
        // Writing to a String cannot fail.
        let _infallible = writeln!(text, "  set {name} {{ type {kind};{elements} }}");
    }
    text.push_str(&chains(nft.hop_port, nft.hop_sources));
    text.push_str("}\n");
    text
}

/// Whether the text of a rule can say the name of that link: nft takes a star for a pattern.
pub(super) fn can_say(link: &str) -> bool {
    link.bytes().all(|byte| byte.is_ascii_graphic() && !b"\"*\\".contains(&byte))
}

/// A set, as it is written. One that is looked into for every packet of the hop says how many elements it may have: the
/// kernel has faster tables for those (net/netfilter/nft_set_hash.c `nft_hash_fast_lookup`).
struct Set {
    name: &'static str,
    kind: String,
    elements: Vec<String>,
}

/// Native devices that the set has room for.
const MOST_NATIVE: u32 = 256;

/// Those of a table, always the same ones in the same order.
fn sets(nft: &Nft) -> Vec<Set> {
    let mut sets = Vec::new();
    for family in &FAMILIES {
        let (keep, address) = (family.select(&nft.keep_source), family.address);
        let one = |n: &IpNetwork| format!("{} . {}", n.network(), n.prefix());
        let nodes = nft.nodes.iter().filter(|node| node.is_ipv4() == family.ipv4);
        sets.extend([
            Set {
                name: family.keep,
                kind: format!("{address} . {address}; flags interval"),
                elements: disjoint(&keep).into_iter().map(|(a, b)| format!("{a} . {b}")).collect(),
            },
            Set {
                name: family.keep_wanted,
                kind: format!("{address} . mark . {address} . mark"),
                elements: keep.iter().map(|(a, b)| format!("{} . {}", one(a), one(b))).collect(),
            },
            Set {
                name: family.nodes,
                kind: format!("{address}; size {}", capacity::NODES),
                elements: nodes.map(IpAddr::to_string).collect(),
            },
        ]);
    }
    let (port, (first, last)) = (nft.hop_port, nft.hop_sources);
    let native = nft.native.iter().map(|name| format!("\"{name}\"")).collect();
    let ports = "inet_service . inet_service . inet_service".to_owned();
    sets.extend([
        Set { name: NATIVE, kind: format!("ifname; size {MOST_NATIVE}"), elements: native },
        Set { name: HOP_WANTED, kind: ports, elements: vec![format!("{port} . {first} . {last}")] },
    ]);
    sets
}

fn chains(port: u16, (first, last): (u16, u16)) -> String {
    format!(
        r#"  chain keep_source {{
    type nat hook postrouting priority 99; policy accept;
    ip saddr . ip daddr @keep4 snat ip to ip saddr comment "own to remote: the source stays"
    ip6 saddr . ip6 daddr @keep6 snat ip6 to ip6 saddr comment "own to remote: the source stays"
  }}
  chain hop_in {{
    type filter hook prerouting priority -300; policy accept;
    udp dport {port} goto hop_guard
  }}
  chain hop_guard {{
    iifname @native udp sport {first}-{last} ip saddr @nodes4 notrack accept comment "the hop"
    iifname @native udp sport {first}-{last} ip6 saddr @nodes6 notrack accept comment "the hop"
    iifname @native accept
    ip daddr @nodes4 counter drop comment "forwarded: forged"
    ip6 daddr @nodes6 counter drop comment "forwarded: forged"
    fib daddr type local counter drop comment "from here: forged"
  }}
  chain hop_out {{
    type filter hook output priority -300; policy accept;
    udp dport {port} goto hop_untracked
  }}
  chain hop_untracked {{
    udp sport {first}-{last} ip daddr @nodes4 notrack accept comment "the hop"
    udp sport {first}-{last} ip6 daddr @nodes6 notrack accept comment "the hop"
  }}
"#
    )
}

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
    let found = contents(&elements);
    Ok(found.filter(|nft| skeleton == self::skeleton(nft.hop_port, nft.hop_sources)))
}

/// The value that the sets hold; `None` if those that rules use do not follow from those that were wanted.
fn contents(elements: &BTreeMap<String, Vec<Value>>) -> Option<Nft> {
    let of = |set: &str| elements.get(set).map_or(&[][..], Vec::as_slice).iter();
    let mut nft = Nft::default();
    for family in &FAMILIES {
        let wanted = of(family.keep_wanted).map(wanted_pair).collect::<Option<Pairs>>()?;
        let used = of(family.keep).map(used_pair).collect::<Option<Pairs>>()?;
        if used != disjoint(&wanted) {
            return None;
        }
        nft.keep_source.extend(wanted);
        let address = |value: &Value| value.as_str()?.parse::<IpAddr>().ok();
        nft.nodes.extend(of(family.nodes).map(address).collect::<Option<Vec<_>>>()?);
    }
    let name = |value: &Value| value.as_str().map(str::to_owned);
    nft.native = of(NATIVE).map(name).collect::<Option<BTreeSet<_>>>()?;
    let mut wanted = of(HOP_WANTED);
    let [port, first, last] = wanted.next()?.get("concat")?.as_array()?.as_slice() else { return None };
    let number = |value: &Value| value.as_u64().and_then(|port| u16::try_from(port).ok());
    (nft.hop_port, nft.hop_sources) = (number(port)?, (number(first)?, number(last)?));
    wanted.next().is_none().then_some(nft)
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
/// of one flag, which newer versions print as the flag; and with a range of one as that one.
fn normal(value: &Value) -> Value {
    match value {
        Value::Object(fields) => {
            let kept = fields.iter().filter(|(key, _)| !["handle", "packets", "bytes"].contains(&key.as_str()));
            let field = |(key, value): (&String, &Value)| match value {
                Value::String(_) if key == "flags" => (key.clone(), json!([value])),
                _ => (key.clone(), normal(value)),
            };
            match value.get("range").and_then(Value::as_array).map(Vec::as_slice) {
                Some([first, last]) if first == last => first.clone(),
                _ => Value::Object(kept.map(field).collect()),
            }
        }
        Value::Array(items) => Value::Array(items.iter().map(normal).collect()),
        other => other.clone(),
    }
}

/// Everything in our table but the elements of its sets, as [`parse`] lays it out.
fn skeleton(port: u16, (first, last): (u16, u16)) -> Vec<(String, Value)> {
    let native = matching("==", json!({"meta": {"key": "iifname"}}), "@native");
    let accept = json!({"accept": null});
    let to_hop = |chain, target| {
        bare_rule(chain, json!([matching("==", payload("udp", "dport"), port), {"goto": {"target": target}}]))
    };
    let sources = if first == last { json!(first) } else { json!({"range": [first, last]}) };
    let from_hop = matching("==", payload("udp", "sport"), sources);
    let local = matching("==", json!({"fib": {"result": "type", "flags": ["daddr"]}}), "local");
    let forged =
        |comment, towards: Value| rule("hop_guard", comment, json!([towards, {"counter": {}}, {"drop": null}]));
    let comes = |from: Value| rule("hop_guard", "the hop", json!([native, from_hop, from, {"notrack": null}, accept]));
    let goes = |to: Value| rule("hop_untracked", "the hop", json!([from_hop, to, {"notrack": null}, accept]));
    let node = |protocol, end, set| matching("==", payload(protocol, end), set);
    let mut all = vec![
        ("table carrick".to_owned(), json!({"family": "inet", "name": TABLE})),
        chain("keep_source", "nat", "postrouting", 99),
        rule("keep_source", "own to remote: the source stays", json!([pair_in("ip", "@keep4"), keep("ip")])),
        rule("keep_source", "own to remote: the source stays", json!([pair_in("ip6", "@keep6"), keep("ip6")])),
        chain("hop_in", "filter", "prerouting", -300),
        to_hop("hop_in", "hop_guard"),
        regular_chain("hop_guard"),
        comes(node("ip", "saddr", "@nodes4")),
        comes(node("ip6", "saddr", "@nodes6")),
        bare_rule("hop_guard", json!([native, accept])),
        forged("forwarded: forged", node("ip", "daddr", "@nodes4")),
        forged("forwarded: forged", node("ip6", "daddr", "@nodes6")),
        forged("from here: forged", local),
        chain("hop_out", "filter", "output", -300),
        to_hop("hop_out", "hop_untracked"),
        regular_chain("hop_untracked"),
        goes(node("ip", "daddr", "@nodes4")),
        goes(node("ip6", "daddr", "@nodes6")),
        sized_set(NATIVE, json!("ifname"), MOST_NATIVE),
        set(HOP_WANTED, json!(["inet_service", "inet_service", "inet_service"])),
    ];
    for Sets { address, keep, keep_wanted, nodes, .. } in &FAMILIES {
        let (name, mut pairs) = set(keep, json!([address, address]));
        pairs["flags"] = json!(["interval"]);
        all.extend([(name, pairs), set(keep_wanted, json!([address, "mark", address, "mark"]))]);
        all.push(sized_set(nodes, json!(address), capacity::NODES));
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn set(name: &str, kind: Value) -> (String, Value) {
    (format!("set {name}"), json!({"family": "inet", "table": TABLE, "name": name, "type": kind}))
}

fn sized_set(name: &str, kind: Value, size: u32) -> (String, Value) {
    let (name, mut set) = set(name, kind);
    set["size"] = json!(size);
    (name, set)
}

/// Of no hook: rules of others lead there.
fn regular_chain(name: &str) -> (String, Value) {
    (format!("chain {name}"), json!({"family": "inet", "table": TABLE, "name": name}))
}

fn chain(name: &str, kind: &str, hook: &str, priority: i32) -> (String, Value) {
    let chain = json!({
        "family": "inet", "table": TABLE, "name": name, "type": kind, "hook": hook, "prio": priority, "policy": "accept",
    });
    (format!("chain {name}"), chain)
}

fn rule(chain: &str, comment: &str, expression: Value) -> (String, Value) {
    let (name, mut rule) = bare_rule(chain, expression);
    rule["comment"] = json!(comment);
    (name, rule)
}

fn bare_rule(chain: &str, expression: Value) -> (String, Value) {
    (format!("rule {chain}"), json!({"family": "inet", "table": TABLE, "chain": chain, "expr": expression}))
}

fn matching(op: &str, left: Value, right: impl Into<Value>) -> Value {
    json!({"match": {"op": op, "left": left, "right": right.into()}})
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn pair_in(protocol: &str, set: &str) -> Value {
    matching("==", json!({"concat": [payload(protocol, "saddr"), payload(protocol, "daddr")]}), set)
}

fn keep(protocol: &str) -> Value {
    json!({"snat": {"family": protocol, "addr": payload(protocol, "saddr")}})
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
mod tests;
