//! Two members, `mn` in public and `va` behind NAT, joined by the program as it ships.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    net::{IpAddr, SocketAddr},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result};
use lab::{
    Carrick, Lab, Member, Mesh, Node, Process,
    capture::{Capture, Expected},
    carrick::{DEVICES, HOP_PORT, Running, TUNNEL_PORT, snapshot},
    traffic::ping::ping,
    wait_for,
};
use serde_json::Value;

pub(crate) const PORT: u16 = 8080;
pub(crate) const MILLISECOND: Duration = Duration::from_millis(1);
/// Well below the agent's timer of 30 s: what happens within it was done because of an event.
pub(crate) const SOON: Duration = Duration::from_secs(15);
pub(crate) const CONNECT_LIMIT: Duration = Duration::from_secs(60);

/// The lab, with the program running on both nodes.
pub(crate) struct Joined<'a> {
    pub(crate) lab: &'a mut Lab,
    pub(crate) carrick: Carrick,
    pub(crate) mesh: Mesh,
    pub(crate) running: BTreeMap<String, Running>,
}

/// The built program: `cargo xtask test` names it.
pub(crate) fn carrick() -> Result<Carrick> {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/release/carrick");
    let binary = env::var_os("CARRICK_BIN").map_or_else(built, Into::into);
    Carrick::new(&binary).context("the program under test: `cargo build --release -p agent`, or run `cargo xtask test`")
}

