//! `carrick cleanup`: the diff against the empty state.

use std::io;

use anyhow::{Context, bail};

use crate::{
    agent::{check_backend, leftovers, with_cause},
    args,
    diff::diff,
    kernel::{self, Linux, Secrets},
    lock::Lock,
    reconcile::{Kernel, Layer},
    state::State,
    tunnel::client::Client,
};

pub(super) async fn run(args: args::Cleanup) -> anyhow::Result<bool> {
    check_backend(&args.backend)?;
    kernel::check_privileges()?;
    let run_dir = &args.backend.run_dir;
    let _lock = Lock::take(run_dir, "agent").context("a running agent would put everything back")?;
    let mut kernel = Linux::new(Client::new(run_dir), Secrets::default()).context("cannot open netlink sockets")?;
    let reading = kernel.read().await;
    // Without a tunnel there are no sessions to end; its links are read over netlink.
    for error in reading.failed.iter().filter(|error| error.layer != Layer::WireGuard) {
        bail!("{}: nothing was removed", with_cause(error));
    }
    let operations = diff(&State::default(), &reading.state);
    let mut failed = 0;
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
    for file in leftovers(run_dir) {
        match std::fs::remove_file(&file) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                eprintln!("carrick: cannot remove {}: {error}", file.display());
                failed += 1;
            }
            _ => {}
        }
    }
    Ok(failed == 0)
}
