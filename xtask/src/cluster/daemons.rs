//! What runs on the machines of a cluster, with which settings: pure.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::{
    Store, cilium,
    design::{Design, Network, Proxy, Role, Seat},
    images::PAUSE,
    spec::{Program, Step},
};

/// Where the built programs lie.
#[derive(Clone, Debug)]
pub struct Programs {
    pub etcd: PathBuf,
    pub kine: PathBuf,
    pub apiserver: PathBuf,
    pub controller_manager: PathBuf,
    pub scheduler: PathBuf,
    pub kubelet: PathBuf,
    pub proxy: PathBuf,
    pub kubectl: PathBuf,
    pub flanneld: PathBuf,
    pub cilium: cilium::Programs,
}

/// Where containerd listens, on each node.
pub const CONTAINERD: &str = "/run/containerd/containerd.sock";
const PLUGINS: &str = "/usr/lib/cni";
/// The network plugin's settings.
pub const CONFLIST: &str = "/etc/cni/net.d/10-pods.conflist";
/// Where flanneld writes which range is this node's.
pub const FLANNEL_RANGE: &str = "/run/flannel/subnet.env";

/// The steps of the control plane's machine. `pki` is where its certificates lie.
pub fn control_plane(design: &Design, programs: &Programs, pki: &Path, store: Store) -> Result<Vec<Step>> {
    let p = pki.display();
    let address = design.seats()[0].address();
    let (pods, services) = (design.member.pods, design.services);
    let store = match store {
        Store::Etcd => daemon(
            "etcd",
            &programs.etcd,
            "--name store --data-dir /var/lib/store/etcd --unsafe-no-fsync --logger zap
             --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379
             --listen-peer-urls http://127.0.0.1:2380 --initial-advertise-peer-urls http://127.0.0.1:2380
             --initial-cluster store=http://127.0.0.1:2380",
        ),
        Store::Kine => daemon(
            "kine",
            &programs.kine,
            "--listen-address=tcp://127.0.0.1:2379 --metrics-bind-address=0
             --endpoint=sqlite:///var/lib/store/kine.db?_journal=WAL&cache=shared&_busy_timeout=30000&_txlock=immediate",
        ),
    };
    let issuer = "https://kubernetes.default.svc.cluster.local";
    let apiserver = format!(
        "--etcd-servers=http://127.0.0.1:2379 --bind-address=0.0.0.0 --secure-port=6443 --advertise-address={address}
         --service-cluster-ip-range={services} --allow-privileged=true --anonymous-auth=false
         --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction
         --client-ca-file={p}/ca.crt --tls-cert-file={p}/apiserver.crt --tls-private-key-file={p}/apiserver.key
         --cert-dir=/run/apiserver --kubelet-certificate-authority={p}/ca.crt
         --kubelet-client-certificate={p}/kubelet-client.crt --kubelet-client-key={p}/kubelet-client.key
         --kubelet-preferred-address-types=InternalIP --service-account-issuer={issuer}
         --service-account-key-file={p}/service-account.pub --service-account-signing-key-file={p}/service-account.key
         --requestheader-client-ca-file={p}/front-proxy-ca.crt --requestheader-allowed-names=front-proxy-client
         --requestheader-username-headers=X-Remote-User --requestheader-group-headers=X-Remote-Group
         --requestheader-extra-headers-prefix=X-Remote-Extra- --proxy-client-cert-file={p}/front-proxy-client.crt
         --proxy-client-key-file={p}/front-proxy-client.key --enable-aggregator-routing=true"
    );
    let kubeconfig = |name: &str| {
        let file = format!("{p}/{name}.kubeconfig");
        format!(
            "--kubeconfig={file} --authentication-kubeconfig={file} --authorization-kubeconfig={file}
             --tls-cert-file={p}/{name}.crt --tls-private-key-file={p}/{name}.key
             --leader-elect=false --bind-address=127.0.0.1"
        )
    };
    // Its default rate makes it take 6 s to start.
    let controller_manager = format!(
        "{} --use-service-account-credentials=true --service-account-private-key-file={p}/service-account.key
         --root-ca-file={p}/ca.crt --cluster-signing-cert-file={p}/ca.crt --cluster-signing-key-file={p}/ca.key
         --cluster-name={} --cluster-cidr={pods} --allocate-node-cidrs={} --service-cluster-ip-range={services}
         --node-monitor-period=2s --node-monitor-grace-period=20s
         --kube-api-qps=200 --kube-api-burst=400 --concurrent-serviceaccount-token-syncs=20",
        kubeconfig("controller-manager"),
        design.name(),
        design.network == Network::Flannel,
    );
    Ok(vec![
        store,
        daemon("kube-apiserver", &programs.apiserver, &apiserver),
        // Without a server the controller manager ends, and is started again later than it need be.
        Step::Until(Program::new(
            &programs.kubectl,
            &format!("--kubeconfig={p}/controller-manager.kubeconfig --request-timeout=5s get --raw=/readyz"),
        )),
        daemon("kube-controller-manager", &programs.controller_manager, &controller_manager),
        daemon("kube-scheduler", &programs.scheduler, &kubeconfig("scheduler")),
    ])
}

