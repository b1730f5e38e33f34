//! Cases are data: each block of a file in `cases/` is a folder in a compact form, followed by what is made of it.
//! `UPDATE_EXPECT=1` writes the arrows anew.

mod laws;

use std::fmt::Write;

use expect_test::{Expect, ExpectFile, expect, expect_file};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::*;
use crate::api::{
    network::{BlockAffinity, CiliumAllocation, CiliumNode, IpPool, ServiceCidr},
    *,
};

const DOMAIN: &str = "mesh.internal";

/// A key that is written as one capital letter in the cases.
fn key(letter: u8) -> String {
    PublicKey::new([letter; 32]).expect("a letter's key is of no low order").to_string()
}

/// `claims RANGE`, `dials ENDPOINT` and `key KEY` are members with one thing to look at.
/// `NAME ID [gwN=KEY@ENDPOINT,..] [allow=RANGE,..] [keepalive=N] [via=NAME,..] [alias=NAME,..]` is a MeshCluster.
/// `NAME offers RANGE[=TYPE[>RANGE]].. [to=NAME,..] [as=OBJECT]` is a RouteAdvertisement.
/// `policy NAME`, `gateway SLOT [node=NAME] [ordinal=N] [key=KEY] [hop=IP,..]`, `node NAME [ip=IP,..] [pods=RANGE,..]
/// [pod=RANGE]`, `services NAME RANGE,..`, `cilium NODE [RANGE,..] [pools=RANGE,..]`, `block NAME RANGE on NODE [STATE]
/// [type=TYPE] [deleted]`, `pool NAME RANGE [disabled]` and `pod [NAMESPACE/]NAME on NODE [IP,..] [first=IP] [host] [phase=PHASE]` are what they say.
/// `at NAME [local=RANGE,..] [api=IP]` takes that member's view.
/// `warnings` asks for them. `␣` is a space, `∅` nothing, `{1..3}` each number in turn.
#[derive(Default)]
struct Case {
    objects: Objects,
    views: Vec<Local>,
    warnings: bool,
}

fn plain(text: &str) -> String {
    text.replace('␣', " ").replace('∅', "")
}

fn list(text: &str) -> Vec<String> {
    text.split(',').flat_map(expand).collect()
}

fn expand(text: &str) -> Vec<String> {
    let Some((before, (range, after))) = text.split_once('{').and_then(|(b, rest)| Some((b, rest.split_once('}')?)))
    else {
        return vec![plain(text)];
    };
    let (from, to) = range.split_once("..").expect("{from..to}");
    let (from, to): (u32, u32) = (from.parse().expect("a number"), to.parse().expect("a number"));
    (from..=to).map(|n| plain(&format!("{before}{n}{after}"))).collect()
}

fn named(name: &str) -> ObjectMeta {
    ObjectMeta { name: Some(plain(name)), ..ObjectMeta::default() }
}

