//! What the host has left for VMMs: memory, open files, processes, watches. Reads and judges nothing; `limits` does.
//!
//! A limit that cannot be read does not limit. It takes some tens of microseconds, whatever the number of VMs: no directory of
//! `/proc` is listed.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::process::{Resource as Rlimit, geteuid, getrlimit};

use crate::limits::{Resource, Supply};

/// Open files that are left for requests, and for the sockets and logs of those VMMs that are being started.
const KEPT_DESCRIPTORS: u64 = 64;

/// The limits that stay as they are while a server runs.
#[derive(Debug)]
pub(crate) struct Host {
    most_processes: Vec<(&'static str, u64)>,
    most_watches: Option<u64>,
    /// The groups of processes that this one is in and that have a limit.
    groups: Vec<PidsGroup>,
    /// The same of those with a limit of memory.
    memory_groups: Vec<MemoryGroup>,
}

/// A cgroup with a limit of processes.
#[derive(Debug)]
struct PidsGroup {
    current: PathBuf,
    most: u64,
}

/// A cgroup with a limit of memory, in bytes.
#[derive(Debug)]
struct MemoryGroup {
    current: PathBuf,
    stat: PathBuf,
    /// What of it the kernel takes back before it kills somebody: a field of `stat`.
    given_back: &'static str,
    most: u64,
}

impl MemoryGroup {
    /// What its processes can still take.
    fn left(&self) -> Option<u64> {
        let stat = fs::read_to_string(&self.stat).ok()?;
        let given_back = stat.lines().find_map(|line| {
            let bytes = line.strip_prefix(self.given_back)?.strip_prefix(' ')?;
            bytes.trim().parse().ok()
        });
        let held = number(&self.current)?.saturating_sub(given_back.unwrap_or(0));
        Some(self.most.saturating_sub(held))
    }
}

impl Host {
    pub(crate) fn read() -> Self {
        let groups = read("/proc/self/cgroup").unwrap_or_default();
        let mount = Path::new("/sys/fs/cgroup");
        let sysctl = |name, path| Some((name, number(Path::new(path))?));
        let most_processes = [
            sysctl("kernel.pid_max", "/proc/sys/kernel/pid_max"),
            sysctl("kernel.threads-max", "/proc/sys/kernel/threads-max"),
        ];
        Self {
            most_processes: most_processes.into_iter().flatten().collect(),
            most_watches: number(Path::new("/proc/sys/fs/inotify/max_user_watches")),
            groups: pids_groups(&groups, mount),
            memory_groups: memory_groups(&groups, mount),
        }
    }

    /// What is left now. `watched` is how many directories this server watches.
    pub(crate) fn supplies(&self, watched: u64) -> Vec<Supply> {
        let mut supplies = Vec::with_capacity(8);
        let mut add = |resource, limit, left| {
            supplies.push(Supply {
                resource,
                limit,
                left,
            });
        };
        if let Some(memory) = Memory::read() {
            add(Resource::Memory, "MemAvailable", memory.available);
        }
        for group in &self.memory_groups {
            if let Some(left) = group.left() {
                add(Resource::Memory, "the memory limit of its cgroup", left);
            }
        }
        if let (Some(most), Some(open)) = (getrlimit(Rlimit::Nofile).current, open_files()) {
            let left = most.saturating_sub(open).saturating_sub(KEPT_DESCRIPTORS);
            add(Resource::OpenFiles, "RLIMIT_NOFILE", left);
        }
        if let Some(running) = read("/proc/loadavg").as_deref().and_then(threads) {
            for (limit, most) in &self.most_processes {
                add(Resource::Processes, limit, most.saturating_sub(running));
            }
        }
        for group in &self.groups {
            if let Some(current) = number(&group.current) {
                add(
                    Resource::Processes,
                    "pids.max of its cgroup",
                    group.most.saturating_sub(current),
                );
            }
        }
        // Root's processes are not limited (setrlimit(2)). How many its user has, no file says.
        if let (Some(most), false) = (getrlimit(Rlimit::Nproc).current, geteuid().is_root()) {
            add(Resource::Processes, "RLIMIT_NPROC", most);
        }
        if let Some(most) = self.most_watches {
            let limit = "fs.inotify.max_user_watches";
            add(Resource::Watches, limit, most.saturating_sub(watched));
        }
        supplies
    }
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path).ok()
}

fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// How many files this process has open. The size of the directory says it since Linux 6.2; before, it is 0 and the
/// files are counted.
fn open_files() -> Option<u64> {
    let path = "/proc/self/fd";
    match fs::metadata(path).ok()?.len() {
        0 => Some(fs::read_dir(path).ok()?.count() as u64),
        open => Some(open),
    }
}

/// The host's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Memory {
    pub(crate) available: u64,
    pub(crate) total: u64,
}

impl Memory {
    pub(crate) fn read() -> Option<Self> {
        Self::of(&read("/proc/meminfo")?)
    }

    fn of(meminfo: &str) -> Option<Self> {
        let bytes = |field: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(field))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            Some(kib << 10)
        };
        Some(Self {
            available: bytes("MemAvailable:")?,
            total: bytes("MemTotal:")?,
        })
    }
}

/// How many threads there are on the host: the number behind the slash in `/proc/loadavg`.
fn threads(loadavg: &str) -> Option<u64> {
    let (_, threads) = loadavg.split_whitespace().nth(3)?.split_once('/')?;
    threads.parse().ok()
}

/// The groups in `/proc/self/cgroup` that limit processes, from the innermost to the outermost.
fn pids_groups(groups: &str, mount: &Path) -> Vec<PidsGroup> {
    let limited = groups_of("pids", groups, mount)
        .into_iter()
        .filter_map(|(group, _)| {
            Some(PidsGroup {
                most: number(&group.join("pids.max"))?,
                current: group.join("pids.current"),
            })
        });
    limited.collect()
}

/// The same of those that limit memory.
fn memory_groups(groups: &str, mount: &Path) -> Vec<MemoryGroup> {
    /// What stands for no limit in version 1, to the size of a page.
    const NONE: u64 = i64::MAX as u64 >> 16 << 16;
    let limited = groups_of("memory", groups, mount)
        .into_iter()
        .filter_map(|(group, is_first_version)| {
            let (most, current, given_back) = if is_first_version {
                (
                    "memory.limit_in_bytes",
                    "memory.usage_in_bytes",
                    "total_inactive_file",
                )
            } else {
                ("memory.max", "memory.current", "inactive_file")
            };
            let most = number(&group.join(most)).filter(|most| *most < NONE)?;
            Some(MemoryGroup {
                current: group.join(current),
                stat: group.join("memory.stat"),
                given_back,
                most,
            })
        });
    limited.collect()
}

