//! Pins, entries and attachments on the real kernel: each test in a mount and a network namespace of its own, with a bpffs
//! of its own. They need root.

#![allow(clippy::unwrap_used)]

use std::{
    fs,
    future::Future,
    net::{IpAddr, Ipv6Addr},
    os::unix::fs::PermissionsExt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use ipnetwork::{IpNetwork, Ipv4Network, Ipv6Network};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use proptest::{
    collection::{btree_map, btree_set, vec},
    prelude::*,
    sample::select,
    test_runner::{Config as Cases, TestRunner},
};

use super::*;
use crate::{
    kernel::{object::OBJECT, tests::sh},
    keys::HopSecret,
    names::{MemberId, Ordinal},
    probe::HealthMaps,
    scratch::Scratch,
    state::{Config, Home, Node, Remote},
};

/// A node: its namespaces, its bpffs and its run directory.
struct Place {
    dir: PathBuf,
    rtnl: Rtnl,
}

impl Place {
    fn bpffs(&self) -> PathBuf {
        self.dir.join("bpf")
    }

    fn run_dir(&self) -> PathBuf {
        self.dir.join("run")
    }

    fn bpf(&self) -> Bpf {
        Bpf::new(&self.bpffs(), &self.run_dir()).unwrap()
    }

    /// As an agent would do that has another build.
    fn upgraded(&self) -> Bpf {
        let mut bytes = OBJECT.to_vec();
        bytes.extend(b"another build");
        self.with(bytes, ebpf::ABI)
    }

    fn with(&self, object: Vec<u8>, abi: u32) -> Bpf {
        Bpf::of(Object::new(Cow::Owned(object)).unwrap(), abi, &self.bpffs(), &self.run_dir())
    }
}

/// A bpffs, until it is dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).unwrap();
    }
}

/// Runs `work` on a thread and a runtime of its own, in its own namespaces, on a node with the devices of a gateway.
fn on_node<T: Send, F: Future<Output = T>>(work: impl FnOnce(Place) -> F + Send) -> T {
    let inside = || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("these tests need root");
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).unwrap();
        let scratch = Scratch::new();
        let bpffs = scratch.path().join("bpf");
        fs::create_dir(&bpffs).unwrap();
        mount(Some("bpf"), &bpffs, Some("bpf"), MsFlags::empty(), none).unwrap();
        let _mounted = Mounted(bpffs);
        sh("ip link set lo up
            for link in carrick-hop carrick-wg0 eth0 eth0.7; do ip link add $link type veth peer name p$link; done
            ip link property add dev eth0 altname carrick-wg7");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let dir = scratch.path().to_owned();
        runtime.block_on(async { work(Place { dir, rtnl: Rtnl::new().unwrap() }).await })
    };
    let ended = thread::scope(|scope| scope.spawn(inside).join());
    ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn at(program: Program, link: &str) -> Attachment {
    Attachment { program, link: link.to_owned() }
}

/// What a gateway has attached.
fn gateway() -> BTreeSet<Attachment> {
    BTreeSet::from([
        at(Program::Steer, "carrick-hop"),
        at(Program::FromHop, "carrick-hop"),
        at(Program::SteerNative, "eth0"),
        at(Program::SteerNative, "eth0.7"),
        at(Program::ToPeer, "carrick-wg0"),
        at(Program::FromPeer, "carrick-wg0"),
    ])
}

fn marks() -> BTreeMap<HopId, HopMark> {
    let secrets = ["AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=", "AgICAgICAgICAgICAgICAgICAgICAgICAgICAgICAgI="];
    let marks = secrets.map(|secret| secret.parse::<HopSecret>().unwrap().mark());
    marks.into_iter().map(|mark| (mark.id(), mark)).collect()
}

async fn read(place: &Place, bpf: &mut Bpf) -> (Option<state::Maps>, BTreeSet<Attachment>) {
    let maps = bpf.read_maps(&marks()).unwrap();
    (maps, bpf.read_programs(&place.rtnl).await.unwrap())
}

/// One pass, in the order of the real one; how many steps it took.
async fn pass(place: &Place, bpf: &mut Bpf, wanted: &BTreeSet<Attachment>) -> usize {
    let (maps, programs) = read(place, bpf).await;
    let mut steps = 0;
    if maps.is_none() {
        bpf.load().await.unwrap();
        steps += 1;
    }
    for attachment in wanted.difference(&programs) {
        bpf.attach(&place.rtnl, attachment).await.unwrap_or_else(|error| panic!("{attachment:?}: {error}"));
        steps += 1;
    }
    for attachment in programs.difference(wanted) {
        bpf.detach(&place.rtnl, attachment).await.unwrap();
        steps += 1;
    }
    steps
}

