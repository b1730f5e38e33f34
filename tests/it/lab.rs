//! The lab itself: what it claims to be, measured with its own tools.

mod cni;
mod faults;

use std::{
    io::{BufRead, BufReader},
    net::{IpAddr, SocketAddr},
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{Command, Stdio},
    thread::sleep,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use lab::{
    Host, Lab, Member,
    capture::{Capture, Expected},
    guard,
    traffic::{http, ping::ping, tcp, udp::Flow},
    wait_for,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

const PORT: u16 = 8080;
const MILLISECOND: Duration = Duration::from_millis(1);

fn pair_with<T>(name: &str, test: impl FnOnce(&mut Lab) -> Result<T>) -> T {
    Lab::with(name, &Member::pair(), test).unwrap_or_else(|error| panic!("{error:?}"))
}

fn answers(host: &Host, to: IpAddr) -> Result<bool> {
    let pings = ping(host, to, 2)?;
    ensure!(pings.all_answered() || pings.none_answered(), "{} pings {to}: {pings:?}", host.name());
    Ok(pings.all_answered())
}

/// Who reaches whom, as a whole table: both families, NAT and plain.
#[test]
fn hosts_reach_what_they_should_and_nothing_else() {
    pair_with("reach", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        let router = lab.cluster("va")?.router.as_ref().context("va has a router")?;
        let (mn_pod, va_pod) = (&mn.pods[0], &va.pods[0]);
        let mut rows = Vec::new();
        for (family, name) in [(0, "IPv4"), (1, "IPv6")] {
            let mut row = |what: &str, from: &Host, to: IpAddr| -> Result<()> {
                rows.push(format!("{name} {what}: {}", if answers(from, to)? { "yes" } else { "no" }));
                Ok(())
            };
            row("pod mn to its node", &mn_pod.host, mn.addresses[family])?;
            row("node va to its pod", &va.host, va_pod.addresses[family])?;
            row("node va to node mn", &va.host, mn.addresses[family])?;
            row("pod va to node mn", &va_pod.host, mn.addresses[family])?;
            row("node mn to node va", &mn.host, va.addresses[family])?;
            row("internet to node va", &lab.internet, va.addresses[family])?;
            row("router of va to node va", router, va.addresses[family])?;
            row("pod mn to pod va", &mn_pod.host, va_pod.addresses[family])?;
            row("pod va to pod mn", &va_pod.host, mn_pod.addresses[family])?;
        }
        assert_eq!(
            rows,
            [
                "IPv4 pod mn to its node: yes",
                "IPv4 node va to its pod: yes",
                "IPv4 node va to node mn: yes",
                "IPv4 pod va to node mn: yes",
                "IPv4 node mn to node va: no",
                "IPv4 internet to node va: no",
                "IPv4 router of va to node va: yes",
                "IPv4 pod mn to pod va: no",
                "IPv4 pod va to pod mn: no",
                "IPv6 pod mn to its node: yes",
                "IPv6 node va to its pod: yes",
                "IPv6 node va to node mn: yes",
                "IPv6 pod va to node mn: yes",
                "IPv6 node mn to node va: no",
                "IPv6 internet to node va: no",
                "IPv6 router of va to node va: yes",
                "IPv6 pod mn to pod va: no",
                "IPv6 pod va to pod mn: no",
            ]
        );
        Ok(())
    });
}

/// The server sees the NAT router's public address, and the node's own where there is no NAT.
#[test]
fn nat_and_the_network_plugin_masquerade() {
    pair_with("masquerade", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        let server: SocketAddr = (mn.addresses[0], PORT).into();
        let _server = http::Server::start(&mn.host, server)?;
        let seen = [&va.host, &va.pods[0].host, &mn.pods[0].host].map(|host| http::get(host, server));
        let seen = seen.into_iter().collect::<Result<Vec<_>>>()?;
        // A pod's packets to its own node do not leave by a masquerading route: postrouting is not passed.
        let expected: Vec<IpAddr> = vec!["198.51.100.6".parse()?, "198.51.100.6".parse()?, mn.pods[0].ip()];
        assert_eq!(seen, expected);
        Ok(())
    });
}

