//! What Carrick could leave on a node of a real cluster: [`snapshot_by`] without what the cluster itself changes all the time.

use std::collections::BTreeSet;

use ::lab::carrick::snapshot_by;
use anyhow::Result;

use crate::cluster::record::{Machine, output};

/// Words of lines that come and go with pods, with the cable of a machine that was off: it has another MAC then, and with
/// the pod range of a Node that was deleted: it gets another.
const OTHERS: &[&str] = &[
    " dev flannel.1 ",
    ": flannel.1 inet ",
    ": flannel.1: <",
    "veth",
    "cni0",
    "eth0@if",
    "fe80::",
    "/run/containerd",
    "/run/netns",
    "/run/kubelet",
    "/run/flannel",
    "/run/sysctl",
];
/// The kubelet makes the folder for a volume of Carrick's pods, and takes no such folder away.
const VOLUME: &str = "find /run -path /run/carrick-lab -prune -o -print: /run/carrick (1)";
/// Of the rulesets, only our table counts: kube-proxy's and flannel's follow their Services and nodes.
const RULESET: &str = "nft ";
const OUR_TABLE: &str = "carrick";

/// One a line.
pub fn of(node: &Machine) -> Result<BTreeSet<String>> {
    let lines = snapshot_by(|program, arguments| output(node.command(program)?.args(arguments), ""))?;
    Ok(lines.into_iter().filter(|line| counts(line)).collect())
}

fn counts(line: &str) -> bool {
    match line.starts_with(RULESET) {
        true => line.contains(OUR_TABLE),
        false => line != VOLUME && !OTHERS.iter().any(|word| line.contains(word)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_carrick_could_leave_counts() {
        for line in [
            "ip -o link show: 7: carrick-hop: <BROADCAST> (1)",
            "ip -4 rule show: 11: from all lookup 7473 proto kernel (1)",
            "ip -4 route show table all: unreachable 10.44.0.0/16 table 7474 proto kernel (1)",
            "ip -o address show: 1: lo inet6 fd77::1/128 scope global deprecated (1)",
            "nft --stateless list ruleset: table inet carrick { (1)",
            "find /run -path /run/carrick-lab -prune -o -print: /run/carrick/agent.sock (1)",
            "find /sys/fs/bpf: /sys/fs/bpf/carrick (1)",
        ] {
            assert!(counts(line), "{line}");
        }
        for line in [
            "ip -o link show: 9: veth12: <BROADCAST> (1)",
            "nft --stateless list ruleset: chain KUBE-SERVICES { (1)",
            "ip -4 route show table all: 10.42.3.0/24 via 10.42.3.0 dev flannel.1 onlink (1)",
            "ip -o link show: 3: flannel.1: <BROADCAST,UP> link/ether 86:4d:b4:50:11:44 (1)",
            "ip -o address show: 3: flannel.1 inet 10.42.3.0/32 scope global flannel.1 (1)",
        ] {
            assert!(!counts(line), "{line}");
        }
    }
}
