//! From flags to a client. Nothing is asked of the API server here.

use std::{
    ffi::OsStr,
    path::{Path, PathBuf},
    time::Duration,
};

use kube::{
    Client, Config, Error,
    client::AuthError,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};

use super::prune::unquoted;

/// An API server that says nothing for so long is taken for dead. A watch ends by itself, and begins anew, after 290 s, and
/// kube-runtime waits 5 s more. Until then nothing need be said: where nothing has changed since a watch began there are
/// no bookmarks (Kubernetes' `cacheWatcher.process`).
const SILENCE: Duration = Duration::from_secs(300);
/// To connect, with TLS.
const CONNECT: Duration = Duration::from_secs(10);

/// `why` holds the causes, and no secret: not what a kubeconfig or a credentials plugin says, even if it cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("cannot use the kubeconfig {}: name a usable one with --kubeconfig: {why}", path.display())]
    Kubeconfig { path: PathBuf, why: String },
    #[error("cannot use a pod's service account: outside of a pod, name a kubeconfig with --kubeconfig: {why}")]
    ServiceAccount { why: Box<InClusterError> },
    #[error(
        "cannot make a client for the API server {host}: correct the kubeconfig's certificates and credentials: {why}"
    )]
    Client { host: String, why: String },
}

/// The client, and the API server's address.
pub(super) async fn connect(
    kubeconfig: Option<&OsStr>,
    context: Option<&str>,
) -> Result<(Client, String), ConnectError> {
    let mut config = match kubeconfig {
        Some(paths) => from_files(paths, context).await?,
        None => Config::incluster_env().map_err(|why| ConnectError::ServiceAccount { why: Box::new(why) })?,
    };
    config.read_timeout = Some(SILENCE);
    config.connect_timeout = Some(CONNECT);
    // The watches try again by themselves, and tell of what failed.
    config.default_retry = false;
    let host = config.cluster_url.to_string().trim_end_matches('/').to_owned();
    match Client::try_from(config) {
        Ok(client) => Ok((client, host)),
        Err(why) => Err(ConnectError::Client { host, why: told(&why) }),
    }
}

/// As `kubectl` does it: what an earlier file says stands.
async fn from_files(paths: &OsStr, context: Option<&str>) -> Result<Config, ConnectError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |why| ConnectError::Kubeconfig { path, why: kubeconfig_told(&why) }
    };
    let mut merged = Kubeconfig::default();
    for path in std::env::split_paths(paths).filter(|path| !path.as_os_str().is_empty()) {
        let next = Kubeconfig::read_from(&path).map_err(failed(&path))?;
        merged = merged.merge(next).map_err(failed(&path))?;
    }
    let options = KubeConfigOptions { context: context.map(str::to_owned), ..KubeConfigOptions::default() };
    let config = Config::from_custom_kubeconfig(merged, &options).await;
    config.map_err(failed(Path::new(paths)))
}

fn told(error: &Error) -> String {
    match error {
        Error::Auth(error) => auth_told(error),
        error => error.to_string(),
    }
}

fn kubeconfig_told(error: &KubeconfigError) -> String {
    match error {
        KubeconfigError::Parse(why) => format!("cannot be parsed: {}", parse_told(why)),
        error => error.to_string(),
    }
}

/// Without the lines around the flaw, which it cites, and without values.
fn parse_told(error: &serde_saphyr::Error) -> String {
    unquoted(&error.without_snippet().to_string().replace('`', "\""))
}

/// What a credentials plugin prints is credentials, and its command has its environment.
pub(super) fn auth_told(error: &AuthError) -> String {
    match error {
        AuthError::AuthExecParse(why) => {
            format!("what the credentials plugin says cannot be parsed: {}", parse_told(why))
        }
        AuthError::AuthExecRun { out, .. } => {
            let said = String::from_utf8_lossy(&out.stderr);
            format!("the credentials plugin failed ({}): {}", out.status, said.trim())
        }
        error => unquoted(&error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::process::ExitStatusExt,
        process::{ExitStatus, Output},
    };

    use expect_test::expect;

    use super::*;

    const SECRET: &str = "c2VjcmV0LWtleQ==";

    #[test]
    fn a_kubeconfig_that_cannot_be_read_tells_no_secret() {
        let mistakes = [
            "users: SECRET",
            "users: [{name: SECRET, user: SECRET}]",
            "users: [{name: a, user: {token: [SECRET]}}]",
            "users: [{name: a, user: {token: SECRET, token: SECRET}}]",
            "users:\n- name: a\n  user:\n    client-key-data: SECRET\n   token: SECRET",
            "users: [{name: a, user: {exec: {interactiveMode: \"SECRET\"}}}]",
            "users: [{name: a, user: {token: \"SECRET}}]",
            "users: [{name: a, user: {token: !SECRET x, client-key-data: *SECRET}}]",
        ];
        let told = mistakes.map(|text| {
            let error = Kubeconfig::from_yaml(&text.replace("SECRET", SECRET)).unwrap_err();
            kubeconfig_told(&error)
        });
        expect![[r#"
            cannot be parsed: expected sequence start at line 1, column 8
            cannot be parsed: expected mapping start at line 1, column 40
            cannot be parsed: expected string scalar at line 1, column 33
            cannot be parsed: duplicate mapping key: token, set DuplicateKeyPolicy in Options if acceptable at line 1, column 51
            cannot be parsed: while parsing a block mapping, did not find expected key at line 5, column 4
            cannot be parsed: unknown variant "…", expected one of Never, IfAvailable, Always at line 1, column 50
            cannot be parsed: unclosed quote at line 1, column 33
            cannot be parsed: alias references unknown anchor at line 1, column 71"#]].assert_eq(&told.join("\n"));
        assert!(told.iter().all(|told| !told.contains(SECRET)));
    }

    #[test]
    fn credentials_that_cannot_be_had_tell_no_secret() {
        let unreadable = Kubeconfig::from_yaml(&format!("users: [{SECRET}]"));
        let Err(KubeconfigError::Parse(unreadable)) = unreadable else { panic!("it can be read") };
        let out = Output {
            status: ExitStatus::from_raw(256),
            stdout: SECRET.as_bytes().to_vec(),
            stderr: b"no session: log in first\n".to_vec(),
        };
        let failed = AuthError::AuthExecRun { cmd: format!("TOKEN={SECRET} plugin"), out: Box::new(out) };
        let told = [AuthError::AuthExecParse(unreadable), failed].map(|error| told(&Error::Auth(error)));
        expect![[r#"
            what the credentials plugin says cannot be parsed: expected mapping start at line 1, column 9
            the credentials plugin failed (exit status: 1): no session: log in first"#]]
        .assert_eq(&told.join("\n"));
        assert!(told.iter().all(|told| !told.contains(SECRET)));
    }
}
