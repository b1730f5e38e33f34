//! What a cluster's services and its CNI use: read while the agents run, as it comes and goes.

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use expect_test::expect;
use lab::{carrick::Running, wait_for};
use serde_json::{Value, json};

use super::{
    agents::CRDS,
    client::Ask,
    counts::asked,
    kubernetes::{GATEWAY, MESH, WORKER},
    world::{KEYS, RANGES, RBAC, VA, World, advertisement, cluster},
};
use crate::joined::{SOON, says};

const CILIUM: &str = "/apis/cilium.io/v2/ciliumnodes";
const POOLS: &str = "/apis/crd.projectcalico.org/v1/ippools";
const BLOCKS: &str = "/apis/crd.projectcalico.org/v1/blockaffinities";
/// What `va` offers besides [`VA`].
const MORE: [&str; 3] = ["10.45.0.0/24", "10.45.1.0/24", "10.45.2.0/24"];

/// A CRD as its CNI has it, as far as it matters here: each keeps whatever its objects say.
fn crd(group: &str, version: &str, kind: &str, plural: &str) -> Value {
    let schema = json!({"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true}});
    let version = json!({"name": version, "served": true, "storage": true, "schema": schema});
    let names =
        json!({"kind": kind, "listKind": format!("{kind}List"), "plural": plural, "singular": kind.to_lowercase()});
    let spec = json!({"group": group, "scope": "Cluster", "names": names, "versions": [version]});
    json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
           "metadata": {"name": format!("{plural}.{group}")}, "spec": spec})
}

fn crds() -> [Value; 3] {
    [
        crd("cilium.io", "v2", "CiliumNode", "ciliumnodes"),
        crd("crd.projectcalico.org", "v1", "IPPool", "ippools"),
        crd("crd.projectcalico.org", "v1", "BlockAffinity", "blockaffinities"),
    ]
}

/// Makes it, or makes it so, once its kind is served.
fn apply(world: &World, path: &str, api_version: &str, kind: &str, spec: &Value) -> Result<()> {
    let object = json!({"apiVersion": api_version, "kind": kind, "spec": spec});
    wait_for(&format!("{path} to be written"), SOON, || {
        world.admin(&Ask::apply(path, object.clone())).map(drop).map_err(|error| format!("{error:#}"))
    })
}

fn cilium_node(world: &World, name: &str, range: &str) -> Result<()> {
    let spec = json!({"ipam": {"podCIDRs": [range]}, "addresses": [{"type": "InternalIP", "ip": "192.0.2.1"}]});
    apply(world, &format!("{CILIUM}/{name}"), "cilium.io/v2", "CiliumNode", &spec)
}

fn pool(world: &World, name: &str, range: &str) -> Result<()> {
    let spec = json!({"cidr": range, "blockSize": 26, "natOutgoing": true});
    apply(world, &format!("{POOLS}/{name}"), "crd.projectcalico.org/v1", "IPPool", &spec)
}

fn block(world: &World, name: &str, node: &str, range: &str) -> Result<()> {
    let spec = json!({"cidr": range, "node": node, "state": "confirmed", "deleted": "false", "type": "host"});
    apply(world, &format!("{BLOCKS}/{name}"), "crd.projectcalico.org/v1", "BlockAffinity", &spec)
}

/// Where the programs of a node look for the pods of this cluster, IPv4: each prefix, with the node's address.
fn homes(world: &World, node: usize) -> Result<Vec<String>> {
    let homes = format!("/sys/fs/bpf/carrick/v{}/maps/HOMES", ebpf::ABI);
    let dump = ["-j", "map", "dump", "pinned", &homes];
    let entries: Vec<Value> = serde_json::from_str(&world.node(node).host.output("bpftool", &dump)?)?;
    let mut homes = entries.iter().map(home).collect::<Result<Vec<_>>>()?;
    homes.retain(|home| !home.contains(':'));
    homes.sort();
    Ok(homes)
}

fn home(entry: &Value) -> Result<String> {
    let bytes = |field: &str| -> Result<Vec<u8>> {
        let bytes = entry[field].as_array().context("bytes")?.iter();
        let byte = |byte: &Value| u8::from_str_radix(byte.as_str()?.strip_prefix("0x")?, 16).ok();
        bytes.map(byte).collect::<Option<_>>().context("bytes in hexadecimal")
    };
    let (key, value) = (bytes("key")?, bytes("value")?);
    let (length, prefix) = key.split_first_chunk::<4>().context("a length")?;
    let address = |bytes: &[u8]| Ok::<_, anyhow::Error>(Ipv6Addr::from(<[u8; 16]>::try_from(bytes)?).to_canonical());
    let (length, prefix) = (u32::from_ne_bytes(*length), address(prefix)?);
    let length = if prefix.is_ipv4() { length - 96 } else { length };
    let home = match address(&value)? {
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => "here".to_owned(),
        node => format!("on {node}"),
    };
    Ok(format!("{prefix}/{length} {home}"))
}