/// Until nothing is left to do.
async fn settle(place: &Place, bpf: &mut Bpf, wanted: &BTreeSet<Attachment>) {
    for _ in 0..3 {
        if pass(place, bpf, wanted).await == 0 {
            assert!(bpf.still_attached(&place.rtnl).await.unwrap());
            return;
        }
    }
    panic!("a third pass still writes");
}

/// The ids of the programs at each hook.
fn hooks() -> BTreeMap<(String, bool), Vec<u32>> {
    let mut hooks = BTreeMap::new();
    for link in ["carrick-hop", "carrick-wg0", "eth0", "eth0.7"] {
        for ingress in [false, true] {
            let index = sys::index_of(link).unwrap().unwrap();
            let programs = sys::query(index, ingress).unwrap().iter().map(|attached| attached.program).collect();
            hooks.insert((link.to_owned(), ingress), programs);
        }
    }
    hooks
}

/// A foreign program, attached for as long as the link lives.
fn foreign(place: &Place, link: &str, first: bool) -> OwnedFd {
    let pins = Pins::new(&place.bpffs(), 7000);
    pins.make_dirs().unwrap();
    let ours = Object::new(Cow::Borrowed(OBJECT)).unwrap();
    let loaded = load::load_programs(&pins, &ours, &place.run_dir(), &[Program::ToPeer]).unwrap();
    pins.remove().unwrap();
    sys::link_create(loaded[&Program::ToPeer].as_fd(), sys::index_of(link).unwrap().unwrap(), false, first).unwrap()
}

fn any_prefix() -> impl Strategy<Value = IpNetwork> {
    let v4 = (any::<[u8; 4]>(), 0..=32u8).prop_map(|(ip, length)| {
        let ip = Ipv4Network::new(ip.into(), length).unwrap().network();
        IpNetwork::V4(Ipv4Network::new(ip, length).unwrap())
    });
    let v6 = (any::<[u8; 16]>(), 0..=128u8).prop_map(|(mut ip, length)| {
        ip[0] |= 0x20;
        let ip = Ipv6Network::new(ip.into(), length).unwrap().network();
        IpNetwork::V6(Ipv6Network::new(ip, length).unwrap())
    });
    prop_oneof![v4, v6]
}

fn any_ip() -> impl Strategy<Value = IpAddr> {
    let v6 = any::<[u8; 16]>().prop_map(|mut ip| {
        ip[0] |= 0x20;
        IpAddr::from(ip)
    });
    prop_oneof![any::<[u8; 4]>().prop_map(IpAddr::from), v6]
}

fn any_member() -> impl Strategy<Value = MemberId> {
    (1..=4095i64).prop_map(|id| MemberId::new(id).unwrap())
}

fn any_slot() -> impl Strategy<Value = Ordinal> {
    (0..8i64).prop_map(|slot| Ordinal::new(slot).unwrap())
}

/// Addresses, at most one of each family.
fn any_hop() -> impl Strategy<Value = BTreeSet<IpAddr>> {
    (any::<[u8; 4]>(), any::<[u8; 16]>(), 1..4u8).prop_map(|(v4, mut v6, which)| {
        v6[0] |= 0x20;
        let both = [(1, IpAddr::from(v4)), (2, IpAddr::from(v6))];
        both.into_iter().filter(|(bit, _)| which & bit != 0).map(|(_, ip)| ip).collect()
    })
}

fn any_config() -> impl Strategy<Value = Config> {
    let secrets: Vec<HopId> = marks().into_keys().collect();
    let secrets = select(vec![vec![], vec![secrets[0]], vec![secrets[1], secrets[0]]]);
    let wireguard = btree_set(Just(Device(Ordinal::ZERO)), 0..2);
    let who = (any_member(), prop::option::of(any_slot()), any::<[u8; 16]>());
    let numbers = (any::<u16>(), any::<u16>(), any::<[u16; 3]>());
    let ways = (any_hop(), btree_map(any_slot(), any_hop(), 0..8), wireguard, secrets);
    (who, ways, numbers).prop_map(
        |((member, slot, overlay), (hop, gateways, wireguard, secrets), (mtu, hop_mtu, ports))| Config {
            member,
            slot,
            overlay: overlay.into(),
            hop,
            gateways,
            wireguard,
            secrets,
            mtu,
            hop_mtu,
            wireguard_port: ports[0],
            hop_port: ports[1],
            probe_port: ports[2],
        },
    )
}

