//! `carrick`: the agent, the tunnel, and what an operator asks of them.

use std::process::ExitCode;

fn main() -> ExitCode {
    agent::cli::main(agent::args::Called::read())
}
