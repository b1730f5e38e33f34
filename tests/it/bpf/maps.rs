//! A [`World`] in the maps of the loaded object, and the counters read back from them.

use std::{borrow::BorrowMut, collections::BTreeMap};

use anyhow::{Context as _, Result};
use aya::{
    Ebpf, Pod,
    maps::{
        Array, HashMap, MapData, PerCpuArray, RingBuf,
        lpm_trie::{Key as TrieKey, LpmTrie},
    },
};
use ebpf::{Addr, Answer, Config, Count, Home, Node, Offered, Reach, Reason, Remote, TestKey, TestSeen, Wake, sent};

use super::{
    cases::MEMBERS,
    model::{Key, Prefix, World},
};

/// The maps of one loaded object.
pub struct Maps {
    remote: LpmTrie<MapData, [u8; 16], Remote>,
    own: LpmTrie<MapData, [u8; 16], Offered>,
    version: Array<MapData, u64>,
    homes: LpmTrie<MapData, [u8; 16], Home>,
    nodes: HashMap<MapData, [u8; 16], Node>,
    config: Array<MapData, Config>,
    answer: Array<MapData, Answer>,
    probed: Array<MapData, u64>,
    health: Array<MapData, Reach>,
    traffic: Array<MapData, u64>,
    wake: RingBuf<MapData>,
    drops: PerCpuArray<MapData, u64>,
    sent: PerCpuArray<MapData, Count>,
    test_key: Array<MapData, TestKey>,
    test_seen: Array<MapData, TestSeen>,
    written: Option<World>,
}

/// What the programs counted so far, over all CPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub drops: BTreeMap<Reason, u64>,
    pub sent: BTreeMap<u32, Count>,
}

impl Counters {
    pub fn drop(&mut self, reason: Reason) {
        *self.drops.entry(reason).or_default() += 1;
    }

    pub fn send(&mut self, index: u32, packets: u64, bytes: u64) {
        let count = self.sent.entry(index).or_default();
        count.packets += packets;
        count.bytes += bytes;
    }

    /// What was counted since `earlier`; what was not counted is left out.
    pub fn since(&self, earlier: &Counters) -> Counters {
        let mut counters = Counters::default();
        for (reason, count) in &self.drops {
            let more = count - earlier.drops.get(reason).copied().unwrap_or(0);
            counters.drops.extend((more > 0).then_some((*reason, more)));
        }
        for (index, count) in &self.sent {
            let before = earlier.sent.get(index).copied().unwrap_or_default();
            let more = Count { packets: count.packets - before.packets, bytes: count.bytes - before.bytes };
            counters.sent.extend((more != Count::default()).then_some((*index, more)));
        }
        counters
    }
}

impl Maps {
    /// Takes them out of the object, whose programs keep using them.
    pub fn take(object: &mut Ebpf) -> Result<Maps> {
        let mut map = |name: &str| object.take_map(name).with_context(|| format!("the object has no map {name}"));
        Ok(Maps {
            remote: map("REMOTE")?.try_into()?,
            own: map("OWN")?.try_into()?,
            version: map("VERSION")?.try_into()?,
            homes: map("HOMES")?.try_into()?,
            nodes: map("NODES")?.try_into()?,
            config: map("CONFIG")?.try_into()?,
            answer: map("ANSWER")?.try_into()?,
            probed: map("PROBED")?.try_into()?,
            health: map("HEALTH")?.try_into()?,
            traffic: map("TRAFFIC")?.try_into()?,
            wake: map("WAKE")?.try_into()?,
            drops: map("DROPS")?.try_into()?,
            sent: map("SENT")?.try_into()?,
            test_key: map("TEST_KEY")?.try_into()?,
            test_seen: map("TEST_SEEN")?.try_into()?,
            written: None,
        })
    }