fn any_maps() -> impl Strategy<Value = state::Maps> {
    let remote = prop_oneof![
        any_member().prop_map(Remote::Range),
        any_member().prop_map(Remote::Overlay),
        any_member().prop_map(Remote::Carved),
    ];
    let home = prop_oneof![Just(Home::Here), any_ip().prop_map(Home::Node)];
    let node = (prop::option::of(any_slot()), any_ip()).prop_map(|(slot, home)| Node { slot, home });
    (
        prop::option::of(any_config()),
        btree_map(any_prefix(), remote, 0..40),
        btree_map(any_prefix(), btree_set(any_member(), 0..20), 0..20),
        btree_map(any_prefix(), home, 0..40),
        btree_map(any_ip(), node, 0..40),
    )
        .prop_map(|(config, remote, own, homes, nodes)| state::Maps { config, remote, own, homes, nodes })
}

/// What leads from one content to the other, by the real diff.
fn steps(wanted: &state::Maps, actual: &state::Maps) -> Vec<state::Op> {
    let state = |maps: &state::Maps| state::State { maps: Some(maps.clone()), ..state::State::default() };
    crate::diff::diff(&state(wanted), &state(actual))
}

fn apply(bpf: &Bpf, op: &state::Op) {
    let done = match op {
        state::Op::SetEntry(entry) => bpf.set(entry, &marks()),
        state::Op::NarrowOwn(prefix, members) => bpf.set(&Entry::Own(*prefix, members.clone()), &marks()),
        state::Op::DelEntry(key) => bpf.delete(key),
        op => panic!("{op}"),
    };
    done.unwrap_or_else(|error| panic!("{op}: {error}"));
}

#[test]
fn any_content_is_read_as_it_was_written() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        bpf.load().await.unwrap();
        let mut runner = TestRunner::new(Cases { failure_persistence: None, ..Cases::with_cases(60) });
        let bpf = std::cell::RefCell::new(bpf);
        let law = |wanted: state::Maps| {
            let mut bpf = bpf.borrow_mut();
            let before = bpf.read_maps(&marks()).unwrap().unwrap();
            for op in steps(&wanted, &before) {
                apply(&bpf, &op);
            }
            let after = bpf.read_maps(&marks()).unwrap().unwrap();
            prop_assert_eq!(steps(&wanted, &after), vec![]);
            prop_assert_eq!(after, wanted);
            Ok(())
        };
        runner.run(&any_maps(), law).unwrap();
    });
}

/// Whatever bytes somebody has put there: one pass later the maps hold what is wanted, and the second writes nothing.
#[test]
fn nonsense_in_the_maps_is_repaired() {
    let nonsense = vec((any_prefix(), any::<[u8; 4]>(), any::<u16>()), 0..20);
    on_node(|place| async move {
        let mut bpf = place.bpf();
        bpf.load().await.unwrap();
        let mut runner = TestRunner::new(Cases { failure_persistence: None, ..Cases::with_cases(60) });
        let bpf = std::cell::RefCell::new(bpf);
        let law = |(wanted, nonsense): (state::Maps, Vec<(IpNetwork, [u8; 4], u16)>)| {
            let mut bpf = bpf.borrow_mut();
            let maps = bpf.maps().unwrap();
            let fd = |name: &str| maps.get(name).0;
            let keys = wanted.remote.keys().chain(wanted.own.keys()).copied();
            let keys = keys.zip(nonsense.iter().cycle()).map(|(key, (_, kind, member))| (key, *kind, *member));
            for (to, [kind, zero, slot, any], member) in keys.chain(nonsense.iter().copied()) {
                let to = codec::prefix(&to);
                sys::update(fd("REMOTE"), &to, &ebpf::Remote { member, kind, zero }).unwrap();
                let offered = ebpf::Offered { members: [u64::from_ne_bytes([any, slot, 0, zero, 0, 0, kind, 0]); 64] };
                sys::update(fd("OWN"), &to, &offered).unwrap();
                sys::update(fd("HOMES"), &to, &ebpf::Home { node: ebpf::Addr([any; 16]) }).unwrap();
                let node = ebpf::Node { slot, zero: [zero, 0, 0], home: ebpf::Addr([kind; 16]) };
                sys::update(fd("NODES"), &to.data(), &node).unwrap();
                let config = ebpf::Config { member, slot, hop_ifindex: kind.into(), secrets: zero, ..codec::NO_CONFIG };
                sys::update(fd("CONFIG"), &0_u32, &config).unwrap();
            }
            let actual = bpf.read_maps(&marks()).unwrap().unwrap();
            for op in steps(&wanted, &actual) {
                apply(&bpf, &op);
            }
            let after = bpf.read_maps(&marks()).unwrap().unwrap();
            prop_assert_eq!(steps(&wanted, &after), vec![]);
            prop_assert_eq!(after, wanted);
            Ok(())
        };
        runner.run(&(any_maps(), nonsense), law).unwrap();
    });
}

