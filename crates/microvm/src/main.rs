//! `stencil-microvm`: one process, one VM. See the library for what it serves.

mod log;

use std::env;
use std::panic;
use std::process;
use std::process::ExitCode;

use log::Log;
use stencil_core::error_chain;
use stencil_microvm::{ApiSocket, VERSION, serve};
use tracing_subscriber::filter::{LevelFilter, Targets};

const USAGE: &str = "usage: stencil-microvm --api-socket <path=PATH | PATH | fd=N> | --version";

fn main() -> ExitCode {
    lean_allocator();
    // A session of its own: the VM outlives the terminal and the server that started it. It fails only where the
    // process leads a group already, and then it is cut off from neither.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "no session of its own");
    }
    // Each thread is needed: a VMM that has lost one must not look alive. The log has the message.
    let report = panic::take_hook();
    panic::set_hook(Box::new(move |panic| {
        report(panic);
        process::abort();
    }));
    let socket = match arguments(env::args().skip(1)) {
        Ok(Asked::Serve(socket)) => socket,
        Ok(Asked::Version) => {
            println!("stencil-microvm {VERSION}");
            return ExitCode::SUCCESS;
        }
        Err(wrong) => {
            eprintln!("stencil-microvm: {wrong}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    let filter = env::var("RUST_LOG")
        .ok()
        .and_then(|text| text.parse::<Targets>().ok());
    let log = Log::new(filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO)));
    if let Err(error) = tracing::subscriber::set_global_default(log) {
        eprintln!("stencil-microvm: there is no log: {error}");
    }
    match serve(&socket) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{}", error_chain(&error));
            ExitCode::FAILURE
        }
    }
}

/// One heap for all threads: none allocates where speed matters, and each heap of its own has memory that nobody else
/// uses, in every fork.
fn lean_allocator() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes any values, and no other thread runs yet. Where it refuses, all is as it was.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// What the command line asks for.
enum Asked {
    Serve(ApiSocket),
    Version,
}

fn arguments(mut words: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut socket = None;
    while let Some(word) = words.next() {
        let value = match word.as_str() {
            "--version" => return Ok(Asked::Version),
            "--api-socket" => words.next().ok_or("--api-socket needs a value")?,
            other => match other.strip_prefix("--api-socket=") {
                Some(value) => value.to_owned(),
                None => return Err(format!("unknown argument {other:?}")),
            },
        };
        socket = Some(value.parse::<ApiSocket>().map_err(|error| error.to_string())?);
    }
    socket
        .map(Asked::Serve)
        .ok_or_else(|| "--api-socket is missing".to_owned())
}
