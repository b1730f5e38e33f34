//! Asks the API server, as whoever has the token.

use std::path::Path;

use anyhow::{Context, Result, anyhow};
use http::Method;
use kube::{
    Config, Error,
    config::{AuthInfo, KubeConfigOptions, Kubeconfig},
};
use lab::Host;
use serde_json::Value;
use tokio::{runtime::Runtime, task::JoinSet};

/// Who applies, by server-side apply.
const MANAGER: &str = "fieldManager=tests&force=true";
/// Requests that are on their way at once.
const AT_ONCE: usize = 32;

/// What to ask.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    method: Method,
    path: String,
    body: Option<(&'static str, Value)>,
}

/// What was said: the object, or why not.
pub(crate) type Answer = Result<Value, Refusal>;

#[derive(Clone, Debug)]
pub(crate) struct Refusal {
    pub(crate) code: u16,
    pub(crate) message: String,
}

impl Ask {
    pub(crate) fn get(path: &str) -> Ask {
        Ask { method: Method::GET, path: path.to_owned(), body: None }
    }

    pub(crate) fn delete(path: &str) -> Ask {
        Ask { method: Method::DELETE, path: path.to_owned(), body: None }
    }

    pub(crate) fn create(path: &str, body: Value) -> Ask {
        Ask { method: Method::POST, path: path.to_owned(), body: Some(("application/json", body)) }
    }

    pub(crate) fn merge(path: &str, body: Value) -> Ask {
        Ask { method: Method::PATCH, path: path.to_owned(), body: Some(("application/merge-patch+json", body)) }
    }

    /// By server-side apply; the path's last part is the name.
    pub(crate) fn apply(path: &str, mut body: Value) -> Ask {
        body["metadata"]["name"] = path.rsplit('/').next().into();
        let path = format!("{path}?{MANAGER}");
        Ask { method: Method::PATCH, path, body: Some(("application/apply-patch+yaml", body)) }
    }

    /// As a row of a table.
    pub(crate) fn shown(&self) -> String {
        let verb = match &self.body {
            Some(("application/apply-patch+yaml", _)) => "APPLY",
            _ => self.method.as_str(),
        };
        let path = self.path.strip_suffix(MANAGER).map_or(self.path.as_str(), |path| &path[..path.len() - 1]);
        format!("{verb} {path}")
    }

    fn request(&self, token: &str) -> Result<http::Request<Vec<u8>>> {
        let request = http::Request::builder().method(&self.method).uri(&self.path);
        let mut request = request.header("authorization", format!("Bearer {token}"));
        let mut bytes = Vec::new();
        if let Some((kind, body)) = &self.body {
            request = request.header("content-type", *kind);
            bytes = body.to_string().into_bytes();
        }
        request.body(bytes).context("a request")
    }
}

/// That what was asked is done.
pub(crate) fn done(ask: &Ask, answer: Answer) -> Result<()> {
    answer.map_err(|refusal| anyhow!("{}: {refusal:?}", ask.shown())).map(drop)
}

/// A client that is nobody: each request brings a token.
pub(crate) struct Client {
    runtime: Runtime,
    client: kube::Client,
}

impl Client {
    /// For the API server that the kubeconfig names.
    pub(crate) fn new(kubeconfig: &Path) -> Result<Client> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(async {
            let read = Kubeconfig::read_from(kubeconfig)?;
            let mut config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await?;
            config.auth_info = AuthInfo::default();
            config.default_retry = false;
            Ok::<_, anyhow::Error>(kube::Client::try_from(config)?)
        })?;
        Ok(Client { runtime, client })
    }

    /// Asks from that host. Fails only where nothing answers.
    pub(crate) fn ask(&self, host: &Host, token: &str, ask: &Ask) -> Result<Answer> {
        host.run(|| self.runtime.block_on(send(self.client.clone(), ask.request(token)?))).with_context(|| ask.shown())
    }

    /// Asks for all of them, several at a time, and hands on what was said to each, in any order.
    pub(crate) fn ask_all(
        &self,
        host: &Host,
        token: &str,
        mut asks: impl Iterator<Item = Ask> + Send,
        mut each: impl FnMut(&Ask, Answer) -> Result<()> + Send,
    ) -> Result<()> {
        host.run(|| {
            self.runtime.block_on(async {
                let mut sent = JoinSet::new();
                loop {
                    while sent.len() < AT_ONCE
                        && let Some(ask) = asks.next()
                    {
                        let (client, request) = (self.client.clone(), ask.request(token)?);
                        sent.spawn(async move { (send(client, request).await, ask) });
                    }
                    let Some(answer) = sent.join_next().await else { return Ok(()) };
                    let (answer, ask) = answer?;
                    each(&ask, answer.with_context(|| ask.shown())?)?;
                }
            })
        })
    }
}

async fn send(client: kube::Client, request: http::Request<Vec<u8>>) -> Result<Answer> {
    match client.request_text(request).await {
        // What is no JSON ("ok") is told as a string.
        Ok(text) => Ok(Ok(serde_json::from_str(&text).unwrap_or(Value::String(text)))),
        Err(Error::Api(status)) => Ok(Err(Refusal { code: status.code, message: status.message.clone() })),
        Err(error) => Err(error.into()),
    }
}