/// What programs know of the tables ends with every change to them.
#[test]
fn a_change_to_the_tables_is_a_new_version() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        bpf.load().await.unwrap();
        let version = || sys::lookup::<u32, u64>(bpf.maps().unwrap().get("VERSION").0, &0).unwrap().unwrap();
        let mut runner = TestRunner::new(Cases { failure_persistence: None, ..Cases::with_cases(20) });
        let law = |wanted: state::Maps| {
            let none = state::Maps::default();
            for op in steps(&wanted, &none).into_iter().chain(steps(&none, &wanted)) {
                let before = version();
                apply(&bpf, &op);
                prop_assert_eq!(version(), before + 1, "{}", op);
            }
            Ok(())
        };
        runner.run(&any_maps(), law).unwrap();
        let before = version();
        bpf.forget().unwrap();
        assert_eq!(version(), before + 1);
    });
}

#[test]
fn a_configuration_for_other_links_or_secrets_is_none() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        bpf.load().await.unwrap();
        let wanted = Config {
            member: MemberId::new(1).unwrap(),
            slot: Some(Ordinal::ZERO),
            overlay: Ipv6Addr::LOCALHOST,
            hop: BTreeSet::from(["192.168.0.1".parse().unwrap()]),
            gateways: BTreeMap::new(),
            wireguard: BTreeSet::from([Device(Ordinal::ZERO)]),
            secrets: marks().into_keys().collect(),
            mtu: 1420,
            hop_mtu: 1400,
            wireguard_port: 27473,
            hop_port: 27472,
            probe_port: 27455,
        };
        let write = |bpf: &Bpf| bpf.set(&Entry::Config(wanted.clone()), &marks()).unwrap();
        let config = |bpf: &mut Bpf| bpf.read_maps(&marks()).unwrap().unwrap().config;
        write(&bpf);
        assert_eq!(config(&mut bpf), Some(wanted.clone()));
        sh("ip link set carrick-hop address 02:00:00:00:00:07");
        assert_eq!(config(&mut bpf), None);
        write(&bpf);
        assert_eq!(config(&mut bpf), Some(wanted.clone()));
        sh("ip link del carrick-wg0; ip link add carrick-wg0 type veth peer name pcarrick-wg0");
        assert_eq!(config(&mut bpf), None);
        write(&bpf);
        assert_eq!(bpf.read_maps(&BTreeMap::new()).unwrap().unwrap().config, None);
        // carrick-wg7 is only another name of eth0.
        let other = Config { wireguard: Device::all().collect(), ..wanted.clone() };
        let refused = bpf.set(&Entry::Config(other), &marks()).unwrap_err();
        assert_eq!(refused.to_string(), "this node does not have the link carrick-wg1");
    });
}

#[test]
fn another_agent_of_this_build_adopts_everything() {
    on_node(|place| async move {
        settle(&place, &mut place.bpf(), &gateway()).await;
        let before = (hooks(), sh(&format!("find {} | sort", place.bpffs().display())));
        let mut second = place.bpf();
        assert_eq!(pass(&place, &mut second, &gateway()).await, 0);
        assert_eq!((hooks(), sh(&format!("find {} | sort", place.bpffs().display()))), before);
        assert_eq!(before.0.values().map(Vec::len).sum::<usize>(), gateway().len());
    });
}

/// Asks what is at every hook, over and over, in this network namespace.
struct Watcher {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<(usize, usize)>,
}

impl Watcher {
    /// Counts how often a hook has fewer programs than now.
    fn start() -> Watcher {
        let stop = Arc::new(AtomicBool::new(false));
        let told = stop.clone();
        let full = hooks();
        let watch = move || {
            let (mut looks, mut gaps) = (0, 0);
            while !told.load(Ordering::Relaxed) {
                let now = hooks();
                gaps += full.iter().filter(|(hook, programs)| now[*hook].len() < programs.len()).count();
                looks += 1;
            }
            (looks, gaps)
        };
        // A thread begins in the namespaces of the one that makes it.
        Watcher { stop, thread: thread::spawn(watch) }
    }

    fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        let (looks, gaps) = self.thread.join().unwrap();
        assert!(looks > 0);
        assert_eq!(gaps, 0, "in {looks} looks");
    }
}

fn a_range() -> Entry {
    Entry::Remote("10.44.0.0/16".parse().unwrap(), Remote::Range(MemberId::new(2).unwrap()))
}

