//! `cargo xtask`: what can be done with this tree. One file a task, and what the tasks are made of:
//!
//! | module | role |
//! |---|---|
//! | `setup`, `demo`, `e2e`, `bench`, `ci` | the tasks |
//! | `host`, `build`, `guest` | what the host can do; the binaries and the test guest |
//! | `linux` | a small Linux guest, of Debian's packages and the agent |
//! | `hypervisor` | which one is driven, and what it can do |
//! | `server`, `processes` | a `stencil serve` of its own, and proof that nothing of it stays |
//! | `client`, `guest_console`, `arrivals` | talking to the server, to a guest, and seeing forks arrive |
//! | `vmm` | a VMM without a server |
//! | `command`, `interrupt` | running programs within a time limit; undoing things on Ctrl-C |
//! | `report` | telling what happened |
//!
//! Nothing here links a crate of Stencil: it drives the binaries from outside, as a user would.

mod armed;
mod arrivals;
mod bench;
mod build;
mod ci;
mod client;
mod command;
mod demo;
mod e2e;
mod guest;
mod guest_console;
mod host;
mod hypervisor;
mod interrupt;
mod linux;
mod processes;
mod report;
mod server;
mod setup;
mod vmm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// What can be done with this tree.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Checks what the host has, and installs what is missing (as root) or says how.
    Setup,
    /// Shows the main job on this host: a warm VM becomes a template, and the template many VMs.
    Demo(demo::Options),
    /// Builds a small Linux guest with the agent, and prints the options of `stencil create` that boot it.
    Linux,
    /// Drives the real binaries through every scenario.
    E2e(e2e::Options),
    /// Measures, and writes down what it found.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Runs all checks and tests.
    Ci,
}

/// Why a task could not be carried out. That a check of it failed is not among them.
#[derive(Debug, thiserror::Error)]
enum TaskError {
    #[error(transparent)]
    Setup(#[from] setup::SetupError),
    #[error(transparent)]
    Build(#[from] build::BuildError),
    #[error(transparent)]
    Command(#[from] command::CommandError),
    #[error(transparent)]
    Demo(#[from] demo::DemoError),
    #[error(transparent)]
    Bench(#[from] bench::BenchError),
    #[error(transparent)]
    Linux(#[from] linux::LinuxError),
    #[error("Linux guests cannot be run")]
    NoLinux(#[from] setup::NoLinux),
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::HypervisorError),
    #[error("could not keep what the tests say in a temporary file")]
    Scratch(#[source] std::io::Error),
    #[error("could not listen for Ctrl-C")]
    Interrupt(#[source] std::io::Error),
    #[error("could not write {}", path.display())]
    Write {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
}

/// The exit code for a host on which no VM can run, and for wrong usage.
const CANNOT_RUN: u8 = 2;

fn main() -> ExitCode {
    match run(&Cli::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{}", report::chain(&error));
            match error {
                TaskError::Setup(setup::SetupError::Host(_)) => ExitCode::from(CANNOT_RUN),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

/// Whether everything that the task checked holds.
fn run(task: &Task) -> Result<bool, TaskError> {
    interrupt::listen().map_err(TaskError::Interrupt)?;
    match task {
        Task::Setup => setup::run().map(|()| true).map_err(TaskError::from),
        Task::Demo(options) => demo::run(options),
        Task::Linux => linux::run().map(|()| true).map_err(TaskError::from),
        Task::E2e(options) => e2e::run(options),
        Task::Bench(bench) => bench::run(bench).map(|()| true),
        Task::Ci => ci::run(),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }
}
