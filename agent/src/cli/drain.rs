//! `carrick drain`: asks the agent, then waits until nobody sends through this gateway any more.

use std::time::{Duration, Instant};

use anyhow::bail;
use tokio::time::sleep;

use super::status::ask;
use crate::{args, status::Drain, status_socket::Request};

/// How often it is asked whether it is done.
const POLL: Duration = Duration::from_millis(200);

pub(super) async fn run(args: args::Drain) -> anyhow::Result<bool> {
    if args.undo {
        ask(&args.run_dir, Request::Undrain).await?;
        println!("this gateway takes part again");
        return Ok(true);
    }
    let began = Instant::now();
    let mut status = ask(&args.run_dir, Request::Drain).await?;
    loop {
        match status.drain {
            Drain::NoGateway => bail!("this node is no gateway: nothing is sent through it"),
            Drain::Taking => bail!("somebody else has ended the draining"),
            Drain::Drained => {
                println!("drained after {:.1} s", began.elapsed().as_secs_f64());
                return Ok(true);
            }
            Drain::OverTime => {
                println!("still sent to after {:.0} s: is there another gateway?", began.elapsed().as_secs_f64());
                return Ok(false);
            }
            Drain::Draining => {}
        }
        sleep(POLL).await;
        status = ask(&args.run_dir, Request::Status).await?;
    }
}
