//! What a fault costs: numbered UDP at 1 kHz both ways and one TCP stream run through it, and their loss is counted.

use std::{net::IpAddr, thread::sleep, time::Duration};

use ::lab::{
    Namespace, Pod,
    traffic::{
        stream::Stream,
        udp::{Flow, Report},
    },
    wait_for,
};
use anyhow::Result;

use super::{CONNECT_LIMIT, INTERVAL, say, table::Table};

/// How long traffic runs before and after a fault.
pub const AROUND: Duration = Duration::from_secs(2);

/// What a fault may cost.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Price {
    Nothing,
    /// What was on its way: where nothing is lost, the fault did not meet the traffic. It must go on by itself.
    Some,
    /// Either.
    Any,
}

impl Price {
    fn allows(self, lost: u64) -> bool {
        match self {
            Price::Nothing => lost == 0,
            Price::Some => lost > 0,
            Price::Any => true,
        }
    }
}

/// Where traffic comes from or goes to.
#[derive(Clone, Copy, Debug)]
pub struct End<'a> {
    pub network: &'a Namespace,
    pub ip: IpAddr,
}

impl End<'_> {
    /// A pod of the lab, by its first address.
    pub fn of(pod: &Pod) -> End<'_> {
        End { network: &pod.host, ip: pod.ip() }
    }
}

/// Running traffic between two ends.
#[derive(Debug)]
pub struct Load {
    flows: [Flow; 2],
    stream: Stream,
}

impl Load {
    /// Returns once all of it arrives.
    pub fn start(a: End<'_>, b: End<'_>) -> Result<Load> {
        let flow = |from: End<'_>, to: End<'_>| Flow::start(from.network, to.network, (to.ip, 0).into(), INTERVAL);
        let stream = Stream::start(a.network, b.network, (b.ip, 0).into())?;
        let load = Load { flows: [flow(a, b)?, flow(b, a)?], stream };
        load.goes_on()?;
        Ok(load)
    }

    /// Waits until it goes on, and says in the table what `name` cost.
    pub fn end(self, table: &mut Table, name: &str, price: Price) -> Result<()> {
        self.goes_on()?;
        sleep(AROUND);
        let Load { flows, stream } = self;
        let reports = flows.into_iter().map(Flow::stop).collect::<Result<Vec<_>>>()?;
        let stream = stream.stop();
        let lost: u64 = reports.iter().map(|report| report.back.lost).sum();
        let gap = reports.iter().map(|report| report.back.longest_gap_ms).max().unwrap_or_default();
        for Report { sent, refused, there, .. } in &reports {
            say(&format!(
                "of {sent} sent, {refused} were refused at once and {} did not arrive",
                there.lost.saturating_sub(*refused)
            ));
        }
        stream.failure.iter().for_each(|failure| say(failure));
        table.hold(format!("{name}: lost of 2 x 1 kHz UDP"), price.allows(lost), lost, "packets");
        table.hold(format!("{name}: longest gap"), true, gap, "ms");
        table.hold(format!("{name}: longest stall of a TCP stream"), stream.survived(), stream.longest_stall_ms, "ms");
        Ok(())
    }

    fn goes_on(&self) -> Result<()> {
        let now = || (self.flows.iter().map(Flow::answered).collect::<Vec<_>>(), self.stream.arrived());
        let (before, arrived) = now();
        wait_for("traffic to go on", CONNECT_LIMIT, || {
            let (flows, bytes) = now();
            let on = flows.iter().zip(&before).all(|(now, before)| *now > before + 1000) && bytes > arrived;
            if on { Ok(()) } else { Err(format!("from {before:?}, {arrived} to {flows:?}, {bytes}")) }
        })
    }
}