fn wait_home(world: &World, node: usize, home: &str, there: bool) -> Result<()> {
    wait_for(&format!("{home} to be {there} on {}", world.node(node).host.name()), SOON, || {
        let homes = homes(world, node).map_err(|error| format!("{error:#}"))?;
        if homes.iter().any(|one| one == home) == there { Ok(()) } else { Err(homes.join("\n")) }
    })
}

/// Both nodes say of a range that it collides with that object, and have no route for it.
fn wait_refused(world: &World, range: &str, object: &str) -> Result<()> {
    for node in [GATEWAY, WORKER] {
        world.wait_status(node, &format!("that {range} collides with {object}"), |status| {
            says(status, "rejections", &format!("{range} overlaps"))
                && says(status, "rejections", &format!("({object})"))
        })?;
        world.wait_route(node, range, false)?;
    }
    Ok(())
}

fn offer(world: &World, ranges: &[&str]) -> Result<()> {
    world.put("routeadvertisements", &[advertisement("va", ranges)])
}

fn start(world: &World) -> Result<[Running; 2]> {
    let running = world.start_both()?;
    offer(world, &[VA, MORE[0], MORE[1], MORE[2]])?;
    for node in [GATEWAY, WORKER] {
        for range in MORE {
            world.wait_route(node, range, true)?;
        }
        world.wait_well(node)?;
    }
    Ok(running)
}

/// Takes the CRDs of CNIs away again, and what was said of them.
fn tidy(world: &World) -> Result<()> {
    crds().iter().try_for_each(|crd| {
        let path = format!("{CRDS}/{}", crd["metadata"]["name"].as_str().context("a name")?);
        world.admin(&Ask::delete(&path)).map(drop)?;
        wait_for("the CRD to be gone", SOON, || match world.admin(&Ask::get(&path)) {
            Err(_) => Ok(()),
            Ok(_) => Err(path.clone()),
        })
    })
}