/// The steps of a node. `images` are the archives that its containerd is given.
pub fn node(design: &Design, seat: &Seat, programs: &Programs, pki: &Path, images: &[PathBuf]) -> Vec<Step> {
    let (p, name, address) = (pki.display(), &seat.name, seat.address());
    let ctr = |arguments: &str| Step::Until(Program::new("ctr", &format!("--address {CONTAINERD} {arguments}")));
    let mut steps =
        vec![daemon("containerd", Path::new("containerd"), "--config /etc/containerd/config.toml"), ctr("version")];
    steps.extend(images.iter().map(|image| ctr(&import(image))));
    steps.push(daemon(
        "kubelet",
        &programs.kubelet,
        &format!(
            "--config=/etc/kubernetes/kubelet.yaml --kubeconfig={p}/kubelet.kubeconfig --hostname-override={name}
             --node-ip={address} --v=2"
        ),
    ));
    steps.push(daemon("kube-proxy", &programs.proxy, "--config=/etc/kubernetes/kube-proxy.yaml"));
    if design.network == Network::Flannel {
        let mut flanneld = Program::new(
            &programs.flanneld,
            &format!(
                "--kube-subnet-mgr --kubeconfig-file={p}/flannel.kubeconfig --iface=eth0 --ip-masq
                 --net-config-path=/etc/kube-flannel/net-conf.json --subnet-file={FLANNEL_RANGE}"
            ),
        );
        flanneld.environment.push(("NODE_NAME".to_owned(), name.clone()));
        steps.push(Step::Daemon { name: "flanneld".to_owned(), program: flanneld });
        steps.push(Step::FlannelRange);
    }
    if design.network == Network::Routed {
        let program =
            cilium::agent(&programs.cilium, name, &pki.join("cilium.kubeconfig"), &design.member.pods.to_string());
        steps.push(Step::Idle { name: cilium::DAEMON.to_owned(), program });
    }
    steps
}

/// What `ctr` is told to have containerd know an image, as the kubelet looks for it.
pub fn import(image: &Path) -> String {
    format!("--namespace k8s.io images import --snapshotter overlayfs {}", image.display())
}

fn daemon(name: &str, path: &Path, arguments: &str) -> Step {
    Step::Daemon { name: name.to_owned(), program: Program::new(path, arguments) }
}

/// The settings below `/proc/sys` of every machine. What bridges carry passes iptables, as kube-proxy wants it.
pub fn sysctls() -> Vec<(String, String)> {
    let pairs = [
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv6/conf/eth0/accept_dad", "0"),
        ("net/ipv4/conf/default/rp_filter", "2"),
        ("net/bridge/bridge-nf-call-iptables", "1"),
    ];
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
}

/// The files of a machine's root.
pub fn files(design: &Design, seat: &Seat, pki: &Path) -> Result<Vec<(PathBuf, String)>> {
    let hosts = format!("127.0.0.1 localhost\n::1 localhost\n{} {}\n", seat.address(), seat.name);
    // Nothing listens there: a name that the cluster does not know fails at once.
    let resolver = "nameserver 127.0.0.1\noptions attempts:1\n".to_owned();
    let mut files = vec![("/etc/hosts".into(), hosts), ("/etc/resolv.conf".into(), resolver)];
    if let Role::Node(n) = seat.role {
        files.push(("/etc/containerd/config.toml".into(), containerd()));
        files.push(("/etc/kubernetes/kubelet.yaml".into(), kubelet(design, pki)?));
        files.push(("/etc/kubernetes/kube-proxy.yaml".into(), proxy(design, seat, pki)));
        files.push(match design.network {
            Network::Routed => (CONFLIST.into(), conflist(&design.node_pods(n)?.to_string(), 1500)),
            Network::Flannel => ("/etc/kube-flannel/net-conf.json".into(), flannel(design)),
        });
        files.push((cilium::START.into(), cilium::START_TEXT.to_owned()));
    }
    Ok(files)
}