impl Case {
    fn read(text: &str) -> Case {
        let mut case = Case::default();
        for line in text.lines().filter(|line| !line.starts_with('#') && !line.starts_with("=>")) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["warnings"] => case.warnings = true,
                ["claims", range] => {
                    case.cluster("mn", "1", &[&format!("allow={range}")]);
                    case.advertisement("mn", &[range]);
                }
                ["dials", endpoint] => case.cluster("mn", "1", &[&format!("gw0=A@{endpoint}")]),
                ["key", key] => case.cluster("mn", "1", &[&format!("gw0={key}")]),
                ["policy", name] => {
                    case.objects
                        .policies
                        .push(EgressPolicy { metadata: named(name), ..EgressPolicy::new("", Default::default()) });
                }
                ["gateway", name, ref rest @ ..] => case.objects.gateways.push(gateway(name, rest)),
                ["node", name, ref rest @ ..] => case.objects.nodes.push(node(name, rest)),
                ["pod", name, "on", node, ref rest @ ..] => case.objects.pods.push(pod(name, node, rest)),
                ["services", name, ranges] => {
                    let mut object = ServiceCidr { metadata: meta(name), ..ServiceCidr::default() };
                    object.spec.cidrs = list(ranges);
                    case.objects.service_cidrs.push(object);
                }
                ["cilium", name, ref rest @ ..] => case.objects.cilium_nodes.push(cilium(name, rest)),
                ["block", name, range, "on", node, ref rest @ ..] => {
                    case.objects.block_affinities.push(block(name, range, node, rest));
                }
                ["pool", name, range, ref rest @ ..] => {
                    let mut object = IpPool { metadata: meta(name), ..IpPool::default() };
                    object.spec.cidr = plain(range);
                    object.spec.disabled = rest == ["disabled"];
                    case.objects.ip_pools.push(object);
                }
                ["at", name, ref rest @ ..] => case.views.push(local(name, rest)),
                [name, "offers", ref rest @ ..] => case.advertisement(name, rest),
                [name, id, ref rest @ ..] => case.cluster(name, id, rest),
                _ => panic!("what is {line:?}?"),
            }
        }
        case
    }

    fn cluster(&mut self, name: &str, id: &str, words: &[&str]) {
        let mut spec = MeshClusterSpec { id: id.parse().expect("an id"), ..MeshClusterSpec::default() };
        for word in words {
            let (field, value) = word.split_once('=').expect("field=value");
            match field {
                "allow" => spec.allowed_cidrs = list(value),
                "keepalive" => spec.persistent_keepalive_seconds = Some(value.parse().expect("seconds")),
                "via" => spec.via = list(value),
                "alias" => spec.dns_aliases = list(value),
                gateway => {
                    let ordinal = gateway.strip_prefix("gw").expect("gwN").parse().expect("an ordinal");
                    let (key, endpoints) = match value.split_once('@') {
                        Some((key, endpoints)) => (key, list(endpoints)),
                        None => (value, Vec::new()),
                    };
                    let public_key = match key.as_bytes() {
                        [letter @ b'A'..=b'Z'] => self::key(*letter),
                        _ => plain(key),
                    };
                    spec.gateways.push(GatewaySpec { ordinal, public_key, endpoints });
                }
            }
        }
        self.objects.clusters.push(MeshCluster { metadata: named(name), spec, status: None });
    }

    fn advertisement(&mut self, name: &str, words: &[&str]) {
        let mut spec = RouteAdvertisementSpec { cluster: plain(name), ..RouteAdvertisementSpec::default() };
        let mut object = name;
        for word in words {
            match word.split_once('=') {
                Some(("to", to)) => spec.to = list(to),
                Some(("as", name)) => object = name,
                with_type => {
                    let (range, kind) = with_type.unwrap_or((word, "Pod"));
                    let (kind, exported_as) = match kind.split_once('>') {
                        Some((kind, other)) => (kind, Some(other.to_owned())),
                        None => (kind, None),
                    };
                    spec.routes.extend(expand(range).into_iter().map(|cidr| AdvertisedRoute {
                        cidr,
                        kind: plain(kind),
                        exported_as: exported_as.clone(),
                    }));
                }
            }
        }
        self.objects.advertisements.push(RouteAdvertisement { metadata: named(object), spec, status: None });
    }

    /// What is made of the case, a line for each rejection, member and warning.
    fn outcome(&self) -> String {
        let mut text = String::new();
        let (mesh, refused) = mesh(&self.objects, DOMAIN);
        write(&mut text, "", &mesh.members, &refused);
        for local in &self.views {
            let (intent, refused) = Intent::new(&mesh, &self.objects, local);
            write(&mut text, &format!("at {}: ", intent.me), &intent.members, &refused);
            write_cluster(&mut text, &intent);
        }
        for warning in warnings(&mesh).iter().filter(|_| self.warnings) {
            writeln!(text, "=> warning: {warning}").expect("a string");
        }
        if text.is_empty() {
            text.push_str("=> nothing\n");
        }
        (b'A'..=b'Z').fold(text, |text, letter| text.replace(&key(letter), &char::from(letter).to_string()))
    }
}

