//! The command line.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::PathBuf;

use clap::{Parser, Subcommand};
use stencil_api::memory_size::MemorySize;
use stencil_api::request::AddDisk;
use stencil_api::timeout::{TimeLimit, Timeout};
use stencil_core::{HypervisorName, ImageName, InstanceName, MemoryGeneration, MemoryMode, State};

/// Manages virtual machines that can be forked: warm one up, make it a template, and stamp out forks that go on from it
#[derive(Debug, Parser)]
#[command(
    name = "stencil",
    version,
    propagate_version = true,
    disable_help_subcommand = true
)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) server: ServerPlace,
    /// Print the API's JSON instead of tables
    #[arg(long, global = true)]
    pub(crate) json: bool,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where the server is.
#[derive(Debug, clap::Args)]
pub(crate) struct ServerPlace {
    /// The server's socket [default: stencil.sock in the data directory]
    #[arg(
        long,
        global = true,
        env = "STENCIL_SOCKET",
        hide_env_values = true,
        value_name = "PATH"
    )]
    pub(crate) socket: Option<PathBuf>,
    /// The server's address instead of a socket, such as `http://10.0.0.7:8080`; its token is taken from STENCIL_TOKEN
    #[arg(
        long,
        global = true,
        env = "STENCIL_URL",
        hide_env_values = true,
        value_name = "URL"
    )]
    pub(crate) url: Option<String>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the server
    Serve(Serve),
    /// Tell what this host can do, and what would let it do more
    Doctor(Doctor),
    /// Serve the memory of one VM: the server starts this beside its VMM
    #[command(hide = true)]
    Pager(Pager),
    #[command(flatten)]
    Client(ClientCommand),
}

/// What a client asks of the server.
#[derive(Debug, Subcommand)]
pub(crate) enum ClientCommand {
    /// Make an instance and start it
    Create(Create),
    /// List instances
    Ls(Ls),
    /// Show one instance
    Show(One),
    /// Boot an instance that is down
    Start(One),
    /// End its VM, after its guest was asked to power off; on standby, throw its snapshot away
    Stop(One),
    /// Stop its vCPUs
    Pause(One),
    /// Let its vCPUs go on
    Resume(One),
    /// Write it to disk and end its VM
    Standby(One),
    /// Let it go on from standby
    Restore(One),
    /// Make an instance on standby a template
    Promote(Promote),
    /// Make a template an instance on standby again
    Demote(One),
    /// Have a template's next fork record anew which pages forks touch first
    RecordHotPages(One),
    /// Change how many forks of a template are kept prepared
    Arm(Arm),
    /// Make new instances that go on where this one stopped
    Fork(Fork),
    /// Delete instances
    Rm(Rm),
    /// Run a command in an instance, by the agent in its guest
    Exec(Exec),
    /// Copy a file or directory into an instance or out of it, by the agent in its guest
    Cp(Cp),
    /// Show what the guest printed, or give it input
    Console(Console),
    /// Wait until an instance is in a state
    Wait(Wait),
    /// Keep what instances are made of, by name
    #[command(subcommand)]
    Image(ImageCommand),
    /// Show the versions of this program and of the server
    Version,
}

impl ClientCommand {
    /// The one instance that the command changes or talks to, as it was typed. `rm` and `cp` see to theirs themselves.
    pub(crate) fn changes(&mut self) -> Option<&mut String> {
        match self {
            Self::Start(one)
            | Self::Stop(one)
            | Self::Pause(one)
            | Self::Resume(one)
            | Self::Standby(one)
            | Self::Restore(one)
            | Self::Demote(one)
            | Self::RecordHotPages(one) => Some(&mut one.id),
            Self::Promote(promote) => Some(&mut promote.id),
            Self::Arm(arm) => Some(&mut arm.id),
            Self::Fork(fork) => Some(&mut fork.id),
            Self::Exec(exec) => Some(&mut exec.id),
            Self::Console(console) => Some(&mut console.id),
            // These only read, and the server takes the beginning of an id for that.
            Self::Show(_) | Self::Ls(_) | Self::Wait(_) => None,
            Self::Create(_) | Self::Rm(_) | Self::Cp(_) | Self::Image(_) | Self::Version => None,
        }
    }
}

