//! One file per subcommand; each is plan and diff with other ends.

mod cleanup;
mod drain;
mod export;
mod keys;
mod kubectl;
mod plan;
mod status;
mod validate;

use std::{io::IsTerminal, process::ExitCode};

use anyhow::Context;
use nix::sys::prctl::set_dumpable;
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::{
    agent,
    args::{self, Called, Command, Format, LogFormat, PluginCommand},
    kubectl::Question,
    source,
    tunnel::{self, TunnelOptions},
};

/// Runs the command. Exit code 0: done and well; 1: failed, or the answer is no; 2: the call's words are off.
pub fn main(called: Called) -> ExitCode {
    let answer = match called {
        Called::Carrick(args) => {
            start_logs(args.log_format);
            // Whoever runs holds keys.
            if let Err(error) = set_dumpable(false) {
                tracing::warn!("a crash may write keys into a core dump: {error}");
            }
            run(args.command)
        }
        Called::Plugin(plugin) => {
            start_logs(LogFormat::Human);
            run_plugin(plugin.command)
        }
    };
    match answer {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("carrick: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> anyhow::Result<bool> {
    match command {
        Command::Agent(node) => block_on(async { Ok(agent::run(node, shutdown()?).await.map(|()| true)?) }),
        Command::Tunnel(args) => run_tunnel(args),
        Command::Drain(args) => block_on(drain::run(args)),
        Command::Status(args) => block_on(status::run(args)),
        Command::Plan(args) => block_on(plan::run(args)),
        Command::Keys(args) => keys::run(args),
        Command::Validate(args) => block_on(validate::run(args)),
        Command::Export(args) => block_on(export::run(args)),
        Command::Cleanup(args) => block_on(async { cleanup::run(args, shutdown()?).await }),
    }
}

fn run_plugin(command: PluginCommand) -> anyhow::Result<bool> {
    match command {
        PluginCommand::Status(args) => kubectl::run(Question::Status, &args),
        PluginCommand::Plan(args) => kubectl::run(Question::Plan, &args),
        PluginCommand::Export(args) => run(Command::Export(args)),
        PluginCommand::Validate(args) => run(Command::Validate(args)),
        PluginCommand::Keys(args) => block_on(keys::run_secret(args)),
    }
}

fn run_tunnel(args: args::Tunnel) -> anyhow::Result<bool> {
    let options = TunnelOptions { run_dir: args.run_dir, ..TunnelOptions::default() };
    let runtime = tunnel::runtime(None).context("cannot start the runtime")?;
    runtime.block_on(async { Ok(tunnel::serve(options, shutdown()?).await.map(|()| true)?) })
}

/// Runs on one thread: the agent is a loop, and its memory is counted.
fn block_on(work: impl Future<Output = anyhow::Result<bool>>) -> anyhow::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.context("cannot start the runtime")?;
    let answer = runtime.block_on(work);
    // A name look-up may still hang in the resolver.
    runtime.shutdown_background();
    answer
}

/// Resolves at SIGINT or SIGTERM.
fn shutdown() -> anyhow::Result<impl Future<Output = ()>> {
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot catch SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot catch SIGTERM")?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

/// RUST_LOG can ask for anything but what the tunnel's library says of keys, and what our problems say already.
fn start_logs(format: LogFormat) {
    let wanted = EnvFilter::builder().with_default_directive(tracing::Level::INFO.into()).from_env_lossy();
    let caps = source::LOG_CAPS.into_iter().chain([tunnel::LOG_CAP]);
    let capped = caps.fold(wanted, |wanted, cap| wanted.add_directive(cap.parse().expect("a directive")));
    let colours = std::io::stderr().is_terminal();
    let logs = tracing_subscriber::fmt().with_env_filter(capped).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Human => logs.with_target(false).init(),
        LogFormat::Json => logs.json().init(),
    }
}

/// Prints an answer in the form that was asked for.
fn print(format: Format, answer: &impl Serialize, table: impl FnOnce() -> String) -> anyhow::Result<()> {
    match format {
        Format::Table => print!("{}", table()),
        Format::Json => println!("{}", serde_json::to_string_pretty(answer)?),
        Format::Yaml => print!("{}", serde_saphyr::to_string(answer)?),
    }
    Ok(())
}
