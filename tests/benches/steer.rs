//! What a packet costs in the steering programs: nanoseconds, by BPF_PROG_TEST_RUN, as one line of JSON.
//!
//! Each packet is asked again and again, so the tables lie in the processor's caches. Of several runs of one packet the
//! quickest counts, since others only add to it; of several destinations, spread over the table, the middle one.
//! What an empty program costs in the same way is printed beside, and subtracted from nothing.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, TestRun as _,
    maps::{Array, MapData, lpm_trie},
    programs::{SchedClassifier, TestRunOptions},
};
use ebpf::{Addr, Config, MAX_MEMBER_ID, NO_SLOT, Offered, Reach, Remote, V4_PREFIX, remote};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};
use serde_json::{Value, json};

type Trie<V> = lpm_trie::LpmTrie<MapData, [u8; 16], V>;

const PREFIXES: [u32; 3] = [16, 4096, 65_536];
const DESTINATIONS: u32 = 64;
const RUNS: usize = 50;
/// Packets of one run.
const REPEAT: u32 = 2_000;

/// This member, whose pod sends; the others have the ids above.
const MEMBER: u16 = 1;
const SOURCE: [u8; 4] = [10, 42, 2, 2];
/// In no table.
const FOREIGN: [u8; 4] = [203, 0, 113, 9];
/// Both slots of whoever is asked for.
const BOTH: u8 = 0b11;

// Verdicts of tcx programs.
const NEXT: u32 = u32::MAX;
const REDIRECT: u32 = 7;

fn main() -> Result<()> {
    // Maps are pinned by name: nobody else sees these.
    let none = None::<&str>;
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).context("unshare: this needs root")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make the mounts private")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), none).context("mount a BPF file system")?;

    let mut gateway = Bench::new(agent::kernel::object::OBJECT, "gateway", 0)?;
    let mut worker = Bench::new(agent::kernel::object::TEST_OBJECT, "worker", NO_SLOT)?;
    let mut costs = vec![cost("an empty program", 0, worker.quickest("test_nothing", FOREIGN, NEXT)?)];
    for prefixes in PREFIXES {
        gateway.fill(prefixes)?;
        costs.push(cost("steer into a tunnel", prefixes, gateway.steered("steer", REDIRECT)?));
        costs.push(cost("steer_native, foreign", prefixes, gateway.quickest("steer_native", FOREIGN, NEXT)?));
        worker.fill(prefixes)?;
        // The program that ships would see the key that it has set in the round before; this one does not look at it.
        costs.push(cost("steer over the hop", prefixes, worker.steered("test_steer", NEXT)?));
    }
    println!("{}", json!({ "costs": costs }));
    Ok(())
}

fn cost(name: &str, prefixes: u32, cost: Duration) -> Value {
    json!({ "name": name, "prefixes": prefixes, "nanoseconds": cost.as_nanos() as u64 })
}

/// One loaded object, and its table of remote prefixes.
struct Bench {
    object: Ebpf,
    remote: Trie<Remote>,
    /// Prefixes that are in it.
    filled: u32,
}

impl Bench {
    /// Loads an object, with maps of its own, as if on a node with that slot, which reaches every member.
    fn new(object: &[u8], name: &str, slot: u8) -> Result<Bench> {
        let pins = Path::new("/sys/fs/bpf").join(name);
        fs::create_dir(&pins).with_context(|| pins.display().to_string())?;
        let mut object = EbpfLoader::new().default_map_pin_directory(&pins).load(object).context("load the object")?;
        for (name, program) in object.programs_mut() {
            let program: &mut SchedClassifier = program.try_into()?;
            program.load().with_context(|| format!("load {name}"))?;
        }
        array::<Config>(&mut object, "CONFIG")?.set(0, config(slot), 0)?;
        let mut health: Array<MapData, Reach> = array(&mut object, "HEALTH")?;
        let reach = if slot == NO_SLOT { Reach { via: BOTH, ..REACH } } else { Reach { links: BOTH, ..REACH } };
        (0..=u32::from(MAX_MEMBER_ID)).try_for_each(|member| health.set(member, reach, 0))?;
        array::<u64>(&mut object, "PROBED")?.set(0, u64::MAX, 0)?;
        let mut own: Trie<Offered> = take(&mut object, "OWN")?.try_into()?;
        own.insert(&key([10, 42, 0, 0], 16), Offered { members: [u64::MAX; 64] }, 0)?;
        let remote = take(&mut object, "REMOTE")?.try_into()?;
        Ok(Bench { object, remote, filled: 0 })
    }

