//! Programs at the clsact qdisc, for kernels without tcx: filters of priority 1 with a handle of our own, in direct-action
//! mode, told by that handle and their name.
//!
//! Invariant: the qdisc is never removed, and no filter with another handle or name is.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, OwnedFd},
};

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption},
};

use super::super::rtnl::{Rtnl, absent_is_done, is};
use crate::state::Program;

/// Two, because a filter comes first by being made anew, before the old one goes.
const HANDLES: [u32; 2] = [0xca77, 0xca78];
const PRIORITY: u32 = 1;
/// ETH_P_ALL, network order.
const EVERY_PROTOCOL: u32 = 0x0003_u16.to_be() as u32;

/// A filter of priority 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    handle: u32,
    name: String,
    /// The id of its program.
    pub(super) program: u32,
}

impl Filter {
    fn is_ours(&self, program: Program) -> bool {
        HANDLES.contains(&self.handle) && self.name == program.name()
    }
}

/// What is at a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Hook(Vec<Filter>);

impl Hook {
    /// Our filter, and whether it comes first. With two of them a crash has left one too many: not as it should be.
    pub(super) fn ours(&self, program: Program) -> Option<(&Filter, bool)> {
        let mut ours = self.0.iter().enumerate().filter(|(_, filter)| filter.is_ours(program));
        match (ours.next(), ours.next()) {
            (Some((place, filter)), None) => Some((filter, place == 0)),
            _ => None,
        }
    }
}

fn parent(ingress: bool) -> TcHandle {
    let minor = if ingress { TcHandle::MIN_INGRESS } else { TcHandle::MIN_EGRESS };
    TcHandle { major: u16::MAX, minor }
}

fn message(ifindex: u32, ingress: bool, handle: u32) -> io::Result<TcMessage> {
    let index = i32::try_from(ifindex).map_err(io::Error::other)?;
    let mut message = TcMessage::with_index(index);
    message.header.parent = parent(ingress);
    message.header.handle = handle.into();
    Ok(message)
}

/// The filters of priority 1, in the order in which they run.
pub(super) async fn read(rtnl: &Rtnl, ifindex: u32, ingress: bool) -> io::Result<Hook> {
    let request = message(ifindex, ingress, 0)?;
    let answers = match rtnl.dump(RouteNetlinkMessage::GetTrafficFilter(request)).await {
        Ok(answers) => answers,
        // No such qdisc.
        Err(error) if is(&error, &[libc::EINVAL, libc::ENOENT, libc::ENODEV]) => return Ok(Hook::default()),
        Err(error) => return Err(error),
    };
    let messages = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewTrafficFilter(message) => Some(message),
        _ => None,
    });
    // The list that holds the filters is told as well, with no handle.
    let first =
        messages.filter(|message| message.header.info >> 16 == PRIORITY && u32::from(message.header.handle) != 0);
    Ok(Hook(first.map(|message| filter(&message)).collect()))
}

fn filter(message: &TcMessage) -> Filter {
    let mut filter = Filter { handle: message.header.handle.into(), name: String::new(), program: 0 };
    let options = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    for option in options.flatten() {
        match option {
            TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => filter.name.clone_from(name),
            TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = *id,
            _ => {}
        }
    }
    filter
}

/// Attaches the program, before every other of priority 1 if it must be; replaces ours in one step.
pub(super) async fn attach(
    rtnl: &Rtnl,
    ifindex: u32,
    program: (Program, &OwnedFd),
    must_be_first: bool,
) -> io::Result<()> {
    let ingress = program.0.is_ingress();
    let hook = read(rtnl, ifindex, ingress).await?;
    let ours: Vec<&Filter> = hook.0.iter().filter(|filter| filter.is_ours(program.0)).collect();
    // What is made comes before what is there.
    let settled = ours.first().filter(|ours| !must_be_first || hook.0.first() == Some(**ours));
    if let Some(kept) = settled {
        set(rtnl, ifindex, program, kept.handle, NLM_F_REPLACE).await?;
    } else {
        add_qdisc(rtnl, ifindex).await?;
        let free = HANDLES.into_iter().find(|handle| hook.0.iter().all(|filter| filter.handle != *handle));
        let free = free.ok_or_else(|| io::Error::other("both handles that we use at a hook are taken"))?;
        set(rtnl, ifindex, program, free, NLM_F_EXCL).await?;
    }
    let kept = settled.map(|kept| kept.handle);
    for stale in ours.iter().filter(|filter| Some(filter.handle) != kept) {
        delete(rtnl, ifindex, ingress, stale.handle).await?;
    }
    Ok(())
}

/// Detaches every filter of ours with the program's name.
pub(super) async fn detach(rtnl: &Rtnl, ifindex: u32, program: Program) -> io::Result<()> {
    let hook = read(rtnl, ifindex, program.is_ingress()).await?;
    for filter in hook.0.iter().filter(|filter| filter.is_ours(program)) {
        delete(rtnl, ifindex, program.is_ingress(), filter.handle).await?;
    }
    Ok(())
}

/// The indexes of the devices that have the qdisc.
pub(super) async fn devices(rtnl: &Rtnl) -> io::Result<Vec<u32>> {
    let answers = rtnl.dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default())).await?;
    let clsact = answers.into_iter().filter_map(|answer| match answer {
        RouteNetlinkMessage::NewQueueDiscipline(found) => found
            .attributes
            .iter()
            .any(|attribute| matches!(attribute, TcAttribute::Kind(kind) if kind == "clsact"))
            .then_some(found.header.index),
        _ => None,
    });
    clsact.map(|index| u32::try_from(index).map_err(io::Error::other)).collect()
}

async fn add_qdisc(rtnl: &Rtnl, ifindex: u32) -> io::Result<()> {
    let mut qdisc = message(ifindex, true, 0xffff_0000)?;
    qdisc.header.parent = TcHandle::CLSACT;
    qdisc.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    let added = rtnl.change(RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL).await;
    added.or_else(|error| if error.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) })
}

async fn set(rtnl: &Rtnl, ifindex: u32, (program, fd): (Program, &OwnedFd), handle: u32, how: u16) -> io::Result<()> {
    let mut filter = message(ifindex, program.is_ingress(), handle)?;
    filter.header.info = PRIORITY << 16 | EVERY_PROTOCOL;
    let options = [
        TcFilterBpfOption::ProgFd(fd.as_fd().as_raw_fd().unsigned_abs()),
        TcFilterBpfOption::ProgName(program.name().to_owned()),
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterBpf::KIND.to_owned()),
        TcAttribute::Options(options.into_iter().map(TcOption::Bpf).collect()),
    ];
    rtnl.change(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE | how).await
}

async fn delete(rtnl: &Rtnl, ifindex: u32, ingress: bool, handle: u32) -> io::Result<()> {
    let mut filter = message(ifindex, ingress, handle)?;
    filter.header.info = PRIORITY << 16 | EVERY_PROTOCOL;
    filter.attributes = vec![TcAttribute::Kind(TcFilterBpf::KIND.to_owned())];
    absent_is_done(rtnl.change(RouteNetlinkMessage::DelTrafficFilter(filter), 0).await)
}