    /// Makes the maps hold `world`, and nothing else.
    pub fn write(&mut self, world: &World) -> Result<()> {
        if let Some(old) = self.written.take() {
            clear(&mut self.remote, old.remote.keys())?;
            clear(&mut self.own, old.own.keys())?;
            clear(&mut self.homes, old.homes.keys())?;
            for addr in old.nodes.keys() {
                self.nodes.remove(&addr.0)?;
            }
        }
        for (prefix, remote) in &world.remote {
            self.remote.insert(&key(prefix), remote, 0)?;
        }
        for (prefix, members) in &world.own {
            let mut offered = Offered { members: [0; 64] };
            for member in members {
                offered.members[usize::from(member / 64)] |= 1 << (member % 64);
            }
            self.own.insert(&key(prefix), offered, 0)?;
        }
        for (prefix, node) in &world.homes {
            self.homes.insert(&key(prefix), Home { node: *node }, 0)?;
        }
        for (addr, node) in &world.nodes {
            self.nodes.insert(addr.0, node, 0)?;
        }
        for (member, reach) in &world.health {
            self.health.set(u32::from(*member), reach, 0)?;
        }
        self.config.set(0, world.config, 0)?;
        let version = self.version.get(&0, 0)?;
        self.version.set(0, version + 1, 0)?;
        self.answer.set(0, world.answer, 0)?;
        // Never behind the clock, or as far behind as the machine has run.
        self.probed.set(0, if world.probed { u64::MAX } else { 0 }, 0)?;
        self.written = Some(world.clone());
        Ok(())
    }

    /// What the tables are said to be; a new world is a new version.
    pub fn version(&self) -> Result<u64> {
        Ok(self.version.get(&0, 0)?)
    }

    pub fn set_version(&mut self, version: u64) -> Result<()> {
        Ok(self.version.set(0, version, 0)?)
    }

    /// The tunnel key that the next packets come with.
    pub fn set_key(&mut self, key: Option<Key>) -> Result<()> {
        let key =
            key.map_or(TestKey { remote: Addr::NONE, vni: 0 }, |key| TestKey { remote: key.remote, vni: key.vni });
        Ok(self.test_key.set(0, key, 0)?)
    }

    pub fn clear_seen(&mut self) -> Result<()> {
        let nothing = TestSeen { kind: 0, ifindex: 0, reason: 0, vni: 0, remote: Addr::NONE, local: Addr::NONE };
        Ok(self.test_seen.set(0, nothing, 0)?)
    }

    pub fn seen(&self) -> Result<TestSeen> {
        Ok(self.test_seen.get(&0, 0)?)
    }

    pub fn counters(&self) -> Result<Counters> {
        let mut counters = Counters::default();
        for reason in Reason::ALL {
            counters.drops.insert(*reason, self.drops.get(&(*reason as u32), 0)?.iter().sum());
        }
        for index in 0..sent::LEN {
            for count in self.sent.get(&index, 0)?.iter() {
                counters.send(index, count.packets, count.bytes);
            }
        }
        Ok(counters)
    }

    /// When a packet towards the member was last steered, in nanoseconds.
    pub fn set_traffic(&mut self, member: u16, at: u64) -> Result<()> {
        Ok(self.traffic.set(u32::from(member), at, 0)?)
    }

    pub fn traffic(&self) -> Result<BTreeMap<u16, u64>> {
        MEMBERS.into_iter().map(|member| Ok((member, self.traffic.get(&u32::from(member), 0)?))).collect()
    }

    /// The members that were told in `WAKE` since this was last asked, in that order.
    pub fn woken(&mut self) -> Vec<u32> {
        let mut woken = Vec::new();
        while let Some(record) = self.wake.next() {
            assert_eq!(record.len(), size_of::<Wake>(), "a record of WAKE");
            woken.push(u32::from_ne_bytes([record[0], record[1], record[2], record[3]]));
        }
        woken
    }
}

fn key((addr, len): &Prefix) -> TrieKey<[u8; 16]> {
    TrieKey::new(*len, addr.0)
}

fn clear<'a, V: Pod>(
    trie: &mut LpmTrie<impl BorrowMut<MapData>, [u8; 16], V>,
    prefixes: impl Iterator<Item = &'a Prefix>,
) -> Result<()> {
    for prefix in prefixes {
        trie.remove(&key(prefix))?;
    }
    Ok(())
}
