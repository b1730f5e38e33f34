//! The BPF programs, as built by `build.rs`.
//!
//! Invariant: both objects are of this build's `ebpf`; their maps and values are those of its library.

/// The programs and maps of a node.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs"));

/// The same programs with entry points for test runs (`test_steer` and so on), and two maps more: `TEST_KEY`, `TEST_SEEN`.
pub static TEST_OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs-test"));

#[cfg(test)]
mod tests {
    use std::{
        collections::{BTreeMap, BTreeSet},
        env, fs,
        path::Path,
    };

    use aya::{
        EbpfLoader, VerifierLogLevel,
        programs::{ProgramError, SchedClassifier},
    };
    use aya_obj::Object;
    use nix::{
        mount::{MsFlags, mount},
        sched::{CloneFlags, unshare},
    };

    use super::*;
    use crate::scratch::Scratch;

    const PROGRAMS: [&str; 5] = ["from_hop", "from_peer", "steer", "steer_native", "to_peer"];
    const MAPS: [&str; 14] = [
        "ANSWER", "CONFIG", "DROPS", "HEALTH", "HOMES", "KNOWN", "NODES", "OWN", "PROBED", "REMOTE", "SENT", "TRAFFIC",
        "VERSION", "WAKE",
    ];

    /// Runs `work` with an empty bpffs, on a thread with a mount namespace of its own.
    fn with_bpffs(work: impl FnOnce(&Path) + Send) {
        // Seen from outside it stays an empty directory.
        let scratch = Scratch::new();
        let inside = || {
            unshare(CloneFlags::CLONE_NEWNS).expect("loading programs needs root");
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).unwrap();
            mount(Some("bpf"), scratch.path(), Some("bpf"), MsFlags::empty(), None::<&str>).unwrap();
            work(scratch.path());
        };
        let ended = std::thread::scope(|scope| scope.spawn(inside).join());
        ended.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    }

    /// Loads every program of an object; panics with the verifier's log.
    fn load(object: &[u8], l2: u32, bpffs: &Path) -> BTreeSet<String> {
        let mut ebpf = EbpfLoader::new()
            .verifier_log_level(VerifierLogLevel::VERBOSE | VerifierLogLevel::STATS)
            .override_global("L2", &l2, true)
            .override_global("NATIVE_L2", &l2, true)
            .default_map_pin_directory(bpffs)
            .load(object)
            .unwrap();
        let mut loaded = BTreeSet::new();
        for (name, program) in ebpf.programs_mut() {
            let program: &mut SchedClassifier = program.try_into().unwrap();
            match program.load() {
                Ok(()) => {}
                Err(ProgramError::LoadError { io_error, verifier_log }) => {
                    panic!("{name} with L2 = {l2}: {io_error}\n{verifier_log}")
                }
                Err(error) => panic!("{name} with L2 = {l2}: {error}"),
            }
            assert!(loaded.insert(name.to_owned()));
        }
        loaded
    }

    #[test]
    fn every_program_loads_with_and_without_link_header() {
        with_bpffs(|bpffs| {
            let programs = PROGRAMS.map(str::to_owned);
            let tests = PROGRAMS.iter().chain(&["nothing"]).map(|name| format!("test_{name}")).collect::<BTreeSet<_>>();
            for l2 in [0, 14] {
                assert_eq!(load(OBJECT, l2, bpffs), BTreeSet::from(programs.clone()));
                // With the maps that the first left: pins are found again.
                assert_eq!(load(TEST_OBJECT, l2, bpffs), tests);
            }
            let entries = fs::read_dir(bpffs).unwrap();
            let entries = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            // The kernel itself puts two iterators into every bpffs: maps.debug, progs.debug.
            let pinned: BTreeSet<_> = entries.filter(|name| !name.ends_with(".debug")).collect();
            assert_eq!(pinned, BTreeSet::from(MAPS.map(str::to_owned)));
        });
    }

    /// Instructions of each program, without what few it calls (`memcpy` and the like).
    fn instructions(object: &[u8]) -> BTreeMap<String, usize> {
        let functions = Object::parse(object).unwrap().functions;
        let programs = functions.into_values().filter(|function| PROGRAMS.contains(&function.name.as_str()));
        programs.map(|function| (function.name, function.instructions.len())).collect()
    }

    #[test]
    fn programs_do_not_grow_or_shrink_unnoticed() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../ebpf/instructions.txt");
        let counted = instructions(OBJECT);
        assert_eq!(counted.len(), PROGRAMS.len(), "{counted:?}");
        if env::var_os("UPDATE_EXPECT").is_some() {
            let text: String = counted.iter().map(|(name, count)| format!("{name} {count}\n")).collect();
            fs::write(&file, text).unwrap();
        }
        let text = fs::read_to_string(&file).unwrap();
        let recorded: BTreeMap<_, _> = text
            .lines()
            .map(|line| {
                let (name, count) = line.split_once(' ').unwrap();
                (name.to_owned(), count.parse::<usize>().unwrap())
            })
            .collect();
        let names = |counts: &BTreeMap<String, usize>| counts.keys().cloned().collect::<Vec<_>>();
        let accept = "UPDATE_EXPECT=1 cargo test -p agent --lib kernel::object accepts it into ebpf/instructions.txt";
        assert_eq!(names(&counted), names(&recorded), "{accept}");
        for (name, count) in counted {
            let before = recorded[&name];
            assert!(
                count.abs_diff(before) * 10 <= before,
                "{name}: {count} instructions, recorded are {before}; {accept}"
            );
        }
    }
}
