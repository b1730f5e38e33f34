//! `cargo xtask lab`: members on this machine, by hand.

use std::{
    io::{Write, stdout},
    process::Command,
    sync::Arc,
    thread,
    time::Duration,
};

use ::lab::{
    Cni, Lab, Member,
    guard::{self, Guard, Record},
    host,
};
use anyhow::{Context, Result};
use clap::Subcommand;

use crate::process;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Makes a lab that stays until it is taken down.
    Up {
        /// Letters, digits, '-' and '_'.
        #[arg(default_value = "lab")]
        name: String,
        /// NAME:PODS, and :nat for a member behind NAT; may be repeated. The first gets id 1.
        #[arg(long = "member", default_values = ["mn:10.42.0.0/16", "va:10.44.0.0/16:nat"])]
        members: Vec<String>,
        /// Nodes of each member.
        #[arg(long, default_value_t = 1)]
        nodes: u8,
        /// Gateways of each member: its first nodes.
        #[arg(long, default_value_t = 1)]
        gateways: u8,
        /// Network plugin of each member: bridge, host-routing, skip-fib, fabric or strict.
        #[arg(long, default_value = "bridge")]
        cni: Cni,
    },
    /// Removes a lab: its processes, namespaces, links and files.
    Down {
        #[arg(default_value = "lab")]
        name: String,
    },
    /// Runs a shell, or a command, on a host of a lab.
    Enter {
        name: String,
        host: String,
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// Lists the labs and their hosts.
    List,
}

/// True: a lab that cannot be made is an error.
pub fn run(args: &Args) -> Result<bool> {
    match &args.command {
        Action::Up { name, members, nodes, gateways, cni } => {
            let shaped = |member| Member { nodes: *nodes, gateways: *gateways, cni: *cni, ..member };
            up(name, members, shaped)?;
        }
        Action::Down { name } => guard::down(name)?,
        Action::Enter { name, host, command } => enter(name, host, command)?,
        Action::List => guard::list()?.iter().try_for_each(print)?,
    }
    Ok(true)
}

/// From now on, an interrupt ends the lab and then this process, as a shell reports SIGINT. The thread that works in the
/// lab need not look: whatever it does there fails.
pub fn end_on_interrupt(guard: &Arc<Guard>) {
    on_interrupt(guard, Guard::end);
}

/// [`end_on_interrupt`], for what is more than a lab.
pub fn on_interrupt<T: Send + Sync + 'static>(made: &Arc<T>, end: impl Fn(&T) -> Result<()> + Send + 'static) {
    let made = Arc::downgrade(made);
    thread::spawn(move || {
        while let Some(made) = made.upgrade() {
            if process::interrupted() {
                eprintln!("interrupted: removing what was made");
                if let Err(error) = end(&made) {
                    eprintln!("{error:#}");
                }
                std::process::exit(130);
            }
            drop(made);
            thread::sleep(Duration::from_millis(20));
        }
    });
}

fn up(name: &str, members: &[String], shaped: impl Fn(Member) -> Member) -> Result<()> {
    let member = |(id, text): (u16, &String)| Ok(shaped(Member::parse(text, id)?));
    let members = (1..).zip(members).map(member).collect::<Result<Vec<_>>>()?;
    let guard = Guard::named(name)?;
    end_on_interrupt(&guard);
    let built = Lab::build(guard.clone(), &members).and_then(Lab::keep);
    // Kept, or being ended by an interrupt: then this waits.
    guard.end()?;
    built?;
    print(&guard::load(name)?)?;
    println!("\nenter a host:  cargo xtask lab enter {name} HOST\nremove it all: cargo xtask lab down {name}");
    Ok(())
}

fn enter(name: &str, host: &str, command: &[String]) -> Result<()> {
    let record = guard::load(name)?;
    let hosts = || record.hosts.iter().map(|host| host.name.as_str()).collect::<Vec<_>>().join(", ");
    let target = record.hosts.iter().find(|candidate| candidate.name == host);
    let target = target.with_context(|| format!("lab {name} has no host {host}; it has: {}", hosts()))?;
    let shell = || std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned());
    let mut program = match command {
        [] => Command::new(shell()),
        [program, arguments @ ..] => {
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
    };
    match host::enter(target, name, &mut program)? {}
}

/// Fails where nobody reads any more.
fn print(record: &Record) -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "{}", record.name)?;
    for host in &record.hosts {
        writeln!(out, "  {:<16} pid {:<8} {}", host.name, host.pid, host.addresses.join(" "))?;
    }
    Ok(())
}