/// The machine may lack CAP_SYS_RESOURCE: then runc cannot lower an oom_score_adj, and says no more than "EOF".
fn containerd() -> String {
    format!(
        r#"version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [
  "io.containerd.snapshotter.v1.aufs",
  "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs",
]
[grpc]
  address = "{CONTAINERD}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE}"
  netns_mounts_under_state_dir = true
  disable_tcp_service = true
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{PLUGINS}"
    conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
"#
    )
}

fn kubelet(design: &Design, pki: &Path) -> Result<String> {
    let p = pki.display();
    Ok(format!(
        r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
failSwapOn: false
protectKernelDefaults: false
containerRuntimeEndpoint: unix://{CONTAINERD}
authentication: {{anonymous: {{enabled: false}}, webhook: {{enabled: true}}, x509: {{clientCAFile: {p}/ca.crt}}}}
authorization: {{mode: Webhook}}
tlsCertFile: {p}/kubelet.crt
tlsPrivateKeyFile: {p}/kubelet.key
clusterDomain: cluster.local
clusterDNS: ["{dns}"]
resolvConf: ""
nodeStatusUpdateFrequency: 4s
nodeLeaseDurationSeconds: 20
syncFrequency: 10s
shutdownGracePeriod: 0s
evictionHard: {{memory.available: 200Mi, nodefs.available: 1%, imagefs.available: 1%, nodefs.inodesFree: 1%}}
imageGCHighThresholdPercent: 100
volumePluginDir: /var/lib/kubelet/volumeplugins
containerLogMaxSize: 10Mi
enforceNodeAllocatable: [pods]
"#,
        dns = design.dns_service()?
    ))
}

/// conntrack's limits are the whole machine's: they are left alone.
fn proxy(design: &Design, seat: &Seat, pki: &Path) -> String {
    let mode = match design.proxy {
        Proxy::Iptables => "iptables",
        Proxy::Nftables => "nftables",
    };
    format!(
        r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: {mode}
clientConnection: {{kubeconfig: {}/kube-proxy.kubeconfig}}
hostnameOverride: {}
clusterCIDR: {}
bindAddress: {}
healthzBindAddress: "127.0.0.1:10256"
metricsBindAddress: "127.0.0.1:10249"
conntrack: {{maxPerCore: 0, tcpEstablishedTimeout: 0s, tcpCloseWaitTimeout: 0s}}
"#,
        pki.display(),
        seat.name,
        design.member.pods,
        seat.address(),
    )
}

fn flannel(design: &Design) -> String {
    format!("{{\"Network\": \"{}\", \"Backend\": {{\"Type\": \"vxlan\"}}}}\n", design.member.pods)
}

/// A bridge with addresses of `range`, which flannel's own plugin would delegate to.
fn conflist(range: &str, mtu: u32) -> String {
    format!(
        r#"{{"cniVersion": "0.4.0", "name": "pods", "plugins": [
  {{"type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
    "ipMasq": false, "mtu": {mtu}, "ipam": {{"type": "host-local", "ranges": [[{{"subnet": "{range}"}}]]}}}},
  {{"type": "portmap", "capabilities": {{"portMappings": true}}}}
]}}
"#
    )
}