/// Unsolicited packets to the router's public address stay outside, also on the port that its inside uses.
#[test]
fn nat_lets_only_answers_in() {
    pair_with("nat", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        let flow = Flow::start(&va.host, &mn.host, (mn.addresses[0], PORT).into(), MILLISECOND)?;
        wait_for("an answer", Duration::from_secs(5), || flow.first_answer().ok_or_else(|| "none".to_owned()))?;
        let solicited = flow.stop()?;
        let public: IpAddr = "198.51.100.6".parse()?;
        let unsolicited = ping(&lab.internet, public, 2)?;
        let _server = http::Server::start(&va.host, (va.addresses[0], PORT).into())?;
        let refused = http::get(&lab.internet, (public, PORT).into());
        assert_eq!((solicited.back.lost, unsolicited.none_answered(), refused.is_err()), (0, true, true));
        Ok(())
    });
}

#[test]
fn a_capture_counts_by_kind() {
    pair_with("capture", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        let expected = Expected {
            tunnel: 27473..=27480,
            hop: 27472,
            private: vec!["10.42.0.0/16".parse()?, "10.44.0.0/16".parse()?],
        };
        let capture = Capture::start(&lab.internet, "site2", expected)?;
        // To a private range, in the clear, though nobody answers.
        let unanswered = ping(&va.pods[0].host, mn.pods[0].ip(), 2)?;
        // Not private, and not a tunnel.
        let answered = ping(&va.host, mn.addresses[0], 3)?;
        // WireGuard's header, on the tunnel's port and on another; then another header on the tunnel's port.
        va.host.run(|| {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            for (port, message) in
                [(27473, [1, 0, 0, 0]), (27480, [4, 0, 0, 0]), (27481, [1, 0, 0, 0]), (27473, [0; 4])]
            {
                socket.send_to(&message, (mn.addresses[0], port))?;
            }
            Ok(())
        })?;
        // The node's refusals (ICMP) have come back when this has.
        let after = ping(&va.host, mn.addresses[0], 1)?;
        let seen = capture.stop()?;
        assert!(unanswered.none_answered() && answered.all_answered() && after.all_answered());
        // 2 answers that the private range is unknown, 8 of pings, 2 wrong datagrams, 4 refusals.
        assert_eq!((seen.clear, seen.tunnel, seen.other, seen.missed), (2, 2, 16, 0), "{seen:?}");
        assert!(seen.link > 0, "no ARP: {seen:?}");
        assert_eq!(seen.described[0], "clear text: ICMP type 8 code 0 198.51.100.6 > 10.42.0.2");
        Ok(())
    });
}

#[test]
fn numbered_udp_counts_what_a_dead_link_loses() {
    pair_with("udp", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        let flow = Flow::start(&va.pods[0].host, &mn.host, (mn.addresses[0], PORT).into(), MILLISECOND)?;
        sleep(Duration::from_millis(200));
        lab.internet.ip("link set site2 down")?;
        sleep(Duration::from_millis(300));
        lab.internet.ip("link set site2 up")?;
        wait_for("an answer after the cut", Duration::from_secs(10), || {
            let answers = answers(&va.host, mn.addresses[0]).map_err(|error| format!("{error:#}"))?;
            if answers { Ok(()) } else { Err("none".to_owned()) }
        })?;
        sleep(Duration::from_millis(100));
        let report = flow.stop()?;
        for count in [&report.there, &report.back] {
            assert!(count.lost > 0 && count.longest_gap_ms >= 290, "{report:?}");
            assert_eq!(count.received + count.lost, report.sent, "{report:?}");
            assert_eq!(count.duplicates, 0, "{report:?}");
        }
        Ok(())
    });
}

#[test]
fn traffic_without_trouble_loses_nothing() {
    pair_with("clean", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        for family in [0, 1] {
            let flow = Flow::start(&va.pods[0].host, &mn.host, (mn.addresses[family], PORT).into(), MILLISECOND)?;
            let address = (mn.addresses[family], PORT).into();
            let throughput = tcp::throughput(&va.pods[0].host, &mn.host, address, 2, Duration::from_millis(300))?;
            let report = flow.stop()?;
            assert!(report.sent > 0 && throughput.bytes > 0, "{report:?} {throughput:?}");
            assert_eq!((report.refused, report.there.lost, report.back.lost), (0, 0, 0), "{report:?}");
        }
        Ok(())
    });
}