/// The agents run before any CRD of a CNI is there.
pub(super) fn a_cni_s_ranges_are_read_as_they_come(world: &mut World) -> Result<()> {
    let _running = start(world)?;
    expect![[r#"
        10.42.0.0/24 here
        10.42.1.0/24 on 203.0.113.3"#]]
    .assert_eq(&homes(world, GATEWAY)?.join("\n"));
    expect!["10.42.1.0/24 here"].assert_eq(&homes(world, WORKER)?.join("\n"));
    for crd in crds() {
        world.admin(&Ask::create(CRDS, crd))?;
    }
    // Cilium: the gateway hears of all nodes, the worker of its own.
    cilium_node(world, "mn-0", "10.45.0.0/25")?;
    cilium_node(world, "mn-1", "10.45.0.128/25")?;
    wait_home(world, GATEWAY, "10.45.0.0/25 here", true)?;
    wait_home(world, GATEWAY, &format!("10.45.0.128/25 on {}", world.node(WORKER).addresses[0]), true)?;
    wait_home(world, WORKER, "10.45.0.128/25 here", true)?;
    world.wait_status(GATEWAY, "whose range it is", |status| says(status, "rejections", "(CiliumNode mn-"))?;
    world.wait_status(WORKER, "whose range it is", |status| says(status, "rejections", "(CiliumNode mn-1)"))?;
    for node in [GATEWAY, WORKER] {
        world.wait_route(node, MORE[0], false)?;
    }
    // Calico: the pool is everybody's, its blocks are the gateway's to know.
    pool(world, "default-ipv4-ippool", "10.45.1.0/24")?;
    wait_refused(world, MORE[1], "IPPool default-ipv4-ippool")?;
    block(world, "mn-1-10-45-2-0-26", "mn-1", "10.45.2.0/26")?;
    wait_home(world, GATEWAY, &format!("10.45.2.0/26 on {}", world.node(WORKER).addresses[0]), true)?;
    wait_home(world, WORKER, &format!("{} here", RANGES[0]), true)?;
    world.wait_status(GATEWAY, "whose block it is", |status| {
        says(status, "rejections", "(BlockAffinity mn-1-10-45-2-0-26)")
    })?;
    world.wait_route(GATEWAY, MORE[2], false)?;

    // What is deleted goes at once.
    for path in [format!("{CILIUM}/mn-0"), format!("{CILIUM}/mn-1"), format!("{BLOCKS}/mn-1-10-45-2-0-26")] {
        world.admin(&Ask::delete(&path))?;
    }
    for node in [GATEWAY, WORKER] {
        world.wait_route(node, MORE[0], true)?;
        world.wait_route(node, MORE[2], true)?;
    }
    // What goes with its CRD stays for a while: somebody may have erred.
    tidy(world)?;
    for node in [GATEWAY, WORKER] {
        world.wait_status(node, "that the pool is in doubt", |status| {
            says(status, "problems", "IPPools: half or more are gone from one list to the next: default-ipv4-ippool")
        })?;
        ensure!(!world.routes(node)?.contains(MORE[1]));
    }
    Ok(())
}

/// The API server's own object; more of them are added as a cluster grows.
pub(super) fn services_ranges_are_nobody_else_s(world: &mut World) -> Result<()> {
    let _running = start(world)?;
    world.put("meshclusters", &[cluster("va", 2, KEYS[1], &["10.44.0.0/15", "10.96.0.0/16"])])?;
    offer(world, &[VA, "10.96.0.0/24", MORE[0]])?;
    wait_refused(world, "10.96.0.0/24", "ServiceCIDR kubernetes")?;
    let path = "/apis/networking.k8s.io/v1/servicecidrs/more";
    apply(world, path, "networking.k8s.io/v1", "ServiceCIDR", &json!({"cidrs": [MORE[0]]}))?;
    wait_refused(world, MORE[0], "ServiceCIDR more")?;
    world.admin(&Ask::delete(path))?;
    for node in [GATEWAY, WORKER] {
        world.wait_route(node, MORE[0], true)?;
    }
    Ok(())
}

/// What may not be read is told, and holds nothing else up.
pub(super) fn a_cni_s_kind_that_is_forbidden_is_named(world: &mut World) -> Result<()> {
    let role = format!("{RBAC}/clusterroles/carrick-worker");
    let good = world.admin(&Ask::get(&role))?;
    let mut rules = good["rules"].as_array().context("rules")?.clone();
    rules.retain(|rule| rule["resources"] != json!(["servicecidrs"]) && rule["resources"] != json!(["ippools"]));
    ensure!(good["rules"].as_array().is_some_and(|all| all.len() == rules.len() + 2));
    world.admin(&Ask::merge(&role, json!({"rules": rules})))?;
    let mesh = crds().iter().try_for_each(|crd| world.admin(&Ask::create(CRDS, crd.clone())).map(drop));
    let seen = world.server.audit()?.len();
    let told = mesh.and_then(|()| {
        world.put("meshclusters", &[cluster("va", 2, KEYS[1], &["10.44.0.0/15"])])?;
        let running = [world.start(GATEWAY)?, world.start(WORKER)?];
        world.put_mesh()?;
        world.wait_route(WORKER, VA, true)?;
        // A kind that has just been made is not served at once, and for a moment that is told as well.
        let told = world.wait_status(WORKER, "what is forbidden", |status| {
            world.problems(status).len() == 2
                && says(status, "problems", "servicecidrs")
                && says(status, "problems", "ippools")
        })?;
        // What others offer is followed, and goes.
        world.admin(&Ask::delete(&format!("{}/routeadvertisements/va", MESH)))?;
        world.wait_route(WORKER, VA, false)?;
        Ok((running, told))
    });
    let often = asked(&world.server.audit()?[seen..], "worker");
    world.admin(&Ask::merge(&role, json!({"rules": good["rules"]})))?;
    let (_running, told) = told?;
    expect![[r#"
        : ippools.crd.projectcalico.org is forbidden: User "system:serviceaccount:carrick:carrick-worker" cannot list resource "ippools" in API group "crd.projectcalico.org" at the cluster scope (403): grant it, as the chart's RBAC does
        : servicecidrs.networking.k8s.io is forbidden: User "system:serviceaccount:carrick:carrick-worker" cannot list resource "servicecidrs" in API group "networking.k8s.io" at the cluster scope (403): grant it, as the chart's RBAC does"#]]
    .assert_eq(&world.problems(&told).join("\n"));
    ensure!(
        often.keys().any(|request| request.starts_with("list /apis/networking.k8s.io/v1/servicecidrs")),
        "{often:?}"
    );
    // Once it may, it does.
    world.wait_well(WORKER)?;
    tidy(world)
}
