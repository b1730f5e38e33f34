//! Network policies that select the pods that talk, in a cluster where something enforces them.

use std::{
    thread::sleep,
    time::{Duration, Instant},
};

use ::lab::{
    traffic::{ping::ping, udp::Flow},
    wait_for,
};
use anyhow::{Context, Result, ensure};

use super::{CONNECT_LIMIT, Demo, INTERVAL, pods, tenths, wait_silent};
use crate::{
    cluster::{cilium, record::Cluster, up},
    demo::load::{AROUND, Price},
};

/// Enforced here, on the worker.
const CLUSTER: &str = "va";
const NODE: &str = "va-2";
/// How long traffic is watched under a policy.
const WHILE: Duration = Duration::from_secs(5);
/// Documentation's: nobody has it.
const NOBODY: &str = "198.51.100.0/24";

impl Demo<'_> {
    pub(super) fn policies(&mut self) -> Result<()> {
        self.table.begin("Cilium started on a worker: its pod answers");
        cilium::start(self.clusters.cluster(CLUSTER)?, self.clusters.machine(NODE)?)?;
        self.renewed()?;
        self.admitted()?;
        self.refused()?;
        self.table.begin("Cilium stopped");
        cilium::stop(self.clusters.cluster(CLUSTER)?, self.clusters.machine(NODE)?)?;
        self.renewed()?;
        self.wait_all()
    }

    /// Another pod on the node.
    fn renewed(&self) -> Result<()> {
        pods::renew(self.clusters.cluster(CLUSTER)?, NODE)
    }

    /// What is admitted passes, and nothing else: a pod of the same cluster is not answered any more. As it is applied,
    /// Cilium denies a packet or two of what it admits (its drops of reason 133), and none after.
    fn admitted(&mut self) -> Result<()> {
        let range = self.clusters_pods("mn")?;
        self.under_load("a network policy applied that admits the other member's pods", Price::Any, |demo| {
            apply(demo.clusters.cluster(CLUSTER)?, &range)?;
            let (pod, neighbour) = (demo.pod(CLUSTER, 2)?, demo.pod(CLUSTER, 1)?);
            up::wait("the policy to be enforced", &[], || {
                ensure!(ping(&neighbour.network, pod.ip, 1)?.none_answered(), "a neighbour is answered");
                Ok(())
            })?;
            demo.wait_all()
        })?;
        self.under_load("while that policy is in force", Price::Nothing, |demo| {
            sleep(WHILE);
            demo.wait_all()
        })
    }

    fn refused(&mut self) -> Result<()> {
        let name = "a network policy that admits others: arrived of 2 x 1 kHz UDP";
        self.table.begin(name);
        let (va, mn) = (self.pod(CLUSTER, 2)?, self.pod("mn", 2)?);
        let start = || -> Result<[Flow; 2]> {
            let there = Flow::start(&mn.network, &va.network, (va.ip, 0).into(), INTERVAL)?;
            Ok([there, Flow::start(&va.network, &mn.network, (mn.ip, 0).into(), INTERVAL)?])
        };
        let flows = start()?;
        let answered = |flows: &[Flow]| flows.iter().map(Flow::answered).collect::<Vec<_>>();
        let all = |flows: &[Flow]| if answered(flows).contains(&0) { Err("no".to_owned()) } else { Ok(()) };
        wait_for("answers", CONNECT_LIMIT, || all(&flows))?;
        apply(self.clusters.cluster(CLUSTER)?, NOBODY)?;
        wait_silent(&flows)?;
        for flow in flows {
            flow.stop()?;
        }
        let flows = start()?;
        sleep(AROUND);
        self.wait_all()?;
        let arrived: u64 = answered(&flows).iter().sum();
        self.table.hold(name, arrived == 0, arrived, "packets");
        self.table.begin("the network policy deleted: answered after");
        let cluster = self.clusters.cluster(CLUSTER)?;
        let called = Instant::now();
        cluster.kubectl(&["-n", pods::NAMESPACE, "delete", "networkpolicy", POLICY], "")?;
        wait_for("answers", CONNECT_LIMIT, || all(&flows))?;
        let milliseconds = tenths(called.elapsed().as_secs_f64() * 1e3);
        for flow in flows {
            flow.stop()?;
        }
        self.table.hold(self.table.step(), true, milliseconds, "ms");
        Ok(())
    }

    fn clusters_pods(&self, cluster: &str) -> Result<String> {
        let ranges = self.ranges(|name| name == cluster)?;
        Ok(ranges.iter().find(|range| range.is_ipv4()).context("a cluster without IPv4 pods")?.to_string())
    }
}

const POLICY: &str = "talk";

/// Of all pods of the demo: they may talk with that range and nothing else.
fn apply(cluster: &Cluster, range: &str) -> Result<()> {
    let policy = format!(
        r#"
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {{name: {POLICY}, namespace: {}}}
spec:
  podSelector: {{}}
  policyTypes: [Ingress, Egress]
  ingress: [{{from: [{{ipBlock: {{cidr: {range}}}}}]}}]
  egress: [{{to: [{{ipBlock: {{cidr: {range}}}}}]}}]
"#,
        pods::NAMESPACE
    );
    cluster.kubectl(&["apply", "-f", "-"], &policy).map(drop)
}