/// Runs a test between two connected members.
pub(crate) fn joined(name: &str, test: impl FnOnce(&mut Joined<'_>) -> Result<()>) {
    prepared(name, &Member::pair(), |joined| {
        joined.start()?;
        joined.connected()?;
        test(joined)
    });
}

/// Runs a test between members whose folder is written and whose program does not run yet.
pub(crate) fn prepared(name: &str, members: &[Member], test: impl FnOnce(&mut Joined<'_>) -> Result<()>) {
    let result = Lab::with(name, members, |lab| {
        let carrick = carrick()?;
        let mesh = carrick.write_mesh(lab)?;
        test(&mut Joined { lab, carrick, mesh, running: BTreeMap::new() })
    });
    result.unwrap_or_else(|error| panic!("{error:?}"));
}

impl Joined<'_> {
    pub(crate) fn node(&self, member: &str) -> Result<&Node> {
        self.lab.node(member)
    }

    pub(crate) fn member(&self, name: &str) -> Result<&Member> {
        Ok(&self.lab.cluster(name)?.member)
    }

    /// Starts tunnel and agent on every node.
    pub(crate) fn start(&mut self) -> Result<()> {
        for (member, node) in self.lab.nodes() {
            self.running.insert(member.name.clone(), self.carrick.start(member, node, &self.mesh)?);
        }
        Ok(())
    }

    /// Waits until `mn` and `va` each say that they are connected to the other.
    pub(crate) fn connected(&self) -> Result<()> {
        self.carrick.wait_connected(self.node("mn")?, &["va"], CONNECT_LIMIT)?;
        self.carrick.wait_connected(self.node("va")?, &["mn"], CONNECT_LIMIT)?;
        Ok(())
    }

    pub(crate) fn kill_agent(&mut self, member: &str) -> Result<()> {
        let Running { tunnel, agent } = self.running.remove(member).context("it runs")?;
        agent.kill()?;
        // Its tunnel goes on until the lab ends.
        tunnel.into_iter().for_each(Process::detach);
        Ok(())
    }

    pub(crate) fn start_agent(&self, member: &str) -> Result<Process> {
        self.carrick.start_agent(self.member(member)?, self.node(member)?, &self.mesh)
    }

    /// What the agent says, ready or not.
    pub(crate) fn status(&self, member: &str) -> Result<Value> {
        let text = self.shell(member, &format!("{} status -o json || true", self.carrick.path().display()))?;
        serde_json::from_str(&text).with_context(|| format!("{member}: carrick status -o json: {text:?}"))
    }

    /// Waits until the agent's status is so.
    pub(crate) fn wait_status(&self, member: &str, what: &str, so: impl Fn(&Value) -> bool) -> Result<Value> {
        wait_for(&format!("{member} to say {what}"), SOON, || {
            let status = self.status(member).map_err(|error| format!("{error:#}"))?;
            if so(&status) { Ok(status) } else { Err(status.to_string()) }
        })
    }

    pub(crate) fn shell(&self, member: &str, script: &str) -> Result<String> {
        self.node(member)?.host.output("sh", &["-c", script])
    }

    /// Runs the program where it must fail, and returns what it said.
    pub(crate) fn refused(&self, member: &str, wrapper: &str, arguments: &str) -> Result<String> {
        let carrick = self.carrick.path().display();
        self.shell(member, &format!("if {wrapper} {carrick} {arguments} 2>&1; then echo IT DID NOT FAIL; exit 1; fi"))
    }

    /// Whether the first pod of one member reaches the first pod of the other, in each family.
    pub(crate) fn reaches(&self, from: &str, to: &str) -> Result<[bool; 2]> {
        let (from, to) = (&self.node(from)?.pods[0], &self.node(to)?.pods[0]);
        let answers = |address: IpAddr| Ok::<_, anyhow::Error>(ping(&from.host, address, 2)?.all_answered());
        Ok([answers(to.addresses[0])?, answers(to.addresses[1])?])
    }

    pub(crate) fn wait_reaches(&self, from: &str, to: &str) -> Result<()> {
        wait_for(&format!("a pod of {from} to reach one of {to}"), SOON, || {
            match self.reaches(from, to).map_err(|error| format!("{error:#}"))? {
                [true, true] => Ok(()),
                answers => Err(format!("answers in IPv4, IPv6: {answers:?}")),
            }
        })
    }

    pub(crate) fn pod_address(&self, member: &str) -> Result<SocketAddr> {
        Ok((self.node(member)?.pods[0].ip(), PORT).into())
    }

    /// What passes on the internet's end of a member's uplink.
    pub(crate) fn capture(&self, member: &str) -> Result<Capture> {
        let expected = Expected {
            tunnel: TUNNEL_PORT..=TUNNEL_PORT + DEVICES - 1,
            hop: HOP_PORT,
            private: self.lab.clusters.iter().flat_map(|cluster| cluster.member.allowed_ranges()).collect(),
        };
        Capture::start(&self.lab.internet, &self.lab.cluster(member)?.uplink, expected)
    }

    /// What is configured on a node's network, link numbers and flags that change by themselves left out.
    pub(crate) fn network(&self, member: &str) -> Result<BTreeSet<String>> {
        let lines = snapshot(self.node(member)?)?.into_iter();
        let (links, mut others): (Vec<_>, Vec<_>) = lines.partition(|line| line.starts_with("ip -o"));
        let says_nothing = |line: &String| {
            ["find ", "nft --stateless list ruleset:  (", "nft --stateless list ruleset: } ("]
                .iter()
                .any(|start| line.starts_with(start))
        };
        others.retain(|line| !says_nothing(line));
        let without_number = |line: &String| match line.splitn(3, ": ").collect::<Vec<_>>()[..] {
            [command, _, rest] => Some(format!("{command}: {rest}")),
            _ => None,
        };
        let ours = links.iter().filter(|line| line.contains("carrick-wg"));
        others.extend(ours.filter_map(without_number));
        Ok(others.into_iter().collect())
    }

    /// Waits until the network of a node is as it was.
    pub(crate) fn wait_network(&self, member: &str, before: &BTreeSet<String>, why: &str) -> Result<()> {
        wait_for(&format!("{member}'s network to be as it was: {why}"), SOON, || {
            let now = self.network(member).map_err(|error| format!("{error:#}"))?;
            let difference = lab::carrick::difference(before, &now);
            if difference.is_empty() { Ok(()) } else { Err(difference.join("\n")) }
        })
    }
}

/// Whether a list of the status has an entry with that text.
pub(crate) fn says(status: &Value, list: &str, text: &str) -> bool {
    let entries = status[list].as_array().map_or(&[][..], Vec::as_slice);
    entries.iter().any(|entry| entry.as_str().is_some_and(|entry| entry.contains(text)))
}
