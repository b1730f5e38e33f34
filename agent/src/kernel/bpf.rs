//! Everything of ours in bpffs and on tc hooks: pinned maps and their entries, pinned programs, and where they are attached.
//!
//! Invariants: what another process has attached or pinned is never touched; a program is replaced in one step, so no
//! packet meets a hook without it; the data plane stands without the agent.

mod clsact;
mod codec;
pub mod health;
mod load;
mod maps;
mod pins;
mod sys;
mod tcx;
#[cfg(test)]
mod tests;

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

use self::{
    codec::Local,
    health::Health,
    load::{LoadError, Object},
    maps::Maps,
    pins::Pins,
};
use super::rtnl::Rtnl;
use crate::{
    keys::{HopId, HopMark},
    names::{Device, HOP},
    state::{self, Attachment, Entry, Key, Program},
};

/// How programs are attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// From Linux 6.6 on.
    Tcx,
    Clsact,
}

/// Our objects under one bpffs.
#[derive(Debug)]
pub struct Bpf {
    pins: Pins,
    run_dir: PathBuf,
    object: Arc<Object>,
    /// In place of what the kernel can.
    forced: Option<Hook>,
    /// As the last reading or loading found them.
    maps: Option<Maps>,
    settled: Settled,
    /// What the last reading found, and what was attached since.
    standing: BTreeMap<Attachment, Standing>,
}

/// Whether, since the last reading, everything that is attached was brought to this build.
#[derive(Debug)]
enum Settled {
    NotYet,
    Done,
    /// Each further attempt would fail alike, and run the verifier again.
    Failed(io::ErrorKind, String),
}

/// An attachment as it should stay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Standing {
    ifindex: u32,
    /// Of the link for tcx, of the program for clsact.
    id: u32,
}

impl Bpf {
    /// `run_dir` takes the logs of refused programs. Touches nothing.
    pub fn new(bpffs: &Path, run_dir: &Path) -> io::Result<Bpf> {
        Ok(Bpf::of(Object::new(Cow::Borrowed(super::object::OBJECT))?, ebpf::ABI, bpffs, run_dir))
    }

    fn of(object: Object, abi: u32, bpffs: &Path, run_dir: &Path) -> Bpf {
        Bpf {
            pins: Pins::new(bpffs, abi),
            run_dir: run_dir.to_owned(),
            object: Arc::new(object),
            forced: None,
            maps: None,
            settled: Settled::NotYet,
            standing: BTreeMap::new(),
        }
    }

    /// Attaches so, whatever the kernel can.
    pub fn force(self, hook: Hook) -> Bpf {
        Bpf { forced: Some(hook), ..self }
    }

    /// How this kernel attaches, found out by asking it.
    pub fn hook(&self) -> io::Result<Hook> {
        /// In every network namespace.
        const LO: u32 = 1;
        if let Some(forced) = self.forced {
            return Ok(forced);
        }
        match sys::query(LO, false) {
            Ok(_) => Ok(Hook::Tcx),
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(Hook::Clsact),
            Err(error) => Err(error),
        }
    }

    /// What the maps hold; `None`: they are not all pinned, or not as these programs need them.
    pub(super) fn read_maps(&mut self, marks: &BTreeMap<HopId, HopMark>) -> io::Result<Option<state::Maps>> {
        self.open_maps(marks).map_err(load::explain)
    }

    fn open_maps(&mut self, marks: &BTreeMap<HopId, HopMark>) -> io::Result<Option<state::Maps>> {
        self.settled = Settled::NotYet;
        self.maps = None;
        if !self.pins.is_bpffs()? {
            return Ok(None);
        }
        self.maps = Maps::open(&self.pins, &self.object.shapes)?;
        let Some(maps) = &self.maps else { return Ok(None) };
        Ok(Some(maps.read(&local(marks)?)?))
    }

    /// Where our programs, of this build and with the pinned maps, are attached and come first if they must.
    pub(super) async fn read_programs(&mut self, rtnl: &Rtnl) -> io::Result<BTreeSet<Attachment>> {
        self.standing.clear();
        let programs = if self.maps.is_some() { self.pins.open_programs(&self.object.build)? } else { None };
        let Some(programs) = programs else { return Ok(BTreeSet::new()) };
        let id = |(program, fd): (Program, OwnedFd)| Ok((program, sys::program_id(fd.as_fd())?));
        let ids = programs.into_iter().map(id).collect::<io::Result<BTreeMap<Program, u32>>>()?;
        self.standing = match self.hook()? {
            Hook::Tcx => self.read_tcx(&ids)?,
            Hook::Clsact => read_clsact(rtnl, &ids).await?,
        };
        Ok(self.standing.keys().cloned().collect())
    }

    fn read_tcx(&self, ids: &BTreeMap<Program, u32>) -> io::Result<BTreeMap<Attachment, Standing>> {
        let mut standing = BTreeMap::new();
        for attachment in self.pins.list_links()? {
            let Some(link) = tcx::open(&self.pins, &attachment)? else { continue };
            let found = Standing { ifindex: link.info.ifindex, id: link.info.id };
            let right = link.info.program == ids[&attachment.program]
                && link.info.is_at(attachment.program.is_ingress())
                && sys::index_of(&attachment.link)? == Some(found.ifindex);
            if right && stands_at_tcx(&attachment, found)? {
                standing.insert(attachment, found);
            }
        }
        Ok(standing)
    }

