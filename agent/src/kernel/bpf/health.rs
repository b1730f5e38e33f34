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
use ebpf::{Answer, Count, Reach, Reason, sent};

use super::{maps::Maps, sys};
use crate::{health::NO_ANSWER, names::MemberId, probe::HealthMaps};

/// The maps of health and the counters.
pub struct Health {
    reach: (OwnedFd, u32),
    answer: OwnedFd,
    probed: OwnedFd,
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
            probed: own("PROBED")?,
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

    /// What was steered so far, by the indexes of [`ebpf::sent`].
    pub fn sent(&self) -> io::Result<[Count; sent::LEN as usize]> {
        let mut sent = [Count::default(); sent::LEN as usize];
        for (way, sum) in (0_u32..).zip(&mut sent) {
            for count in sys::lookup_per_cpu::<Count>(self.sent.as_fd(), way, self.cpus)? {
                sum.packets += count.packets;
                sum.bytes += count.bytes;
            }
        }
        Ok(sent)
    }
}

impl HealthMaps for Health {
    fn read_reach(&self) -> io::Result<BTreeMap<MemberId, Reach>> {
        let entries = sys::entries::<u32, Reach>(self.reach.0.as_fd(), self.reach.1)?;
        let told = entries.into_iter().filter(|(_, reach)| *reach != Reach::default());
        Ok(told.filter_map(|(id, reach)| Some((MemberId::new(id.into())?, reach))).collect())
    }

    fn write_reach(&mut self, member: MemberId, reach: Reach) -> io::Result<()> {
        sys::update(self.reach.0.as_fd(), &u32::from(member.get()), &reach)
    }

    fn read_answer(&self) -> io::Result<Answer> {
        Ok(sys::lookup(self.answer.as_fd(), &0_u32)?.unwrap_or(NO_ANSWER))
    }

    fn write_answer(&mut self, answer: &Answer) -> io::Result<()> {
        sys::update(self.answer.as_fd(), &0_u32, answer)
    }

    fn stand_by(&mut self) -> io::Result<()> {
        let now = u64::try_from(sys::monotonic()?.as_nanos()).map_err(io::Error::other)?;
        sys::update(self.probed.as_fd(), &0_u32, &now)
    }

    fn last_traffic(&self, member: MemberId) -> io::Result<Option<Duration>> {
        let at: Option<u64> = sys::lookup(self.traffic.as_fd(), &u32::from(member.get()))?;
        let now = sys::monotonic()?;
        Ok(at.filter(|at| *at > 0).map(|at| now.saturating_sub(Duration::from_nanos(at))))
    }

    fn passed_on(&self) -> io::Result<u64> {
        let passed_on = sent::FOR_NODES as usize..=sent::FROM_PEERS as usize;
        Ok(self.sent()?[passed_on].iter().map(|count| count.packets).sum())
    }

    fn wake_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    fn next_wake(&mut self) -> Option<MemberId> {
        loop {
            let record = self.wake.next()?;
            let member = record.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes));
            if let Some(member) = member.and_then(|member| MemberId::new(member.into())) {
                return Some(member);
            }
        }
    }
}
