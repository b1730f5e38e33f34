//! The keys' directory: who this gateway is, and what it shares with others. Read, made, never printed.
//!
//! `gateway-<ordinal>` holds the slot's private key, or two while one replaces the other: both are loaded, and the one
//! that the folder names is used. `psk-<member>` holds the key shared with that member; its first line is used, and a
//! second, the one before it, may stand below so that one can go back. `hop` holds the secret that this cluster's nodes
//! share, or two while one replaces the other: the first sends, both are accepted. Each line is base64, as `wg genkey`
//! and `wg genpsk` write it.
//!
//! Invariants: a file that others can read is not used. A preshared key that cannot be used never looks like none
//! ([`Preshared::Unusable`]). An existing key is never overwritten, only added to. No error holds a byte of a file.

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File, Metadata},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    str::FromStr,
};

use x25519_dalek::StaticSecret;
use zeroize::Zeroizing;

use crate::{
    keys::{BadKey, HopId, HopSecret, PresharedKey, PrivateKey, PublicKey},
    names::{MemberName, Ordinal},
};

/// Keys of a slot: one, and what replaces it.
pub const KEYS: usize = 2;

/// Bytes of a key file: two lines of 44 characters, with room for blanks.
const MAX_FILE: usize = 1024;

/// The keys of one node.
#[derive(Clone, Debug, Default)]
pub struct Keyring {
    /// The slot's keys, at most two.
    pub private: BTreeMap<PublicKey, PrivateKey>,
    /// Members that a preshared key is meant for; any other member has none.
    pub preshared: BTreeMap<MemberName, Preshared>,
    /// The cluster's hop secrets, at most two; the first sends.
    pub hop: Vec<HopSecret>,
}

/// Which files this node cannot do without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// The slot that the node holds; a worker has none.
    pub slot: Option<Ordinal>,
    /// Whether the cluster has other nodes.
    pub hop: bool,
}

/// What a `psk-<member>` file came to.
#[derive(Clone, Debug)]
pub enum Preshared {
    Key(PresharedKey),
    /// There is a file, so the member's peers are meant to have a key: without it they must not be configured at all.
    Unusable,
}

impl Preshared {
    /// The key, if it can be used.
    pub fn key(&self) -> Option<&PresharedKey> {
        match self {
            Preshared::Key(key) => Some(key),
            Preshared::Unusable => None,
        }
    }
}

/// A key file, or the directory of them, that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{}: {fault}", path.display())]
pub struct KeyProblem {
    pub path: PathBuf,
    pub fault: KeyFault,
    pub lost: Lost,
}

/// What a problem keeps us from knowing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Every key: the directory cannot be read.
    All,
    /// The slot's own keys.
    Slot,
    /// The hop secrets.
    Hop,
    /// The key that is shared with this member.
    Member(MemberName),
    /// Nothing: the file is none of ours, only named like one (`psk-va~`, `psk-va.bak`).
    Nothing,
}

impl KeyProblem {
    /// Whether it concerns every peer, so that a pass that does not know better must not break anything. A preshared key
    /// that cannot be used concerns its own member, which is known as [`Preshared::Unusable`]; hop secrets stay in use until
    /// there are others; a stray file concerns nobody.
    pub fn blocks(&self) -> bool {
        matches!(self.lost, Lost::All | Lost::Slot)
    }

    /// The member whose `psk-<member>` file this is.
    pub fn member(&self) -> Option<&MemberName> {
        if let Lost::Member(member) = &self.lost { Some(member) } else { None }
    }
}

/// Why, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum KeyFault {
    #[error("does not exist: make the key with `carrick keys gen`, or put the file there")]
    Missing,
    #[error(
        "does not exist: make it with `carrick keys gen --hop` on one node, and copy it to all nodes of the cluster"
    )]
    NoHop,
    #[error("is not a file: put the key's file in its place")]
    NotAFile,
    #[error("is not a directory: give the directory that holds the key files")]
    NotADirectory,
    #[error("can be read or written by others (mode {0:04o}): chmod 600")]
    Mode(u32),
    #[error("can be written by others (mode {0:04o}): chmod 700")]
    DirMode(u32),
    #[error("belongs to user {0}: chown it to the user that Carrick runs as")]
    Owner(u32),
    #[error("holds no key: it is empty")]
    Empty,
    #[error("is not a key file: it is longer than {MAX_FILE} bytes")]
    TooLong,
    #[error("holds {0} lines: at most two keys may stand there, delete the old ones")]
    Lines(usize),
    #[error("line {line} {key}: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them")]
    Key { line: usize, key: BadKey },
    #[error("is named after no member: {0}")]
    Name(crate::names::NotALabel),
    #[error("exists already, and no key is ever overwritten: to replace it, add a second key")]
    Exists,
    #[error("holds two keys already: delete the one that is no longer used")]
    Full,
    #[error("is a link: add the key where it leads")]
    Link,
    #[error("is there: another run is making this key, or was interrupted; if there is none, delete the file")]
    Busy,
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
}

