//! `carrick cleanup`: the diff against the empty state, then the files that a crash left.

use std::{fs, io, path::Path};

use anyhow::{Context, bail};

use crate::{
    agent::check_backend,
    args,
    causes::with_cause,
    diff::diff,
    kernel::{self, Linux, Secrets, bpf::Bpf},
    names::Device,
    reconcile::{Kernel, Layer},
    run_dir::Lock,
    source,
    state::{Op, State},
    status_socket,
    tunnel::{self, TunnelOptions, client::Client},
};

pub(super) async fn run(args: args::Cleanup, shutdown: impl Future<Output = ()>) -> anyhow::Result<bool> {
    check_backend(&args.backend)?;
    kernel::check_privileges()?;
    let run_dir = &args.backend.run_dir;
    let bpf = Bpf::new(&args.backend.bpffs, run_dir).context("the BPF programs in this binary are broken")?;
    let mut kernel =
        Linux::new(Client::new(run_dir), Secrets::default(), bpf).context("cannot open netlink sockets")?;
    if args.dry_run {
        operations(&mut kernel).await?.iter().for_each(|operation| println!("{operation}"));
        return Ok(true);
    }
    let lock = Lock::take(run_dir, "agent").context("a running agent would put everything back")?;
    let mut remaining = 0usize;
    for operation in operations(&mut kernel).await? {
        println!("{operation}");
        remaining += usize::from(!done(&operation, kernel.apply(&operation).await));
    }
    // What somebody has altered reads as missing, but must go all the same.
    for operation in kernel::sweep() {
        remaining += usize::from(!done(&operation, kernel.apply(&operation).await));
    }
    remaining += remove_files(run_dir, lock);
    remaining += forget(&args.state.state_dir);
    if args.wait && remaining == 0 {
        println!("nothing of Carrick's is left in the kernel: this waits to be ended");
        shutdown.await;
    }
    Ok(remaining == 0)
}

async fn operations(kernel: &mut Linux<Client>) -> anyhow::Result<Vec<Op>> {
    let reading = kernel.read().await;
    // Without a tunnel there are no sessions to end; its links are read over netlink. Of BPF, everything is swept.
    let needed = |layer: Layer| !matches!(layer, Layer::WireGuard | Layer::Maps | Layer::Programs);
    if let Some(error) = reading.failed.iter().find(|error| needed(error.layer)) {
        bail!("{}: nothing was removed", with_cause(error));
    }
    Ok(diff(&State::default(), &reading.state))
}

/// Takes away what crashed processes left in the run directory, and the directory; how many of these would not go.
fn remove_files(run_dir: &Path, agent: Lock) -> usize {
    let remove = |path: &Path| gone(path, fs::remove_file(path));
    let mut all = vec![remove(&status_socket::path(run_dir))];
    match Lock::take(run_dir, "tunnel") {
        Ok(_tunnel) => {
            all.push(remove(&run_dir.join(tunnel::SOCKET)));
            all.push(remove_uapi_sockets(&TunnelOptions::default().uapi_dir, remove));
        }
        Err(held) => eprintln!("carrick: {held}: it holds no device any more, and goes on"),
    }
    drop(agent);
    // Not if something is in it, as the socket of a tunnel that runs.
    if is_empty(run_dir) {
        all.push(remove_folder(run_dir));
    }
    all.into_iter().filter(|gone| !gone).count()
}

/// Takes away what was kept for the next start, and the folder; how many of these would not go.
fn forget(state_dir: &Path) -> usize {
    let mut all = vec![gone(state_dir, source::forget(state_dir))];
    if is_empty(state_dir) {
        all.push(remove_folder(state_dir));
    }
    all.into_iter().filter(|gone| !gone).count()
}

/// `wg`'s sockets of our devices, and their folder if that leaves it empty.
fn remove_uapi_sockets(dir: &Path, remove: impl Fn(&Path) -> bool) -> bool {
    let all: Vec<bool> = Device::all().map(|device| remove(&dir.join(format!("{device}.sock")))).collect();
    all.into_iter().all(|gone| gone) && (!is_empty(dir) || gone(dir, fs::remove_dir(dir)))
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none())
}

/// A mount point, as a pod's volume is, belongs to whoever mounted it. In a pod's root, which is read-only, that is what
/// the kernel says first.
fn remove_folder(dir: &Path) -> bool {
    match fs::remove_dir(dir) {
        Err(error) if matches!(error.kind(), io::ErrorKind::ResourceBusy | io::ErrorKind::ReadOnlyFilesystem) => true,
        removed => gone(dir, removed),
    }
}

fn done(operation: &Op, result: io::Result<()>) -> bool {
    result.inspect_err(|error| eprintln!("carrick: {operation}: {error}")).is_ok()
}

fn gone(path: &Path, removed: io::Result<()>) -> bool {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("carrick: cannot remove {}: {error}", path.display());
            false
        }
        _ => true,
    }
}