    /// Puts so many prefixes into the table, spread evenly over 11.0.0.0/8, each of some member.
    fn fill(&mut self, prefixes: u32) -> Result<()> {
        for at in 0..self.filled {
            self.remote.remove(&key(prefix(at, self.filled), 24))?;
        }
        for at in 0..prefixes {
            let member = MEMBER + 1 + u16::try_from(at % u32::from(MAX_MEMBER_ID - MEMBER))?;
            self.remote.insert(&key(prefix(at, prefixes), 24), Remote { member, kind: remote::RANGE, zero: 0 }, 0)?;
        }
        self.filled = prefixes;
        Ok(())
    }

    /// Of packets to remote pods: the middle one of several destinations.
    fn steered(&mut self, program: &str, verdict: u32) -> Result<Duration> {
        let destinations = DESTINATIONS.min(self.filled);
        let mut costs = Vec::new();
        for at in 0..destinations {
            let [a, b, c, _] = prefix(at, destinations);
            costs.push(self.quickest(program, [a, b, c, 9], verdict)?);
        }
        costs.sort();
        Ok(costs[costs.len() / 2])
    }

    /// Of a packet to that destination, of which `verdict` must become that.
    fn quickest(&mut self, program: &str, destination: [u8; 4], verdict: u32) -> Result<Duration> {
        let found = self.object.program(program).with_context(|| format!("the object has no program {program}"))?;
        let classifier: &SchedClassifier = found.try_into()?;
        let packet = packet(destination);
        let mut costs = Vec::new();
        for _ in 0..RUNS {
            let options = TestRunOptions { data_in: Some(&packet), repeat: REPEAT, ..TestRunOptions::default() };
            let run = classifier.test_run(options).with_context(|| format!("run {program}"))?;
            ensure!(run.return_value == verdict, "{program} to {destination:?}: {}, not {verdict}", run.return_value);
            costs.push(run.duration);
        }
        costs.into_iter().min().context("it ran")
    }
}

const REACH: Reach = Reach { via: 0, links: 0, mtu: 1420, kept: 0, zero: [0; 3] };

fn config(slot: u8) -> Config {
    let node = |last| Addr::v4([192, 0, 2, last]);
    let mut config = Config {
        gateways: [[Addr::NONE; 8]; 2],
        hop: [node(3), Addr::NONE],
        overlay: Addr([0xfd; 16]),
        hop_ifindex: 2,
        wireguard: [0; 8],
        vni: [0x123456, 0],
        mac: [[2, 0, 0, 0, 0, 1], [0; 6]],
        hop_mac: [2, 0, 0, 0, 0, 2],
        member: MEMBER,
        mtu: 1420,
        hop_mtu: 1450,
        wireguard_port: 27473,
        hop_port: 27472,
        probe_port: 27455,
        slot,
        secrets: 1,
    };
    if slot == NO_SLOT {
        config.gateways[0][..2].copy_from_slice(&[node(1), node(2)]);
    } else {
        config.wireguard[..2].copy_from_slice(&[3, 4]);
    }
    config
}

/// The prefix at place `at` of so many that lie evenly in 11.0.0.0/8: a /24.
fn prefix(at: u32, of: u32) -> [u8; 4] {
    let [_, _, b, c] = (at * (65_536 / of)).to_be_bytes();
    [11, b, c, 0]
}

fn key(network: [u8; 4], length: u32) -> lpm_trie::Key<[u8; 16]> {
    lpm_trie::Key::new(V4_PREFIX + length, Addr::v4(network).0)
}

/// A TCP segment of 100 bytes in an Ethernet frame, from our pod.
fn packet(destination: [u8; 4]) -> Vec<u8> {
    let ethernet = [2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 8, 0x08, 0x00];
    let length: u16 = 20 + 20 + 100;
    let mut ip = [0x45, 0, 0, 0, 0, 1, 0x40, 0, 63, 6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    ip[2..4].copy_from_slice(&length.to_be_bytes());
    ip[12..16].copy_from_slice(&SOURCE);
    ip[16..].copy_from_slice(&destination);
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(folded as u16)).to_be_bytes());
    // Ports 40000 to 443, an ACK.
    let tcp = [0x9c, 0x40, 0x01, 0xbb, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 0xff, 0xff, 0, 0, 0, 0];
    [&ethernet[..], &ip, &tcp, &[0; 100]].concat()
}

fn take(object: &mut Ebpf, name: &str) -> Result<aya::maps::Map> {
    object.take_map(name).with_context(|| format!("the object has no map {name}"))
}

fn array<V: aya::Pod>(object: &mut Ebpf, name: &str) -> Result<Array<MapData, V>> {
    Ok(take(object, name)?.try_into()?)
}
