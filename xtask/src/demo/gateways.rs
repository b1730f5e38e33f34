//! What members of three nodes and two gateways show beyond those of one node: any pod reaches any pod, both gateways
//! carry, and what each fault costs under 1 kHz numbered UDP and one TCP stream.

use std::{fs, thread::sleep};

use ::lab::{
    Carrick, Mesh, Node, Pod,
    carrick::{DEVICES, Running, TUNNEL_PORT},
    faults::{Fault, Traffic},
    traffic::udp::Flow,
    watch::sum,
};
use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use super::{
    Demo,
    load::{AROUND, End, Load, Price},
    rows,
};
use crate::bench::way;

impl<'a> Demo<'a> {
    /// All of it. `running` is by node, in the lab's order, and what runs at the end.
    pub(super) fn gateways(&mut self, mesh: &Mesh, running: &mut [Running]) -> Result<()> {
        self.workers()?;
        self.shares()?;
        let watch = self.lab.watch()?;
        self.node_off(mesh, running)?;
        self.link_cut()?;
        self.drain(mesh, running)?;
        self.restart("agents restarted", self.carrick.clone(), mesh, running)?;
        let second = self.second_build()?;
        self.restart("agents upgraded to a second build", second, mesh, running)?;
        self.tunnels_down(running)?;
        let seen = sum(&watch.stop()?);
        let name = "uplinks of all nodes: clear text for a remote range, faults and all tunnels down included";
        rows::clear_text(&mut self.table, name, &seen);
        Ok(())
    }

    fn workers(&mut self) -> Result<()> {
        self.table.begin("workers");
        for [(from, client), (to, server)] in [[("mn", 2), ("va", 2)], [("va", 2), ("mn", 2)]] {
            let ends = [End::of(self.pod(from, client)?), End::of(self.pod(to, server)?)];
            rows::page(&mut self.table, &format!("worker pod of {from} to worker pod of {to}"), ends)?;
        }
        Ok(())
    }

    /// Packets of the tunnel on each gateway's uplink, while pods of all nodes talk.
    fn shares(&mut self) -> Result<()> {
        self.table.begin("packets per gateway");
        let watch = self.lab.watch()?;
        let pairs = [("mn", "va"), ("va", "mn")].into_iter().flat_map(|(a, b)| (0..3).map(move |n| (a, b, n)));
        let start = |(from, to, n)| Flow::between(self.pod(from, n)?, self.pod(to, 2 - n)?);
        let flows = pairs.map(start).collect::<Result<Vec<_>>>()?;
        sleep(AROUND);
        flows.into_iter().try_for_each(|flow| flow.stop().map(drop))?;
        let seen = watch.stop()?;
        for (_, node) in self.lab.nodes().filter(|(_, node)| node.slot.is_some()) {
            let packets = seen[node.host.name()].tunnel;
            self.table.hold(
                format!("packets of the tunnel by gateway {}", node.host.name()),
                packets > 0,
                packets,
                "packets",
            );
        }
        Ok(())
    }

    fn node_off(&mut self, mesh: &Mesh, running: &mut [Running]) -> Result<()> {
        let off = self.under_traffic("a gateway node off", Price::Some, |demo| {
            let [node, _] = demo.way()?;
            demo.lab.power_off(node)?;
            Ok(node)
        })?;
        self.lab.power_on(off)?;
        self.start_again(off, mesh, running)
    }

    fn link_cut(&mut self) -> Result<()> {
        let cut = self.under_traffic("a link between two gateways cut", Price::Some, |demo| {
            let [ours, theirs] = demo.way()?;
            demo.lab.cut(ours, theirs, &tunnels())
        })?;
        cut.into_iter().try_for_each(Fault::mend)?;
        self.all_connected()
    }

    fn drain(&mut self, mesh: &Mesh, running: &mut [Running]) -> Result<()> {
        let drained = self.under_traffic("a gateway drained and stopped", Price::Nothing, |demo| {
            let [node, _] = demo.way()?;
            demo.carrick.drain(node)?;
            let Running { agent, tunnel } = &mut running[demo.place(node)?];
            for process in [agent].into_iter().chain(tunnel) {
                process.signal(Signal::SIGTERM)?;
                process.wait()?;
            }
            Ok(node)
        })?;
        self.start_again(drained, mesh, running)
    }