impl KeyFault {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> KeyFault {
        move |source| match source.kind() {
            io::ErrorKind::NotFound => KeyFault::Missing,
            _ => KeyFault::Io { what, source },
        }
    }

    /// While the slot's keys are read or written.
    fn at(self, path: &Path) -> KeyProblem {
        self.losing(Lost::Slot, path)
    }

    fn losing(self, lost: Lost, path: &Path) -> KeyProblem {
        KeyProblem { path: path.to_owned(), fault: self, lost }
    }
}

impl Keyring {
    /// Reads what is wanted, and every preshared key.
    ///
    /// Where the directory cannot be read there are no private keys either, so that no peer can be configured without
    /// a preshared key that was not seen.
    pub fn read(dir: &Path, wanted: Wanted) -> (Keyring, Vec<KeyProblem>) {
        let (mut ring, mut problems) = (Keyring::default(), Vec::new());
        let names = match check_dir(dir).and_then(|()| list(dir)) {
            Ok(names) => names,
            Err(fault) => return (ring, vec![fault.losing(Lost::All, dir)]),
        };
        if let Some(path) = wanted.slot.map(|slot| gateway_path(dir, slot)) {
            match read_keys::<PrivateKey>(&path) {
                Ok(keys) => ring.private = keys.into_iter().map(|key| (key.public(), key)).collect(),
                Err(fault) => problems.push(fault.at(&path)),
            }
        }
        if wanted.hop {
            let path = dir.join(HOP_FILE);
            match read_keys::<HopSecret>(&path) {
                Ok(secrets) => ring.hop = secrets,
                Err(KeyFault::Missing) => problems.push(KeyFault::NoHop.losing(Lost::Hop, &path)),
                Err(fault) => problems.push(fault.losing(Lost::Hop, &path)),
            }
        }
        for name in names {
            let Some(member) = name.strip_prefix("psk-") else { continue };
            let path = dir.join(&name);
            let member = match MemberName::from_str(member) {
                Ok(member) => member,
                Err(error) => {
                    problems.push(KeyFault::Name(error).losing(Lost::Nothing, &path));
                    continue;
                }
            };
            let key = read_keys::<PresharedKey>(&path).map(|keys| keys.into_iter().next());
            let preshared = match key {
                Ok(Some(key)) => Preshared::Key(key),
                Ok(None) => Preshared::Unusable,
                Err(fault) => {
                    problems.push(fault.losing(Lost::Member(member.clone()), &path));
                    Preshared::Unusable
                }
            };
            ring.preshared.insert(member, preshared);
        }
        (ring, problems)
    }

    /// Puts back from `last`, what was known before this reading, exactly what its `problems` took away.
    pub fn keep(&mut self, last: Keyring, problems: &[KeyProblem]) {
        for problem in problems {
            match &problem.lost {
                // The only problem there is.
                Lost::All => return *self = last,
                Lost::Slot => self.private.clone_from(&last.private),
                Lost::Hop => self.hop.clone_from(&last.hop),
                Lost::Member(member) => {
                    if let Some(key) = last.preshared.get(member) {
                        self.preshared.insert(member.clone(), key.clone());
                    }
                }
                Lost::Nothing => {}
            }
        }
    }
}

/// Makes the slot's first key, and the directory if it is missing. Fails if the file exists, whatever it holds.
pub fn generate(dir: &Path, slot: Ordinal) -> Result<PublicKey, KeyProblem> {
    let key = random();
    make(dir, &gateway_path(dir, slot), &key.to_base64())?;
    Ok(key.public())
}