#[derive(Debug, clap::Args)]
pub(crate) struct Serve {
    /// The data directory [default: /var/lib/stencil for root, else stencil in the user's data directory]
    #[arg(long, env = "STENCIL_DATA", hide_env_values = true, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Listen on TCP too; it takes --token-file, or on a loopback address --no-auth
    #[arg(
        long,
        env = "STENCIL_LISTEN",
        hide_env_values = true,
        value_name = "ADDR:PORT"
    )]
    pub(crate) listen: Option<SocketAddr>,
    /// The tokens of those who may ask over TCP, one a line, 16 or more characters each; made with a random one if it is not there
    #[arg(
        long,
        env = "STENCIL_TOKEN_FILE",
        hide_env_values = true,
        value_name = "FILE",
        requires = "listen",
        conflicts_with = "no_auth"
    )]
    pub(crate) token_file: Option<PathBuf>,
    /// Let whoever is on this host do everything over TCP, also other users; only for a loopback address
    #[arg(long, requires = "listen")]
    pub(crate) no_auth: bool,
    /// A name by which the server is reached over TCP, beside addresses and localhost; can be given many times
    #[arg(
        long = "allow-host",
        env = "STENCIL_ALLOW_HOSTS",
        value_delimiter = ',',
        hide_env_values = true,
        value_name = "NAME",
        requires = "listen"
    )]
    pub(crate) allow_hosts: Vec<String>,
    /// The origin of web pages that may ask, such as `https://panel.example`; can be given many times
    #[arg(
        long = "allow-origin",
        env = "STENCIL_ALLOW_ORIGINS",
        value_delimiter = ',',
        hide_env_values = true,
        value_name = "ORIGIN"
    )]
    pub(crate) allow_origins: Vec<String>,
    #[command(flatten)]
    pub(crate) vmms: Vmms,
    /// How many forks of each template are kept prepared
    #[arg(
        long,
        env = "STENCIL_ARMED",
        hide_env_values = true,
        default_value_t = 0,
        value_name = "N"
    )]
    pub(crate) armed: u32,
    /// How much of each VM's console and VMM log is kept, the last part
    #[arg(
        long,
        env = "STENCIL_LOG_LIMIT",
        hide_env_values = true,
        default_value = "16MiB",
        value_name = "SIZE"
    )]
    pub(crate) log_limit: MemorySize,
}

/// Where VMMs are.
#[derive(Debug, clap::Args)]
pub(crate) struct Vmms {
    /// The stencil-microvm binary [default: beside this one, else in PATH]
    #[arg(long, env = "STENCIL_MICROVM", hide_env_values = true, value_name = "PATH")]
    pub(crate) microvm: Option<PathBuf>,
    /// The cloud-hypervisor binary, v51 to v53 [default: in PATH; without one it is not offered]
    #[arg(
        long,
        env = "STENCIL_CLOUD_HYPERVISOR",
        hide_env_values = true,
        value_name = "PATH"
    )]
    pub(crate) cloud_hypervisor: Option<PathBuf>,
    /// The qemu-system-x86_64 binary, 7.2 or later [default: in PATH; without one it is not offered]
    #[arg(long, env = "STENCIL_QEMU", hide_env_values = true, value_name = "PATH")]
    pub(crate) qemu: Option<PathBuf>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Doctor {
    /// The data directory that a server would have [default: as of `serve`]
    #[arg(long, env = "STENCIL_DATA", hide_env_values = true, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) vmms: Vmms,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Pager {
    /// Which memory the snapshot holds
    #[arg(long, value_name = "ID")]
    pub(crate) memory_generation: MemoryGeneration,
    /// A list of the pages that are to be there first
    #[arg(long, value_name = "PATH")]
    pub(crate) hot_pages: Option<PathBuf>,
    /// Record which pages are touched first
    #[arg(long, conflicts_with = "hot_pages")]
    pub(crate) record: bool,
}