/// The network plugin's settings on a node of flannel's, from what flanneld has written to [`FLANNEL_RANGE`]. `None`
/// while that is not whole.
pub fn flannel_conflist(range: &str) -> Option<String> {
    let value = |name: &str| range.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let subnet: ipnetwork::Ipv4Network = value("FLANNEL_SUBNET")?.parse().ok()?;
    let network = ipnetwork::Ipv4Network::new(subnet.network(), subnet.prefix()).ok()?;
    Some(conflist(&network.to_string(), value("FLANNEL_MTU")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn the_plugin_gets_flannels_range() {
        let written =
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        expect![[r#"
            {"cniVersion": "0.4.0", "name": "pods", "plugins": [
              {"type": "bridge", "bridge": "cni0", "isGateway": true, "isDefaultGateway": true, "hairpinMode": true,
                "ipMasq": false, "mtu": 1450, "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.42.1.0/24"}]]}},
              {"type": "portmap", "capabilities": {"portMappings": true}}
            ]}
        "#]]
        .assert_eq(&flannel_conflist(written).unwrap());
        assert_eq!(flannel_conflist("FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\n"), None);
    }

    #[test]
    fn files_for_json_readers_are_json() {
        for design in super::super::design::both(super::super::design::NODES).unwrap() {
            for seat in design.seats() {
                for (path, text) in files(&design, &seat, Path::new("/pki")).unwrap() {
                    if path.extension().is_some_and(|kind| kind == "json" || kind == "conflist") {
                        serde_json::from_str::<serde_json::Value>(&text).unwrap();
                    }
                }
            }
        }
    }

    fn shown(step: Step) -> String {
        match step {
            Step::Daemon { name, .. } => format!("  {name}\n"),
            Step::Idle { name, .. } => format!("  {name}, when it is started\n"),
            Step::Until(program) => format!("  until {} {}\n", program.path.display(), program.arguments.join(" ")),
            Step::FlannelRange => "  until flanneld has a range\n".to_owned(),
        }
    }

    #[test]
    fn what_runs_where() {
        let at = |name: &str| PathBuf::from(name);
        let programs = Programs {
            etcd: at("etcd"),
            kine: at("kine"),
            apiserver: at("kube-apiserver"),
            controller_manager: at("kube-controller-manager"),
            scheduler: at("kube-scheduler"),
            kubelet: at("kubelet"),
            proxy: at("kube-proxy"),
            kubectl: at("kubectl"),
            flanneld: at("flanneld"),
            cilium: cilium::Programs { agent: at("cilium-agent"), plugin: at("cilium-cni"), source: at("cilium") },
        };
        let mut text = String::new();
        for design in super::super::design::both(super::super::design::NODES).unwrap() {
            for seat in design.seats() {
                let pki = Path::new("/pki");
                let steps = match seat.role {
                    Role::ControlPlane => control_plane(&design, &programs, pki, Store::Etcd).unwrap(),
                    Role::Node(_) => node(&design, &seat, &programs, pki, &["/images/a.tar".into()]),
                };
                text += &format!("{}:\n", seat.name);
                text += &steps.into_iter().map(shown).collect::<String>();
            }
        }
        expect![[r#"
            mn-api:
              etcd
              kube-apiserver
              until kubectl --kubeconfig=/pki/controller-manager.kubeconfig --request-timeout=5s get --raw=/readyz
              kube-controller-manager
              kube-scheduler
            mn-0:
              containerd
              until ctr --address /run/containerd/containerd.sock version
              until ctr --address /run/containerd/containerd.sock --namespace k8s.io images import --snapshotter overlayfs /images/a.tar
              kubelet
              kube-proxy
              flanneld
              until flanneld has a range
            mn-1:
              containerd
              until ctr --address /run/containerd/containerd.sock version
              until ctr --address /run/containerd/containerd.sock --namespace k8s.io images import --snapshotter overlayfs /images/a.tar
              kubelet
              kube-proxy
              flanneld
              until flanneld has a range
            va-api:
              etcd
              kube-apiserver
              until kubectl --kubeconfig=/pki/controller-manager.kubeconfig --request-timeout=5s get --raw=/readyz
              kube-controller-manager
              kube-scheduler
            va-0:
              containerd
              until ctr --address /run/containerd/containerd.sock version
              until ctr --address /run/containerd/containerd.sock --namespace k8s.io images import --snapshotter overlayfs /images/a.tar
              kubelet
              kube-proxy
              cilium-agent, when it is started
            va-1:
              containerd
              until ctr --address /run/containerd/containerd.sock version
              until ctr --address /run/containerd/containerd.sock --namespace k8s.io images import --snapshotter overlayfs /images/a.tar
              kubelet
              kube-proxy
              cilium-agent, when it is started
        "#]].assert_eq(&text);
    }
}
