//! A member joins: what `carrick export` writes of its cluster, and that another member takes it.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use anyhow::{Context, Result};
use expect_test::expect;
use lab::wait_for;

use super::{
    client::Ask,
    kubernetes::{ADMIN, GATEWAY, MESH, program},
    world::{TENANT, World},
};
use crate::joined::SOON;

/// A user's folder, with what they have in the PATH: kubectl, and carrick as its plugin too.
fn folder(world: &World) -> Result<PathBuf> {
    let folder = world.lab.dir("user");
    if folder.exists() {
        return Ok(folder);
    }
    fs::create_dir(&folder).context("make a folder")?;
    let carrick = world.carrick.path();
    let links = [("kubectl", program("KUBECTL")?), ("carrick", carrick.into()), ("kubectl-carrick", carrick.into())];
    fs::create_dir(folder.join("bin")).context("make a folder")?;
    for (name, program) in links {
        symlink(program, folder.join("bin").join(name)).with_context(|| format!("link {name}"))?;
    }
    Ok(folder)
}

/// Runs the lines in that folder, each as whoever has the token; what they said, without what differs from run to run.
pub(super) fn run(world: &World, token: &str, lines: &[&str]) -> Result<String> {
    let folder = folder(world)?;
    let config = world.server.kubeconfig("user", token, "default")?;
    let mut text = String::new();
    for line in lines {
        let environment = format!("PATH={}/bin:$PATH KUBECONFIG={}", folder.display(), config.display());
        let script = format!("cd {} && export {environment} && {line} 2>&1; echo \"exit code $?\"", folder.display());
        let said = world.lab.internet.output("sh", &["-c", &script])?;
        text += &format!("$ {line}\n{}", said.replace("exit code 0\n", ""));
    }
    let said = text.replace(&config.display().to_string(), "KUBECONFIG").replace(&world.server.url(), "SERVER");
    Ok(said.lines().map(|line| format!("{}\n", line.trim_end())).collect())
}

/// The key that the gateway has made.
fn key(world: &World) -> Result<String> {
    let gateway = wait_for("the gateway's MeshGateway", SOON, || {
        world.admin(&Ask::get(&format!("{MESH}/meshgateways/0"))).map_err(|error| format!("{error:#}"))
    })?;
    Ok(gateway["spec"]["publicKey"].as_str().context("a key")?.to_owned())
}