#[test]
fn another_build_takes_over_with_no_instant_without_a_program() {
    on_node(|place| async move {
        let mut old = place.bpf();
        settle(&place, &mut old, &gateway()).await;
        old.set(&a_range(), &marks()).unwrap();
        let before = (hooks(), old.generation().unwrap());
        let mut new = place.upgraded();
        let watcher = Watcher::start();
        // What is no longer wanted goes, whatever build it is of.
        let wanted: BTreeSet<Attachment> = gateway().into_iter().filter(|one| one.link != "eth0.7").collect();
        settle(&place, &mut new, &gateway()).await;
        watcher.finish();
        settle(&place, &mut new, &wanted).await;
        let after = hooks();
        assert!(before.0.iter().all(|(hook, programs)| programs.is_empty() || after[hook] != *programs));
        assert_eq!(after[&("eth0.7".to_owned(), false)], Vec::<u32>::new());
        assert_eq!(new.generation().unwrap(), before.1, "the maps stay");
        let (maps, _) = read(&place, &mut new).await;
        assert_eq!(maps.unwrap().remote.len(), 1);
        let builds = sh(&format!("ls {}/carrick/v{} | grep -c programs-", place.bpffs().display(), ebpf::ABI));
        assert_eq!(builds, "1\n");
    });
}

#[test]
fn an_older_version_is_taken_over_once_the_new_maps_are_filled() {
    on_node(|place| async move {
        let mut old = place.with(OBJECT.to_vec(), ebpf::ABI - 1);
        settle(&place, &mut old, &gateway()).await;
        let member = MemberId::new(7).unwrap();
        let reach = ebpf::Reach { via: 3, links: 1, mtu: 1420, ..ebpf::Reach::default() };
        old.health().unwrap().unwrap().write_reach(member, reach).unwrap();
        let before = hooks();
        let mut new = place.bpf();
        assert_eq!(read(&place, &mut new).await, (None, BTreeSet::new()));
        let watcher = Watcher::start();
        new.load().await.unwrap();
        assert_eq!(hooks(), before, "the new maps are still empty");
        let health = new.health().unwrap().unwrap();
        assert_eq!(health.read_reach().unwrap(), BTreeMap::from([(member, reach)]), "what was learned stays");
        settle(&place, &mut new, &gateway()).await;
        watcher.finish();
        assert!(hooks().iter().all(|(hook, programs)| programs.is_empty() || before[hook] != *programs));
        assert_eq!(sh(&format!("ls {}/carrick", place.bpffs().display())), format!("v{}\n", ebpf::ABI));
        // The old one, started again, leaves the newer alone.
        let mut again = place.with(OBJECT.to_vec(), ebpf::ABI - 1);
        again.load().await.unwrap();
        assert_eq!(pass(&place, &mut new, &gateway()).await, 0);
        again.unload(&place.rtnl).await.unwrap();
        assert!(!place.bpffs().join("carrick").exists());
        assert!(hooks().values().all(Vec::is_empty));
    });
}

#[test]
fn whatever_is_taken_from_the_pins_is_repaired() {
    let taken = [
        "*",
        "v*/maps/*",
        "v*/maps/REMOTE",
        "v*/links/*",
        "v*/links/carrick-hop-steer",
        "v*/programs-*",
        "v*/programs-*/steer",
    ];
    for taken in taken {
        on_node(|place| async move {
            let mut bpf = place.bpf();
            settle(&place, &mut bpf, &gateway()).await;
            bpf.set(&a_range(), &marks()).unwrap();
            sh(&format!("rm -r {}/carrick/{taken}", place.bpffs().display()));
            let (maps, programs) = read(&place, &mut bpf).await;
            assert!(maps.is_none() || programs != gateway(), "{taken}: not noticed");
            assert_eq!(maps.is_some(), !taken.contains("maps") && taken != "*", "{taken}");
            settle(&place, &mut bpf, &gateway()).await;
            whole_again(taken).await;
            // The programs use the maps that are pinned: what is set there is what they see.
            let programs = bpf.programs().unwrap();
            let steer = sys::program_maps(programs[&Program::Steer].as_fd()).unwrap();
            let remote = sys::map_info(bpf.maps().unwrap().get("REMOTE").0).unwrap().id;
            assert!(steer.contains(&remote), "{taken}: {steer:?}, {remote}");
        });
    }
}

