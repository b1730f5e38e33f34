//! The pinned maps: their shapes, and the entries that a plan fills.
//!
//! Invariant: a map is only read or written through [`Maps`], which holds maps of the shapes that the object asks for.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use super::{
    codec::{self, Local},
    pins::Pins,
    sys::{self, Kind, MapInfo},
};
use crate::state::{self, Entry, Key};

/// Every map that is pinned, by its name in the object. Others belong to one build of the programs, or to tests.
pub(super) const NAMES: [&str; 14] = [
    "REMOTE", "OWN", "VERSION", "KNOWN", "HOMES", "NODES", "CONFIG", "HEALTH", "ANSWER", "PROBED", "TRAFFIC", "WAKE",
    "DROPS", "SENT",
];

/// Those of them that no plan fills: health and counters. A version adopts them from another where their shapes are the
/// same, so what takes another meaning in the same shape must take another name.
const LASTING: [&str; 6] = ["HEALTH", "ANSWER", "PROBED", "TRAFFIC", "DROPS", "SENT"];

/// What a map must be for programs and agent to mean the same by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    pub(super) map_type: u32,
    pub(super) key_size: u32,
    pub(super) value_size: u32,
    pub(super) max_entries: u32,
}

impl From<MapInfo> for Shape {
    fn from(info: MapInfo) -> Shape {
        let MapInfo { map_type, key_size, value_size, max_entries, .. } = info;
        Shape { map_type, key_size, value_size, max_entries }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Shape { map_type, key_size, value_size, max_entries } = self;
        write!(f, "a map of type {map_type}, keys of {key_size} bytes, values of {value_size}, {max_entries} entries")
    }
}

/// A pin among the maps that is not what these programs need.
#[derive(Debug, thiserror::Error)]
#[error(
    "{path} is {found}, and not {wanted}, as these programs need it: `carrick cleanup` removes it, and the next start makes it anew"
)]
pub(super) struct Misshapen {
    path: String,
    found: String,
    wanted: Shape,
}

/// What stands where a map should be.
pub(super) enum Found {
    Right(OwnedFd),
    Wrong(Misshapen),
    Nothing,
}

pub(super) fn find(pins: &Pins, name: &str, wanted: Shape) -> io::Result<Found> {
    let path = pins.map(name);
    let misshapen = |found: String| Found::Wrong(Misshapen { path: path.display().to_string(), found, wanted });
    match sys::open(&path, Kind::Map) {
        Ok(None) => Ok(Found::Nothing),
        Ok(Some(map)) => {
            let found = Shape::from(sys::map_info(map.as_fd())?);
            Ok(if found == wanted { Found::Right(map) } else { misshapen(found.to_string()) })
        }
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(misshapen("no map".to_owned())),
        Err(error) => Err(error),
    }
}

/// Pins what another version has learned as ours too, where we have nothing: both share it until the other goes.
pub(super) fn adopt(pins: &Pins, shapes: &BTreeMap<&'static str, Shape>) -> io::Result<()> {
    let others = pins.others()?;
    for name in LASTING {
        let shape = shapes[name];
        if !matches!(find(pins, name, shape)?, Found::Nothing) {
            continue;
        }
        for other in &others {
            if let Found::Right(map) = find(other, name, shape)? {
                sys::pin(map.as_fd(), &pins.map(name))?;
                break;
            }
        }
    }
    Ok(())
}

