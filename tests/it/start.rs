//! What can be wrong when the programs start, and what they say of it.

use std::{
    fs,
    os::unix::{fs::PermissionsExt, process::ExitStatusExt},
};

use anyhow::{Context, Result, ensure};
use lab::{Member, carrick::Running, wait_for};
use nix::sys::signal::Signal;

use crate::joined::{Joined, SOON, joined, prepared, says};

fn keys(joined: &Joined<'_>, member: &str) -> Result<std::path::PathBuf> {
    Ok(joined.node(member)?.host.dir().join("keys"))
}

fn agent(joined: &Joined<'_>, more: &str) -> Result<String> {
    let (folder, keys) = (joined.mesh.folder().display(), keys(joined, "mn")?);
    Ok(format!("agent --config-dir {folder} --cluster-name mn --keys-dir {} {more}", keys.display()))
}

#[test]
fn the_second_on_a_node_says_who_is_the_first() {
    joined("second", |joined| {
        let running = &joined.running["mn"];
        for (arguments, lock, first) in [
            (agent(joined, "")?, "agent.lock", &running.agent),
            ("tunnel".to_owned(), "tunnel.lock", running.tunnel()?),
            ("cleanup".to_owned(), "agent.lock", &running.agent),
        ] {
            let said = joined.refused("mn", "", &arguments)?;
            let holder = format!("/run/carrick/{lock} is held by process {}", first.pid().context("it runs")?);
            ensure!(said.contains(&holder), "{arguments}: {said}");
        }
        ensure!(joined.reaches("mn", "va")? == [true, true]);
        Ok(())
    });
}

#[test]
fn what_the_machine_lacks_is_named() {
    prepared("lacks", &Member::pair(), |joined| {
        let said = joined.refused("mn", "setpriv --bounding-set -net_admin", &agent(joined, "")?)?;
        ensure!(said.contains("CAP_NET_ADMIN"), "{said}");
        let said = joined.refused("mn", "setpriv --bounding-set -net_admin", "tunnel")?;
        ensure!(said.contains("CAP_NET_ADMIN"), "{said}");
        let said = joined.refused("mn", "", &agent(joined, "--wireguard kernel")?)?;
        ensure!(said.contains("--wireguard kernel is not supported yet"), "{said}");
        joined.shell("mn", "mount -t tmpfs none /dev/net")?;
        let said = joined.refused("mn", "", "tunnel")?;
        ensure!(said.contains("/dev/net/tun does not exist"), "{said}");
        Ok(())
    });
}

/// As in a pod: per-device sysctls go over netlink.
#[test]
fn nothing_needs_a_writable_proc_sys() {
    prepared("sysctl", &Member::pair(), |joined| {
        joined.shell("mn", "mount --bind /proc/sys /proc/sys && mount -o remount,bind,ro /proc/sys")?;
        joined.shell("mn", "if echo 1 2>/dev/null > /proc/sys/net/ipv4/ip_forward; then exit 1; fi")?;
        joined.start()?;
        joined.connected()?;
        joined.wait_reaches("va", "mn")
    });
}

/// The agent goes on without the key, and takes it as soon as it is right.
#[test]
fn a_key_file_that_cannot_be_used_is_named_and_nothing_is_made_up() {
    prepared("keys", &Member::pair(), |joined| {
        let file = keys(joined, "mn")?.join("gateway-0");
        let good = fs::read(&file)?;
        let mode = |mode| fs::set_permissions(&file, fs::Permissions::from_mode(mode));
        mode(0o644)?;
        joined.start()?;
        joined.wait_status("mn", "the mode", |status| says(status, "problems", "gateway-0: can be read or written"))?;
        mode(0o600)?;
        fs::write(&file, &good[..20])?;
        joined.wait_status("mn", "the length", |status| says(status, "problems", "gateway-0: line 1 is"))?;
        fs::remove_file(&file)?;
        joined.wait_status("mn", "that it is missing", |status| {
            says(status, "problems", "gateway-0: does not exist: make the key with `carrick keys gen`")
        })?;
        fs::create_dir(&file)?;
        joined
            .wait_status("mn", "that it is no file", |status| says(status, "problems", "gateway-0: is not a file"))?;
        ensure!(
            joined.network("mn")?.iter().all(|line| !line.contains("carrick-wg")),
            "something was made without a key"
        );
        fs::remove_dir(&file)?;
        fs::write(&file, &good)?;
        mode(0o600)?;
        joined.connected()
    });
}