/// The groups in which a controller may limit this process, from the innermost to the outermost, and whether each is of version 1.
fn groups_of(controller: &str, groups: &str, mount: &Path) -> Vec<(PathBuf, bool)> {
    let of_line = |line: &str| {
        // `<hierarchy>:<controllers>:<path>`; version 2 has one hierarchy without names (cgroups(7)).
        let (_, rest) = line.split_once(':')?;
        let (controllers, group) = rest.split_once(':')?;
        let is_first_version = !controllers.is_empty();
        let mount = if !is_first_version {
            mount.to_owned()
        } else if controllers.split(',').any(|name| name == controller) {
            mount.join(controller)
        } else {
            return None;
        };
        Some((mount.join(group.trim_start_matches('/')), is_first_version))
    };
    let innermost = groups.lines().filter_map(of_line);
    let all = innermost.flat_map(|(group, is_first_version)| {
        let up: Vec<PathBuf> = group
            .ancestors()
            .take_while(|group| group.starts_with(mount))
            .map(Path::to_owned)
            .collect();
        up.into_iter().map(move |group| (group, is_first_version))
    });
    all.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_bytes() {
        let meminfo =
            "MemTotal:       24684564 kB\nMemFree:         4735016 kB\nMemAvailable:   24077364 kB\n";
        let memory = Memory {
            available: 24_077_364 << 10,
            total: 24_684_564 << 10,
        };
        assert_eq!(Memory::of(meminfo), Some(memory));
        assert_eq!(Memory::of("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn all_threads_are_counted_also_those_that_sleep() {
        assert_eq!(threads("0.11 0.52 0.87 2/187 12345\n"), Some(187));
        assert_eq!(threads(""), None);
    }

    #[test]
    fn a_file_that_is_opened_is_counted() {
        let open = || open_files().unwrap();
        let before = open();
        let files: Vec<_> = (0..100).map(|_| fs::File::open("/dev/null").unwrap()).collect();
        // Other tests of this process open and close some meanwhile.
        assert!(open() >= before.saturating_sub(20) + files.len() as u64);
    }

    #[test]
    fn every_group_that_limits_processes_counts_in_both_versions_of_cgroups() {
        let mount = tempfile::tempdir().unwrap();
        let group = |path: &str, most: &str| {
            let group = mount.path().join(path);
            fs::create_dir_all(&group).unwrap();
            fs::write(group.join("pids.max"), most).unwrap();
        };
        group("user.slice", "5000\n");
        group("user.slice/user-1000.slice", "max\n");
        group("user.slice/user-1000.slice/stencil.service", "100\n");
        group("pids/old", "7\n");
        let most = |groups| -> Vec<u64> {
            pids_groups(groups, mount.path())
                .into_iter()
                .map(|group| group.most)
                .collect()
        };
        assert_eq!(
            most("0::/user.slice/user-1000.slice/stencil.service\n"),
            [100, 5000]
        );
        assert_eq!(most("9:name=systemd:/old\n8:pids:/old\n0::/\n"), [7]);
        assert_eq!(most("4:memory:/old\n"), [] as [u64; 0]);
    }

    #[test]
    fn every_group_that_limits_memory_counts_without_what_the_kernel_takes_back() {
        let mount = tempfile::tempdir().unwrap();
        let file = |path: &str, content: &str| {
            let path = mount.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        };
        file("box/memory.max", "262144000\n");
        file("box/memory.current", "200000000\n");
        file(
            "box/memory.stat",
            "anon 1\nfile 90000000\ninactive_file 50000000\n",
        );
        file("box/in/memory.max", "max\n");
        file("memory/old/memory.limit_in_bytes", "1000000\n");
        file("memory/old/memory.usage_in_bytes", "900000\n");
        file(
            "memory/old/memory.stat",
            "inactive_file 5\ntotal_inactive_file 300000\n",
        );
        file("memory/memory.limit_in_bytes", "9223372036854771712\n");
        let left = |groups| -> Vec<u64> {
            let groups = memory_groups(groups, mount.path());
            groups.iter().filter_map(MemoryGroup::left).collect()
        };
        assert_eq!(left("0::/box/in\n"), [262_144_000 - 150_000_000]);
        assert_eq!(left("4:memory:/old\n0::/\n"), [400_000]);
        assert_eq!(left("8:pids:/old\n"), [] as [u64; 0]);
    }

    #[test]
    fn this_host_tells_what_it_has_of_everything() {
        let supplies = Host::read().supplies(0);
        for resource in [
            Resource::Memory,
            Resource::OpenFiles,
            Resource::Processes,
            Resource::Watches,
        ] {
            let of_it = supplies.iter().find(|supply| supply.resource == resource);
            assert!(
                of_it.is_some_and(|supply| supply.left > 0),
                "{resource:?}: {supplies:?}"
            );
        }
    }
}
