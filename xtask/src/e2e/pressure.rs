//! Memory pressure on the host, as far as a scenario may make it: processes in a memory cgroup that is too small for the
//! file that they read over and over. The kernel counts what they wait for as everybody's.

use std::fs::{self, File};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};

use super::failure::Failure;

/// Memory of the group, in bytes.
const GROUP_BYTES: u64 = 30 << 20;
/// How long killed members may take to leave a group, and how often it is looked.
const REMOVE_LIMIT: Duration = Duration::from_secs(10);
const REMOVE_AGAIN: Duration = Duration::from_millis(10);
/// What its process reads: enough that it never stays.
const FILE_BYTES: u64 = 200 << 20;

/// Processes that wait for memory much of their time, until this is dropped.
#[derive(Debug)]
pub(super) struct Pressure {
    process: Child,
    waited_before: Duration,
    /// Removed after the process has ended.
    _group: Group,
}

/// A memory cgroup; removed when this is dropped.
#[derive(Debug)]
struct Group {
    path: PathBuf,
    limit: &'static str,
    members: &'static str,
}

impl Pressure {
    /// Begins, with its file in `scratch`. Where this host does not allow it, the scenario is skipped.
    pub(super) fn begin(scratch: &Path) -> Result<Self, Failure> {
        let skipped = |what: &str| {
            let what = format!("memory pressure cannot be made here: {what}");
            move |error: io::Error| Failure::Skipped(format!("{what}: {error}"))
        };
        let waited_before = waited().map_err(skipped("/proc/pressure/memory"))?;
        let file = scratch.join("read-over-and-over");
        // Written and not sparse: holes cost no memory.
        write_out(&file).map_err(Failure::file(&file))?;
        let group = Group::make().map_err(skipped("no memory cgroup"))?;
        fs::write(group.path.join(group.limit), GROUP_BYTES.to_string()).map_err(skipped(group.limit))?;
        // It joins the group before it reads: who reads a page first pays for it.
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                "echo $$ > \"$1\" && for i in 1 2 3 4 5 6 7 8; do while cat \"$0\" > /dev/null; do :; done & done; wait",
            ])
            .arg(&file)
            .arg(group.path.join(group.members))
            .process_group(0);
        Ok(Self {
            process: command.spawn().map_err(skipped("sh"))?,
            waited_before,
            _group: group,
        })
    }

    /// For how long tasks have waited for memory since it began.
    pub(super) fn waited(&self) -> Result<Duration, Failure> {
        let now = waited().map_err(Failure::file(Path::new(PRESSURE)))?;
        Ok(now.saturating_sub(self.waited_before))
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        // The shell and what it runs; it is a group of its own.
        if let Some(group) = rustix::process::Pid::from_raw(self.process.id().cast_signed()) {
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _ = self.process.wait();
    }
}

impl Group {
    /// Of the first or the second version of cgroups.
    fn make() -> io::Result<Self> {
        let name = format!("stencil-e2e-{}", std::process::id());
        let first = Path::new("/sys/fs/cgroup/memory");
        let (parent, limit, members) = if first.is_dir() {
            (first, "memory.limit_in_bytes", "tasks")
        } else {
            (Path::new("/sys/fs/cgroup"), "memory.max", "cgroup.procs")
        };
        let path = parent.join(name);
        fs::create_dir(&path)?;
        Ok(Self { path, limit, members })
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Members that have just been killed are still in it for a moment.
        let deadline = Instant::now() + REMOVE_LIMIT;
        while Instant::now() < deadline {
            if fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(REMOVE_AGAIN);
        }
        eprintln!("{} could not be removed", self.path.display());
    }
}

/// The file on disk, and not in the page cache: there it would be ours, and cost the group nothing.
fn write_out(path: &Path) -> io::Result<()> {
    let mut file = File::create(path)?;
    io::copy(&mut io::Read::take(io::repeat(1), FILE_BYTES), &mut file)?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}

const PRESSURE: &str = "/proc/pressure/memory";

/// The total of `some` in microseconds (Linux, Documentation/accounting/psi.rst).
fn waited() -> io::Result<Duration> {
    let text = fs::read_to_string(PRESSURE)?;
    let total = text
        .lines()
        .next()
        .and_then(|some| some.rsplit_once("total=")?.1.parse().ok());
    total
        .map(Duration::from_micros)
        .ok_or_else(|| io::ErrorKind::InvalidData.into())
}
