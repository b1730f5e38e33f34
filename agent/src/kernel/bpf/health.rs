//! What the prober and status read and write in the pinned maps, apart from any pass.
//!
//! Invariant: a [`Health`] stays usable for as long as it lives; whether its maps are still the pinned ones says
//! [`Health::generation`].

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    time::Duration,
};

use aya::maps::{Map, MapData, RingBuf};
use ebpf::{Answer, Count, Reach, Reason, SLOTS};

use super::{maps::Maps, sys};
use crate::names::MemberId;

/// Ways by which packets leave: own slots over the hop, then WireGuard devices.
const WAYS: usize = 2 * SLOTS as usize;

/// The maps of health and the counters.
pub struct Health {
    reach: (OwnedFd, u32),
    answer: OwnedFd,
    traffic: OwnedFd,
    drops: OwnedFd,
    sent: OwnedFd,
    wake: RingBuf<MapData>,
    cpus: usize,
    generation: u32,
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Health").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl Health {
    pub(super) fn of(maps: &Maps) -> io::Result<Health> {
        let own = |name: &str| maps.get(name).0.try_clone_to_owned();
        let ring = Map::from_map_data(MapData::from_fd(own("WAKE")?).map_err(io::Error::other)?);
        let wake = ring.and_then(RingBuf::try_from).map_err(io::Error::other)?;
        let cpus = aya::util::nr_cpus().map_err(|(file, error)| super::super::context(file, &error))?;
        Ok(Health {
            reach: (own("HEALTH")?, maps.get("HEALTH").1),
            answer: own("ANSWER")?,
            traffic: own("TRAFFIC")?,
            drops: own("DROPS")?,
            sent: own("SENT")?,
            wake,
            cpus,
            generation: maps.generation()?,
        })
    }

    /// Which maps these are: another number where any was made anew.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// `HEALTH`, without the entries that are all zero.
    pub fn read_reach(&self) -> io::Result<BTreeMap<MemberId, Reach>> {
        let entries = sys::entries::<u32, Reach>(self.reach.0.as_fd(), self.reach.1)?;
        let told = entries.into_iter().filter(|(_, reach)| *reach != Reach::default());
        Ok(told.filter_map(|(id, reach)| Some((MemberId::new(id.into())?, reach))).collect())
    }

    pub fn write_reach(&self, member: MemberId, reach: Reach) -> io::Result<()> {
        sys::update(self.reach.0.as_fd(), &u32::from(member.get()), &reach)
    }

    /// `ANSWER`; all zero if it was never written.
    pub fn read_answer(&self) -> io::Result<Answer> {
        let nothing = Answer { flags: 0, zero: 0, mtu: [0; 2], members: [0; 512] };
        Ok(sys::lookup(self.answer.as_fd(), &0_u32)?.unwrap_or(nothing))
    }

    pub fn write_answer(&self, answer: &Answer) -> io::Result<()> {
        sys::update(self.answer.as_fd(), &0_u32, answer)
    }

    /// How long ago a packet towards the member was last steered, exact to [`ebpf::TRAFFIC_NS`]; `None`: never.
    pub fn last_traffic(&self, member: MemberId) -> io::Result<Option<Duration>> {
        let at: Option<u64> = sys::lookup(self.traffic.as_fd(), &u32::from(member.get()))?;
        let now = sys::monotonic()?;
        Ok(at.filter(|at| *at > 0).map(|at| now.saturating_sub(Duration::from_nanos(at))))
    }

    /// Readable, as epoll sees it, when `WAKE` holds something new.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Takes the oldest member out of `WAKE`.
    pub fn next_wake(&mut self) -> Option<MemberId> {
        loop {
            let record = self.wake.next()?;
            let member = record.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
            if let Some(member) = member.and_then(|member| MemberId::new(member.into())) {
                return Some(member);
            }
        }
    }

    /// Packets dropped so far on this node, by reason, those that never were left out.
    pub fn drops(&self) -> io::Result<BTreeMap<Reason, u64>> {
        let mut drops = BTreeMap::new();
        for reason in Reason::ALL {
            let counts = sys::lookup_per_cpu::<u64>(self.drops.as_fd(), *reason as u32, self.cpus)?;
            let sum = counts.iter().sum();
            if sum > 0 {
                drops.insert(*reason, sum);
            }
        }
        Ok(drops)
    }

    /// What was steered so far: indexes 0 to 7 by own slot over the hop, 8 to 15 by WireGuard device.
    pub fn sent(&self) -> io::Result<[Count; WAYS]> {
        let mut sent = [Count::default(); WAYS];
        for (way, sum) in (0_u32..).zip(&mut sent) {
            for count in sys::lookup_per_cpu::<Count>(self.sent.as_fd(), way, self.cpus)? {
                sum.packets += count.packets;
                sum.bytes += count.bytes;
            }
        }
        Ok(sent)
    }
}