fn gateway(name: &str, words: &[&str]) -> MeshGateway {
    let ordinal = name.parse().unwrap_or_default();
    let mut spec = MeshGatewaySpec { ordinal, public_key: key(b'A'), ..MeshGatewaySpec::default() };
    for word in words {
        match word.split_once('=').expect("field=value") {
            ("node", node) => spec.node = plain(node),
            ("ordinal", ordinal) => spec.ordinal = ordinal.parse().expect("a number"),
            ("hop", addresses) => spec.hop_addresses = list(addresses),
            ("key", letter) if letter.len() == 1 => spec.public_key = key(letter.as_bytes()[0]),
            ("key", text) => spec.public_key = plain(text),
            _ => panic!("what is {word:?}?"),
        }
    }
    MeshGateway { metadata: named(name), spec, status: None }
}

fn node(name: &str, words: &[&str]) -> v1::Node {
    let mut node = v1::Node::default();
    node.metadata.name = plain(name);
    for word in words {
        let (field, value) = word.split_once('=').expect("field=value");
        let kind = match field {
            "pods" => {
                node.spec.pod_cidrs = list(value);
                continue;
            }
            "pod" => {
                node.spec.pod_cidr = plain(value);
                continue;
            }
            "ip" => "InternalIP",
            "external" => "ExternalIP",
            "hostname" => "Hostname",
            _ => panic!("what is {word:?}?"),
        };
        let address = |address| v1::NodeAddress { kind: kind.to_owned(), address };
        node.status.addresses.extend(list(value).into_iter().map(address));
    }
    node
}

fn meta(name: &str) -> v1::Metadata {
    v1::Metadata { name: plain(name), ..v1::Metadata::default() }
}

fn cilium(name: &str, words: &[&str]) -> CiliumNode {
    let mut object = CiliumNode { metadata: meta(name), ..CiliumNode::default() };
    for word in words {
        match word.split_once('=') {
            Some(("pools", ranges)) => {
                let one = |range| CiliumAllocation { cidrs: vec![range] };
                object.spec.ipam.pools.allocated = list(ranges).into_iter().map(one).collect();
            }
            None => object.spec.ipam.pod_cidrs = list(word),
            Some(_) => panic!("what is {word:?}?"),
        }
    }
    object
}

fn block(name: &str, range: &str, node: &str, words: &[&str]) -> BlockAffinity {
    let mut object = BlockAffinity { metadata: meta(name), ..BlockAffinity::default() };
    object.spec.cidr = plain(range);
    object.spec.node = plain(node);
    object.spec.state = "confirmed".to_owned();
    object.spec.deleted = "false".to_owned();
    for word in words {
        match word.split_once('=') {
            Some(("type", kind)) => object.spec.kind = kind.to_owned(),
            None if *word == "deleted" => object.spec.deleted = "true".to_owned(),
            None => object.spec.state = (*word).to_owned(),
            Some(_) => panic!("what is {word:?}?"),
        }
    }
    object
}

fn pod(name: &str, node: &str, words: &[&str]) -> v1::Pod {
    let (namespace, name) = name.split_once('/').unwrap_or(("", name));
    let metadata = v1::Metadata { name: plain(name), namespace: namespace.to_owned(), ..v1::Metadata::default() };
    let mut pod = v1::Pod { metadata, ..v1::Pod::default() };
    pod.spec.node_name = plain(node);
    for word in words {
        match word.split_once('=') {
            Some(("first", address)) => pod.status.pod_ip = plain(address),
            Some(("phase", phase)) => pod.status.phase = phase.to_owned(),
            None if *word == "host" => pod.spec.host_network = true,
            None => pod.status.pod_ips = list(word).into_iter().map(|ip| v1::PodIp { ip }).collect(),
            Some(_) => panic!("what is {word:?}?"),
        }
    }
    pod
}

fn write_cluster(text: &mut String, intent: &Intent) {
    let Some(cluster) = &intent.cluster else { return };
    let at = format!("=> at {}:", intent.me);
    if cluster.nodes.is_empty() {
        writeln!(text, "{at} no nodes").expect("a string");
    }
    for (name, node) in &cluster.nodes {
        let hop: Vec<String> = node.hop.iter().map(ToString::to_string).collect();
        let pods: String = node.pods.iter().map(|range| format!(" {range}")).collect();
        let slot = cluster.slot_of(name).map_or(String::new(), |slot| format!(" slot {slot}"));
        writeln!(text, "{at} node {name}{slot} {}{pods}", hop.join(",")).expect("a string");
    }
    if cluster.pooled {
        writeln!(text, "{at} pods in pools").expect("a string");
    }
    for (address, node) in &cluster.pods {
        writeln!(text, "{at} pod {address} on {node}").expect("a string");
    }
}