/// An instance.
#[derive(Debug, clap::Args)]
pub(crate) struct One {
    /// Its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Promote {
    /// Its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
    /// How many forks of it are kept prepared [default: as many as the server keeps]
    #[arg(long, value_name = "N")]
    pub(crate) armed: Option<u32>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Arm {
    /// The template: its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
    /// How many; 0 is none [default: as many as the server keeps]
    pub(crate) count: Option<u32>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Create {
    /// Its name [default: made up]
    pub(crate) name: Option<InstanceName>,
    /// The image that it boots from, instead of --kernel and --initrd
    #[arg(long, value_name = "NAME", conflicts_with_all = ["kernel", "initrd"])]
    pub(crate) image: Option<ImageName>,
    /// The kernel: an ELF with a PVH note, or a bzImage
    #[arg(long, value_name = "PATH", required_unless_present_any = ["image", "firmware"])]
    pub(crate) kernel: Option<PathBuf>,
    /// The firmware to start instead of a kernel
    #[arg(long, value_name = "PATH", conflicts_with_all = ["image", "kernel", "initrd", "cmdline"])]
    pub(crate) firmware: Option<PathBuf>,
    /// The initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub(crate) initrd: Option<PathBuf>,
    /// The kernel's command line [default: the image's]
    #[arg(long)]
    pub(crate) cmdline: Option<String>,
    /// A disk on this raw or qcow2 image, which is never written; with ,ro the guest cannot write either; can be given many times
    #[arg(long = "disk", value_name = "PATH[,ro]", value_parser = disk)]
    pub(crate) disks: Vec<AddDisk>,
    /// How many vCPUs
    #[arg(long, default_value_t = 1)]
    pub(crate) vcpus: u32,
    /// How much memory
    #[arg(long, default_value = "512MiB", value_name = "SIZE")]
    pub(crate) memory: MemorySize,
    /// Which hypervisor: microvm, cloud-hypervisor or qemu; `stencil doctor` tells what each can run on this host
    #[arg(long, default_value = "microvm", value_name = "NAME")]
    pub(crate) hypervisor: HypervisorName,
    /// The guest is ready when it prints this [default: as soon as it runs]
    #[arg(long, value_name = "TEXT")]
    pub(crate) ready_text: Option<String>,
    /// The guest is ready when its agent has made it a machine of its own
    #[arg(long, conflicts_with = "ready_text")]
    pub(crate) ready_agent: bool,
    /// Something to remember of it; can be given many times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) labels: Vec<(String, String)>,
    /// Do not start it
    #[arg(long, conflicts_with = "wait")]
    pub(crate) no_start: bool,
    /// Wait until it is Running, for at most 30 s
    #[arg(long)]
    pub(crate) wait: bool,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Take a kernel and what goes with it into the data directory
    Add(AddImage),
    /// List images
    Ls,
    /// Show one image
    Show {
        /// Its name
        name: String,
    },
    /// Remove images that no instance was made of
    Rm {
        /// Their names
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

#[derive(Debug, clap::Args)]
pub(crate) struct AddImage {
    /// Its name
    pub(crate) name: ImageName,
    /// The kernel: an ELF with a PVH note, or a bzImage
    #[arg(long, value_name = "PATH")]
    pub(crate) kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "PATH")]
    pub(crate) initrd: Option<PathBuf>,
    /// A disk, a raw or qcow2 image on which each instance has a layer of its own; can be given many times
    #[arg(long = "disk", value_name = "PATH")]
    pub(crate) disks: Vec<PathBuf>,
    /// The kernel's command line, for instances that are made without one
    #[arg(long, default_value = "", hide_default_value = true)]
    pub(crate) cmdline: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Ls {
    /// Only those in this state
    #[arg(long)]
    pub(crate) state: Option<State>,
    /// Only forks of this template
    #[arg(long, value_name = "ID")]
    pub(crate) template: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Fork {
    /// The source: its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
    /// How many, all at once
    #[arg(short = 'n', long, value_name = "N")]
    pub(crate) count: Option<u32>,
    /// The fork's name [default: the source's and a number]
    #[arg(long, conflicts_with = "count")]
    pub(crate) name: Option<InstanceName>,
    /// The forks' names but for the number [default: the source's]
    #[arg(long, value_name = "PREFIX", requires = "count")]
    pub(crate) name_prefix: Option<InstanceName>,
    /// The source runs: put it on standby for it, for a moment
    #[arg(long)]
    pub(crate) from_running: bool,
    /// The state in which it begins [default: Running; Stopped for a Stopped source]
    #[arg(long, value_name = "STATE")]
    pub(crate) target_state: Option<State>,
    /// Delete each fork when its command has ended
    #[arg(long, requires = "cmd")]
    pub(crate) rm: bool,
    /// Kill its command after so long: seconds, or with a unit such as 500ms or 2h [default: never]
    #[arg(long, value_name = "TIME", requires = "cmd")]
    pub(crate) timeout: Option<TimeLimit>,
    /// Something in the command's environment; can be given many times
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = pair, requires = "cmd")]
    pub(crate) env: Vec<(String, String)>,
    /// The command's working directory [default: /]
    #[arg(long, value_name = "DIR", requires = "cmd")]
    pub(crate) cwd: Option<String>,
    /// What is run in each fork, behind --
    #[arg(last = true, value_name = "CMD", conflicts_with = "name")]
    pub(crate) cmd: Vec<String>,
    /// How its memory comes back: cow, copy, uffd or ondemand
    #[arg(long, value_name = "MODE")]
    pub(crate) memory_mode: Option<MemoryMode>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Rm {
    /// Their names, ids, or the first 8 or more characters of their ids
    #[arg(required = true, value_name = "ID")]
    pub(crate) ids: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Exec {
    /// Its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
    /// Pass the standard input also if it is a terminal
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) interactive: bool,
    /// Give the command a terminal
    #[arg(short, long, conflicts_with = "json")]
    pub(crate) tty: bool,
    /// Something in its environment; can be given many times
    #[arg(short, long = "env", value_name = "KEY=VALUE", value_parser = pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Its working directory [default: /]
    #[arg(long, value_name = "DIR")]
    pub(crate) cwd: Option<String>,
    /// Kill it after so long: seconds, or with a unit such as 500ms or 2h [default: never]
    #[arg(long, value_name = "TIME")]
    pub(crate) timeout: Option<TimeLimit>,
    /// The program and its arguments; a -- before it is right where it begins with a dash
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    pub(crate) cmd: Vec<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Cp {
    /// What is copied: a path, or NAME:PATH in an instance
    pub(crate) from: String,
    /// Where to: below it if it is a directory that is there, else under this name; one of both is NAME:PATH
    pub(crate) to: String,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Console {
    /// Its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
    /// Go on as the guest prints, until its VM is down
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Only so many last lines [default: all; with --send, none]
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<u64>,
    /// Give the guest this line to read; - gives it the standard input
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) send: Option<String>,
}

#[derive(Debug, clap::Args)]
pub(crate) struct Wait {
    /// Its name, its id, or the first 8 or more characters of its id
    pub(crate) id: String,
    /// Which state
    #[arg(long, default_value = "Running")]
    pub(crate) state: State,
    /// How long: seconds, or with a unit such as 500ms or 2m
    #[arg(long, default_value = "30s", value_name = "TIME")]
    pub(crate) timeout: Timeout,
}

fn disk(text: &str) -> Result<AddDisk, Infallible> {
    let (path, read_only) = match text.strip_suffix(",ro") {
        Some(path) => (path, true),
        None => (text, false),
    };
    Ok(AddDisk {
        path: path.into(),
        read_only,
    })
}

fn pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("it is KEY=VALUE".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }
}
