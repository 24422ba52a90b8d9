//! The agent: the program inside a Linux guest that makes a fork another machine and runs commands in it.
//!
//! One thread, one loop: it waits for bytes from the host, for output of commands, for their ends and their times to be
//! over, and does what is due.
//!
//! | module | role |
//! |---|---|
//! | `agent` | the loop, and what each message of the host does |
//! | `link` | the stream to the host: read and written as far as it goes, never waited for |
//! | `place` | where the host is reached: a port, vsock, a socket |
//! | `sessions`, `session`, `command` | the commands that run, one of them, and how one is begun |
//! | `cgroups` | stops, lets go and kills the user's processes |
//! | `identity` | makes the guest the machine of an epoch |
//! | `renewal` | what the guest renews by itself in a new epoch: its own programs, and processes that ask to be told |
//! | `signals`, `button` | ends of child processes, and requests to end |
//! | `init` | what the first process of a machine has to do besides |
//! | `modules` | loads the image's kernel modules |

mod agent;
mod button;
mod cgroups;
mod command;
mod identity;
mod init;
mod link;
mod modules;
mod place;
mod renewal;
mod session;
mod sessions;
mod signals;

use std::error::Error;
use std::ffi::OsStr;
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use stencil_agent::archive::{self, ArchiveError, Notes};

use crate::agent::Agent;
use crate::cgroups::{CgroupError, Cgroups};
use crate::identity::Identity;
use crate::link::Link;
use crate::place::Place;
use crate::signals::Signals;

/// The agent of Stencil inside a Linux guest. As the first process of a machine it is its init, whatever its arguments are.
#[derive(Debug, Parser)]
#[command(name = "stencil-agent", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    archive: Option<Archive>,
    #[command(flatten)]
    service: Service,
}

#[derive(Debug, Subcommand)]
enum Archive {
    /// Writes a file or directory to standard output, as a tar archive in which it lies under its own name.
    Pack {
        /// What to write.
        path: PathBuf,
    },
    /// Unpacks a tar archive of one file or directory from standard input.
    Unpack {
        /// Where to: below it if it is a directory, else under this name. Nothing is there before all is.
        target: PathBuf,
    },
}

#[derive(Debug, Default, Args)]
struct Service {
    /// The port to the host; without it, the virtio-serial port of the right name, or else vsock.
    #[arg(long, value_name = "PATH", conflicts_with = "listen")]
    port: Option<PathBuf>,
    /// Listen on this Unix socket instead, for a host in the same machine.
    #[arg(long, value_name = "PATH")]
    listen: Option<PathBuf>,
    /// The cgroup (version 2) that holds everything of the user's; without it, all of the machine.
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// The kernel is not this guest's alone, as in a container: leave its randomness and its clock as they are.
    #[arg(long)]
    shared_kernel: bool,
}

fn main() -> ExitCode {
    let done = if rustix::process::getpid().is_init() {
        init::run().map(|()| ExitCode::SUCCESS)
    } else {
        let cli = Cli::parse();
        match cli.archive {
            Some(Archive::Pack { path }) => pack(&path).map_err(Into::into),
            Some(Archive::Unpack { target }) => unpack(&target).map_err(Into::into),
            None => serve(&cli.service).map(|()| ExitCode::SUCCESS),
        }
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            log(&error_chain(&*error));
            ExitCode::FAILURE
        }
    }
}

/// Writes `path` to standard output, under its own name.
fn pack(path: &Path) -> Result<ExitCode, ArchiveError> {
    // The host gives it the name that was asked for.
    let name = path.file_name().unwrap_or(OsStr::new("unnamed"));
    let out = BufWriter::with_capacity(64 << 10, io::stdout().lock());
    let notes = archive::pack(path, name, out)?;
    Ok(tell(&notes))
}

/// Unpacks standard input.
fn unpack(target: &Path) -> Result<ExitCode, ArchiveError> {
    let notes = archive::unpack(io::stdin().lock(), target, archive::From::Owner)?.keep()?;
    Ok(tell(&notes))
}

fn tell(notes: &Notes) -> ExitCode {
    for line in notes.lines() {
        eprintln!("{line}");
    }
    if notes.is_partial() {
        ExitCode::from(archive::PARTIAL)
    } else {
        ExitCode::SUCCESS
    }
}

/// Serves the host until a signal asks for the end.
fn serve(service: &Service) -> Result<(), Box<dyn Error>> {
    let signals = Signals::block()?;
    let place = match (&service.port, &service.listen) {
        (Some(port), _) => Place::port(port)?,
        (None, Some(socket)) => Place::socket(socket)?,
        (None, None) => Place::find()?,
    };
    let cgroups = join_cgroups(service.cgroup.as_deref());
    let identity = Identity::new(service.shared_kernel)?;
    log(&format!("waits for the host on {place}"));
    let mut agent = Agent::new(Link::new(place)?, signals, cgroups, identity);
    let ended = agent.run()?;
    if ended == agent::Ended::PowerOff {
        // The machine's own init ends what it began.
        std::process::Command::new("poweroff").spawn()?;
    }
    Ok(())
}

/// Goes into a cgroup of the agent's own. Without one it runs commands, and cannot freeze them.
fn join_cgroups(top: Option<&Path>) -> Result<Cgroups, CgroupError> {
    Cgroups::join(top).inspect_err(|error| log(&format!("cannot freeze processes: {}", error_chain(error))))
}

/// Says what happened, on standard error: the console where the agent is init, the journal where it is a service.
fn log(line: &str) {
    use std::io::Write;
    // Where nobody can be told, work goes on.
    let _ = writeln!(std::io::stderr(), "stencil-agent: {line}");
}

/// An error with all of its causes in one line.
fn error_chain(error: &dyn Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line = format!("{line}: {cause}");
        source = cause.source();
    }
    line
}