/// Adds a second key below the slot's first, for a rotation: make, commit, wait, drop.
pub fn add(dir: &Path, slot: Ordinal) -> Result<PublicKey, KeyProblem> {
    let key = random();
    append::<PrivateKey>(dir, &gateway_path(dir, slot), PrivateKey::to_base64, &key.to_base64())?;
    Ok(key.public())
}

/// Makes the cluster's first hop secret, as [`generate`] does a key.
pub fn generate_hop(dir: &Path) -> Result<HopId, KeyProblem> {
    let secret = HopSecret::new(*Zeroizing::new(StaticSecret::random().to_bytes()));
    make(dir, &dir.join(HOP_FILE), &secret.to_base64())?;
    Ok(secret.mark().id())
}

/// Adds a second hop secret below the first: it is accepted, and does not send yet.
pub fn add_hop(dir: &Path) -> Result<HopId, KeyProblem> {
    let secret = HopSecret::new(*Zeroizing::new(StaticSecret::random().to_bytes()));
    append::<HopSecret>(dir, &dir.join(HOP_FILE), HopSecret::to_base64, &secret.to_base64())?;
    Ok(secret.mark().id())
}

/// Makes a file of one line.
fn make(dir: &Path, path: &Path, line: &str) -> Result<(), KeyProblem> {
    if !dir.exists() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| KeyFault::Io { what: "cannot be made", source }.at(dir))?;
    }
    check_dir(dir).map_err(|fault| fault.at(dir))?;
    let draft = Draft::write(path, &[line])?;
    // Unlike a rename, a link never replaces what is there.
    fs::hard_link(&draft.path, path).map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyFault::Exists.at(path),
        _ => KeyFault::Io { what: "cannot be made", source }.at(path),
    })?;
    drop(draft);
    sync(dir)
}

/// Adds a second line to a file that has one.
fn append<K: FromStr<Err = BadKey>>(
    dir: &Path,
    path: &Path,
    to_base64: fn(&K) -> Zeroizing<String>,
    line: &str,
) -> Result<(), KeyProblem> {
    check_dir(dir).map_err(|fault| fault.at(dir))?;
    let meta = fs::symlink_metadata(path).map_err(|error| KeyFault::io("cannot be read")(error).at(path))?;
    if meta.is_symlink() {
        return Err(KeyFault::Link.at(path));
    }
    let draft = {
        // Held from before the file is read, so that two runs cannot both add to what they have read.
        let lock = Draft::write(path, &[])?;
        let keys = read_keys::<K>(path).map_err(|fault| fault.at(path))?;
        let [first] = keys.as_slice() else { return Err(KeyFault::Full.at(path)) };
        lock.fill(&[&to_base64(first), line])?
    };
    draft.replace(path)?;
    sync(dir)
}

const HOP_FILE: &str = "hop";

fn gateway_path(dir: &Path, slot: Ordinal) -> PathBuf {
    dir.join(format!("gateway-{slot}"))
}

/// A new key, clamped as `wg genkey` does it (RFC 7748 §5), so that every tool shows the same bytes.
pub(crate) fn random() -> PrivateKey {
    let mut bytes = Zeroizing::new(StaticSecret::random().to_bytes());
    bytes[0] &= 248;
    bytes[31] = (bytes[31] & 127) | 64;
    PrivateKey::new(*bytes)
}

/// A key file that is being written, beside the one that it becomes. Deleted when dropped; its name is the lock.
struct Draft {
    path: PathBuf,
    file: File,
}

impl Draft {
    fn write(target: &Path, lines: &[&str]) -> Result<Draft, KeyProblem> {
        let name = target.file_name().unwrap_or_default().to_string_lossy();
        let path = target.with_file_name(format!(".{name}.new"));
        let file = File::options().write(true).create_new(true).mode(0o600).open(&path);
        let file = file.map_err(|source| match source.kind() {
            io::ErrorKind::AlreadyExists => KeyFault::Busy.at(&path),
            _ => KeyFault::Io { what: "cannot be made", source }.at(&path),
        })?;
        Draft { path, file }.fill(lines)
    }

    fn fill(mut self, lines: &[&str]) -> Result<Draft, KeyProblem> {
        let written = lines
            .iter()
            .try_for_each(|line| {
                self.file.write_all(line.as_bytes())?;
                self.file.write_all(b"\n")
            })
            .and_then(|()| self.file.sync_all());
        written.map_err(|source| KeyFault::Io { what: "cannot be written", source }.at(&self.path))?;
        Ok(self)
    }