/// Waits until there is one program of a gateway at each hook, and none that nobody holds.
async fn whole_again(after: &str) {
    let mut attached = 0;
    for _ in 0..500 {
        attached = hooks().values().map(Vec::len).sum::<usize>();
        if attached == gateway().len() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{after}: {attached} programs stay attached");
}

/// Waits until the damage is seen: the kernel detaches what is unpinned a little later.
async fn noticed(place: &Place, bpf: &Bpf, damage: &str) {
    for _ in 0..500 {
        if !bpf.still_attached(&place.rtnl).await.unwrap() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{damage}: not noticed");
}

#[test]
fn what_somebody_detaches_or_deletes_is_noticed_and_attached_again() {
    let damages = [
        // Without a pin and without an fd the link is gone.
        "rm BPFFS/carrick/v*/links/eth0-steer_native",
        "ip link del carrick-wg0; ip link add carrick-wg0 type veth peer name pcarrick-wg0",
        "ip link del eth0.7; ip link add eth0.7 type veth peer name peth0.7",
        "rm BPFFS/carrick/v*/maps/WAKE",
    ];
    for damage in damages {
        on_node(|place| async move {
            let mut bpf = place.bpf();
            settle(&place, &mut bpf, &gateway()).await;
            sh(&damage.replace("BPFFS", &place.bpffs().display().to_string()));
            noticed(&place, &bpf, damage).await;
            settle(&place, &mut bpf, &gateway()).await;
            whole_again(damage).await;
        });
    }
}

#[test]
fn foreign_programs_stay_and_ours_comes_first_again() {
    on_node(|place| async move {
        let behind = foreign(&place, "eth0", false);
        let mut bpf = place.bpf();
        settle(&place, &mut bpf, &gateway()).await;
        let ours = hooks()[&("eth0".to_owned(), false)][0];
        let before = foreign(&place, "eth0", true);
        let id = |link: &OwnedFd| sys::link_info(link.as_fd()).unwrap().program;
        assert_eq!(hooks()[&("eth0".to_owned(), false)], [id(&before), ours, id(&behind)]);
        assert!(!bpf.still_attached(&place.rtnl).await.unwrap());
        let watcher = Watcher::start();
        settle(&place, &mut bpf, &gateway()).await;
        watcher.finish();
        assert_eq!(hooks()[&("eth0".to_owned(), false)], [ours, id(&before), id(&behind)]);
        bpf.unload(&place.rtnl).await.unwrap();
        assert_eq!(hooks()[&("eth0".to_owned(), false)], [id(&before), id(&behind)]);
    });
}

/// The filters of a device as `tc` shows them: their handles and names.
fn filters(link: &str, hook: &str) -> String {
    sh(&format!("tc filter show dev {link} {hook} | grep -o 'handle.*direct-action' || true"))
}

#[test]
fn without_tcx_it_is_attached_by_clsact() {
    on_node(|place| async move {
        let mut bpf = place.bpf().force(Hook::Clsact);
        settle(&place, &mut bpf, &gateway()).await;
        assert!(hooks().values().all(Vec::is_empty), "nothing by tcx");
        assert_eq!(filters("carrick-hop", "ingress"), "handle 0xca77 from_hop direct-action\n");
        assert_eq!(filters("carrick-hop", "egress"), "handle 0xca77 steer direct-action\n");
        // A second agent adopts, another build replaces.
        assert_eq!(pass(&place, &mut place.bpf().force(Hook::Clsact), &gateway()).await, 0);
        let mut new = place.upgraded().force(Hook::Clsact);
        let wanted: BTreeSet<Attachment> = gateway().into_iter().filter(|one| one.link != "eth0.7").collect();
        settle(&place, &mut new, &wanted).await;
        assert_eq!((filters("eth0.7", "egress"), filters("eth0", "egress").lines().count()), (String::new(), 1));
        // Somebody comes before us, and after us.
        let pins = Pins::new(&place.bpffs(), ebpf::ABI);
        let steer = format!("{}/carrick/v{}/programs-{}/steer", place.bpffs().display(), ebpf::ABI, new.object.build);
        assert!(pins.open_programs(&new.object.build).unwrap().is_some());
        sh(&format!(
            "tc filter add dev eth0 egress prio 1 handle 1 bpf da pinned {steer}
            tc filter add dev eth0 egress prio 2 handle 0xca77 bpf da pinned {steer}"
        ));
        assert!(!new.still_attached(&place.rtnl).await.unwrap());
        settle(&place, &mut new, &wanted).await;
        let names: Vec<String> = filters("eth0", "egress").lines().map(|line| line[..13].to_owned()).collect();
        assert_eq!(names, ["handle 0xca78", "handle 0x1 st", "handle 0xca77"]);
        sh("tc filter del dev carrick-wg0 ingress prio 1; tc qdisc del dev carrick-hop clsact");
        assert!(!new.still_attached(&place.rtnl).await.unwrap());
        settle(&place, &mut new, &wanted).await;
        new.unload(&place.rtnl).await.unwrap();
        let names: Vec<String> = filters("eth0", "egress").lines().map(|line| line[..13].to_owned()).collect();
        assert_eq!(names, ["handle 0x1 st", "handle 0xca77"]);
        assert_eq!(filters("carrick-hop", "ingress") + &filters("carrick-wg0", "egress"), "");
    });
}

#[test]
fn attaching_to_no_link_says_so() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        let missing = at(Program::SteerNative, "eth1");
        let unloaded = bpf.attach(&place.rtnl, &missing).await.unwrap_err();
        assert_eq!(unloaded.to_string(), "the BPF maps are not loaded");
        bpf.load().await.unwrap();
        let error = bpf.attach(&place.rtnl, &missing).await.unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (io::ErrorKind::NotFound, "eth1 does not exist".to_owned()));
        bpf.detach(&place.rtnl, &missing).await.unwrap();
    });
}