    /// Loads and pins maps and programs where they are missing.
    pub(super) async fn load(&mut self) -> io::Result<()> {
        self.blocking(load::load).await?;
        self.maps = Maps::open(&self.pins, &self.object.shapes)?;
        Ok(())
    }

    pub(super) fn set(&self, entry: &Entry, marks: &BTreeMap<HopId, HopMark>) -> io::Result<()> {
        let local = if let Entry::Config(_) = entry { local(marks)? } else { Local::default() };
        self.maps()?.set(entry, &local)
    }

    pub(super) fn delete(&self, key: &Key) -> io::Result<()> {
        self.maps()?.delete(key)
    }

    fn maps(&self) -> io::Result<&Maps> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "the BPF maps are not loaded");
        self.maps.as_ref().ok_or_else(missing)
    }

    /// What the prober and status use; `None`: the maps are not loaded.
    pub(super) fn health(&self) -> io::Result<Option<Health>> {
        self.maps.as_ref().map(Health::of).transpose()
    }

    pub(super) fn forget(&self) -> io::Result<()> {
        self.maps.as_ref().map_or(Ok(()), Maps::forget)
    }

    pub(super) fn generation(&self) -> io::Result<Option<u32>> {
        self.maps.as_ref().map(Maps::generation).transpose()
    }

    pub(super) async fn attach(&mut self, rtnl: &Rtnl, attachment: &Attachment) -> io::Result<()> {
        self.maps()?;
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("{} does not exist", attachment.link));
        let ifindex = sys::index_of(&attachment.link)?.ok_or_else(missing)?;
        let programs = self.settle(rtnl).await?;
        let program = &programs[&attachment.program];
        let id = match self.hook()? {
            Hook::Tcx => {
                self.attach_tcx(attachment, ifindex, program).await?;
                tcx::open(&self.pins, attachment)?.map_or(0, |link| link.info.id)
            }
            Hook::Clsact => {
                let must_be_first = attachment.program.must_be_first();
                clsact::attach(rtnl, ifindex, (attachment.program, program), must_be_first).await?;
                sys::program_id(program.as_fd())?
            }
        };
        self.standing.insert(attachment.clone(), Standing { ifindex, id });
        Ok(())
    }

    async fn attach_tcx(&self, attachment: &Attachment, ifindex: u32, program: &OwnedFd) -> io::Result<()> {
        let (wanted, program) = (attachment.clone(), program.try_clone()?);
        self.blocking(move |pins, object, run_dir| {
            let spare = || {
                let mut loaded = load::load_programs(pins, object, run_dir, &[wanted.program])?;
                loaded.remove(&wanted.program).ok_or_else(|| io::Error::other("nothing was loaded"))
            };
            Ok(tcx::attach(pins, &wanted, ifindex, &program, spare)?)
        })
        .await
    }

    pub(super) async fn detach(&mut self, rtnl: &Rtnl, attachment: &Attachment) -> io::Result<()> {
        self.standing.remove(attachment);
        match (self.hook()?, sys::index_of(&attachment.link)?) {
            (Hook::Tcx, _) => tcx::detach(&self.pins, attachment),
            (Hook::Clsact, Some(ifindex)) => clsact::detach(rtnl, ifindex, attachment.program).await,
            (Hook::Clsact, None) => Ok(()),
        }
    }

    /// Detaches and unpins everything, of whatever version.
    pub(super) async fn unload(&mut self, rtnl: &Rtnl) -> io::Result<()> {
        self.standing.clear();
        self.maps = None;
        for ifindex in clsact::devices(rtnl).await? {
            for program in Program::ALL {
                clsact::detach(rtnl, ifindex, program).await?;
            }
        }
        if self.pins.is_bpffs()? {
            for pins in self.pins.all()? {
                for attachment in pins.list_links()? {
                    tcx::detach(&pins, &attachment)?;
                }
            }
            self.pins.remove_all()?;
        }
        load::forget_logs(&self.run_dir)
    }

    /// Whether all that stood after the last pass stands still: to detach a program sends no event. Cheap: a few
    /// microseconds for each attachment.
    pub(super) async fn still_attached(&self, rtnl: &Rtnl) -> io::Result<bool> {
        let hook = self.hook()?;
        for (attachment, standing) in &self.standing {
            let stands = match hook {
                Hook::Tcx => stands_at_tcx(attachment, *standing)?,
                Hook::Clsact => stands_at_clsact(rtnl, attachment, *standing).await?,
            };
            if !stands {
                return Ok(false);
            }
        }
        Ok(self.maps.is_none() || self.pins.has_maps(self.object.shapes.keys()))
    }

    /// The programs of this build, loaded if need be; on the first call after a reading, whatever else of ours is attached
    /// gets the program of this build in one step, and older builds and versions go. By then the maps are filled.
    async fn settle(&mut self, rtnl: &Rtnl) -> io::Result<BTreeMap<Program, OwnedFd>> {
        if let Settled::Failed(kind, problem) = &self.settled {
            return Err(io::Error::new(*kind, problem.clone()));
        }
        let settled = if let Settled::Done = self.settled { Ok(()) } else { self.replace_others(rtnl).await };
        self.settled = match &settled {
            Ok(()) => Settled::Done,
            Err(error) => Settled::Failed(error.kind(), error.to_string()),
        };
        settled?;
        self.programs()
    }

    fn programs(&self) -> io::Result<BTreeMap<Program, OwnedFd>> {
        let gone = || io::Error::new(io::ErrorKind::NotFound, "the pinned programs are gone");
        self.pins.open_programs(&self.object.build)?.ok_or_else(gone)
    }

    async fn replace_others(&mut self, rtnl: &Rtnl) -> io::Result<()> {
        self.load().await?;
        let programs = self.programs()?;
        self.pins.remove_strays()?;
        let older = self.pins.older()?;
        for pins in older.iter().chain([&self.pins]) {
            for attachment in pins.list_links()? {
                self.replace_link(pins, &attachment, &programs[&attachment.program])?;
            }
        }
        if self.hook()? == Hook::Clsact {
            replace_filters(rtnl, &programs).await?;
        }
        older.iter().try_for_each(Pins::remove)?;
        self.pins.remove_programs(Some(&self.object.build))
    }

    /// Gives a pinned link this build's program, and a pin among this version's.
    fn replace_link(&self, pins: &Pins, attachment: &Attachment, program: &OwnedFd) -> io::Result<()> {
        let Some(link) = tcx::open(pins, attachment)?.filter(|link| link.info.ifindex != 0) else {
            return pins.remove_link(attachment);
        };
        tcx::update(&link, program)?;
        if pins.link(attachment) != self.pins.link(attachment) {
            self.pins.replace_link(attachment, &link.fd)?;
        }
        Ok(())
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Pins, &Object, &Path) -> Result<T, LoadError> + Send + 'static,
    ) -> io::Result<T> {
        let (pins, object, run_dir) = (self.pins.clone(), self.object.clone(), self.run_dir.clone());
        super::blocking(move || Ok(work(&pins, &object, &run_dir)?)).await
    }
}

