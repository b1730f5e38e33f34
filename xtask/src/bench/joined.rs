//! Two members of the lab that Carrick has joined, for as long as a benchmark needs them.

use std::{cell::RefCell, collections::BTreeMap, path::Path};

use anyhow::{Context, Result};
use lab::{
    Carrick, Lab, Member, Mesh, Node, Pod,
    carrick::{Running, WHOLE_LIMIT},
    guard::Guard,
    topology::Cluster,
    wait_for,
};

use super::traffic;
use crate::{lab::end_on_interrupt, process::check_interrupted};

/// Ends, with everything that runs in it, with this value.
#[derive(Debug)]
pub struct Joined {
    /// By node. Before the lab, so that nothing is waited for in namespaces that are gone.
    running: RefCell<BTreeMap<String, Running>>,
    pub lab: Lab,
    pub carrick: Carrick,
    mesh: Mesh,
}

impl Joined {
    /// Builds the members and starts Carrick on every node.
    pub fn new(name: &str, members: &[Member; 2], carrick: &Path) -> Result<Joined> {
        check_interrupted()?;
        let carrick = Carrick::new(carrick)?;
        let guard = Guard::unique(name)?;
        end_on_interrupt(&guard);
        let lab = Lab::build(guard, members)?;
        let mesh = carrick.write_mesh(&lab)?;
        let joined = Joined { running: RefCell::default(), lab, carrick, mesh };
        joined.lab.nodes().try_for_each(|(_, node)| joined.start(node.host.name()))?;
        Ok(joined)
    }

    pub fn clusters(&self) -> [&Cluster; 2] {
        [&self.lab.clusters[0], &self.lab.clusters[1]]
    }

    /// The gateway of a member, 0 or 1, with that slot.
    pub fn gateway(&self, member: usize, slot: u8) -> Result<&Node> {
        let cluster = self.clusters()[member];
        let found = cluster.gateways().find(|(_, held)| *held == slot);
        Ok(found.with_context(|| format!("{} has no slot {slot}", cluster.member.name))?.0)
    }

    /// The last node of a member: a worker, if it has any.
    pub fn last(&self, member: usize) -> Result<&Node> {
        let cluster = self.clusters()[member];
        cluster.nodes.last().with_context(|| format!("{} has no node", cluster.member.name))
    }

    pub fn node(&self, name: &str) -> Result<(&Member, &Node)> {
        self.lab.nodes().find(|(_, node)| node.host.name() == name).with_context(|| format!("no node {name}"))
    }

    /// Starts what runs on that node.
    pub fn start(&self, node: &str) -> Result<()> {
        let (member, found) = self.node(node)?;
        let running = self.carrick.start(member, found, &self.mesh)?;
        self.running.borrow_mut().insert(node.to_owned(), running);
        Ok(())
    }

    /// Ends in order what runs on that node.
    pub fn stop(&self, node: &str) -> Result<()> {
        let running = self.running.borrow_mut().remove(node).with_context(|| format!("{node} runs nothing"))?;
        running.terminate()
    }

    /// Ends the agent of that node in order, and starts another. The tunnel goes on.
    pub fn restart_agent(&self, node: &str) -> Result<()> {
        let Running { tunnel, agent } =
            self.running.borrow_mut().remove(node).with_context(|| format!("{node} runs nothing"))?;
        agent.terminate()?;
        let (member, found) = self.node(node)?;
        let agent = self.carrick.start_agent(member, found, &self.mesh)?;
        self.running.borrow_mut().insert(node.to_owned(), Running { tunnel, agent });
        Ok(())
    }

    /// Kills every agent. The tunnels go on.
    pub fn kill_agents(&self) -> Result<()> {
        for (_, Running { tunnel, agent }) in self.running.take() {
            agent.kill()?;
            // It ends with the lab.
            tunnel.into_iter().for_each(lab::Process::detach);
        }
        Ok(())
    }

    /// Forgets what ran on a node that was switched off.
    pub fn forget(&self, node: &str) {
        self.running.borrow_mut().remove(node);
    }

    /// Waits until every gateway is connected to every gateway of the other member, and probes have found every way: to each
    /// of them, and from every node by every gateway of its own.
    pub fn wait_connected(&self) -> Result<()> {
        check_interrupted()?;
        self.carrick.wait_whole(&self.lab.clusters)
    }

    /// Waits until a packet gets from one pod to the other, and its answer back.
    pub fn wait_reached(&self, from: &Pod, to: &Pod) -> Result<()> {
        let what = format!("an answer from {} to {}", to.host.name(), from.host.name());
        wait_for(&what, WHOLE_LIMIT, || {
            check_interrupted().map_err(|error| error.to_string())?;
            traffic::answers(&from.host, from.ip(), to.ip()).map_err(|error| format!("{error:#}"))
        })
    }
}
