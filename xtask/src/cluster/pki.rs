//! Certificates, keys and kubeconfigs of a cluster, made by `openssl`: every Debian has it, and a crate for the few
//! commands of a test bed would be one more to keep.
//!
//! Invariant: a machine is given its own keys and no other's.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use super::design::{Design, Role, Seat};

/// Days that certificates are valid.
const DAYS: &str = "365";

/// Who a certificate is for.
struct Identity<'a> {
    /// Of `FILE.crt` and `FILE.key`.
    file: &'a str,
    /// Kubernetes' user.
    name: &'a str,
    /// Kubernetes' group.
    group: Option<&'a str>,
    /// As in `DNS:localhost,IP:127.0.0.1`; empty for a client.
    served: String,
}

/// A certificate authority: `NAME.crt` and `NAME.key` in a folder.
struct Authority {
    dir: PathBuf,
    name: &'static str,
}

/// Makes everything of a cluster. `dir` gets what belongs to the cluster, and `machine` says where a machine's keys go.
/// Returns the administrator's kubeconfig.
pub fn make(design: &Design, dir: &Path, machine: impl Fn(&Seat) -> Result<PathBuf>) -> Result<PathBuf> {
    make_folder(dir)?;
    let ca = Authority::make(dir, "ca")?;
    let front_proxy = Authority::make(dir, "front-proxy-ca")?;
    for seat in design.seats() {
        let folder = machine(&seat)?;
        make_folder(&folder)?;
        copy(dir, &folder, "ca.crt")?;
        match seat.role {
            Role::ControlPlane => control_plane(design, &ca, &front_proxy, &folder)?,
            Role::Node(_) => node(design, &ca, &seat, &folder)?,
        }
    }
    ca.issue(dir, &client("admin", "admin", Some("system:masters")))?;
    kubeconfig(design, dir, "admin")
}

fn client<'a>(file: &'a str, name: &'a str, group: Option<&'a str>) -> Identity<'a> {
    Identity { file, name, group, served: String::new() }
}

fn control_plane(design: &Design, ca: &Authority, front_proxy: &Authority, folder: &Path) -> Result<()> {
    copy(&ca.dir, folder, "ca.key")?;
    copy(&front_proxy.dir, folder, "front-proxy-ca.crt")?;
    let service = "kubernetes.default.svc";
    let mut served = "DNS:kubernetes,DNS:kubernetes.default,DNS:localhost,IP:127.0.0.1".to_owned();
    served += &format!(",DNS:{service},DNS:{service}.cluster.local,IP:{}", design.kubernetes_service()?);
    served += &format!(",IP:{}", design.seats()[0].address());
    ca.issue(folder, &Identity { file: "apiserver", name: "kube-apiserver", group: None, served })?;
    ca.issue(folder, &client("kubelet-client", "kube-apiserver-kubelet-client", Some("system:masters")))?;
    front_proxy.issue(folder, &client("front-proxy-client", "front-proxy-client", None))?;
    for (file, name) in
        [("controller-manager", "system:kube-controller-manager"), ("scheduler", "system:kube-scheduler")]
    {
        let served = "DNS:localhost,IP:127.0.0.1".to_owned();
        ca.issue(folder, &Identity { file, name, group: None, served })?;
        kubeconfig(design, folder, file)?;
    }
    let key = folder.join("service-account.key");
    openssl(&["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-out", text(&key)?])?;
    openssl(&["pkey", "-in", text(&key)?, "-pubout", "-out", text(&folder.join("service-account.pub"))?])
}

fn node(design: &Design, ca: &Authority, seat: &Seat, folder: &Path) -> Result<()> {
    let name = format!("system:node:{}", seat.name);
    let served = format!("DNS:{},IP:{}", seat.name, seat.address());
    ca.issue(folder, &Identity { file: "kubelet", name: &name, group: Some("system:nodes"), served })?;
    ca.issue(folder, &client("kube-proxy", "system:kube-proxy", None))?;
    ["flannel", "cilium"].into_iter().try_for_each(|name| ca.issue(folder, &client(name, name, None)))?;
    let all = ["kubelet", "kube-proxy", "flannel", "cilium"];
    all.into_iter().try_for_each(|file| kubeconfig(design, folder, file).map(drop))
}

impl Authority {
    fn make(dir: &Path, name: &'static str) -> Result<Authority> {
        let extensions =
            "basicConstraints = critical,CA:TRUE\nkeyUsage = critical,keyCertSign,cRLSign,digitalSignature\n";
        certificate(dir, name, &format!("/CN={name}"), extensions, &[])?;
        Ok(Authority { dir: dir.to_owned(), name })
    }

