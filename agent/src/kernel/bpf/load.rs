//! Loads the object: maps are pinned by name and reused, programs are pinned by the build that they are of.
//!
//! Invariant: nothing that is loaded and right is touched, so the data plane outlives the agent, and a load that fails
//! leaves what was there.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::{
        fd::{AsFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use aya::{
    Ebpf, EbpfError, EbpfLoader,
    programs::{ProgramError, SchedClassifier},
};
use sha2::{Digest, Sha256};

use super::{
    maps::{self, Found, Misshapen, NAMES, Shape},
    pins::Pins,
};
use crate::state::Program;

/// Programs and maps as they were built.
#[derive(Debug)]
pub(super) struct Object {
    bytes: Cow<'static, [u8]>,
    /// Tells one build from another.
    pub(super) build: String,
    pub(super) shapes: BTreeMap<&'static str, Shape>,
}

/// Why the object cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub(super) enum LoadError {
    #[error("{path} is no bpf filesystem: `mount -t bpf bpf {path}`, or mount the node's there with a hostPath volume")]
    NoBpffs { path: String },
    #[error(
        "no {missing}: run as root, or give the container `capabilities: {{add: [NET_ADMIN, BPF, PERFMON]}}` and user 0"
    )]
    Unprivileged { missing: &'static str },
    #[error(transparent)]
    Misshapen(#[from] Misshapen),
    #[error("the object has no {0}: it is of another version than this agent")]
    Lacks(&'static str),
    #[error("this kernel refuses the program {program} ({source}): its verifier's log is {log}")]
    Refused { program: &'static str, log: String, source: io::Error },
    #[error("cannot load the program {program}")]
    Program { program: &'static str, source: ProgramError },
    #[error("cannot load the object")]
    Object(#[from] EbpfError),
    #[error("cannot read the object")]
    Parse(#[from] aya_obj::ParseError),
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<LoadError> for io::Error {
    fn from(error: LoadError) -> io::Error {
        let kind = match &error {
            LoadError::Io(_) => {
                let LoadError::Io(error) = error else { unreachable!("matched just now") };
                return error;
            }
            LoadError::NoBpffs { .. } => io::ErrorKind::NotFound,
            LoadError::Unprivileged { .. } => io::ErrorKind::PermissionDenied,
            LoadError::Misshapen(_) | LoadError::Lacks(_) | LoadError::Parse(_) => io::ErrorKind::InvalidData,
            LoadError::Refused { .. } | LoadError::Program { .. } | LoadError::Object(_) => io::ErrorKind::Other,
        };
        io::Error::new(kind, error)
    }
}

impl Object {
    pub(super) fn new(bytes: Cow<'static, [u8]>) -> Result<Object, LoadError> {
        let parsed = aya_obj::Object::parse(&bytes)?;
        let shape = |name: &'static str| {
            let map = parsed.maps.get(name).ok_or(LoadError::Lacks(name))?;
            let (map_type, max_entries) = (map.map_type(), map.max_entries());
            Ok((name, Shape { map_type, key_size: map.key_size(), value_size: map.value_size(), max_entries }))
        };
        let shapes = NAMES.into_iter().map(shape).collect::<Result<_, LoadError>>()?;
        let build = Sha256::digest(&bytes)[..8].iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Object { bytes, build, shapes })
    }
}

/// Makes the maps and programs that are missing, and pins them. Attaches nothing.
pub(super) fn load(pins: &Pins, object: &Object, run_dir: &Path) -> Result<(), LoadError> {
    if !pins.is_bpffs()? {
        return Err(LoadError::NoBpffs { path: pins.bpffs().display().to_string() });
    }
    check_capabilities()?;
    if let Some(abi) = pins.newer()? {
        tracing::warn!(abi, "a newer version has maps here: they are left alone, until `carrick cleanup`");
    }
    let mut whole = true;
    for (name, shape) in &object.shapes {
        match maps::find(pins, name, *shape)? {
            Found::Right(_) => {}
            Found::Wrong(misshapen) => return Err(misshapen.into()),
            Found::Nothing => whole = false,
        }
    }
    if whole && pins.open_programs(&object.build)?.is_some() {
        return Ok(());
    }
    if !whole {
        // They use maps that nobody finds any more.
        pins.remove_programs(None)?;
    }
    pins.make_dirs()?;
    maps::adopt(pins, &object.shapes)?;
    let loaded = load_programs(pins, object, run_dir, &Program::ALL)?;
    pins.pin_programs(&object.build, &loaded)?;
    Ok(())
}

/// Loads programs that use the pinned maps, which are made where they are missing.
pub(super) fn load_programs(
    pins: &Pins,
    object: &Object,
    run_dir: &Path,
    which: &[Program],
) -> Result<BTreeMap<Program, OwnedFd>, LoadError> {
    let mut loader = EbpfLoader::new();
    for name in NAMES {
        loader.map_pin_path(name, pins.map(name));
    }
    let mut ebpf = loader.load(&object.bytes)?;
    which.iter().map(|program| Ok((*program, load_one(&mut ebpf, *program, run_dir)?))).collect()
}

fn load_one(ebpf: &mut Ebpf, program: Program, run_dir: &Path) -> Result<OwnedFd, LoadError> {
    let name = program.name();
    let failed = |source: ProgramError| LoadError::Program { program: name, source };
    let found = ebpf.program_mut(name).ok_or(LoadError::Lacks(name))?;
    let classifier: &mut SchedClassifier = found.try_into().map_err(failed)?;
    let log = log_path(run_dir, program);
    match classifier.load() {
        Ok(()) => {
            // Of an earlier refusal.
            forget(&log)?;
            Ok(classifier.fd().map_err(failed)?.as_fd().try_clone_to_owned()?)
        }
        Err(ProgramError::LoadError { io_error, verifier_log }) => {
            let saved = save(&log, &verifier_log.to_string());
            let log = match saved {
                Ok(()) => format!("in {}", log.display()),
                Err(error) => format!("lost, {} cannot be written: {error}", log.display()),
            };
            Err(LoadError::Refused { program: name, log, source: io_error })
        }
        Err(error) => Err(failed(error)),
    }
}

fn log_path(run_dir: &Path, program: Program) -> PathBuf {
    run_dir.join(format!("verifier-{}.log", program.name()))
}

pub(super) fn forget_logs(run_dir: &Path) -> io::Result<()> {
    Program::ALL.into_iter().try_for_each(|program| forget(&log_path(run_dir, program)))
}

fn forget(path: &Path) -> io::Result<()> {
    fs::remove_file(path).or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
}

/// For its owner alone: it shows addresses of the kernel.
fn save(path: &Path, text: &str) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    }
    forget(path)?;
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?.write_all(text.as_bytes())
}

/// Says what is missing, where something is not permitted.
pub(super) fn explain(error: io::Error) -> io::Error {
    match check_capabilities() {
        Err(missing) if error.kind() == io::ErrorKind::PermissionDenied => missing.into(),
        _ => error,
    }
}

/// What loading needs (include/linux/capability.h `bpf_capable`, `perfmon_capable`).
fn check_capabilities() -> Result<(), LoadError> {
    const SYS_ADMIN: u32 = 21;
    const NEEDED: [(u32, &str); 2] = [(39, "CAP_BPF"), (38, "CAP_PERFMON")];
    let held = super::super::capabilities()?;
    let has = |capability: u32| held & (1 << capability) != 0;
    match NEEDED.into_iter().find(|(capability, _)| !has(*capability) && !has(SYS_ADMIN)) {
        Some((_, missing)) => Err(LoadError::Unprivileged { missing }),
        None => Ok(()),
    }
}
