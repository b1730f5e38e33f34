//! The small values that everything else is keyed by: who a member is, which slot, which device, which table.
//!
//! Each is parsed once and then cannot be wrong: a [`MemberId`] is in range, a [`MemberName`] is a DNS label.

use std::{fmt, str::FromStr};

/// A member's number, 1 to 4095: decides conflicts (the lower wins) and places the member in probe bitmaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(u16);

impl MemberId {
    /// `None` outside 1 to [`ebpf::MAX_MEMBER_ID`].
    pub fn new(id: i64) -> Option<MemberId> {
        u16::try_from(id).ok().filter(|id| (1..=ebpf::MAX_MEMBER_ID).contains(id)).map(MemberId)
    }

    pub fn get(self) -> u16 {
        self.0
    }
}

impl fmt::Display for MemberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A member's name: a DNS label (RFC 1123), the name of its MeshCluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberName(String);

/// Why a text is no [`MemberName`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a member's name is a DNS label: 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit")]
pub struct NotALabel;

impl FromStr for MemberName {
    type Err = NotALabel;

    fn from_str(text: &str) -> Result<MemberName, NotALabel> {
        let inner = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-';
        let good =
            (1..=63).contains(&text.len()) && text.bytes().all(inner) && !text.starts_with('-') && !text.ends_with('-');
        if good { Ok(MemberName(text.to_owned())) } else { Err(NotALabel) }
    }
}

impl MemberName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for MemberName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A gateway slot of a member, 0 to 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ordinal(u8);

impl Ordinal {
    pub const ZERO: Ordinal = Ordinal(0);

    /// `None` outside 0 to 7.
    pub fn new(ordinal: i64) -> Option<Ordinal> {
        u8::try_from(ordinal).ok().filter(|o| *o < ebpf::SLOTS).map(Ordinal)
    }

    /// Every slot there can be, lowest first.
    pub fn all() -> impl Iterator<Item = Ordinal> {
        (0..ebpf::SLOTS).map(Ordinal)
    }

    pub fn get(self) -> u8 {
        self.0
    }
}

impl fmt::Display for Ordinal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The WireGuard device that holds every member's gateway of one ordinal as a peer: `carrick-wg0` to `carrick-wg7`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Device(pub Ordinal);

/// What every WireGuard device of ours is called, up to its number.
pub const DEVICE_PREFIX: &str = "carrick-wg";

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{DEVICE_PREFIX}{}", self.0)
    }
}

impl Device {
    /// The device of that link name; `None` for a foreign link.
    pub fn from_link(name: &str) -> Option<Device> {
        let number = name.strip_prefix(DEVICE_PREFIX)?;
        Device::all().find(|device| device.0.get().to_string() == number)
    }

    /// Every device there can be, lowest first.
    pub fn all() -> impl Iterator<Item = Device> {
        Ordinal::all().map(Device)
    }
}

/// A link of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Interface {
    /// The VXLAN device between the nodes of this cluster: `carrick-hop`.
    Hop,
    WireGuard(Device),
}

pub const HOP: &str = "carrick-hop";

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Interface::Hop => f.write_str(HOP),
            Interface::WireGuard(device) => device.fmt(f),
        }
    }
}

impl Interface {
    /// The interface of that link name; `None` for a foreign link.
    pub fn from_link(name: &str) -> Option<Interface> {
        if name == HOP { Some(Interface::Hop) } else { Device::from_link(name).map(Interface::WireGuard) }
    }

    /// Every link there can be.
    pub fn all() -> impl Iterator<Item = Interface> {
        std::iter::once(Interface::Hop).chain(Device::all().map(Interface::WireGuard))
    }
}

/// A node's name: a DNS subdomain (RFC 1123), the name of its Node object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeName(String);

/// Why a text is no [`NodeName`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("a node's name is 1 to 253 of a-z, 0-9, '-' and '.', each part starting and ending with a letter or digit")]
pub struct NotASubdomain;

impl FromStr for NodeName {
    type Err = NotASubdomain;

    fn from_str(text: &str) -> Result<NodeName, NotASubdomain> {
        let label = |part: &str| part.parse::<MemberName>().is_ok();
        if text.len() <= 253 && text.split('.').all(label) { Ok(NodeName(text.to_owned())) } else { Err(NotASubdomain) }
    }
}

impl NodeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The text in lower case, with a '-' for whatever no name can have; `localhost` if nothing remains.
    pub fn nearest(text: &str) -> NodeName {
        let lower = text.to_ascii_lowercase();
        let plain = lower.replace(|c: char| !c.is_ascii_lowercase() && !c.is_ascii_digit() && c != '.', "-");
        let parts = plain.split('.').map(|part| part.trim_matches('-')).filter(|part| !part.is_empty());
        let name = parts.collect::<Vec<_>>().join(".");
        name.parse().unwrap_or_else(|NotASubdomain| NodeName("localhost".to_owned()))
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Our two routing tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// 7473: the way to remote ranges.
    Remote,
    /// 7474: an `unreachable` twin of each remote range, so that forwarded packets fail closed when the device is gone.
    Closed,
}

impl Table {
    pub const ALL: [Table; 2] = [Table::Remote, Table::Closed];

    pub fn id(self) -> u32 {
        match self {
            Table::Remote => 7473,
            Table::Closed => 7474,
        }
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id().fmt(f)
    }
}