    /// Puts a certificate and its key into `folder`.
    fn issue(&self, folder: &Path, identity: &Identity<'_>) -> Result<()> {
        let mut extensions = "basicConstraints = critical,CA:FALSE\nkeyUsage = critical,digitalSignature\n".to_owned();
        extensions += "extendedKeyUsage = clientAuth,serverAuth\n";
        if !identity.served.is_empty() {
            extensions += &format!("subjectAltName = {}\n", identity.served);
        }
        let group = identity.group.map(|group| format!("/O={group}")).unwrap_or_default();
        let subject = format!("{group}/CN={}", identity.name);
        let [certificate_of_ca, key] = ["crt", "key"].map(|kind| self.dir.join(format!("{}.{kind}", self.name)));
        let signed = ["-CA", text(&certificate_of_ca)?, "-CAkey", text(&key)?];
        certificate(folder, identity.file, &subject, &extensions, &signed)
    }
}

/// Makes `FILE.key` and `FILE.crt`.
fn certificate(dir: &Path, file: &str, subject: &str, extensions: &str, signed: &[&str]) -> Result<()> {
    let [config, key, out] = ["cnf", "key", "crt"].map(|kind| dir.join(format!("{file}.{kind}")));
    let text_of_config = format!("[req]\ndistinguished_name = subject\n[subject]\n[extensions]\n{extensions}");
    fs::write(&config, text_of_config).with_context(|| format!("write {}", config.display()))?;
    let mut arguments = vec!["req", "-x509", "-noenc", "-days", DAYS, "-subj", subject];
    arguments.extend(["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]);
    arguments.extend(["-config", text(&config)?, "-extensions", "extensions"]);
    arguments.extend(["-keyout", text(&key)?, "-out", text(&out)?]);
    arguments.extend(signed);
    openssl(&arguments)?;
    fs::remove_file(&config).with_context(|| format!("remove {}", config.display()))
}

fn openssl(arguments: &[&str]) -> Result<()> {
    let output = Command::new("openssl").args(arguments).output().context("openssl")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "openssl {}: {}", arguments.join(" "), said.trim_end());
    Ok(())
}

/// Writes `FILE.kubeconfig`, which names `FILE.crt` and `FILE.key` beside it. JSON is YAML, too.
fn kubeconfig(design: &Design, folder: &Path, file: &str) -> Result<PathBuf> {
    let at = |name: &str| folder.join(name);
    let name = design.name();
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": design.server(), "certificate-authority": at("ca.crt")}}],
        "users": [{"name": file, "user": {
            "client-certificate": at(&format!("{file}.crt")), "client-key": at(&format!("{file}.key")),
        }}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": file}}],
        "current-context": name,
    });
    let path = at(&format!("{file}.kubeconfig"));
    fs::write(&path, serde_json::to_vec_pretty(&config)?).with_context(|| format!("write {}", path.display()))?;
    Ok(path)
}

fn make_folder(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))
}

fn copy(from: &Path, to: &Path, name: &str) -> Result<()> {
    fs::copy(from.join(name), to.join(name)).with_context(|| format!("copy {name}"))?;
    Ok(())
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_authority_issues_it_vouches_for() {
        let dir = std::env::temp_dir().join(format!("carrick-pki-{}", std::process::id()));
        make_folder(&dir).unwrap();
        let ca = Authority::make(&dir, "ca").unwrap();
        let served = "DNS:mn-0,IP:203.0.113.2".to_owned();
        let identity = Identity { file: "kubelet", name: "system:node:mn-0", group: Some("system:nodes"), served };
        ca.issue(&dir, &identity).unwrap();
        let shown = |arguments: &[&str]| {
            let output = Command::new("openssl").args(arguments).current_dir(&dir).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(shown(&["verify", "-x509_strict", "-CAfile", "ca.crt", "kubelet.crt"]), "kubelet.crt: OK\n");
        let asked = ["x509", "-in", "kubelet.crt", "-noout", "-subject", "-ext", "subjectAltName"];
        assert_eq!(
            shown(&asked),
            "subject=O = system:nodes, CN = system:node:mn-0\nX509v3 Subject Alternative Name: \n    \
             DNS:mn-0, IP Address:203.0.113.2\n"
        );
        fs::remove_dir_all(&dir).unwrap();
    }
}