/// Keys that were good stay in use when their files go bad; a wrong preshared key is never replaced by none.
#[test]
fn keys_that_go_bad_take_nothing_away() {
    prepared("bad-keys", &Member::pair(), |joined| {
        for (member, other) in [("mn", "va"), ("va", "mn")] {
            write_psk(&keys(joined, member)?.join(format!("psk-{other}")), PSK)?;
        }
        joined.start()?;
        joined.connected()?;
        let before = joined.network("mn")?;
        fs::remove_file(keys(joined, "mn")?.join("gateway-0"))?;
        write_psk(&keys(joined, "mn")?.join("psk-va"), "short")?;
        for text in ["gateway-0: does not exist", "psk-va: line 1"] {
            joined.wait_status("mn", text, |status| says(status, "problems", text))?;
        }
        ensure!(joined.network("mn")? == before);
        ensure!(joined.reaches("mn", "va")? == [true, true]);

        joined.kill_agent("mn")?;
        let _agent = joined.start_agent("mn")?;
        joined
            .wait_status("mn", "that it is not ready", |status| status["synced"] == true && status["ready"] == false)?;
        ensure!(joined.network("mn")? == before);
        ensure!(joined.reaches("mn", "va")? == [true, true]);
        Ok(())
    });
}

const PSK: &str = "c2hhcmVkIGJ5IHR3byBtZW1iZXJzLCBub3QgcHJpbnQ=";

fn write_psk(file: &std::path::Path, key: &str) -> Result<()> {
    fs::write(file, format!("{key}\n"))?;
    Ok(fs::set_permissions(file, fs::Permissions::from_mode(0o600))?)
}

/// Without nft nothing can say what a peer may send here, so no peer is made.
#[test]
fn what_nft_is_missing_for_is_named_and_the_rest_goes_on() {
    prepared("no-nft", &Member::pair(), |joined| {
        let _tunnel = joined.carrick.start_tunnel(joined.node("mn")?)?;
        let agent = agent(joined, "")?;
        let arguments: Vec<&str> = agent.split_whitespace().collect();
        let path = joined.carrick.path().to_str().context("a path")?;
        let words = [&["PATH=/nowhere", path][..], &arguments].concat();
        let _agent = joined.node("mn")?.host.spawn("agent", "env", &words)?;
        joined.wait_status("mn", "what is missing", |status| {
            status["failures"].to_string().contains("nft is not installed: install the package `nftables`")
        })?;
        let shown = joined.shell("mn", "wg show; ip route show table 7474")?;
        ensure!(shown.contains("peer:") && shown.contains("unreachable 10.44.0.0/16"), "{shown}");
        Ok(())
    });
}

/// The programs are what a peer is let in by.
#[test]
fn without_a_bpf_filesystem_there_is_no_peer() {
    prepared("no-bpffs", &Member::pair(), |joined| {
        joined.shell("mn", "umount /sys/fs/bpf")?;
        let _tunnel = joined.carrick.start_tunnel(joined.node("mn")?)?;
        let _agent = joined.start_agent("mn")?;
        joined.wait_status("mn", "what is missing", |status| {
            status["failures"].to_string().contains("mount -t bpf bpf /sys/fs/bpf")
        })?;
        let shown = joined.shell("mn", "wg show; ip route show table 7474")?;
        ensure!(!shown.contains("peer:") && shown.contains("unreachable 10.44.0.0/16"), "{shown}");
        joined.shell("mn", "mount -t bpf bpf /sys/fs/bpf")?;
        joined.wait_status("mn", "to go on by itself", |status| status["ready"] == true)?;
        Ok(())
    });
}

