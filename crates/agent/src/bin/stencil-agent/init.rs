//! What the first process of a machine has to do besides: file systems, kernel modules, the end of the machine.

use std::convert::Infallible;
use std::error::Error;
use std::ffi::CStr;
use std::fs;
use std::path::Path;

use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

use crate::agent::{Agent, Ended};
use crate::cgroups::Cgroups;
use crate::identity::Identity;
use crate::link::Link;
use crate::place::Place;
use crate::signals::Signals;
use crate::{error_chain, log, modules};

/// Type, place and options of what is mounted; the source is the type.
const MOUNTS: [(&CStr, &str, &CStr); 8] = [
    (c"proc", "/proc", c""),
    (c"sysfs", "/sys", c""),
    (c"devtmpfs", "/dev", c"mode=0755"),
    (c"devpts", "/dev/pts", c"mode=0620,ptmxmode=0666"),
    (c"tmpfs", "/dev/shm", c"mode=1777"),
    (c"tmpfs", "/run", c"mode=0755"),
    (c"tmpfs", "/tmp", c"mode=1777"),
    (c"cgroup2", "/sys/fs/cgroup", c""),
];

/// Is init until the machine is off. It never returns: when init ends, the kernel panics.
pub(crate) fn run() -> Result<(), Box<dyn Error>> {
    match serve() {
        Ok(Ended::PowerOff | Ended::Signal) => log("powers off"),
        Err(error) => log(&format!("{}; powers off", error_chain(&*error))),
    }
    match power_off() {
        Ok(never) => match never {},
        Err(error) => Err(error.into()),
    }
}

fn serve() -> Result<Ended, Box<dyn Error>> {
    let signals = Signals::block()?;
    for (kind, place, options) in MOUNTS {
        mount(kind, place, options);
    }
    modules::load(|path, error| log(&format!("could not load {path}: {error}")));
    let place = Place::await_device()?;
    log(&format!("waits for the host on {place}"));
    let identity = Identity { shared_kernel: false };
    let mut agent = Agent::new(Link::new(place)?, signals, Cgroups::join(None), identity);
    Ok(agent.run()?)
}

/// Mounts a file system where there is none yet.
fn mount(kind: &CStr, place: &str, options: &CStr) {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let flags = match place {
        "/dev" | "/dev/pts" => MountFlags::NOSUID,
        "/tmp" => MountFlags::NOSUID | MountFlags::NODEV,
        _ => flags,
    };
    // Where the directory cannot be made, the mount says so.
    let _ = fs::create_dir_all(Path::new(place));
    match rustix::mount::mount(kind, place, kind, flags, options) {
        Ok(()) | Err(rustix::io::Errno::BUSY) => {}
        Err(error) => log(&format!("could not mount {place}: {error}")),
    }
}

/// Ends every process and the machine. One that cannot be switched off, because it has no ACPI, is restarted: its VMM takes
/// that for the end.
fn power_off() -> rustix::io::Result<Infallible> {
    // Nobody is left to be asked, so there is nothing to do about errors.
    let _ = rustix::process::kill_current_process_group(rustix::process::Signal::TERM);
    rustix::fs::sync();
    let command = if Path::new("/sys/firmware/acpi").exists() {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    rustix::system::reboot(command)?;
    // It does not return where it succeeds.
    Err(rustix::io::Errno::INVAL)
}
