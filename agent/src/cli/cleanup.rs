//! `carrick cleanup`: the diff against the empty state.

use std::{io, path::Path};

use anyhow::{Context, bail};

use crate::{
    agent::{check_backend, with_cause},
    args,
    diff::diff,
    kernel::{self, Linux, Secrets},
    reconcile::{Kernel, Layer},
    run_dir::Lock,
    state::State,
    status_socket,
    tunnel::{self, client::Client},
};

pub(super) async fn run(args: args::Cleanup) -> anyhow::Result<bool> {
    check_backend(&args.backend)?;
    kernel::check_privileges()?;
    let run_dir = &args.backend.run_dir;
    let lock = Lock::take(run_dir, "agent").context("a running agent would put everything back")?;
    let mut kernel = Linux::new(Client::new(run_dir), Secrets::default()).context("cannot open netlink sockets")?;
    let reading = kernel.read().await;
    // Without a tunnel there are no sessions to end; its links are read over netlink.
    for error in reading.failed.iter().filter(|error| error.layer != Layer::WireGuard) {
        bail!("{}: nothing was removed", with_cause(error));
    }
    let operations = diff(&State::default(), &reading.state);
    let mut failed = 0usize;
    for operation in &operations {
        println!("{operation}");
        if !args.dry_run
            && let Err(error) = kernel.apply(operation).await
        {
            eprintln!("carrick: {operation}: {error}");
            failed += 1;
        }
    }
    if args.dry_run {
        return Ok(true);
    }
    // What somebody has altered reads as missing, but must go all the same.
    for operation in kernel::sweep() {
        if let Err(error) = kernel.apply(&operation).await {
            eprintln!("carrick: {operation}: {error}");
            failed += 1;
        }
    }
    let socket = status_socket::path(run_dir);
    failed += usize::from(!gone(&socket, std::fs::remove_file(&socket)));
    match Lock::take(run_dir, "tunnel") {
        Ok(_tunnel) => {
            let socket = run_dir.join(tunnel::SOCKET);
            failed += usize::from(!gone(&socket, std::fs::remove_file(&socket)));
        }
        Err(held) => eprintln!("carrick: {held}: it holds no device any more, and goes on"),
    }
    drop(lock);
    // Not if something is in it, as the socket of a tunnel that runs.
    if std::fs::read_dir(run_dir).is_ok_and(|mut entries| entries.next().is_none()) {
        failed += usize::from(!gone(run_dir, std::fs::remove_dir(run_dir)));
    }
    Ok(failed == 0)
}

/// Whether it is gone; says why not.
fn gone(path: &Path, removed: io::Result<()>) -> bool {
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            eprintln!("carrick: cannot remove {}: {error}", path.display());
            false
        }
        _ => true,
    }
}