/// As in a container that was not given them.
#[test]
fn without_the_capabilities_for_programs_there_is_no_peer() {
    prepared("no-cap-bpf", &Member::pair(), |joined| {
        let tunnel = joined.carrick.start_tunnel(joined.node("mn")?)?;
        let agent = agent(joined, "")?;
        let without = "--bounding-set -bpf,-perfmon,-sys_admin";
        let path = joined.carrick.path().to_str().context("a path")?;
        let words: Vec<&str> = without.split(' ').chain([path]).chain(agent.split_whitespace()).collect();
        let process = joined.node("mn")?.host.spawn("agent", "setpriv", &words)?;
        let remedy = "give the container `capabilities: {add: [NET_ADMIN, BPF, PERFMON]}` and user 0";
        joined.wait_status("mn", "what is missing", |status| {
            status["ready"] == false && status["failures"].to_string().contains(remedy)
        })?;
        ensure!(process.log()?.contains(remedy), "{}", process.log()?);
        let shown = joined.shell("mn", "wg show; ip route show table 7474")?;
        ensure!(!shown.contains("peer:") && shown.contains("unreachable 10.44.0.0/16"), "{shown}");
        process.terminate()?;
        tunnel.terminate()
    });
}

/// The plan of a node on which nothing runs yet, twice: the first one did nothing.
#[test]
fn a_plan_performs_nothing() {
    prepared("plan", &Member::pair(), |joined| {
        let before = joined.network("mn")?;
        let carrick = joined.carrick.path().display().to_string();
        let plan = |joined: &Joined<'_>, more: &str| {
            let arguments = agent(joined, more)?.replacen("agent", "plan", 1);
            joined.shell("mn", &format!("{carrick} {arguments}"))
        };
        let first = plan(joined, "")?;
        ensure!(first.contains("ip route replace unreachable 10.44.0.0/16 table 7474"), "{first}");
        ensure!(first.contains("# waits: wg set carrick-wg0"), "{first}");
        ensure!(joined.network("mn")? == before);
        ensure!(plan(joined, "")? == first);
        let yaml = plan(joined, "-o yaml")?;
        ensure!(yaml.starts_with("operations:\n"), "{yaml}");
        let json: serde_json::Value = serde_json::from_str(&plan(joined, "-o json")?)?;
        ensure!(json["operations"].as_array().is_some_and(|operations| !operations.is_empty()), "{json}");
        Ok(())
    });
}

/// A preshared key on both sides works; neither it nor any private key is in anything that was printed.
#[test]
fn no_secret_is_printed() {
    prepared("secrets", &Member::pair(), |joined| {
        for (member, other) in [("mn", "va"), ("va", "mn")] {
            write_psk(&keys(joined, member)?.join(format!("psk-{other}")), PSK)?;
        }
        joined.start()?;
        joined.connected()?;
        joined.wait_reaches("mn", "va")?;
        let mut printed = String::new();
        for member in ["mn", "va"] {
            printed += &joined.running[member].agent.log()?;
            printed += &joined.running[member].tunnel()?.log()?;
            printed += &joined.status(member)?.to_string();
            let carrick = joined.carrick.path().display();
            let (folder, keys) = (joined.mesh.folder().display(), keys(joined, member)?);
            printed += &joined.shell(member, &format!(
                "RUST_LOG=trace {carrick} plan --config-dir {folder} --cluster-name {member} --keys-dir {} --run-dir /run/other 2>&1",
                keys.display()
            ))?;
        }
        ensure!(printed.contains("preshared-key <"), "the preshared key is in use: {printed}");
        for member in ["mn", "va"] {
            let private = fs::read_to_string(keys(joined, member)?.join("gateway-0"))?;
            ensure!(!printed.contains(private.trim()), "a private key was printed");
        }
        ensure!(!printed.contains(PSK), "a preshared key was printed");
        Ok(())
    });
}