#[test]
fn a_map_of_another_shape_is_refused_by_name_and_cleaned_up() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        settle(&place, &mut bpf, &gateway()).await;
        let maps = format!("{}/carrick/v{}/maps", place.bpffs().display(), ebpf::ABI);
        sh(&format!("rm {maps}/NODES; bpftool map create {maps}/NODES type hash key 16 value 20 entries 7 name NODES"));
        let before = hooks();
        assert_eq!(read(&place, &mut bpf).await, (None, BTreeSet::new()));
        let refused = bpf.load().await.unwrap_err().to_string().replace(&maps, "MAPS");
        expect_test::expect![[r#"MAPS/NODES is a map of type 1, keys of 16 bytes, values of 20, 7 entries, and not a map of type 1, keys of 16 bytes, values of 20, 16384 entries, as these programs need it: `carrick cleanup` removes it, and the next start makes it anew"#]]
        .assert_eq(&refused);
        assert_eq!(hooks(), before);
        sh(&format!("rm {maps}/NODES; mv {maps}/../programs-*/steer {maps}/NODES"));
        assert_eq!(read(&place, &mut bpf).await, (None, BTreeSet::new()));
        let refused = bpf.load().await.unwrap_err().to_string();
        assert!(refused.contains("/NODES is no map, and not"), "{refused}");
        bpf.unload(&place.rtnl).await.unwrap();
        assert!(!place.bpffs().join("carrick").exists());
        settle(&place, &mut bpf, &gateway()).await;
    });
}

#[test]
fn without_a_bpffs_or_capabilities_the_remedy_is_named() {
    on_node(|place| async move {
        for bpffs in ["/nowhere", "/tmp"] {
            let mut bpf = Bpf::new(Path::new(bpffs), &place.run_dir()).unwrap();
            assert_eq!(read(&place, &mut bpf).await, (None, BTreeSet::new()));
            let refused = bpf.load().await.unwrap_err().to_string();
            let remedy = format!(
                "{bpffs} is no bpf filesystem: `mount -t bpf bpf {bpffs}`, or mount the node's there with a hostPath volume"
            );
            assert_eq!(refused, remedy);
            bpf.unload(&place.rtnl).await.unwrap();
        }
        // Capabilities belong to a thread.
        let (pins, run_dir) = (Pins::new(&place.bpffs(), ebpf::ABI), place.run_dir());
        for (kept, missing) in [("NET_ADMIN", "CAP_BPF"), ("NET_ADMIN and BPF", "CAP_PERFMON")] {
            let kept = kept.contains(" and ").then_some(39);
            let (pins, run_dir) = (pins.clone(), run_dir.clone());
            let refused = thread::spawn(move || {
                keep_capabilities(&[12, kept.unwrap_or(12)]);
                let object = Object::new(Cow::Borrowed(OBJECT)).unwrap();
                load::load(&pins, &object, &run_dir).unwrap_err().to_string()
            });
            let remedy =
                "run as root, or give the container `capabilities: {add: [NET_ADMIN, BPF, PERFMON]}` and user 0";
            assert_eq!(refused.join().unwrap(), format!("no {missing}: {remedy}"));
        }
        // These are enough.
        let (pins, run_dir) = (pins.clone(), run_dir.clone());
        let loaded = thread::spawn(move || {
            keep_capabilities(&[12, 38, 39]);
            let object = Object::new(Cow::Borrowed(OBJECT)).unwrap();
            load::load(&pins, &object, &run_dir)
        });
        loaded.join().unwrap().unwrap();
    });
}

/// Drops all other capabilities of this thread.
fn keep_capabilities(kept: &[u32]) {
    let bits = kept.iter().fold(0_u64, |bits, capability| bits | 1 << capability);
    sys::set_capabilities(bits).unwrap();
}

/// The object with a program that no verifier takes: its first instruction reads a register that nobody has set.
fn refused_object(program: Program) -> Vec<u8> {
    let parsed = aya_obj::Object::parse(OBJECT).unwrap();
    let code = &parsed.functions[&parsed.programs[program.name()].function_key()].instructions;
    let code: Vec<u8> = code
        .iter()
        .take(100)
        .flat_map(|i| {
            [vec![i.code, i._bitfield_1.get(0, 8) as u8], i.off.to_le_bytes().to_vec(), i.imm.to_le_bytes().to_vec()]
                .concat()
        })
        .collect();
    let mut bytes = OBJECT.to_vec();
    let places: Vec<usize> = (0..bytes.len() - code.len()).filter(|at| bytes[*at..].starts_with(&code)).collect();
    assert!(!places.is_empty());
    for place in places {
        // r0 = r9
        bytes[place..place + 8].copy_from_slice(&[0xbf, 0x90, 0, 0, 0, 0, 0, 0]);
    }
    bytes
}

