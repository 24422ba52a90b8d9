//! `stencil`: the server (`stencil serve`) and the commands of a client.
//!
//! ```text
//! main ── args ──┬── serve ────── engine behind a socket, until a signal
//!                ├── doctor ───── what this host can do, asked of nobody
//!                ├── pager ────── beside one VMM, until that ends
//!                └── commands ─── one call to the server each ── output: a table for people, JSON for programs
//! ```
//!
//! Exit codes: 0 it was done, 1 it was refused or failed, 2 the command line was not understood; of `exec` that of the command.

mod args;
mod commands;
mod doctor;
mod failure;
mod input;
mod output;
mod pager;
mod place;
mod serve;
mod table;
mod terminal;

use std::process::ExitCode;

use clap::Parser;

use crate::args::{Args, Command};
use crate::failure::Failure;

fn main() -> ExitCode {
    let args = Args::parse();
    let json = args.json;
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            failure.report(json);
            ExitCode::from(failure.code())
        }
    }
}

fn run(args: Args) -> Result<(), Failure> {
    match args.command {
        Command::Serve(asked) => serve::run(asked, args.server.socket),
        Command::Doctor(asked) => doctor::run(asked, args.json),
        Command::Pager(asked) => pager::run(asked),
        Command::Client(asked) => commands::run(asked, args.server, args.json),
    }
}
