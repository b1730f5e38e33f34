//! `carrick status`.

use anyhow::Context;

use crate::{args, status_socket};

pub(super) async fn run(args: args::Status) -> anyhow::Result<bool> {
    let path = status_socket::path(&args.run_dir);
    let status = status_socket::fetch(&path)
        .await
        .with_context(|| format!("no agent answers on {}: is `carrick agent` running on this node?", path.display()))?;
    super::print(args.output.output, &status, || status.table())?;
    Ok(status.ready)
}