fn local(name: &str, words: &[&str]) -> Local {
    let mut local = Local { cluster: name.parse().expect("a member"), cidrs: Vec::new(), api_server: None };
    for word in words {
        match word.split_once('=') {
            Some(("local", ranges)) => local.cidrs = ranges.split(',').map(|r| r.parse().expect("a range")).collect(),
            Some(("api", ip)) => local.api_server = Some(ip.parse().expect("an address")),
            _ => panic!("what is {word:?}?"),
        }
    }
    local
}

fn write(text: &mut String, at: &str, members: &BTreeMap<MemberName, Member>, refused: &[Rejection]) {
    for rejection in refused {
        writeln!(text, "=> {at}refused {rejection}").expect("a string");
    }
    for (name, member) in members {
        writeln!(text, "=> {at}{name} {}", shown(member)).expect("a string");
    }
}

fn shown(member: &Member) -> String {
    let mut text = member.id.to_string();
    for (ordinal, gateway) in &member.gateways {
        let endpoints: Vec<String> = gateway.endpoints.iter().map(|endpoint| endpoint.to_string()).collect();
        let at = if endpoints.is_empty() { "" } else { "@" };
        text += &format!(" gw{ordinal}={}{at}{}", gateway.key, endpoints.join(","));
    }
    if let Some(seconds) = member.keepalive {
        text += &format!(" keepalive={seconds}");
    }
    for (range, route) in &member.routes {
        text += &match &route.offered {
            Offer::All => format!(" {range}"),
            Offer::To(to) if to.is_empty() => format!(" {range}>nobody"),
            Offer::To(to) => format!(" {range}>{}", to.iter().map(MemberName::as_str).collect::<Vec<_>>().join("+")),
        };
    }
    text
}

/// Runs every case of a file. A file without any, or fewer than it had, is a mistake.
fn check(cases: &str, at_least: usize, file: ExpectFile) {
    let mut text = String::new();
    let mut count = 0;
    for block in cases.split("\n\n") {
        let given: Vec<&str> = block.lines().filter(|line| !line.starts_with("=>")).collect();
        if !text.is_empty() {
            text.push('\n');
        }
        text += &format!("{}\n", given.join("\n"));
        if given.iter().any(|line| !line.starts_with('#')) {
            text += &Case::read(block).outcome();
            count += 1;
        }
    }
    assert!(count >= at_least, "{count} cases, there were {at_least}");
    file.assert_eq(&text);
}

macro_rules! cases {
    ($($name:ident: $at_least:literal,)*) => {
        $(#[test]
        fn $name() {
            let file = concat!("cases/", stringify!($name), ".txt");
            check(include_str!(concat!("cases/", stringify!($name), ".txt")), $at_least, expect_file![file]);
        })*
    };
}

cases! {
    ranges: 97,
    endpoints: 79,
    keys: 26,
    members: 44,
    routes: 31,
    conflicts: 17,
    view: 23,
    cluster: 24,
    network: 16,
    warned: 6,
}

#[test]
fn every_reason_has_a_case() {
    let cases = [
        include_str!("cases/ranges.txt"),
        include_str!("cases/endpoints.txt"),
        include_str!("cases/keys.txt"),
        include_str!("cases/members.txt"),
        include_str!("cases/routes.txt"),
        include_str!("cases/view.txt"),
        include_str!("cases/conflicts.txt"),
        include_str!("cases/cluster.txt"),
        include_str!("cases/network.txt"),
        // Some reasons are the planner's to give.
        include_str!("../plan/tests.rs"),
    ];
    for reason in Reason::ALL {
        assert!(cases.iter().any(|cases| cases.contains(&format!(": {reason}: "))), "{reason} has no case");
    }
}

