//! What the kernel's VXLAN alone adds to a round trip between two nodes: the floor of each hop.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::Result;
use lab::{Host, guard::Guard};

use super::{
    processor::OnOne,
    report::Measured,
    statistics::median,
    traffic::{self, Ends},
};
use crate::{lab::end_on_interrupt, process::check_interrupted};

/// Two nodes on one cable, and a VXLAN of two over it: round trips of each in turns.
pub fn measure(rounds: u32, round_trips: usize) -> Result<Measured> {
    let _one = OnOne::new()?;
    let guard = Guard::unique("vxlan")?;
    end_on_interrupt(&guard);
    let nodes = [Host::machine(&guard, "a")?, Host::machine(&guard, "b")?];
    nodes[0].ip(&format!("link add eth0 type veth peer name eth0 netns {}", nodes[1].pid()))?;
    for (node, [me, other]) in nodes.iter().zip([[1, 2], [2, 1]]) {
        let vxlan = format!("id 7 dstport 4789 local 192.0.2.{me} remote 192.0.2.{other} noudpcsum");
        node.ip(&format!(
            "addr add 192.0.2.{me}/24 dev eth0\nlink set eth0 up\nlink add vx0 type vxlan {vxlan}\n\
             addr add 198.51.100.{me}/24 dev vx0\nlink set vx0 up"
        ))?;
    }
    let ends = |[a, b, c]: [u8; 3]| -> Ends<'_> {
        let at = |last| IpAddr::from(Ipv4Addr::new(a, b, c, last));
        [(&nodes[0], at(1)), (&nodes[1], at(2))]
    };
    let pairs = [ends([198, 51, 100]), ends([192, 0, 2])];
    traffic::round_trips(&pairs, round_trips / 10)?;
    let mut added = Vec::new();
    for _ in 0..rounds {
        check_interrupted()?;
        let times = traffic::round_trips(&pairs, round_trips)?;
        let [by_vxlan, by_cable] = [0, 1].map(|at: usize| median(times[at].iter().map(|t| t.as_secs_f64() * 1e6)));
        added.push(by_vxlan - by_cable);
    }
    Ok(Measured::of_rounds("one hop by the kernel's VXLAN alone, round trip, added", added.into_iter(), "us"))
}
