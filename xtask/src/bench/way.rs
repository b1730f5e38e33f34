//! Which way packets take between two members, as the gateways' own counters show it.
//!
//! What leaves by device j goes to the other member's slot j, so the sender's gateway and device are the whole way.

use std::{collections::BTreeMap, fs, thread::sleep, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::topology::Cluster;

/// How the links of WireGuard devices begin; the rest is the remote slot.
pub const DEVICE: &str = "carrick-wg";

/// One direction between two members.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Way {
    /// The slot of the sender's gateway.
    pub from: u8,
    /// The slot of the receiver's.
    pub to: u8,
}

/// Packets that were sent, by way.
pub type Sent = BTreeMap<Way, u64>;

/// What a member's gateways have sent so far.
pub fn sent(cluster: &Cluster) -> Result<Sent> {
    let mut sent = Sent::new();
    for (node, from) in cluster.gateways() {
        // That of the thread which asks: it is in the node's network namespace.
        let path = "/proc/thread-self/net/dev";
        let text = node.host.run(|| fs::read_to_string(path).context(path))?;
        sent.extend(transmitted(&text).into_iter().map(|(to, packets)| (Way { from, to }, packets)));
    }
    Ok(sent)
}

/// The ways by which the two members send to each other now, there and back: those that most packets take within `time`.
/// Something must send at least `packets` in each direction meanwhile.
pub fn taken(members: [&Cluster; 2], time: Duration, packets: u64) -> Result<[Way; 2]> {
    let look = || Ok::<_, anyhow::Error>([sent(members[0])?, sent(members[1])?]);
    let before = look()?;
    sleep(time);
    let after = look()?;
    let mut ways = [Way { from: 0, to: 0 }; 2];
    for (i, cluster) in members.iter().enumerate() {
        let (way, count) =
            busiest(&before[i], &after[i]).with_context(|| format!("{}: no device", cluster.member.name))?;
        ensure!(count >= packets, "{}: {count} packets by its busiest way, not {packets}", cluster.member.name);
        ways[i] = way;
    }
    Ok(ways)
}

fn busiest(before: &Sent, after: &Sent) -> Option<(Way, u64)> {
    let more = |(way, count): (&Way, &u64)| (*way, count.saturating_sub(before.get(way).copied().unwrap_or(0)));
    after.iter().map(more).max_by_key(|(_, count)| *count)
}

/// The tenth column of proc_pid_net(5) `dev`, of our devices, by remote slot.
pub fn transmitted(text: &str) -> BTreeMap<u8, u64> {
    let device = |line: &str| {
        let (name, columns) = line.split_once(':')?;
        let slot = name.trim().strip_prefix(DEVICE)?.parse().ok()?;
        Some((slot, columns.split_whitespace().nth(9)?.parse().ok()?))
    };
    text.lines().filter_map(device).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET_DEV: &str = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100      10    0    0    0     0          0         0      100      11    0    0    0     0       0          0
carrick-wg0:    200      20    0    0    0     0          0         0      200      21    0    0    0     0       0          0
carrick-wg1:    300      30    0    0    0     0          0         0      300      31    0    0    0     0       0          0
";

    #[test]
    fn sent_packets_are_read_by_device() {
        assert_eq!(transmitted(NET_DEV), BTreeMap::from([(0, 21), (1, 31)]));
    }

    #[test]
    fn the_busiest_way_is_that_of_most_new_packets() {
        let way = |from, to| Way { from, to };
        let before = Sent::from([(way(0, 0), 1000), (way(0, 1), 5)]);
        let after = Sent::from([(way(0, 0), 1002), (way(0, 1), 10), (way(1, 0), 4)]);
        assert_eq!(busiest(&before, &after), Some((way(0, 1), 5)));
        assert_eq!(busiest(&after, &Sent::new()), None);
    }
}