#[test]
fn a_refusal_of_the_verifier_is_kept_and_changes_nothing() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        settle(&place, &mut bpf, &gateway()).await;
        let before = hooks();
        let mut bad = place.with(refused_object(Program::FromPeer), ebpf::ABI);
        let (maps, programs) = read(&place, &mut bad).await;
        assert!(maps.is_some() && programs.is_empty());
        let log = place.run_dir().join("verifier-from_peer.log");
        let refused = bad.attach(&place.rtnl, &at(Program::Steer, "carrick-hop")).await.unwrap_err().to_string();
        assert!(refused.starts_with("this kernel refuses the program from_peer ("), "{refused}");
        assert!(refused.ends_with(&format!("its verifier's log is in {}", log.display())), "{refused}");
        assert!(fs::read_to_string(&log).unwrap().contains("R9 !read_ok"));
        assert_eq!(fs::metadata(&log).unwrap().permissions().mode() & 0o777, 0o600);
        // Not asked again in the same pass.
        fs::remove_file(&log).unwrap();
        let again = bad.attach(&place.rtnl, &at(Program::FromHop, "carrick-hop")).await.unwrap_err().to_string();
        assert_eq!((again, log.exists()), (refused, false));
        assert_eq!(hooks(), before);
        assert_eq!(pass(&place, &mut bpf, &gateway()).await, 0);
    });
}

#[test]
fn health_is_read_and_written_beside_the_passes() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        assert!(bpf.health().unwrap().is_none());
        settle(&place, &mut bpf, &gateway()).await;
        let mut health = bpf.health().unwrap().unwrap();
        let member = |id| MemberId::new(id).unwrap();
        let reach = |via| ebpf::Reach { via, links: 1, mtu: 1420, ..ebpf::Reach::default() };
        assert_eq!(health.read_reach().unwrap(), BTreeMap::new());
        health.write_reach(member(1), reach(3)).unwrap();
        health.write_reach(member(4095), reach(4)).unwrap();
        assert_eq!(health.read_reach().unwrap(), BTreeMap::from([(member(1), reach(3)), (member(4095), reach(4))]));
        let answer = ebpf::Answer { flags: 1, zero: 0, mtu: [5, 140], members: [7; 512] };
        health.write_answer(&answer).unwrap();
        assert_eq!(health.read_answer().unwrap(), answer);
        assert_eq!(health.last_traffic(member(1)).unwrap(), None);
        // What a packet into the hop meets first: no configuration.
        assert_eq!(health.drops().unwrap(), BTreeMap::new());
        sh("ip link set carrick-hop up; ip link set pcarrick-hop up; ip addr add 192.0.2.1/24 dev carrick-hop; ip neigh add 192.0.2.2 lladdr 02:00:00:00:00:01 dev carrick-hop
            ping -c1 -W1 192.0.2.2 >/dev/null || true");
        assert!(health.drops().unwrap().contains_key(&ebpf::Reason::NotConfigured), "{:?}", health.drops());
        assert_eq!(health.sent().unwrap(), [ebpf::Count::default(); ebpf::sent::LEN as usize]);
        // A pass reads none of it, and another build keeps it.
        assert_eq!(pass(&place, &mut bpf, &gateway()).await, 0);
        let mut new = place.upgraded();
        settle(&place, &mut new, &gateway()).await;
        let after = new.health().unwrap().unwrap();
        assert_eq!(after.generation(), health.generation());
        assert_eq!(after.read_reach().unwrap().len(), 2);
        sh(&format!("rm {}/carrick/v*/maps/HEALTH", place.bpffs().display()));
        settle(&place, &mut new, &gateway()).await;
        assert_ne!(new.generation().unwrap(), Some(health.generation()));
    });
}

/// Not a law: what it costs to read much. `--nocapture` shows it.
#[test]
fn ten_thousand_entries_are_read() {
    on_node(|place| async move {
        let mut bpf = place.bpf();
        bpf.load().await.unwrap();
        for i in 0..5000_u16 {
            let [a, b] = i.to_be_bytes();
            let to = |first| format!("{first}.{a}.{b}.0/24").parse().unwrap();
            bpf.set(&Entry::Remote(to(10), Remote::Range(MemberId::new(2).unwrap())), &marks()).unwrap();
            bpf.set(&Entry::Home(to(11), Home::Here), &marks()).unwrap();
        }
        let began = Instant::now();
        let maps = bpf.read_maps(&marks()).unwrap().unwrap();
        println!("{:?} for 5000 remote prefixes and 5000 homes", began.elapsed());
        assert_eq!((maps.remote.len(), maps.homes.len()), (5000, 5000));
    });
}