pub(super) fn what_is_exported_is_taken_by_another_member(world: &mut World) -> Result<()> {
    let folder = folder(world)?;
    let mut told = run(world, ADMIN, &["carrick export --mesh-dir mesh --wait 0"])?;
    let _gateway = world.start(GATEWAY)?;
    let key = key(world)?;
    let show = "tail -n +1 mesh/*/*.yaml mesh/*/*/*.yaml";
    told += &run(
        world,
        ADMIN,
        &[
            "kubectl carrick export --mesh-dir mesh --endpoint 0=gw0.mn.example.com:27473",
            show,
            "kubectl carrick export --mesh-dir mesh",
            "carrick export --mesh-dir mesh --pod-cidr 10.42.0.0/16 --pod-cidr fd00:10:1::/48",
            show,
            "carrick validate mesh",
        ],
    )?;
    let other = World::new(world.store)?;
    let apply = format!("kubectl apply -R -f {}/mesh", folder.display());
    told += &run(&other, ADMIN, &[&apply, "kubectl carrick validate"])?;
    let told = told.replace(&key, "KEY").replace(&folder.display().to_string(), "USER");
    expect![[r#"
        $ carrick export --mesh-dir mesh --wait 0
        carrick: no key from the gateway of slot 0 within 0 s: are the pods of DaemonSet carrick-gateway ready?
        exit code 1
        $ kubectl carrick export --mesh-dir mesh --endpoint 0=gw0.mn.example.com:27473
        note: the pods of today's Nodes lie in 10.42.0.0/23, fd00:10:1::/63: if the cluster gives its Nodes ranges out of a larger one, name that with --pod-cidr
        wrote mesh/clusters/mn.yaml
        wrote mesh/routes/mn/pods.yaml
        commit the folder, or `kubectl apply -R -f mesh` in every member
        $ tail -n +1 mesh/*/*.yaml mesh/*/*/*.yaml
        ==> mesh/clusters/mn.yaml <==
        apiVersion: carrick.dev/v1alpha1
        kind: MeshCluster
        metadata:
          name: mn
        spec:
          id: 1
          gateways:
          - ordinal: 0
            publicKey: KEY
            endpoints:
            - gw0.mn.example.com:27473
          allowedCIDRs:
          - 10.42.0.0/23
          - fd00:10:1::/63

        ==> mesh/routes/mn/pods.yaml <==
        apiVersion: carrick.dev/v1alpha1
        kind: RouteAdvertisement
        metadata:
          name: mn
        spec:
          cluster: mn
          routes:
          - cidr: 10.42.0.0/23
            type: Pod
          - cidr: fd00:10:1::/63
            type: Pod
        $ kubectl carrick export --mesh-dir mesh
        mesh has all of it already
        commit the folder, or `kubectl apply -R -f mesh` in every member
        $ carrick export --mesh-dir mesh --pod-cidr 10.42.0.0/16 --pod-cidr fd00:10:1::/48
        wrote mesh/clusters/mn.yaml
        wrote mesh/routes/mn/pods.yaml
        commit the folder, or `kubectl apply -R -f mesh` in every member
        $ tail -n +1 mesh/*/*.yaml mesh/*/*/*.yaml
        ==> mesh/clusters/mn.yaml <==
        apiVersion: carrick.dev/v1alpha1
        kind: MeshCluster
        metadata:
          name: mn
        spec:
          id: 1
          gateways:
          - ordinal: 0
            publicKey: KEY
            endpoints:
            - gw0.mn.example.com:27473
          allowedCIDRs:
          - 10.42.0.0/16
          - fd00:10:1::/48

        ==> mesh/routes/mn/pods.yaml <==
        apiVersion: carrick.dev/v1alpha1
        kind: RouteAdvertisement
        metadata:
          name: mn
        spec:
          cluster: mn
          routes:
          - cidr: 10.42.0.0/16
            type: Pod
          - cidr: fd00:10:1::/48
            type: Pod
        $ carrick validate mesh
        1 members, 2 routes accepted, 0 refused
        $ kubectl apply -R -f USER/mesh
        meshcluster.carrick.dev/mn created
        routeadvertisement.carrick.dev/mn created
        $ kubectl carrick validate
        1 members, 2 routes, 2 nodes accepted, 0 refused
    "#]].assert_eq(&told);
    Ok(())
}

pub(super) fn a_right_that_export_lacks_is_named(world: &mut World) -> Result<()> {
    folder(world)?;
    let by_tenant = [
        "carrick export --mesh-dir none",
        "carrick export --mesh-dir none --cluster-name mn",
        "kubectl carrick status",
        "kubectl carrick validate --context no-such",
    ];
    let mut told = run(world, TENANT, &by_tenant)?;
    // Whoever may list MeshGateways and Nodes may export, and there is nothing to export yet.
    let worker = world.token("carrick-worker", "mn-1")?;
    told += &run(world, &worker, &["carrick export --mesh-dir none --cluster-name mn --wait 0"])?;
    told += &run(world, ADMIN, &["kubectl carrick status", "kubectl carrick plan --node mn-1"])?;
    expect![[r#"
        $ carrick export --mesh-dir none
        carrick: give the cluster's name with --cluster-name, as DaemonSet carrick-gateway of namespace carrick does not tell it: SERVER: daemonsets.apps "carrick-gateway" is forbidden: User "tenant" cannot get resource "daemonsets" in API group "apps" in the namespace "carrick" (403): have that right granted
        exit code 1
        $ carrick export --mesh-dir none --cluster-name mn
        carrick: SERVER: meshgateways.carrick.dev is forbidden: User "tenant" cannot list resource "meshgateways" in API group "carrick.dev" at the cluster scope (403): have that right granted
        exit code 1
        $ kubectl carrick status
        carrick: cannot list the agents' pods: Error from server (Forbidden): pods is forbidden: User "tenant" cannot list resource "pods" in API group "" in the namespace "carrick"
        exit code 1
        $ kubectl carrick validate --context no-such
        carrick: cannot use the kubeconfig KUBECONFIG: name a usable one with --kubeconfig: failed to load current context: no-such
        exit code 1
        $ carrick export --mesh-dir none --cluster-name mn --wait 0
        carrick: no key from the gateway of slot 0 within 0 s: are the pods of DaemonSet carrick-gateway ready?
        exit code 1
        $ kubectl carrick status
        carrick: no agent in namespace carrick: is the chart installed there? -n names another
        exit code 1
        $ kubectl carrick plan --node mn-1
        carrick: no agent in namespace carrick on node mn-1: is the chart installed there? -n names another
        exit code 1
    "#]].assert_eq(&told);
    Ok(())
}
