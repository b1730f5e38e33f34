//! What an operator does to the folder, wrong or right, and what two connected members make of it.

use std::fs;

use anyhow::ensure;
use lab::{
    Member,
    carrick::difference,
    mesh::{self, Gateway},
    traffic::{http, ping::ping, udp::Flow},
    wait_for,
};

use crate::joined::{CONNECT_LIMIT, MILLISECOND, PORT, SOON, joined, prepared, says};

#[test]
fn a_broken_file_takes_nothing_away_before_and_after_a_restart() {
    joined("broken", |joined| {
        let before = joined.network("mn")?;
        let routes = fs::read_to_string(joined.mesh.folder().join("va-routes.yaml"))?;
        joined.mesh.write("va-routes.yaml", "kind: [RouteAdvertisement")?;
        joined.wait_status("mn", "which file is broken", |status| says(status, "problems", "va-routes.yaml:1"))?;
        ensure!(difference(&before, &joined.network("mn")?).is_empty());

        joined.kill_agent("mn")?;
        let _agent = joined.start_agent("mn")?;
        let status = joined.wait_status("mn", "that its folder is not whole", |status| status["synced"] == true)?;
        ensure!(status["ready"] == false && says(&status, "problems", "va-routes.yaml:1"), "{status}");
        ensure!(difference(&before, &joined.network("mn")?).is_empty());
        ensure!(joined.reaches("mn", "va")? == [true, true]);

        joined.mesh.write("va-routes.yaml", &routes)?;
        joined.wait_status("mn", "that all is well", |status| status["ready"] == true)?;
        ensure!(difference(&before, &joined.network("mn")?).is_empty());
        Ok(())
    });
}

#[test]
fn a_folder_that_goes_away_takes_nothing_away_and_a_removed_file_does() {
    joined("removed", |joined| {
        let before = joined.network("mn")?;
        let (folder, aside) = (joined.mesh.folder().to_owned(), joined.mesh.folder().with_extension("aside"));
        fs::rename(&folder, &aside)?;
        joined.kill_agent("mn")?;
        let _agent = joined.start_agent("mn")?;
        joined.wait_status("mn", "that it has no folder", |status| status["synced"] == false)?;
        ensure!(difference(&before, &joined.network("mn")?).is_empty());
        fs::rename(&aside, &folder)?;
        joined.wait_status("mn", "that it has read its folder", |status| status["ready"] == true)?;
        ensure!(difference(&before, &joined.network("mn")?).is_empty());

        joined.mesh.remove("va-routes.yaml")?;
        wait_for("the route to be gone", SOON, || {
            let now = joined.network("mn").map_err(|error| format!("{error:#}"))?;
            let left: Vec<_> = now.iter().filter(|line| line.contains("10.44.0.0/16")).cloned().collect();
            if left.is_empty() { Ok(()) } else { Err(left.join("\n")) }
        })?;
        joined.connected()
    });
}

/// Every claim here is refused, each by name, and the pods go on talking.
#[test]
fn bad_objects_are_refused_by_name_and_stop_nothing() {
    joined("refused", |joined| {
        let before = joined.network("mn")?;
        let evil = "
apiVersion: carrick.dev/v1alpha1
kind: MeshCluster
metadata: {name: evil}
spec:
  id: 66
  gateways: [{ordinal: 0, publicKey: AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=}, {ordinal: 9, publicKey: short}]
  allowedCIDRs: [0.0.0.0/0, 10.44.0.0/15, 127.0.0.0/8]
---
apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata: {name: evil}
spec: {cluster: evil, routes: [{cidr: 10.44.7.0/24, type: Pod}, {cidr: 10.50.0.1/24, type: Pod}]}
---
apiVersion: carrick.dev/v1alpha1
kind: RouteAdvertisement
metadata: {name: nobody}
spec: {cluster: nobody, routes: [{cidr: 10.60.0.0/16, type: Pod}]}
---
apiVersion: carrick.dev/v1alpha1
kind: EgressPolicy
metadata: {name: later}
spec: {members: [mn], to: []}
";
        joined.mesh.write("evil.yaml", evil)?;
        let wanted = [
            "MeshCluster/evil spec.gateways[0].publicKey: ZeroKey",
            "MeshCluster/evil spec.gateways[1].ordinal: InvalidOrdinal",
            "MeshCluster/evil spec.allowedCIDRs[0]: ",
            "MeshCluster/evil spec.allowedCIDRs[2]: Loopback",
            "RouteAdvertisement/evil spec.routes[0].cidr: HeldByAnother",
            "RouteAdvertisement/evil spec.routes[1].cidr: HostBits",
            "RouteAdvertisement/nobody spec.cluster: UnknownCluster",
            "EgressPolicy/later",
        ];
        let all = |status: &serde_json::Value| wanted.iter().all(|text| says(status, "rejections", text));
        for member in ["mn", "va"] {
            joined.wait_status(member, "every refusal", all)?;
        }
        ensure!(difference(&before, &joined.network("mn")?).is_empty());
        ensure!(joined.reaches("mn", "va")? == [true, true]);
        let said = joined.refused("mn", "", &format!("validate {}", joined.mesh.folder().display()))?;
        ensure!(wanted.iter().all(|text| said.contains(text)), "{said}");
        Ok(())
    });
}

