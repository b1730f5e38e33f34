//! What a worker and a gateway ask of the API server, counted there.

use std::{collections::BTreeMap, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use expect_test::{Expect, expect};
use serde_json::Value;

use super::{
    counts::{asked, bytes, count_bytes},
    world::World,
};

/// How long nothing happens. A watch is asked for again after minutes.
const QUIET: Duration = Duration::from_secs(8);
/// Of a gateway's own MeshGateway, a minute.
const HEARTBEATS: f64 = 1.0;
/// Requests a minute in a steady cluster, at most.
const WORKER_BUDGET: f64 = 2.0;
const GATEWAY_BUDGET: f64 = 4.0;

pub(super) fn a_steady_cluster_is_not_asked_for_anything(world: &mut World) -> Result<()> {
    let seen = world.server.audit()?.len();
    count_bytes(world)?;
    let _running = world.start_both()?;
    let begun = world.server.audit()?.len();
    let to_start = bytes(world)?;
    sleep(QUIET);
    let audit = world.server.audit()?;
    let (worker, gateway) = (asked(&audit[seen..], "worker"), asked(&audit[seen..], "gateway"));
    let is_status = |event: &&Value| event["requestURI"].as_str().is_some_and(|uri| uri.contains("/status?"));
    let later = audit[begun..].iter().filter(|event| event["stage"] == "ResponseComplete" && !is_status(event)).count();
    let often: Vec<_> = gateway.iter().filter(|(request, times)| request.contains("/status ") && **times > 2).collect();
    ensure!(often.is_empty(), "of an object status is written once in 10 s: {often:?}");
    println!("bytes to start, mn-0 and mn-1: {to_start:?}; in {QUIET:?} after: {:?}", bytes(world)?);
    println!(
        "requests a minute in a steady cluster: worker {:.2}, gateway {:.2}",
        pace(&worker)?,
        pace(&gateway)? + HEARTBEATS
    );
    by_a_worker().assert_eq(&shown(&worker));
    by_a_gateway().assert_eq(&shown(&gateway));
    ensure!(pace(&worker)? <= WORKER_BUDGET && pace(&gateway)? + HEARTBEATS <= GATEWAY_BUDGET);
    ensure!(later == 0, "{later} requests in {QUIET:?}: {:?}", &audit[begun..]);
    Ok(())
}

/// Where no CNI has kinds of its own.
fn by_a_worker() -> Expect {
    expect![[r#"
        1 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/ciliumnodes.cilium.io
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/egresspolicies.carrick.dev
        1 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/ippools.crd.projectcalico.org
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/meshclusters.carrick.dev
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/meshgateways.carrick.dev
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/routeadvertisements.carrick.dev
        1 x list /api/v1/nodes fieldSelector=metadata.name%3Dmn-1 limit=500
        1 x list /apis/apiextensions.k8s.io/v1/customresourcedefinitions fieldSelector=metadata.name%3Dciliumnodes.cilium.io limit=500
        1 x list /apis/apiextensions.k8s.io/v1/customresourcedefinitions fieldSelector=metadata.name%3Dippools.crd.projectcalico.org limit=500
        1 x list /apis/carrick.dev/v1alpha1/egresspolicies limit=500
        1 x list /apis/carrick.dev/v1alpha1/meshclusters limit=500
        1 x list /apis/carrick.dev/v1alpha1/meshgateways limit=500
        1 x list /apis/carrick.dev/v1alpha1/routeadvertisements limit=500
        1 x list /apis/networking.k8s.io/v1/servicecidrs limit=500
        1 x watch /api/v1/nodes allowWatchBookmarks=true fieldSelector=metadata.name%3Dmn-1 resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/apiextensions.k8s.io/v1/customresourcedefinitions allowWatchBookmarks=true fieldSelector=metadata.name%3Dciliumnodes.cilium.io resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/apiextensions.k8s.io/v1/customresourcedefinitions allowWatchBookmarks=true fieldSelector=metadata.name%3Dippools.crd.projectcalico.org resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/egresspolicies allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/meshclusters allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/meshgateways allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/routeadvertisements allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/networking.k8s.io/v1/servicecidrs allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
    "#]]
}

fn by_a_gateway() -> Expect {
    expect![[r#"
        1 x get /api/v1/namespaces/carrick/secrets/carrick-gateway-0
        1 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/blockaffinities.crd.projectcalico.org
        1 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/ciliumnodes.cilium.io
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/egresspolicies.carrick.dev
        1 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/ippools.crd.projectcalico.org
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/meshclusters.carrick.dev
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/meshgateways.carrick.dev
        2 x get /apis/apiextensions.k8s.io/v1/customresourcedefinitions/routeadvertisements.carrick.dev
        1 x list /api/v1/nodes fieldSelector=metadata.name%3Dmn-0 limit=500
        1 x list /api/v1/nodes limit=500
        1 x list /apis/apiextensions.k8s.io/v1/customresourcedefinitions fieldSelector=metadata.name%3Dblockaffinities.crd.projectcalico.org limit=500
        1 x list /apis/apiextensions.k8s.io/v1/customresourcedefinitions fieldSelector=metadata.name%3Dciliumnodes.cilium.io limit=500
        1 x list /apis/apiextensions.k8s.io/v1/customresourcedefinitions fieldSelector=metadata.name%3Dippools.crd.projectcalico.org limit=500
        1 x list /apis/carrick.dev/v1alpha1/egresspolicies limit=500
        1 x list /apis/carrick.dev/v1alpha1/meshclusters limit=500
        1 x list /apis/carrick.dev/v1alpha1/meshgateways limit=500
        1 x list /apis/carrick.dev/v1alpha1/routeadvertisements limit=500
        1 x list /apis/networking.k8s.io/v1/servicecidrs limit=500
        some x patch /apis/carrick.dev/v1alpha1/meshclusters/mn/status fieldManager=carrick force=true
        some x patch /apis/carrick.dev/v1alpha1/meshclusters/va/status fieldManager=carrick force=true
        1 x patch /apis/carrick.dev/v1alpha1/meshgateways/0 fieldManager=carrick force=true
        some x patch /apis/carrick.dev/v1alpha1/meshgateways/0/status fieldManager=carrick force=true
        some x patch /apis/carrick.dev/v1alpha1/routeadvertisements/mn/status fieldManager=carrick force=true
        some x patch /apis/carrick.dev/v1alpha1/routeadvertisements/va/status fieldManager=carrick force=true
        1 x watch /api/v1/nodes allowWatchBookmarks=true fieldSelector=metadata.name%3Dmn-0 resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /api/v1/nodes allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/apiextensions.k8s.io/v1/customresourcedefinitions allowWatchBookmarks=true fieldSelector=metadata.name%3Dblockaffinities.crd.projectcalico.org resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/apiextensions.k8s.io/v1/customresourcedefinitions allowWatchBookmarks=true fieldSelector=metadata.name%3Dciliumnodes.cilium.io resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/apiextensions.k8s.io/v1/customresourcedefinitions allowWatchBookmarks=true fieldSelector=metadata.name%3Dippools.crd.projectcalico.org resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/egresspolicies allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/meshclusters allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/meshgateways allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/carrick.dev/v1alpha1/routeadvertisements allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
        1 x watch /apis/networking.k8s.io/v1/servicecidrs allowWatchBookmarks=true resourceVersion=N timeoutSeconds=290 watch=true
    "#]]
}

fn shown(asked: &BTreeMap<String, usize>) -> String {
    // How often status comes to be written at a start, and whether an event with it, depends on who is heard first; and
    // only who has no key makes one.
    let times =
        |request: &str, times: &usize| if request.contains("/status ") { "some".to_owned() } else { times.to_string() };
    let steady = asked.iter().filter(|(request, _)| !request.contains("/events") && !request.starts_with("update "));
    steady.map(|(request, seen)| format!("{} x {request}\n", times(request, seen))).collect()
}

/// Requests a minute once nothing changes: each watch is asked for again when its time is up.
fn pace(asked: &BTreeMap<String, usize>) -> Result<f64> {
    let watches = asked.keys().filter(|request| request.starts_with("watch "));
    watches
        .map(|request| {
            let seconds = request.split(' ').find_map(|word| word.strip_prefix("timeoutSeconds="));
            let seconds: f64 = seconds.with_context(|| format!("{request} has no end"))?.parse()?;
            Ok(60.0 / seconds)
        })
        .sum()
}
