//! `carrick status`.

use std::path::Path;

use anyhow::Context;

use crate::{
    args,
    status::Status,
    status_socket::{self, Request},
};

pub(super) async fn run(args: args::Status) -> anyhow::Result<bool> {
    let status = ask(&args.run_dir, Request::Status).await?;
    super::print(args.output.output, &status, || status.table())?;
    Ok(if args.serving { status.serving } else { status.ready })
}

/// Asks this node's agent.
pub(super) async fn ask(run_dir: &Path, request: Request) -> anyhow::Result<Status> {
    let path = status_socket::path(run_dir);
    let no_answer = || format!("no agent answers on {}: is `carrick agent` running on this node?", path.display());
    status_socket::ask(&path, request).await.with_context(no_answer)
}
