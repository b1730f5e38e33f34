//! This kernel takes every program that ships, attaches it, and runs it.

use std::{
    fs,
    net::UdpSocket,
    os::fd::{AsFd as _, AsRawFd as _},
    process::Command,
};

use agent::state::Program;
use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf,
    programs::{SchedClassifier, TcAttachType, tc},
    sys::{Stats, enable_stats},
    util::KernelVersion,
};
use nix::sched::{CloneFlags, unshare};

/// The first kernel with tcx.
const TCX: KernelVersion = KernelVersion::new(6, 6, 0);

#[test]
fn every_program_loads_attaches_and_runs() {
    // In a thread of its own: the namespaces are this thread's.
    let shown = std::thread::spawn(load_all).join().expect("no panic").expect("every program runs");
    println!("{shown}");
}

fn load_all() -> Result<String> {
    super::own_bpffs()?;
    unshare(CloneFlags::CLONE_NEWNET).context("unshare: this needs root")?;
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().context("ip")?;
    ensure!(up.success(), "lo does not come up");
    let tcx = KernelVersion::current()? >= TCX;
    if !tcx {
        tc::qdisc_add_clsact("lo").context("add a clsact qdisc")?;
    }
    let _stats = enable_stats(Stats::RunTime).context("count the runs of programs")?;
    let mut object = Ebpf::load(agent::kernel::object::OBJECT).context("load the object")?;
    // It sends to itself, so that nothing is answered.
    let socket = UdpSocket::bind("127.0.0.1:0")?;
    let mut shown = format!("Linux {}, {}\n", release()?, if tcx { "tcx" } else { "clsact" });
    for program in Program::ALL {
        let name = program.name();
        let classifier: &mut SchedClassifier =
            object.program_mut(name).with_context(|| format!("the object has no program {name}"))?.try_into()?;
        classifier.load().with_context(|| format!("load {name}"))?;
        let hook = match program {
            Program::Steer | Program::SteerNative | Program::ToPeer => TcAttachType::Egress,
            Program::FromHop | Program::FromPeer => TcAttachType::Ingress,
        };
        let link = classifier.attach("lo", hook).with_context(|| format!("attach {name}"))?;
        let before = runs(classifier)?;
        socket.send_to(b"through the programs", socket.local_addr()?)?;
        let ran = runs(classifier)? - before;
        ensure!(ran == 1, "{name} saw {ran} of 1 packets");
        classifier.detach(link).with_context(|| format!("detach {name}"))?;
        let info = classifier.info()?;
        let verified = info.verified_instruction_count().context("the kernel counts instructions")?;
        shown += &format!("{name:<12} {hook:?}: taken, {verified} instructions verified; attached, ran\n");
    }
    Ok(shown)
}

fn release() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned())
}

/// How often the program ran, as the kernel counts it.
fn runs(program: &SchedClassifier) -> Result<u64> {
    let fd = program.fd()?.as_fd().as_raw_fd();
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let count = info.lines().find_map(|line| line.strip_prefix("run_cnt:"));
    Ok(count.context("fdinfo has no run_cnt")?.trim().parse()?)
}