fn stands_at_tcx(attachment: &Attachment, standing: Standing) -> io::Result<bool> {
    let hook = tcx::hook(standing.ifindex, attachment.program.is_ingress())?;
    let place = tcx::place(&hook, standing.id);
    Ok(place == Some(0) || (place.is_some() && !attachment.program.must_be_first()))
}

async fn stands_at_clsact(rtnl: &Rtnl, attachment: &Attachment, standing: Standing) -> io::Result<bool> {
    let hook = clsact::read(rtnl, standing.ifindex, attachment.program.is_ingress()).await?;
    Ok(stands_in(&hook, attachment.program, standing.id))
}

fn stands_in(hook: &clsact::Hook, program: Program, id: u32) -> bool {
    let right = |(filter, first): (&clsact::Filter, bool)| filter.program == id && (first || !program.must_be_first());
    hook.ours(program).is_some_and(right)
}

async fn read_clsact(rtnl: &Rtnl, ids: &BTreeMap<Program, u32>) -> io::Result<BTreeMap<Attachment, Standing>> {
    let mut found = BTreeMap::new();
    for ifindex in clsact::devices(rtnl).await? {
        let Some(link) = sys::name_of(ifindex)? else { continue };
        for ingress in [false, true] {
            let hook = clsact::read(rtnl, ifindex, ingress).await?;
            for (program, id) in ids.iter().filter(|(program, _)| program.is_ingress() == ingress) {
                if stands_in(&hook, *program, *id) {
                    let attachment = Attachment { program: *program, link: link.clone() };
                    found.insert(attachment, Standing { ifindex, id: *id });
                }
            }
        }
    }
    Ok(found)
}

/// Gives every filter of ours this build's program.
async fn replace_filters(rtnl: &Rtnl, programs: &BTreeMap<Program, OwnedFd>) -> io::Result<()> {
    for ifindex in clsact::devices(rtnl).await? {
        for (program, fd) in programs {
            let hook = clsact::read(rtnl, ifindex, program.is_ingress()).await?;
            let id = sys::program_id(fd.as_fd())?;
            if hook.ours(*program).is_some_and(|(filter, _)| filter.program != id) {
                clsact::attach(rtnl, ifindex, (*program, fd), false).await?;
            }
        }
    }
    Ok(())
}

/// What there is on this node now.
fn local(marks: &BTreeMap<HopId, HopMark>) -> io::Result<Local> {
    let hop = match (sys::index_of(HOP)?, sys::mac_of(HOP)?) {
        (Some(index), Some(mac)) => Some((index, mac)),
        _ => None,
    };
    let mut wireguard = BTreeMap::new();
    for device in Device::all() {
        if let Some(index) = sys::index_of(&device.to_string())? {
            wireguard.insert(device, index);
        }
    }
    Ok(Local { hop, wireguard, marks: marks.clone() })
}
