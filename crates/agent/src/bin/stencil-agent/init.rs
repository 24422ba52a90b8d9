//! What the first process of a machine has to do besides: file systems, kernel modules, the end of the machine.

use std::convert::Infallible;
use std::error::Error;
use std::ffi::CStr;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::process::WaitOptions;
use rustix::system::RebootCommand;

use crate::agent::{Agent, Ended};
use crate::button::Button;
use crate::identity::Identity;
use crate::link::Link;
use crate::place::Place;
use crate::signals::Signals;
use crate::{error_chain, join_cgroups, log, modules};

/// Type, place and options of what is mounted; the source is the type.
const MOUNTS: [(&CStr, &str, &CStr); 8] = [
    (c"proc", "/proc", c""),
    (c"sysfs", "/sys", c""),
    (c"devtmpfs", "/dev", c"mode=0755"),
    (c"devpts", "/dev/pts", c"mode=0620,ptmxmode=0666"),
    (c"tmpfs", "/dev/shm", c"mode=1777"),
    (c"tmpfs", "/run", c"mode=0755"),
    (c"tmpfs", "/tmp", c"mode=1777"),
    // Each command goes into a cgroup of its own. Unless they are favoured (Linux 6.0), that waits until every CPU has looked up
    // from what it does, some 10 ms (cgroup_threadgroup_rwsem).
    (c"cgroup2", "/sys/fs/cgroup", c"favordynmods"),
];

/// Processes that are asked to end have so long.
const END_LIMIT: Duration = Duration::from_secs(3);
/// Those that were killed have so long: what they have open keeps file systems busy.
const KILL_LIMIT: Duration = Duration::from_secs(1);

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
    // Many programs talk to themselves. An image without `ip` does without.
    let _ = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    let place = Place::await_device()?;
    log(&format!("waits for the host on {place}"));
    let identity = Identity::new(false)?;
    let agent = Agent::new(Link::new(place)?, signals, join_cgroups(None), identity);
    Ok(agent.with_button(Button::find()).run()?)
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
    let mount = |options: &CStr| rustix::mount::mount(kind, place, kind, flags, options);
    let mounted = match mount(options) {
        // This kernel does not know the options.
        Err(rustix::io::Errno::INVAL) => mount(c""),
        mounted => mounted,
    };
    match mounted {
        Ok(()) | Err(rustix::io::Errno::BUSY) => {}
        Err(error) => log(&format!("could not mount {place}: {error}")),
    }
}

/// Ends every process and the machine. One that cannot be switched off, because it has no ACPI, is restarted: its VMM takes
/// that for the end.
fn power_off() -> io::Result<Infallible> {
    end_processes()?;
    rustix::fs::sync();
    unmount_all();
    let command = if Path::new("/sys/firmware/acpi").exists() {
        RebootCommand::PowerOff
    } else {
        RebootCommand::Restart
    };
    rustix::system::reboot(command)?;
    // It does not return where it succeeds.
    Err(ErrorKind::Other.into())
}

/// Asks all processes to end, and ends those that do not.
fn end_processes() -> io::Result<()> {
    let signals = Signals::block()?;
    signal_all(libc::SIGTERM);
    until_ended(&signals, END_LIMIT);
    signal_all(libc::SIGKILL);
    until_ended(&signals, KILL_LIMIT);
    Ok(())
}

/// Waits until no process is left but init, at most for `limit`.
fn until_ended(signals: &Signals, limit: Duration) {
    let deadline = Instant::now() + limit;
    // Whoever is left belongs to init, whose child it became when its parent ended.
    while let Ok(ended) = rustix::process::wait(WaitOptions::NOHANG) {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        if ended.is_none() {
            let mut child = [PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
            // An interrupted wait is looked at again.
            let _ = rustix::event::poll(&mut child, Timespec::try_from(left).ok().as_ref());
            signals.take();
        }
    }
}

/// Takes the file systems of devices away, the last one first, so that they are whole. One that cannot be, as that of the root
/// cannot, becomes read-only.
fn unmount_all() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for mount in mounts.lines().rev() {
        let mut fields = mount.split(' ');
        let (Some(source), Some(place)) = (fields.next(), fields.next()) else {
            continue;
        };
        if !source.starts_with("/dev/") {
            continue;
        }
        // What a field cannot have in it is there in octal (proc_pid_mounts(5)).
        let place = place
            .replace("\\040", " ")
            .replace("\\011", "\t")
            .replace("\\012", "\n")
            .replace("\\134", "\\");
        if rustix::mount::unmount(&*place, UnmountFlags::empty()).is_err()
            && let Err(error) = rustix::mount::mount_remount(&*place, MountFlags::RDONLY, c"")
        {
            log(&format!("could not unmount {place}: {error}"));
        }
    }
}

/// Sends a signal to every process but init.
fn signal_all(signal: i32) {
    // SAFETY: kill touches no memory. That there is no process to get it is no error here.
    unsafe { libc::kill(-1, signal) };
}