    fn restart(&mut self, name: &'static str, carrick: Carrick, mesh: &Mesh, running: &mut [Running]) -> Result<()> {
        self.under_traffic(name, Price::Nothing, |demo| {
            for ((member, node), Running { agent, .. }) in demo.lab.nodes().zip(running) {
                agent.signal(Signal::SIGKILL)?;
                agent.wait()?;
                *agent = carrick.start_agent(member, node, mesh)?;
            }
            demo.all_connected()
        })
    }

    /// The agents are stopped, so that nobody repairs it: the links are cut, then the tunnels killed.
    fn tunnels_down(&mut self, running: &mut [Running]) -> Result<()> {
        self.table.begin("all tunnels down");
        let flow = Flow::between(self.pod("va", 2)?, self.pod("mn", 2)?)?;
        let mut cuts = Vec::new();
        for (ours, theirs) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            cuts.extend(self.lab.cut(self.node("mn", ours)?, self.node("va", theirs)?, &tunnels())?);
        }
        sleep(AROUND);
        for Running { agent, tunnel } in running.iter_mut() {
            agent.signal(Signal::SIGSTOP)?;
            if let Some(tunnel) = tunnel {
                tunnel.signal(Signal::SIGKILL)?;
                tunnel.wait()?;
            }
        }
        let answered = flow.answered();
        sleep(AROUND);
        let through = flow.answered() - answered;
        flow.stop()?;
        self.table.hold("all tunnels down: packets that get through", through == 0, through, "packets");
        cuts.into_iter().try_for_each(Fault::mend)?;
        for ((_, node), running) in self.lab.nodes().zip(running.iter_mut()) {
            running.agent.signal(Signal::SIGCONT)?;
            running.tunnel = node.slot.map(|_| self.carrick.start_tunnel(node)).transpose()?;
        }
        self.all_connected()
    }

    /// Does something while two workers' pods talk, and says what it cost.
    fn under_traffic<T>(
        &mut self,
        name: &'static str,
        price: Price,
        fault: impl FnOnce(&Self) -> Result<T>,
    ) -> Result<T> {
        self.table.begin(name);
        // The gateways' own pods are left out: what lives on a node that goes off is gone with it.
        let load = Load::start(End::of(self.pod("va", 2)?), End::of(self.pod("mn", 2)?))?;
        let done = fault(self)?;
        load.end(&mut self.table, name, price)?;
        Ok(done)
    }

    /// The gateways of `mn` and `va` by which most packets of the traffic go: what fails there costs something.
    fn way(&self) -> Result<[&'a Node; 2]> {
        let [way, _] = way::taken([self.lab.cluster("mn")?, self.lab.cluster("va")?], AROUND / 4, 100)?;
        // The slots of a member are its first nodes.
        Ok([self.node("mn", way.from.into())?, self.node("va", way.to.into())?])
    }

    fn start_again(&self, node: &Node, mesh: &Mesh, running: &mut [Running]) -> Result<()> {
        let at = self.place(node)?;
        running[at].wait_gone()?;
        let (member, node) = self.lab.nodes().nth(at).context("a node")?;
        running[at] = self.carrick.start(member, node, mesh)?;
        self.all_connected()
    }

    /// Until every node of both members says so, of every way.
    pub(super) fn all_connected(&self) -> Result<()> {
        self.carrick.wait_whole(&self.lab.clusters)
    }

    /// Another file with the program in it: what an upgrade runs, unless one was given.
    fn second_build(&self) -> Result<Carrick> {
        if let Some(path) = self.upgrade {
            return Carrick::new(path);
        }
        let copy = self.lab.dir("carrick-second");
        fs::copy(self.carrick.path(), &copy).with_context(|| format!("copy to {}", copy.display()))?;
        Carrick::new(&copy)
    }

    /// Of a node in the lab's order.
    fn place(&self, node: &Node) -> Result<usize> {
        let name = node.host.name();
        self.lab.nodes().position(|(_, other)| other.host.name() == name).with_context(|| format!("no node {name}"))
    }

    fn node(&self, member: &str, number: usize) -> Result<&'a Node> {
        self.lab.cluster(member)?.nodes.get(number).with_context(|| format!("node {number} of {member}"))
    }

    fn pod(&self, member: &str, number: usize) -> Result<&'a Pod> {
        self.node(member, number)?.pods.first().context("a pod")
    }
}

fn tunnels() -> Traffic {
    Traffic::Udp(TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1)
}