/// The standard tool sees the devices, and cannot change them past the agent.
/// A handler of cores gets none either. It shows only where a process that may be dumped is.
#[test]
fn no_secret_is_dumped() {
    joined("dumped", |joined| {
        let dir = joined.lab.dir("cores");
        fs::create_dir(&dir)?;
        let crash = format!("cd {} && ulimit -c unlimited && kill -ABRT $$", dir.display());
        let mut control = joined.node("mn")?.host.spawn("control", "sh", &["-c", &crash])?;
        let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern")?;
        ensure!(control.wait()?.core_dumped(), "this machine dumps no cores: kernel.core_pattern is {pattern}");

        let Running { agent, tunnel } = joined.running.remove("mn").context("mn runs")?;
        for mut process in [agent, tunnel.context("its tunnel runs")?] {
            let pid = process.pid().context("it runs")?;
            joined.shell("mn", &format!("prlimit --pid {pid} --core=unlimited:unlimited"))?;
            process.signal(Signal::SIGABRT)?;
            let ended = process.wait()?;
            ensure!(ended.signal() == Some(Signal::SIGABRT as i32) && !ended.core_dumped(), "{ended}");
        }
        Ok(())
    });
}

#[test]
fn wg_shows_the_devices() {
    joined("wg", |joined| {
        let shown = joined.shell("mn", "wg show carrick-wg0")?;
        for part in
            ["listening port: 27473", "endpoint: 198.51.100.6:", "allowed ips: 10.44.0.0/16", "latest handshake"]
        {
            ensure!(shown.contains(part), "{part:?} is not in {shown}");
        }
        let said =
            joined.shell("mn", "if wg set carrick-wg0 listen-port 1234 2>&1; then echo IT DID NOT FAIL; exit 1; fi")?;
        ensure!(said.contains("Unable to modify interface"), "{said}");
        ensure!(joined.reaches("mn", "va")? == [true, true]);
        Ok(())
    });
}

#[test]
fn logs_are_json_where_it_is_asked_for() {
    prepared("json", &Member::pair(), |joined| {
        let node = joined.node("mn")?;
        let arguments = agent(joined, "--log-format json")?;
        let agent =
            node.host.spawn("json", joined.carrick.path(), &arguments.split_whitespace().collect::<Vec<_>>())?;
        joined.wait_status("mn", "anything", |status| status["synced"] == true)?;
        agent.signal(nix::sys::signal::Signal::SIGTERM)?;
        let log = wait_for("the log to end", SOON, || {
            let log = agent.log().map_err(|error| error.to_string())?;
            if log.contains("the data plane stays") { Ok(log) } else { Err(log) }
        })?;
        for line in log.lines() {
            let line: serde_json::Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
            ensure!(line["level"].is_string() && line["fields"]["message"].is_string(), "{line}");
        }
        Ok(())
    });
}

/// A rotation: both keys are there, the folder says which.
#[test]
fn a_key_is_rotated_by_the_folder() {
    joined("rotate", |joined| {
        let carrick = joined.carrick.path().display().to_string();
        let dir = keys(joined, "va")?;
        let second = joined.shell("va", &format!("{carrick} keys gen --add --keys-dir {}", dir.display()))?;
        let file = joined.mesh.folder().join("va-cluster.yaml");
        let text = fs::read_to_string(&file)?;
        let first = text.split('"').find(|word| word.len() == 44).context("the folder names a key")?.to_owned();
        joined.mesh.write("va-cluster.yaml", &text.replace(&first, second.trim()))?;
        joined.wait_status("mn", "the new key", |status| status["peers"][0]["publicKey"] == second.trim())?;
        joined.connected()?;
        joined.wait_reaches("va", "mn")
    });
}