/// A node has its own /run, bpffs, sysfs, names and nothing of another's.
#[test]
fn a_node_is_a_machine_of_its_own() {
    pair_with("machine", |lab| {
        let (mn, va) = (lab.node("mn")?, lab.node("va")?);
        mn.host.output("touch", &["/run/mine"])?;
        mn.host.output("mkdir", &["/sys/fs/bpf/mine"])?;
        mn.host.set_hosts("203.0.113.2 gw0.mn.example.com")?;
        let listing = |host: &Host, dir: &str| host.output("ls", &[dir]);
        assert_eq!(listing(&mn.host, "/run")?, "carrick-lab\nmine\n");
        assert_eq!(listing(&va.host, "/run")?, "carrick-lab\n");
        assert!(listing(&mn.host, "/sys/fs/bpf")?.contains("mine"));
        assert!(!listing(&va.host, "/sys/fs/bpf")?.contains("mine"));
        assert!(!Path::new("/run/mine").exists() && !Path::new("/sys/fs/bpf/mine").exists());
        assert_eq!(listing(&va.host, "/sys/class/net")?, "cni0\neth0\nlo\npod0\n");
        let resolved = mn.host.output("getent", &["hosts", "gw0.mn.example.com"])?;
        assert_eq!(resolved.split_whitespace().collect::<Vec<_>>(), ["203.0.113.2", "gw0.mn.example.com"]);
        assert!(va.host.output("getent", &["hosts", "gw0.mn.example.com"]).is_err());
        Ok(())
    });
}

#[test]
fn members_have_several_nodes_whose_pods_reach_each_other() {
    let [mn, va] = Member::pair();
    let members = [Member { nodes: 3, ..mn }, Member { nodes: 2, ..va }];
    Lab::with("nodes", &members, |lab| {
        for cluster in &lab.clusters {
            let (first, last) = (&cluster.nodes[0], cluster.nodes.last().context("a node")?);
            for family in [0, 1] {
                ensure!(answers(&first.pods[0].host, last.pods[0].addresses[family])?, "{}", first.host.name());
            }
            let server: SocketAddr = (last.pods[0].ip(), PORT).into();
            let _server = http::Server::start(&last.pods[0].host, server)?;
            assert_eq!(http::get(&first.pods[0].host, server)?, first.pods[0].ip());
        }
        Ok(())
    })
    .unwrap_or_else(|error| panic!("{error:?}"));
}

/// A failed program is reported with what it said; a process ends with the lab, also one that it started itself.
#[test]
fn programs_report_and_end() {
    let guard = pair_with("programs", |lab| {
        let node = lab.node("mn")?;
        let error = node.host.output("sh", &["-c", "echo told >&2; exit 7"]).err().map(|error| error.to_string());
        assert_eq!(error.as_deref(), Some("mn-0: sh -c echo told >&2; exit 7: exit status: 7\ntold"));
        let error = node.host.ip("link set lo up\nlink set nothing up").err().map(|error| error.to_string());
        assert!(error.as_deref().is_some_and(|error| error.contains("   2  link set nothing up")), "{error:?}");

        let mut process = node.host.spawn("talk", "sh", &["-c", "sleep 1000 & echo said; sleep 1000"])?;
        wait_for("its log", Duration::from_secs(5), || match process.log() {
            Ok(log) if log == "said\n" => Ok(()),
            other => Err(format!("{other:?}")),
        })?;
        process.check_running()?;
        process.kill()?;
        Ok(lab.guard().clone())
    });
    assert_eq!(guard::processes(guard.name()).ok(), Some(vec![]));
    assert!(!guard.dir().exists());
    assert!(guard.spawn(&mut Command::new("true")).is_err());
}

/// In the child that [`a_lab_ends_with_its_maker`] starts: the name of the lab to make.
const CHILD: &str = "LAB_TEST_CHILD";

