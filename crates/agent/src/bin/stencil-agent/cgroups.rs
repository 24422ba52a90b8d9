//! The user's processes, by cgroups of version 2: each session has one, and all but the agent can be stopped together.
//!
//! Below the agent's own cgroup lie `agent`, where it lives, and `sessions`. To freeze is to freeze each cgroup that is
//! beside the way from the top to `agent`: then every process that is in a cgroup stands still, and the agent does not.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};

/// Processes in the middle of a long call of the kernel stop late. It is less than the host waits (2 s): in a snapshot that is
/// made amid this wait, it would go on in each fork.
const FREEZE_LIMIT: Duration = Duration::from_millis(1500);

#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("no cgroups of version 2 are mounted")]
    NotMounted,
    #[error("could not use the cgroup {}", .0.display())]
    Use(PathBuf, #[source] io::Error),
    #[error("the processes in {} did not stop within {:?}", .0.display(), FREEZE_LIMIT)]
    NotFrozen(PathBuf),
}

/// The cgroups of the machine, with the agent in its own.
#[derive(Debug)]
pub(crate) struct Cgroups {
    /// The cgroups from the top to the agent's.
    way: Vec<PathBuf>,
    sessions: PathBuf,
    last_session: u64,
    /// Those of sessions that ended; they can be removed when their last process has.
    ended: Vec<PathBuf>,
    /// What is frozen, and where to write that it is not: a file that is open already, as a fork waits for that.
    frozen: Vec<(PathBuf, File)>,
}

impl Cgroups {
    /// Goes into a cgroup of the agent's own, below `top` if it is given.
    pub(crate) fn join(top: Option<&Path>) -> Result<Self, CgroupError> {
        let (top, own) = match top {
            Some(top) => (top.to_owned(), top.to_owned()),
            None => {
                let top = mounted().ok_or(CgroupError::NotMounted)?;
                let own = top.join(own_cgroup().ok_or(CgroupError::NotMounted)?);
                (top, own)
            }
        };
        let (agent, sessions) = (own.join("agent"), own.join("sessions"));
        for dir in [&agent, &sessions] {
            match fs::create_dir(dir) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(CgroupError::Use(dir.clone(), error));
                }
                _ => {}
            }
        }
        let entrance = open_entrance(&agent)?;
        write(&entrance, "0").map_err(|error| CgroupError::Use(agent.clone(), error))?;
        let mut way: Vec<PathBuf> = agent.ancestors().map(Path::to_owned).collect();
        way.retain(|dir| dir.starts_with(&top));
        way.reverse();
        let mut cgroups = Self {
            way,
            sessions,
            last_session: 0,
            ended: Vec::new(),
            frozen: Vec::new(),
        };
        // An agent before this one may have ended while all stood still.
        for child in cgroups.beside()? {
            if fs::read_to_string(child.join("cgroup.freeze")).is_ok_and(|state| state.trim() == "1") {
                let file = open(&child.join("cgroup.freeze"))?;
                cgroups.frozen.push((child, file));
            }
        }
        Ok(cgroups)
    }

    /// The cgroups beside the way to the agent's.
    fn beside(&self) -> Result<Vec<PathBuf>, CgroupError> {
        let mut beside = Vec::new();
        for (dir, next) in self.way.iter().zip(&self.way[1..]) {
            let children = fs::read_dir(dir).map_err(|error| CgroupError::Use(dir.clone(), error))?;
            let children = children.flatten().map(|child| child.path());
            beside.extend(children.filter(|child| child.is_dir() && child != next));
        }
        Ok(beside)
    }

    /// Whether anything is stopped.
    pub(crate) fn is_frozen(&self) -> bool {
        !self.frozen.is_empty()
    }

    /// Makes a cgroup for a session.
    pub(crate) fn begin_session(&mut self) -> Result<PathBuf, CgroupError> {
        loop {
            self.last_session += 1;
            let dir = self.sessions.join(self.last_session.to_string());
            match fs::create_dir(&dir) {
                Ok(()) => return Ok(dir),
                // Of an agent before this one.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(CgroupError::Use(dir, error)),
            }
        }
    }

    /// Removes a session's cgroup, now or when the processes that it left behind have ended.
    pub(crate) fn end_session(&mut self, dir: PathBuf) {
        self.ended.push(dir);
        self.sweep();
    }

    /// Removes what became empty.
    pub(crate) fn sweep(&mut self) {
        self.ended
            .retain(|dir| fs::remove_dir(dir).is_err_and(|error| error.kind() != ErrorKind::NotFound));
    }

    /// Stops everything but the agent; on an error nothing is stopped.
    pub(crate) fn freeze(&mut self) -> Result<(), CgroupError> {
        let frozen = self.try_freeze();
        if frozen.is_err() {
            // What failed is told; what had stopped is let go.
            let _ = self.thaw();
        }
        frozen
    }

    fn try_freeze(&mut self) -> Result<(), CgroupError> {
        for child in self.beside()? {
            let file = open(&child.join("cgroup.freeze"))?;
            write(&file, "1").map_err(|error| CgroupError::Use(child.clone(), error))?;
            self.frozen.push((child, file));
        }
        let deadline = Instant::now() + FREEZE_LIMIT;
        self.frozen
            .iter()
            .try_for_each(|(dir, _)| await_frozen(dir, deadline))
    }

    /// Lets go what was stopped.
    pub(crate) fn thaw(&mut self) -> Result<(), CgroupError> {
        while let Some((dir, file)) = self.frozen.last() {
            match write(file, "0") {
                // A cgroup that was removed has no process.
                Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                    return Err(CgroupError::Use(dir.clone(), error));
                }
                _ => {}
            }
            self.frozen.pop();
        }
        Ok(())
    }
}

/// Kills every process of a cgroup (Linux 5.14).
pub(crate) fn kill(dir: &Path) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.kill");
    write(&open(&path)?, "1").map_err(|error| CgroupError::Use(path, error))
}

/// The file that takes a process into the cgroup.
pub(crate) fn open_entrance(dir: &Path) -> Result<File, CgroupError> {
    open(&dir.join("cgroup.procs"))
}

fn open(path: &Path) -> Result<File, CgroupError> {
    let file = OpenOptions::new().write(true).open(path);
    file.map_err(|error| CgroupError::Use(path.to_owned(), error))
}

fn write(mut file: &File, text: &str) -> io::Result<()> {
    file.write_all(text.as_bytes())
}

/// Waits until `cgroup.events` says `frozen 1`; the kernel tells of each change as an exceptional condition.
fn await_frozen(dir: &Path, deadline: Instant) -> Result<(), CgroupError> {
    let path = dir.join("cgroup.events");
    let failed = |error| CgroupError::Use(path.clone(), error);
    let mut file = File::open(&path).map_err(failed)?;
    loop {
        let mut events = String::new();
        file.rewind().map_err(failed)?;
        file.read_to_string(&mut events).map_err(failed)?;
        if events.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(CgroupError::NotFrozen(dir.to_owned()));
        }
        let mut change = [PollFd::new(&file, PollFlags::PRI)];
        match rustix::event::poll(&mut change, Timespec::try_from(left).ok().as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(failed(error.into())),
        }
    }
}

/// Where cgroups of version 2 are mounted: `/sys/fs/cgroup`, or elsewhere beside version 1 (proc(5), mountinfo).
fn mounted() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?;
    mount.split(' ').nth(4).map(PathBuf::from)
}

/// The agent's cgroup, relative to where they are mounted.
fn own_cgroup() -> Option<PathBuf> {
    let cgroups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(PathBuf::from(path))
}
