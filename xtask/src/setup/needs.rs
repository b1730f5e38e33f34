//! What each command needs of the machine: a table.

use super::{For, Need, What};
use crate::{cluster::cilium, tools};

const LAB: &[For] = &[For::Demo, For::Test, For::Lab, For::Bench, For::Control, For::Cluster];
const GUESTS: &[For] = &[For::Test, For::Vm];
const BUILD: &[For] = &[For::Demo, For::Test, For::Lab, For::Bench, For::Control, For::Vm, For::Cluster, For::Image];
/// What builds or runs the agent.
const AGENT: &[For] = &[For::Demo, For::Test, For::Lab, For::Bench, For::Control, For::Cluster, For::Image];
const CLUSTER: &[For] = &[For::Cluster];
/// What runs an API server.
const SERVER: &[For] = &[For::Test, For::Control, For::Cluster];
const CHART: &[For] = &[For::Test, For::Control, For::Chart, For::Cluster];
const GO: &[For] = &[For::Test, For::Bench, For::Control, For::Chart, For::Cluster];

/// Everything, in the order in which it is got.
pub const NEEDS: &[Need] = &[
    Need { what: What::Root, packages: None, purpose: "makes network namespaces and TUN devices", by: LAB },
    Need { what: What::Namespaces, packages: None, purpose: "nodes of the lab are namespaces", by: LAB },
    Need { what: What::File("/dev/net/tun"), packages: None, purpose: "userspace WireGuard devices", by: LAB },
    Need {
        what: What::Program("cc"),
        packages: Some(["gcc", "gcc", "gcc"]),
        purpose: "compiles and links ring, the cryptography",
        by: BUILD,
    },
    Need {
        what: What::File("/usr/include/stdio.h"),
        packages: Some(["libc6-dev", "glibc-devel", "glibc"]),
        purpose: "compiles and links ring, the cryptography",
        by: BUILD,
    },
    Need {
        what: What::BpfCompiler,
        packages: Some(["rustc-web rust-web-src", "rust rust-src", "rust rust-src"]),
        purpose: "compiles the BPF programs: a rustc with the source of core (rust-src)",
        by: AGENT,
    },
    Need {
        what: What::Llvm,
        packages: Some(["llvm-22-dev", "llvm22-devel", "llvm"]),
        purpose: "bpf-linker is linked to it",
        by: AGENT,
    },
    Need { what: What::BpfLinker, packages: None, purpose: "links the BPF programs", by: AGENT },
    Need {
        what: What::Program("nft"),
        packages: Some(["nftables", "nftables", "nftables"]),
        purpose: "the agent's identity NAT; the lab's masquerading and NAT routers",
        by: AGENT,
    },
    Need {
        what: What::Program("ip"),
        packages: Some(["iproute2", "iproute", "iproute2"]),
        purpose: "links, addresses and routes of the lab",
        by: LAB,
    },
    Need {
        what: What::Program("ping"),
        packages: Some(["iputils-ping", "iputils", "iputils"]),
        purpose: "shows that pods reach each other",
        by: LAB,
    },
    Need {
        what: What::Program("wg"),
        packages: Some(["wireguard-tools", "wireguard-tools", "wireguard-tools"]),
        purpose: "shows our devices; configures the implementations we are measured against",
        by: LAB,
    },
    Need {
        what: What::Program("conntrack"),
        packages: Some(["conntrack", "conntrack-tools", "conntrack-tools"]),
        purpose: "shows the tracked connections, and has a NAT router forget one",
        by: &[For::Test, For::Cluster],
    },
    Need {
        what: What::Program("lua5.1"),
        packages: Some(["lua5.1", "compat-lua", "lua51"]),
        purpose: "runs the health check that the docs give to Argo CD",
        by: &[For::Test],
    },
    Need {
        what: What::Program("bpftool"),
        packages: Some(["bpftool", "bpftool", "bpf"]),
        purpose: "shows the BPF maps, damages what is pinned, and tells Cilium what the kernel can do",
        by: &[For::Test, For::Cluster],
    },
    Need {
        what: What::Program("faketime"),
        packages: Some(["faketime", "libfaketime", "libfaketime"]),
        purpose: "gives an agent a clock that is wrong",
        by: &[For::Test],
    },
    Need {
        what: What::Program("ethtool"),
        packages: Some(["ethtool", "ethtool", "ethtool"]),
        purpose: "changes offloads behind the agent's back",
        by: &[For::Test],
    },
    Need {
        what: What::Program("setpriv"),
        packages: Some(["util-linux", "util-linux", "util-linux"]),
        purpose: "starts the agent without a capability that it needs",
        by: &[For::Test],
    },
    Need {
        what: What::Program("mount"),
        packages: Some(["mount", "util-linux", "util-linux"]),
        purpose: "starts the agent without /dev/net/tun",
        by: &[For::Test],
    },
    Need { what: What::Component("rustfmt", "rustfmt"), packages: None, purpose: "the fmt check", by: &[For::Test] },
    Need {
        what: What::Component("clippy", "cargo-clippy"),
        packages: None,
        purpose: "the clippy check",
        by: &[For::Test],
    },
    Need {
        what: What::GoOrVenv,
        packages: Some(["python3-venv", "python3", "python"]),
        purpose: "fetches Go, where none >= 1.26 is in PATH",
        by: GO,
    },
    Need { what: What::Go, packages: None, purpose: "builds helm, wireguard-go, Kubernetes", by: GO },
    Need {
        what: What::Program("qemu-system-x86_64"),
        packages: Some(["qemu-system-x86", "qemu-system-x86", "qemu-system-x86"]),
        purpose: "runs the guests",
        by: GUESTS,
    },
    Need {
        what: What::Program("busybox"),
        packages: Some(["busybox-static", "busybox", "busybox"]),
        purpose: "the guests' own programs",
        by: &[For::Test, For::Vm, For::Cluster],
    },
    Need {
        what: What::Program("apt-get"),
        packages: Some(["apt", "apt", "apt"]),
        purpose: "fetches Debian's kernels for the guests; installs none",
        by: GUESTS,
    },
    Need {
        what: What::Program("dpkg-deb"),
        packages: Some(["dpkg", "dpkg", "dpkg"]),
        purpose: "unpacks the guests' kernels",
        by: GUESTS,
    },
    Need {
        what: What::Program("dpkg-query"),
        packages: Some(["dpkg", "dpkg", "dpkg"]),
        purpose: "tells which packages the image's files are of",
        by: &[For::Image],
    },
    Need {
        what: What::Program("xz"),
        packages: Some(["xz-utils", "xz", "xz"]),
        purpose: "unpacks the guests' modules",
        by: GUESTS,
    },
    Need {
        what: What::Program("containerd"),
        packages: Some(["containerd", "containerd", "containerd"]),
        purpose: "runs the pods of the clusters' nodes",
        by: CLUSTER,
    },
    Need {
        what: What::Program("runc"),
        packages: Some(["runc", "runc", "runc"]),
        purpose: "runs the containers of containerd",
        by: CLUSTER,
    },
    Need {
        what: What::File("/usr/lib/cni/bridge"),
        packages: Some(["containernetworking-plugins", "containernetworking-plugins", "cni-plugins"]),
        purpose: "plugs the pods of the clusters in",
        by: CLUSTER,
    },
    Need {
        what: What::Program("iptables"),
        packages: Some(["iptables", "iptables-nft", "iptables-nft"]),
        purpose: "flannel's masquerading; one cluster's kube-proxy",
        by: CLUSTER,
    },
    Need {
        what: What::Program("openssl"),
        packages: Some(["openssl", "openssl", "openssl"]),
        purpose: "makes the clusters' certificates and keys",
        by: SERVER,
    },
    Need {
        what: What::Program("nsenter"),
        packages: Some(["util-linux", "util-linux", "util-linux"]),
        purpose: "runs commands in the clusters' nodes",
        by: CLUSTER,
    },
    Need { what: What::Built(&tools::ETCD), packages: None, purpose: "keeps the clusters' objects", by: SERVER },
    Need { what: What::Built(&tools::KINE), packages: None, purpose: "keeps them in SQLite", by: SERVER },
    Need { what: What::Built(&tools::KUBE_APISERVER), packages: None, purpose: "is Kubernetes", by: SERVER },
    Need { what: What::Built(&tools::KUBE_CONTROLLER_MANAGER), packages: None, purpose: "is Kubernetes", by: CLUSTER },
    Need { what: What::Built(&tools::KUBE_SCHEDULER), packages: None, purpose: "is Kubernetes", by: CLUSTER },
    Need { what: What::Built(&tools::KUBELET), packages: None, purpose: "is Kubernetes", by: CLUSTER },
    Need { what: What::Built(&tools::KUBE_PROXY), packages: None, purpose: "is Kubernetes", by: CLUSTER },
    Need { what: What::Built(&tools::KUBECTL), packages: None, purpose: "asks the clusters", by: SERVER },
    Need { what: What::Built(&tools::COREDNS), packages: None, purpose: "resolves names in the clusters", by: CLUSTER },
    Need { what: What::Built(&tools::FLANNELD), packages: None, purpose: "is one cluster's network", by: CLUSTER },
    Need {
        what: What::File(cilium::CLANG),
        packages: Some(["clang-16", "clang16", "clang"]),
        purpose: "compiles what enforces one cluster's network policies",
        by: CLUSTER,
    },
    Need {
        what: What::Built(&tools::CILIUM_AGENT),
        packages: None,
        purpose: "enforces one cluster's network policies",
        by: CLUSTER,
    },
    Need { what: What::Built(&tools::CILIUM_CNI), packages: None, purpose: "tells it of pods", by: CLUSTER },
    Need { what: What::Built(&tools::HELM), packages: None, purpose: "renders and installs the chart", by: CHART },
    Need {
        what: What::Built(&tools::KSTATUS),
        packages: None,
        purpose: "says how GitOps tools read status",
        by: &[For::Test],
    },
    Need { what: What::Built(&tools::CARGO_DENY), packages: None, purpose: "the licence check", by: &[For::Test] },
    Need { what: What::Built(&tools::GOTATUN), packages: None, purpose: "is measured", by: &[For::Bench] },
    Need { what: What::Built(&tools::BORINGTUN), packages: None, purpose: "is measured", by: &[For::Bench] },
    Need { what: What::Built(&tools::WIREGUARD_GO), packages: None, purpose: "is measured", by: &[For::Bench] },
];