    fn replace(mut self, target: &Path) -> Result<(), KeyProblem> {
        fs::rename(&self.path, target).map_err(|error| KeyFault::io("cannot be replaced")(error).at(target))?;
        // The name is free again, and may already be another run's.
        self.path.clear();
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        // Where this fails, the next run says that the file is in its way.
        _ = fs::remove_file(&self.path);
    }
}

fn sync(dir: &Path) -> Result<(), KeyProblem> {
    let synced = File::open(dir).and_then(|dir| dir.sync_all());
    synced.map_err(|source| KeyFault::Io { what: "cannot be synced to disk", source }.at(dir))
}

/// Nobody else may put files into the directory, unless it is sticky: kubelet mounts Secrets on `drwxrwxrwt`, and
/// files of others are refused one by one.
fn check_dir(dir: &Path) -> Result<(), KeyFault> {
    let meta = fs::metadata(dir).map_err(KeyFault::io("cannot be looked at"))?;
    let mode = meta.permissions().mode() & 0o7777;
    if !meta.is_dir() {
        Err(KeyFault::NotADirectory)
    } else if mode & 0o022 != 0 && mode & 0o1000 == 0 {
        Err(KeyFault::DirMode(mode))
    } else {
        check_owner(&meta)
    }
}

fn check_owner(meta: &Metadata) -> Result<(), KeyFault> {
    let us = nix::unistd::geteuid().as_raw();
    if meta.uid() == us || meta.uid() == 0 { Ok(()) } else { Err(KeyFault::Owner(meta.uid())) }
}

/// The names in the directory, sorted; those that are no UTF-8 are none of ours.
fn list(dir: &Path) -> Result<Vec<String>, KeyFault> {
    let names = fs::read_dir(dir).and_then(|entries| {
        entries.map(|entry| entry.map(|entry| entry.file_name().into_string())).collect::<io::Result<Vec<_>>>()
    });
    let mut names: Vec<String> =
        names.map_err(KeyFault::io("cannot be listed"))?.into_iter().filter_map(Result::ok).collect();
    names.sort();
    Ok(names)
}

/// One or two keys. Follows symlinks, as kubelet makes them; what counts is the file that is opened.
fn read_keys<K: FromStr<Err = BadKey>>(path: &Path) -> Result<Vec<K>, KeyFault> {
    // Opening must not wait for a fifo's writer.
    let mut file =
        File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(KeyFault::io("cannot be read"))?;
    let meta = file.metadata().map_err(KeyFault::io("cannot be read"))?;
    if !meta.is_file() {
        return Err(KeyFault::NotAFile);
    }
    check_owner(&meta)?;
    let mode = meta.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(KeyFault::Mode(mode));
    }
    // A buffer that never grows leaves no copies behind.
    let mut buffer = Zeroizing::new([0; MAX_FILE]);
    let mut length = 0;
    while length < MAX_FILE {
        match file.read(&mut buffer[length..]).map_err(KeyFault::io("cannot be read"))? {
            0 => break,
            read => length += read,
        }
    }
    if length == MAX_FILE { Err(KeyFault::TooLong) } else { parse(&buffer[..length]) }
}

