//! From flags to a client. Nothing is asked of the API server here.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Client, Config,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

/// An API server that says nothing for so long is taken for dead. It bookmarks every watch once a minute or so, whether
/// anything changes or not.
const SILENCE: Duration = Duration::from_secs(100);
/// To connect, with TLS.
const CONNECT: Duration = Duration::from_secs(10);

/// What kube's errors say holds their causes already.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot use the kubeconfig {}: name a usable one with --kubeconfig: {why}", path.display())]
    Kubeconfig { path: PathBuf, why: Box<KubeconfigError> },
    #[error("cannot use a pod's service account: outside of a pod, name a kubeconfig with --kubeconfig: {why}")]
    ServiceAccount { why: Box<InClusterError> },
    #[error(
        "cannot make a client for the API server {host}: correct the kubeconfig's certificates and credentials: {why}"
    )]
    Client { host: String, why: Box<kube::Error> },
}

/// The client, and the API server's address.
pub(super) async fn connect(kubeconfig: Option<&OsStr>) -> Result<(Client, String), ConnectError> {
    let mut config = match kubeconfig {
        Some(paths) => from_files(paths).await?,
        None => Config::incluster_env().map_err(|why| ConnectError::ServiceAccount { why: Box::new(why) })?,
    };
    config.read_timeout = Some(SILENCE);
    config.connect_timeout = Some(CONNECT);
    // The watches try again by themselves, and tell of what failed.
    config.default_retry = false;
    let host = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    match Client::try_from(config) {
        Ok(client) => Ok((client, host)),
        Err(why) => Err(ConnectError::Client { host, why: Box::new(why) }),
    }
}

/// As `kubectl` does it: what an earlier file says stands.
async fn from_files(paths: &OsStr) -> Result<Config, ConnectError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |why| ConnectError::Kubeconfig { path, why: Box::new(why) }
    };
    let mut merged = Kubeconfig::default();
    for path in std::env::split_paths(paths).filter(|path| !path.as_os_str().is_empty()) {
        let next = Kubeconfig::read_from(&path).map_err(failed(&path))?;
        merged = merged.merge(next).map_err(failed(&path))?;
    }
    let config = Config::from_custom_kubeconfig(merged, &KubeConfigOptions::default()).await;
    config.map_err(failed(Path::new(paths)))
}