/// A flow that began before there was a tunnel was masqueraded; it must not stay so.
#[test]
fn a_flow_from_before_keeps_its_own_source_from_then_on() {
    prepared("before", &Member::pair(), |joined| {
        let (from, to) = (&joined.node("va")?.pods[0].host, &joined.node("mn")?.pods[0].host);
        let flow = Flow::start(from, to, joined.pod_address("mn")?, MILLISECOND)?;
        let tracked = "conntrack -L -p udp 2>/dev/null | grep -c 'dport=8080' || true";
        wait_for("the flow to be tracked", SOON, || match joined.shell("va", tracked) {
            Ok(count) if count.trim() != "0" => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        ensure!(flow.first_answer().is_none(), "an answer without a tunnel");
        joined.start()?;
        joined.connected()?;
        wait_for("an answer to the old flow", SOON, || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        flow.stop()?;
        Ok(())
    });
}

/// Each side's pods see the other's own addresses, in both families and both directions.
#[test]
fn the_server_sees_the_clients_own_address() {
    joined("source", |joined| {
        for (client, server) in [("mn", "va"), ("va", "mn")] {
            let (client, server) = (&joined.node(client)?.pods[0], &joined.node(server)?.pods[0]);
            for (own, address) in client.addresses.iter().zip(&server.addresses) {
                let _server = http::Server::start(&server.host, (*address, PORT).into())?;
                let seen = http::get(&client.host, (*address, PORT).into())?;
                ensure!(seen == *own, "{address} saw {seen} instead of {own}");
            }
        }
        Ok(())
    });
}

/// `va` reads a folder of its own in which everything is offered to it; `mn` knows better.
#[test]
fn what_was_not_offered_to_a_member_is_out_of_its_reach() {
    let [mn, va] = Member::pair();
    let secret = "10.43.0.0/16";
    let mn = Member { allowed: vec![secret.parse().expect("a range")], ..mn };
    prepared("offers", &[mn, va], |joined| {
        joined.node("mn")?.pods[0].host.ip("addr add 10.43.0.2/32 dev eth0")?;
        joined.node("mn")?.host.ip("route add 10.43.0.0/16 dev cni0")?;
        let forged = joined.lab.dir("forged");
        fs::create_dir(&forged)?;
        let member = joined.member("mn")?.clone();
        joined.mesh.write_routes(&member, &member.allowed_ranges())?;
        for entry in fs::read_dir(joined.mesh.folder())? {
            let path = entry?.path();
            fs::copy(&path, forged.join(path.file_name().expect("a file has a name")))?;
        }
        let ge = Member { id: 3, ..Member::new("ge", 3, "10.46.0.0/16".parse()?) };
        joined.mesh.write_cluster(&ge, &[Gateway { public_key: public_key(7), endpoints: vec![] }])?;
        joined.mesh.write_routes(&member, &member.pod_ranges())?;
        let only_ge = mesh::routes(&member, &[secret.parse()?])
            .replace("name: mn\nspec", "name: mn-secret\nspec")
            .replace("  routes:", "  to: [ge]\n  routes:");
        joined.mesh.write("mn-secret.yaml", &only_ge)?;

        let (mn, va) = (joined.node("mn")?, joined.node("va")?);
        let _mn = joined.carrick.start(&member, mn, &joined.mesh)?;
        let _tunnel = joined.carrick.start_tunnel(va)?;
        let arguments = format!(
            "agent --config-dir {} --cluster-name va --keys-dir {}",
            forged.display(),
            va.host.dir().join("keys").display()
        );
        let _agent = va.host.spawn("agent", joined.carrick.path(), &arguments.split(' ').collect::<Vec<_>>())?;
        joined.carrick.wait_connected(va, &["mn"], CONNECT_LIMIT)?;
        joined.wait_reaches("va", "mn")?;

        let pod = &va.pods[0].host;
        ensure!(ping(pod, "10.43.0.2".parse()?, 3)?.none_answered(), "what is offered to ge alone answered va");
        let status = joined.status("mn")?;
        let counted = |drop: &serde_json::Value| drop["reason"] == "not_offered" && drop["packets"].as_u64() >= Some(3);
        ensure!(status["drops"].as_array().is_some_and(|drops| drops.iter().any(counted)), "nobody counted: {status}");
        Ok(())
    });
}

/// Any valid public key that nobody holds: X25519 takes every 32 bytes but a few.
fn public_key(byte: u8) -> String {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bits = [byte; 33].map(u32::from);
    let text: String = bits
        .chunks(3)
        .flat_map(|three| {
            let word = three[0] << 16 | three[1] << 8 | three[2];
            [18, 12, 6, 0].map(|shift| char::from(ALPHABET[(word >> shift & 63) as usize]))
        })
        .collect();
    // 32 bytes are 42 characters, one of four bits, and a pad.
    let last = ALPHABET[((u32::from(byte) << 2) & 63) as usize];
    format!("{}{}=", &text[..42], char::from(last))
}