/// The keys of a file: one, or two while one replaces the other.
pub(crate) fn parse<K: FromStr<Err = BadKey>>(bytes: &[u8]) -> Result<Vec<K>, KeyFault> {
    let lines: Vec<(usize, &[u8])> = (1..)
        .zip(bytes.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    match lines.len() {
        0 => return Err(KeyFault::Empty),
        1..=KEYS => {}
        more => return Err(KeyFault::Lines(more)),
    }
    let key = |(line, bytes): &(usize, &[u8])| {
        let text = str::from_utf8(bytes).map_err(|_| BadKey::NotBase64);
        text.and_then(str::parse).map_err(|key| KeyFault::Key { line: *line, key })
    };
    lines.iter().map(key).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{chown, symlink};

    use expect_test::{Expect, expect};

    use super::*;
    use crate::scratch::Scratch;

    /// A private key, its public key, and a preshared key.
    const PRIVATE: &str = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk=";
    const OTHER: &str = "EEGlnEPYJV//kbvvIqxKkQwOiS+UENyPncC4bF46ong=";
    const SHARED: &str = "FpCyhws9cxwWoV4xELtfJvjJN+zQVRPISllRWgeopVE=";
    const ZERO: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

    /// As a gateway of a member of one node reads them, and as a worker does.
    const SLOT: Wanted = Wanted { slot: Some(Ordinal::ZERO), hop: false };
    const WORKER: Wanted = Wanted { slot: None, hop: true };

    fn put(dir: &Scratch, name: &str, mode: u32, text: &str) {
        let path = dir.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    fn show(dir: &Scratch, problem: &KeyProblem) -> String {
        problem.to_string().replace(&format!("{}", dir.path().display()), "KEYS")
    }

    /// Everything that reading the directory for slot 0 gives, with nothing secret in it.
    fn outcome(dir: &Scratch) -> String {
        let (ring, problems) = Keyring::read(dir.path(), SLOT);
        let mut out: Vec<String> = ring.private.keys().map(|key| format!("slot {key}")).collect();
        out.extend(ring.preshared.iter().map(|(member, preshared)| match preshared {
            Preshared::Key(key) => format!("{member} {}", key.id()),
            Preshared::Unusable => format!("{member} unusable"),
        }));
        out.extend(problems.iter().map(|problem| show(dir, problem)));
        let everything = format!("{ring:?} {ring:#?} {problems:?} {problems:#?} {out:?}");
        let bytes = |key: &str| format!("{:?}", key.parse::<PrivateKey>().unwrap().as_bytes());
        for secret in [PRIVATE, OTHER, SHARED] {
            assert!(!everything.contains(secret) && !everything.contains(&bytes(secret)), "{everything}");
        }
        out.iter().map(|line| format!("{line}\n")).collect()
    }

    /// Reads a directory of (name, mode, text).
    fn check(files: &[(&str, u32, &str)], expected: Expect) {
        let dir = Scratch::new();
        files.iter().for_each(|(name, mode, text)| put(&dir, name, *mode, text));
        expected.assert_eq(&outcome(&dir));
    }

    #[test]
    fn good_files() {
        check(
            &[("gateway-0", 0o600, PRIVATE), ("gateway-1", 0o644, "x"), ("readme", 0o644, "x")],
            expect![[r#"
            slot HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
        "#]],
        );
        check(
            &[("gateway-0", 0o400, &format!("\n {PRIVATE}\r\n\n{OTHER}\n"))],
            expect![[r#"
            slot HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
            slot clei1xcOL9V1BVgBlS8UN4ehzqq0ShJ92i543AGh2hU=
        "#]],
        );
        check(
            &[("gateway-0", 0o600, PRIVATE), ("psk-va", 0o600, &format!("{SHARED}\n"))],
            expect![[r#"
            slot HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
            va 05e7ce8e79ce7b93
        "#]],
        );
        check(
            &[("gateway-0", 0o600, PRIVATE), ("psk-va", 0o600, &format!("{SHARED}\n{OTHER}\n"))],
            expect![[r#"
            slot HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
            va 05e7ce8e79ce7b93
        "#]],
        );
    }

    #[test]
    fn a_preshared_key_that_cannot_be_used_is_not_none() {
        let files = [
            ("gateway-0", 0o600, PRIVATE),
            ("psk-a", 0o640, SHARED),
            ("psk-b", 0o600, ""),
            ("psk-c", 0o600, ZERO),
            ("psk-d", 0o600, &SHARED[..20]),
            ("psk-e", 0o600, "not base64, but perhaps a secret"),
            ("psk-F", 0o600, SHARED),
            ("psk-va", 0o600, SHARED),
        ];
        check(
            &files,
            expect![[r#"
                slot HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
                a unusable
                b unusable
                c unusable
                d unusable
                e unusable
                va 05e7ce8e79ce7b93
                KEYS/psk-F: is named after no member: a member's name is a DNS label: 1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit
                KEYS/psk-a: can be read or written by others (mode 0640): chmod 600
                KEYS/psk-b: holds no key: it is empty
                KEYS/psk-c: line 1 is all zeros: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
                KEYS/psk-d: line 1 is 15 bytes long, a key has 32: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
                KEYS/psk-e: line 1 is not base64: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
            "#]],
        );
    }

    #[test]
    fn a_problem_blocks_and_takes_no_more_than_it_must() {
        let dir = Scratch::new();
        let good = [("gateway-0", PRIVATE), ("psk-de", SHARED), ("psk-va", OTHER)];
        good.iter().for_each(|(name, text)| put(&dir, name, 0o600, text));
        let (before, problems) = Keyring::read(dir.path(), SLOT);
        assert!(problems.is_empty(), "{problems:?}");
        let show = |ring: &Keyring| {
            let shared = |(member, key): (&MemberName, &Preshared)| format!("{member}={}", key.key().is_some());
            let words = ring.preshared.iter().map(shared);
            let own = format!("slot={}", ring.private.len());
            [own].into_iter().chain(words).collect::<Vec<_>>().join(" ")
        };
        // What is read, what blocks, and what is known with the last reading's help.
        let mut told = String::new();
        let mut tell = |name: &str| {
            let (mut ring, problems) = Keyring::read(dir.path(), SLOT);
            let read = show(&ring);
            ring.keep(before.clone(), &problems);
            let [problem] = problems.as_slice() else { panic!("{problems:?}") };
            let (lost, member) = (&problem.lost, problem.member().map(ToString::to_string));
            told += &format!("{name} {lost:?} {member:?}: blocks={} {read} => {}\n", problem.blocks(), show(&ring));
        };
        // Whatever is wrong with another file, one that was deleted stays deleted.
        fs::remove_file(dir.path().join("psk-de")).unwrap();
        for (name, mode, text) in [
            ("psk-va~", 0o644, "x"),
            ("psk-va.bak", 0o600, SHARED),
            ("psk-va", 0o644, SHARED),
            ("psk-new", 0o600, ""),
            ("gateway-0", 0o600, ""),
        ] {
            put(&dir, name, mode, text);
            tell(name);
            fs::remove_file(dir.path().join(name)).unwrap();
            good.iter().filter(|(good, _)| *good == name).for_each(|(name, text)| put(&dir, name, 0o600, text));
        }
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        tell("the directory");
        expect![[r#"
            psk-va~ Nothing None: blocks=false slot=1 va=true => slot=1 va=true
            psk-va.bak Nothing None: blocks=false slot=1 va=true => slot=1 va=true
            psk-va Member(MemberName("va")) Some("va"): blocks=false slot=1 va=false => slot=1 va=true
            psk-new Member(MemberName("new")) Some("new"): blocks=false slot=1 new=false va=true => slot=1 new=false va=true
            gateway-0 Slot None: blocks=true slot=0 va=true => slot=1 va=true
            the directory All None: blocks=true slot=0 => slot=1 de=true va=true
        "#]].assert_eq(&told);
    }

    /// A worker needs no slot's key, and a cluster of one node no hop secret.
    #[test]
    fn hop_secrets() {
        let both = format!("{PRIVATE}\n{OTHER}\n");
        let mut told = String::new();
        let mut last = Keyring::default();
        for (mode, text) in [(0o600, both.as_str()), (0o640, &both), (0o600, OTHER), (0o600, ZERO), (0o600, "")] {
            let dir = Scratch::new();
            put(&dir, "hop", mode, text);
            let (mut ring, problems) = Keyring::read(dir.path(), WORKER);
            let everything = format!("{ring:?} {problems:?}");
            assert!([PRIVATE, OTHER].iter().all(|secret| !everything.contains(secret)), "{everything}");
            ring.keep(last, &problems);
            let ids: Vec<_> = ring.hop.iter().map(|secret| secret.mark().id().to_string()).collect();
            told += &format!("{}\n", ids.join(" "));
            for problem in &problems {
                told += &format!("  {} (blocks={})\n", show(&dir, problem), problem.blocks());
            }
            last = ring;
        }
        let dir = Scratch::new();
        let (mut ring, problems) = Keyring::read(dir.path(), WORKER);
        ring.keep(last, &problems);
        told += &format!("{} {}\n", ring.hop.len(), show(&dir, &problems[0]));
        expect![[r#"
            1de1ffcfde543a1c 83b50ee1895a0fb9
            1de1ffcfde543a1c 83b50ee1895a0fb9
              KEYS/hop: can be read or written by others (mode 0640): chmod 600 (blocks=false)
            83b50ee1895a0fb9
            83b50ee1895a0fb9
              KEYS/hop: line 1 is all zeros: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them (blocks=false)
            83b50ee1895a0fb9
              KEYS/hop: holds no key: it is empty (blocks=false)
            1 KEYS/hop: does not exist: make it with `carrick keys gen --hop` on one node, and copy it to all nodes of the cluster
        "#]].assert_eq(&told);
    }

    #[test]
    fn a_hop_secret_is_made_once_and_the_next_one_comes_second() {
        let dir = Scratch::new();
        assert!(matches!(add_hop(dir.path()).unwrap_err().fault, KeyFault::Missing));
        let first = generate_hop(dir.path()).unwrap();
        assert!(matches!(generate_hop(dir.path()).unwrap_err().fault, KeyFault::Exists));
        let second = add_hop(dir.path()).unwrap();
        assert!(matches!(add_hop(dir.path()).unwrap_err().fault, KeyFault::Full));
        let (ring, problems) = Keyring::read(dir.path(), WORKER);
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(ring.hop.iter().map(|secret| secret.mark().id()).collect::<Vec<_>>(), [first, second]);
        let mode = fs::metadata(dir.path().join("hop")).unwrap().permissions().mode() & 0o7777;
        assert_eq!(mode, 0o600);
    }

    #[test]
    fn bad_gateway_keys() {
        check(
            &[],
            expect![[r#"
            KEYS/gateway-0: does not exist: make the key with `carrick keys gen`, or put the file there
        "#]],
        );
        check(
            &[("gateway-0", 0o644, PRIVATE)],
            expect![[r#"
            KEYS/gateway-0: can be read or written by others (mode 0644): chmod 600
        "#]],
        );
        check(
            &[("gateway-0", 0o600, "\n\n")],
            expect![[r#"
            KEYS/gateway-0: holds no key: it is empty
        "#]],
        );
        check(
            &[("gateway-0", 0o600, &PRIVATE[..40])],
            expect![[r#"
                KEYS/gateway-0: line 1 is 30 bytes long, a key has 32: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
            "#]],
        );
        check(
            &[("gateway-0", 0o600, &PRIVATE[..43])],
            expect![[r#"
                KEYS/gateway-0: line 1 is not base64: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
            "#]],
        );
        check(
            &[("gateway-0", 0o600, ZERO)],
            expect![[r#"
                KEYS/gateway-0: line 1 is all zeros: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
            "#]],
        );
        check(
            &[("gateway-0", 0o600, &format!("{PRIVATE}\n{ZERO}\n"))],
            expect![[r#"
                KEYS/gateway-0: line 2 is all zeros: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
            "#]],
        );
        check(
            &[("gateway-0", 0o600, &format!("{PRIVATE}\n{OTHER}\n{PRIVATE}\n"))],
            expect![[r#"
            KEYS/gateway-0: holds 3 lines: at most two keys may stand there, delete the old ones
        "#]],
        );
        check(
            &[("gateway-0", 0o600, &format!("{PRIVATE} {OTHER}"))],
            expect![[r#"
                KEYS/gateway-0: line 1 is not base64: what belongs there is 32 bytes in base64, as `wg genkey` and `wg genpsk` write them
            "#]],
        );
        check(
            &[("gateway-0", 0o600, &PRIVATE.repeat(100))],
            expect![[r#"
            KEYS/gateway-0: is not a key file: it is longer than 1024 bytes
        "#]],
        );
    }

    #[test]
    fn what_stands_in_a_file_s_place() {
        let dir = Scratch::new();
        fs::create_dir(dir.path().join("gateway-0")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("psk-va"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        symlink("nowhere", dir.path().join("psk-de")).unwrap();
        expect![[r#"
            de unusable
            va unusable
            KEYS/gateway-0: is not a file: put the key's file in its place
            KEYS/psk-de: does not exist: make the key with `carrick keys gen`, or put the file there
            KEYS/psk-va: is not a file: put the key's file in its place
        "#]]
        .assert_eq(&outcome(&dir));
    }

    #[test]
    fn a_mounted_secret() {
        let dir = Scratch::new();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
        fs::create_dir(dir.path().join("..2026_01_02")).unwrap();
        symlink("..2026_01_02", dir.path().join("..data")).unwrap();
        put(&dir, "..data/gateway-0", 0o600, PRIVATE);
        put(&dir, "..data/psk-va", 0o640, SHARED);
        symlink("..data/gateway-0", dir.path().join("gateway-0")).unwrap();
        symlink("..data/psk-va", dir.path().join("psk-va")).unwrap();
        expect![[r#"
            slot HIgo9xNzJMWLKASShiTqIybxZ0U3wGLiUeJ1PKf8ykw=
            va unusable
            KEYS/psk-va: can be read or written by others (mode 0640): chmod 600
        "#]]
        .assert_eq(&outcome(&dir));
        expect!["KEYS/gateway-0: is a link: add the key where it leads"]
            .assert_eq(&show(&dir, &add(dir.path(), Ordinal::ZERO).unwrap_err()));
    }

    #[test]
    fn directories_and_owners() {
        let dir = Scratch::new();
        put(&dir, "gateway-0", 0o600, PRIVATE);
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o770)).unwrap();
        expect![[r#"
            KEYS: can be written by others (mode 0770): chmod 700
        "#]]
        .assert_eq(&outcome(&dir));
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o700)).unwrap();
        // Only root can give files away.
        if nix::unistd::geteuid().is_root() {
            chown(dir.path().join("gateway-0"), Some(12345), None).unwrap();
            assert_eq!(
                outcome(&dir),
                "KEYS/gateway-0: belongs to user 12345: chown it to the user that Carrick runs as\n"
            );
        }
        let (ring, problems) = Keyring::read(&dir.path().join("gateway-0"), SLOT);
        assert!(ring.private.is_empty());
        assert!(matches!(problems[0].fault, KeyFault::NotADirectory), "{problems:?}");
    }

    #[test]
    fn a_key_is_made_once_and_added_to_once() {
        let dir = Scratch::new();
        let keys = dir.path().join("new/keys");
        let first = generate(&keys, Ordinal::ZERO).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        assert_eq!((mode(&keys), mode(&keys.join("gateway-0"))), (0o700, 0o600));

        let again = generate(&keys, Ordinal::ZERO).unwrap_err();
        assert!(matches!(again.fault, KeyFault::Exists), "{again:?}");
        let second = add(&keys, Ordinal::ZERO).unwrap();
        let third = add(&keys, Ordinal::ZERO).unwrap_err();
        assert!(matches!(third.fault, KeyFault::Full), "{third:?}");

        let (ring, problems) = Keyring::read(&keys, SLOT);
        assert!(problems.is_empty(), "{problems:?}");
        assert_eq!(ring.private.into_keys().collect::<Vec<_>>(), [first.min(second), first.max(second)]);
        assert_eq!(mode(&keys.join("gateway-0")), 0o600);
        let names: Vec<_> = fs::read_dir(&keys).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["gateway-0"]);
    }

    #[test]
    fn nothing_that_is_there_is_ever_lost() {
        for text in ["", "x", PRIVATE] {
            let dir = Scratch::new();
            put(&dir, "gateway-0", 0o644, text);
            let error = generate(dir.path(), Ordinal::ZERO).unwrap_err();
            assert!(matches!(error.fault, KeyFault::Exists), "{error:?}");
            add(dir.path(), Ordinal::ZERO).unwrap_err();
            assert_eq!(fs::read_to_string(dir.path().join("gateway-0")).unwrap(), text);
        }
        let dir = Scratch::new();
        symlink("nowhere", dir.path().join("gateway-0")).unwrap();
        assert!(matches!(generate(dir.path(), Ordinal::ZERO).unwrap_err().fault, KeyFault::Exists));
        put(&dir, ".gateway-1.new", 0o600, OTHER);
        let slot = Ordinal::new(1).unwrap();
        assert!(matches!(generate(dir.path(), slot).unwrap_err().fault, KeyFault::Busy));
        assert!(dir.path().join(".gateway-1.new").exists());
        assert!(matches!(add(dir.path(), slot).unwrap_err().fault, KeyFault::Missing));
    }

    #[test]
    fn of_many_runs_at_once_one_makes_the_key() {
        let dir = Scratch::new();
        let runs: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| generate(dir.path(), Ordinal::ZERO))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let made: Vec<_> = runs.iter().flatten().collect();
        let (ring, _) = Keyring::read(dir.path(), SLOT);
        assert_eq!(made, ring.private.keys().collect::<Vec<_>>());
    }

    #[test]
    fn made_keys_are_as_wg_makes_them() {
        let bytes = *random().as_bytes();
        assert_eq!((bytes[0] & 7, bytes[31] >> 6), (0, 1));
        assert_ne!(random().public(), random().public());
    }
}