/// The folder as users write it.
fn check_yaml(folder: &str, expected: Expect) {
    let mut case = Case { warnings: true, ..Case::default() };
    for document in folder.split("---\n") {
        let kind = document.lines().find_map(|line| line.strip_prefix("kind: "));
        match kind.expect("a kind") {
            "MeshCluster" => case.objects.clusters.push(serde_saphyr::from_str(document).expect("a MeshCluster")),
            "RouteAdvertisement" => {
                case.objects.advertisements.push(serde_saphyr::from_str(document).expect("a RouteAdvertisement"));
            }
            "EgressPolicy" => case.objects.policies.push(serde_saphyr::from_str(document).expect("an EgressPolicy")),
            "MeshGateway" => case.objects.gateways.push(serde_saphyr::from_str(document).expect("a MeshGateway")),
            other => panic!("what is a {other}?"),
        }
    }
    expected.assert_eq(&case.outcome());
}

#[test]
fn two_members_as_users_write_them() {
    check_yaml(
        r#"
apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata: {name: mn}
spec:
  id: 1
  gateways:
  - ordinal: 0
    publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=
    endpoints: ["gw0.mn.example.com:27473"]
  allowedCIDRs: [10.42.0.0/16]
---
apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata: {name: va}
spec:
  id: 2
  gateways:
  - {ordinal: 0, publicKey: QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=}
  allowedCIDRs: [10.44.0.0/16]
---
apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata: {name: mn}
spec:
  cluster: mn
  routes:
  - {cidr: 10.42.0.0/16, type: Pod}
---
apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata: {name: va}
spec:
  cluster: va
  to: [mn]
  routes:
  - {cidr: 10.44.0.0/16, type: Pod}
"#,
        expect![[r#"
            => mn 1 gw0=A@gw0.mn.example.com:27473 10.42.0.0/16
            => va 2 gw0=B 10.44.0.0/16>mn
        "#]],
    );
}

#[test]
fn everything_that_can_be_written() {
    check_yaml(
        r#"
apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata: {name: mn}
spec:
  id: 1
  gateways:
  - {ordinal: 0, publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=, endpoints: ["gw0.mn.example.com:27473"]}
  - {ordinal: 1, publicKey: QkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkJCQkI=}
  allowedCIDRs: [10.42.0.0/16, 10.43.0.0/16]
  persistentKeepaliveSeconds: 25
  dnsAliases: [astring-mn.internal]
---
apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata: {name: far}
spec:
  id: 2
  via: [mn]
---
apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata: {name: mn}
spec:
  cluster: mn
  to: []
  routes:
  - {cidr: 10.42.0.0/16, type: Pod, exportedAs: 100.97.0.0/16}
  - {cidr: 10.43.0.0/16, type: Service}
---
apiVersion: carrick.dev/v1alpha1
kind: EgressPolicy
metadata: {name: shop}
spec:
  members: [mn]
  namespaceSelector: {matchLabels: {team: shop}}
  podSelector: {matchExpressions: [{key: app, operator: In, values: [web, db]}]}
  to: [{cluster: de, cidrs: [10.45.0.0/16]}]
---
apiVersion: carrick.dev/v1alpha1
kind: MeshGateway
metadata: {name: "0"}
spec:
  ordinal: 0
  node: mn-1
  hopAddresses: [192.0.2.1]
  publicKey: QUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUFBQUE=
status:
  heartbeat: "2026-01-01T00:00:00Z"
  draining: false
  members: [{name: de, gateways: 2}]
"#,
        expect![[r#"
            => refused MeshCluster/far spec.via: NotYetSupported: a relayed member must not be dialled directly, and relays are not built yet: the whole member is left out; remove `via` to connect to it directly
            => refused MeshCluster/mn spec.dnsAliases: NotYetSupported: further names are not served yet: remove them
            => refused RouteAdvertisement/mn spec.routes[0].exportedAs: NotYetSupported: 10.42.0.0/16 cannot be exported under another range yet: remove `exportedAs`
            => refused RouteAdvertisement/mn spec.routes[1].type: NotYetSupported: 10.43.0.0/16 is of type Service, which is not built yet: only Pod routes are carried
            => refused EgressPolicy/shop spec: NotYetSupported: egress policies are not enforced yet, pods reach everything that is offered: remove it, or limit the offers by `to` of the RouteAdvertisements
            => mn 1 gw0=A@gw0.mn.example.com:27473 gw1=B keepalive=25
        "#]],
    );
}