/// A lab's maker is ended at every stage of its work, in every way, and nothing stays.
#[test]
fn a_lab_ends_with_its_maker() {
    if let Ok(name) = std::env::var(CHILD) {
        make_and_wait(&name).unwrap_or_else(|error| panic!("{error:?}"));
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        for delay_ms in [0, 1, 2, 3, 4, 6, 8, 10, 15, 20, 40, 80, 120, 160, 200, 250, 300, 400] {
            let name = format!("end-{}-{signal}-{delay_ms}", std::process::id());
            let mut child = start_maker(&name).unwrap_or_else(|error| panic!("{error:?}"));
            sleep(Duration::from_millis(delay_ms));
            kill(Pid::from_raw(child.id().cast_signed()), signal).expect("our own child, not yet waited for");
            let status = child.wait().expect("our own child");
            assert_eq!(status.signal(), Some(signal as i32), "{name} ended by itself");
            wait_until_gone(&name);
        }
    }
}

/// The same once it is complete, with programs running: no process is left in any of its namespaces.
#[test]
fn a_complete_lab_ends_with_its_maker() {
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGKILL] {
        let name = format!("complete-{}-{signal}", std::process::id());
        let mut child = start_maker(&name).unwrap_or_else(|error| panic!("{error:?}"));
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let ready = lines.find(|line| line.as_ref().map_or(true, |line| line.ends_with("ready")));
        assert!(matches!(ready, Some(Ok(_))), "the maker did not finish");
        let record = guard::load(&name).expect("a complete lab has a record");
        let namespaces: Vec<_> = record.hosts.iter().map(|host| namespace(host.pid)).collect();
        assert_eq!(namespaces.iter().flatten().count(), 6, "{record:?}");
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("our own child, not yet waited for");
        child.wait().expect("our own child");
        wait_until_gone(&name);
        let everyone = std::fs::read_dir("/proc").expect("/proc").flatten();
        let pids = everyone.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let left: Vec<u32> =
            pids.filter(|pid| namespace(*pid).is_some_and(|ns| namespaces.contains(&Some(ns)))).collect();
        assert_eq!(left, Vec::<u32>::new(), "processes in namespaces of {name}");
    }
}

fn start_maker(name: &str) -> Result<std::process::Child> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "lab::a_lab_ends_with_its_maker", "--nocapture"]).env(CHILD, name);
    command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().context("start the maker")
}

fn make_and_wait(name: &str) -> Result<()> {
    let lab = Lab::build(guard::Guard::named(name)?, &Member::pair())?;
    let _process = lab.node("mn")?.host.spawn("grandchildren", "sh", &["-c", "sleep 1000 & sleep 1000"])?;
    println!("ready");
    loop {
        std::thread::park();
    }
}

fn namespace(pid: u32) -> Option<std::path::PathBuf> {
    std::fs::read_link(format!("/proc/{pid}/ns/net")).ok()
}

fn wait_until_gone(name: &str) {
    let gone = wait_for(&format!("the end of {name}"), Duration::from_secs(10), || {
        let processes = guard::processes(name).map_err(|error| format!("{error:#}"))?;
        let exists = Path::new("/run/carrick-lab").join(name).exists();
        if processes.is_empty() && !exists {
            Ok(())
        } else {
            Err(format!("processes {processes:?}, directory {exists}"))
        }
    });
    gone.unwrap_or_else(|error| panic!("{error:?}"));
}

/// A kept lab goes on without its maker until it is taken down.
#[test]
fn a_kept_lab_stays_until_it_is_taken_down() {
    let name = format!("kept-{}", std::process::id());
    let keep = || -> Result<()> {
        let lab = Lab::build(guard::Guard::named(&name)?, &Member::pair())?;
        assert!(guard::Guard::named(&name).is_err(), "a second lab of that name");
        lab.keep()?;
        let names: Vec<String> = guard::list()?.into_iter().map(|lab| lab.name).collect();
        ensure!(names.contains(&name), "{names:?}");
        ensure!(guard::processes(&name)?.len() == 6, "the hosts' holders");
        guard::down(&name)?;
        ensure!(guard::processes(&name)?.is_empty() && guard::load(&name).is_err());
        ensure!(guard::down(&name).is_err(), "a second time");
        Ok(())
    };
    keep().unwrap_or_else(|error| panic!("{error:?}"));
}
