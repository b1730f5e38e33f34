//! A Kubernetes API server and its store on a host of the lab, and nothing else of Kubernetes: no controller, no kubelet.
//!
//! Invariant: everything that it writes lies in the host's directory, and it ends with the lab.

use std::{
    fs,
    io::{Read, Write},
    net::{IpAddr, SocketAddr, TcpStream},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

use crate::{Host, Process};

/// Where the API server listens.
pub const PORT: u16 = 6443;
const STORE: &str = "127.0.0.1:2379";
/// How many reads and writes of the store are kept when it is compacted.
const KINE_RETAINS: &str = "10";

/// What keeps the objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Store {
    Etcd,
    /// SQLite, behind etcd's protocol.
    Kine,
}

/// The built programs.
#[derive(Clone, Debug)]
pub struct Programs {
    pub etcd: PathBuf,
    pub kine: PathBuf,
    pub apiserver: PathBuf,
}

/// Whom the API server knows beside service accounts.
#[derive(Clone, Copy, Debug)]
pub struct User {
    pub token: &'static str,
    pub name: &'static str,
    pub group: &'static str,
}

#[derive(Debug)]
pub struct ApiServer {
    dir: PathBuf,
    address: IpAddr,
    program: PathBuf,
    kind: Store,
    _store: Process,
    server: Process,
}

impl ApiServer {
    /// Starts both. The API server is ready some seconds later.
    pub fn start(host: &Host, address: IpAddr, programs: &Programs, kind: Store, users: &[User]) -> Result<ApiServer> {
        let dir = host.dir().join("kubernetes");
        fs::DirBuilder::new().mode(0o700).create(&dir).with_context(|| format!("mkdir {}", dir.display()))?;
        let lines = users.iter().map(|user| format!("{},{},{},{:?}\n", user.token, user.name, user.name, user.group));
        write(&dir.join("users.csv"), &lines.collect::<String>())?;
        write(&dir.join("audit.yaml"), AUDIT)?;
        let [key, public] = ["account.key", "account.pub"].map(|file| dir.join(file));
        let curve = ["-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1"];
        host.output("openssl", &[&["genpkey", "-out", text(&key)?], &curve[..]].concat())?;
        host.output("openssl", &["pkey", "-in", text(&key)?, "-pubout", "-out", text(&public)?])?;
        let store = match kind {
            Store::Etcd => host.spawn("etcd", &programs.etcd, &words(&etcd(&dir)))?,
            Store::Kine => host.spawn("kine", &programs.kine, &words(&kine(&dir)))?,
        };
        let server = host.spawn("kube-apiserver", &programs.apiserver, &words(&apiserver(&dir, address)))?;
        Ok(ApiServer { dir, address, program: programs.apiserver.clone(), kind, _store: store, server })
    }

    pub fn url(&self) -> String {
        format!("https://{}", SocketAddr::from((self.address, PORT)))
    }

    /// Fails, with the end of its log, if the API server has ended.
    pub fn check_running(&mut self) -> Result<()> {
        self.server.check_running()
    }

    /// SIGKILL, and then it starts anew.
    pub fn restart(&mut self, host: &Host) -> Result<()> {
        self.server.signal(Signal::SIGKILL)?;
        self.server.wait()?;
        let (dir, address) = (&self.dir, self.address);
        self.server = host.spawn("kube-apiserver", &self.program, &words(&apiserver(dir, address)))?;
        Ok(())
    }

    /// SIGSTOP: it keeps its connections, and says nothing.
    pub fn pause(&self) -> Result<()> {
        self.server.signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Result<()> {
        self.server.signal(Signal::SIGCONT)
    }

    /// Has the store forget all history but the present. Kine does that itself, all the time.
    pub fn compact(&self, host: &Host) -> Result<()> {
        if self.kind == Store::Kine {
            return Ok(());
        }
        // Any key will do: the answer tells the store's revision.
        let header = post(host, "/v3/kv/range", &json!({"key": "AA=="}))?;
        let revision = header["header"]["revision"].as_str().context("etcd tells its revision")?;
        post(host, "/v3/kv/compaction", &json!({"revision": revision, "physical": true})).map(drop)
    }

    /// A kubeconfig for whoever has the token; `file` is its name. JSON is YAML, too.
    pub fn kubeconfig(&self, file: &str, token: &str, namespace: &str) -> Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lab", "cluster": {
                "server": self.url(), "certificate-authority": self.dir.join("certificates/apiserver.crt"),
            }}],
            "users": [{"name": "user", "user": {"token": token}}],
            "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "user", "namespace": namespace}}],
            "current-context": "lab",
        });
        let path = self.dir.join(format!("{file}.kubeconfig"));
        write(&path, &config.to_string())?;
        Ok(path)
    }

    /// What service accounts have asked so far: audit events, in their order, each request once or twice.
    pub fn audit(&self) -> Result<Vec<Value>> {
        let path = self.dir.join("audit.log");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        whole.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    }
}

/// Who asked for what, of service accounts alone. A watch is told when it begins and when it ends.
const AUDIT: &str = r#"apiVersion: audit.k8s.io/v1
kind: Policy
omitStages: [RequestReceived, Panic]
rules:
- {level: Metadata, userGroups: ["system:serviceaccounts"]}
- {level: None}
"#;

fn etcd(dir: &Path) -> String {
    let (data, peers) = (dir.join("etcd"), "http://127.0.0.1:2380");
    format!(
        "--name store --data-dir {} --unsafe-no-fsync --logger zap --log-level warn
         --listen-client-urls http://{STORE} --advertise-client-urls http://{STORE}
         --listen-peer-urls {peers} --initial-advertise-peer-urls {peers} --initial-cluster store={peers}",
        data.display()
    )
}

fn kine(dir: &Path) -> String {
    let options = "_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate";
    format!(
        "--listen-address=tcp://{STORE} --metrics-bind-address=0 --endpoint=sqlite://{}/kine.db?{options}
         --compact-interval=2s --compact-min-retain={KINE_RETAINS}",
        dir.display()
    )
}

fn apiserver(dir: &Path, address: IpAddr) -> String {
    let d = dir.display();
    let issuer = "https://kubernetes.default.svc.cluster.local";
    format!(
        "--etcd-servers=http://{STORE} --bind-address={address} --advertise-address={address} --secure-port={PORT}
         --cert-dir={d}/certificates --endpoint-reconciler-type=none --service-cluster-ip-range=10.96.0.0/16
         --service-account-issuer={issuer} --service-account-key-file={d}/account.pub
         --service-account-signing-key-file={d}/account.key --token-auth-file={d}/users.csv
         --authorization-mode=Node,RBAC --anonymous-auth=false --enable-admission-plugins=NodeRestriction
         --audit-policy-file={d}/audit.yaml --audit-log-path={d}/audit.log --delete-collection-workers=8
         --profiling=false --allow-privileged=true"
    )
}

fn words(line: &str) -> Vec<&str> {
    line.split_whitespace().collect()
}

/// Asks etcd by its JSON gateway.
fn post(host: &Host, path: &str, body: &Value) -> Result<Value> {
    let body = body.to_string();
    let answer = host.run(|| {
        let mut stream = TcpStream::connect(STORE).context("connect to etcd")?;
        let head = format!("POST {path} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {}", body.len());
        write!(stream, "{head}\r\n\r\n{body}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (head, body) = answer.split_once("\r\n\r\n").with_context(|| format!("etcd {path}: {answer}"))?;
    ensure!(head.starts_with("HTTP/1.0 200"), "etcd {path}: {answer}");
    serde_json::from_str(body).with_context(|| format!("etcd {path}: {answer}"))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}