/// All of the pinned maps.
#[derive(Debug)]
pub(super) struct Maps(BTreeMap<&'static str, (OwnedFd, Shape)>);

impl Maps {
    /// `None` unless every one is there, as these programs need it.
    pub(super) fn open(pins: &Pins, shapes: &BTreeMap<&'static str, Shape>) -> io::Result<Option<Maps>> {
        let mut maps = BTreeMap::new();
        for (name, shape) in shapes {
            let Found::Right(map) = find(pins, name, *shape)? else { return Ok(None) };
            maps.insert(*name, (map, *shape));
        }
        Ok(Some(Maps(maps)))
    }

    pub(super) fn get(&self, name: &str) -> (BorrowedFd<'_>, u32) {
        let (map, shape) = &self.0[name];
        (map.as_fd(), shape.max_entries)
    }

    /// The newest map's id: another number where any map was made anew.
    pub(super) fn generation(&self) -> io::Result<u32> {
        let ids = self.0.values().map(|(map, _)| Ok(sys::map_info(map.as_fd())?.id));
        Ok(ids.collect::<io::Result<Vec<u32>>>()?.into_iter().max().unwrap_or(0))
    }

    fn fd(&self, name: &str) -> BorrowedFd<'_> {
        self.get(name).0
    }

    fn entries<K: aya::Pod, V: aya::Pod>(&self, name: &str) -> io::Result<Vec<(K, V)>> {
        let (map, most) = self.get(name);
        sys::entries(map, most).map_err(|error| io::Error::new(error.kind(), format!("map {name}: {error}")))
    }

    fn prefixes<V: aya::Pod, W>(
        &self,
        name: &str,
        decode: impl Fn(&V) -> W,
    ) -> io::Result<BTreeMap<ipnetwork::IpNetwork, W>> {
        let entries = self.entries::<codec::Prefix, V>(name)?;
        Ok(entries.iter().filter_map(|(to, value)| Some((codec::network(to)?, decode(value)))).collect())
    }

    /// What a plan fills.
    pub(super) fn read(&self, local: &Local) -> io::Result<state::Maps> {
        let config = sys::lookup(self.fd("CONFIG"), &0_u32)?;
        let nodes = self.entries("NODES")?;
        Ok(state::Maps {
            config: config.and_then(|config| codec::decode_config(&config, local)),
            remote: self.prefixes("REMOTE", codec::decode_remote)?,
            own: self.prefixes("OWN", codec::decode_offered)?,
            homes: self.prefixes("HOMES", codec::decode_home)?,
            nodes: nodes.iter().map(|(at, node)| (codec::ip(*at), codec::decode_node(node))).collect(),
        })
    }

    pub(super) fn set(&self, entry: &Entry, local: &Local) -> io::Result<()> {
        let invalid = || {
            let problem = format!("{entry:?} cannot be said to the programs");
            io::Error::new(io::ErrorKind::InvalidInput, problem)
        };
        if !codec::is_expressible(entry) {
            return Err(invalid());
        }
        let written = match entry {
            Entry::Config(config) => {
                let bytes = codec::encode_config(config, local).map_err(super::super::missing)?;
                if codec::decode_config(&bytes, local).as_ref() != Some(config) {
                    return Err(invalid());
                }
                sys::update(self.fd("CONFIG"), &0_u32, &bytes)
            }
            Entry::Remote(to, value) => {
                let bytes = codec::encode_remote(*value).ok_or_else(invalid)?;
                sys::update(self.fd("REMOTE"), &codec::prefix(to), &bytes)
            }
            Entry::Own(to, members) => {
                let bytes = codec::encode_offered(members);
                sys::update(self.fd("OWN"), &codec::prefix(to), &bytes)
            }
            Entry::Home(to, home) => sys::update(self.fd("HOMES"), &codec::prefix(to), &codec::encode_home(*home)),
            Entry::Node(at, node) => sys::update(self.fd("NODES"), &codec::address(*at), &codec::encode_node(*node)),
        };
        written.and_then(|()| self.forget()).map_err(|error| match error.raw_os_error() {
            Some(libc::ENOSPC | libc::E2BIG) => {
                io::Error::new(io::ErrorKind::StorageFull, "the map is full: this mesh is larger than is supported")
            }
            _ => error,
        })
    }

    /// Has the programs forget what they know of the tables.
    pub(super) fn forget(&self) -> io::Result<()> {
        let version = sys::lookup::<u32, u64>(self.fd("VERSION"), &0)?.unwrap_or(0);
        sys::update(self.fd("VERSION"), &0_u32, &version.wrapping_add(1))
    }

    pub(super) fn delete(&self, key: &Key) -> io::Result<()> {
        let deleted = match key {
            // An array's entry cannot be deleted: to the programs, zeros are no configuration.
            Key::Config => sys::update(self.fd("CONFIG"), &0_u32, &codec::NO_CONFIG),
            Key::Remote(to) => sys::delete(self.fd("REMOTE"), &codec::prefix(to)),
            Key::Own(to) => sys::delete(self.fd("OWN"), &codec::prefix(to)),
            Key::Home(to) => sys::delete(self.fd("HOMES"), &codec::prefix(to)),
            Key::Node(at) => sys::delete(self.fd("NODES"), &codec::address(*at)),
        };
        deleted.and_then(|()| self.forget())
    }
}
