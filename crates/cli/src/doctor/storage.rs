//! The data directory: whether it can be written, on which file system it is, and how much fits.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, Mode, OFlags, access, ioctl_ficlone, open, statvfs};
use stencil_core::error_chain;

use super::Finding;
use crate::table;

const ABOUT: &str = "data";
/// Less than this holds few snapshots, in bytes.
const LITTLE_SPACE: u64 = 4 << 30;

pub(super) fn data_directory(data: &Path) -> Finding {
    // Where it is not there yet, a server makes it.
    let there = data
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    let shown = data.display();
    if let Err(error) = access(there, Access::WRITE_OK | Access::EXEC_OK) {
        return Finding::missing(
            ABOUT,
            format!("{shown} cannot be written: {error}"),
            "name a directory of this user's: stencil serve --data DIR",
        );
    }
    let (space, is_full) = match statvfs(there) {
        Ok(facts) => {
            let bytes = facts.f_bavail.saturating_mul(facts.f_frsize);
            (format!("{} free", table::bytes(bytes)), bytes < LITTLE_SPACE)
        }
        Err(error) => (format!("free space unknown: {}", error_chain(&error)), false),
    };
    let kind = fs::canonicalize(there)
        .ok()
        .zip(fs::read_to_string("/proc/self/mountinfo").ok())
        .and_then(|(path, mounts)| file_system(&path, &mounts))
        .unwrap_or_else(|| "a file system of an unknown kind".to_owned());
    let reflink = if shares_blocks(there) {
        ", copies share blocks (reflink)"
    } else {
        ", no reflink"
    };
    let fact = format!("{shown}: {kind}{reflink}, {space}");
    if ["tmpfs", "ramfs"].contains(&kind.as_str()) {
        Finding::limited(
            ABOUT,
            fact,
            "snapshots there take the host's memory and are lost when it restarts: use a disk",
        )
    } else if is_full {
        Finding::limited(
            ABOUT,
            fact,
            "a snapshot takes up to its guest's memory: make room, or name another one with --data",
        )
    } else {
        Finding::good(ABOUT, fact)
    }
}

/// The kind of file system that holds a path, from the lines of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
fn file_system(path: &Path, mounts: &str) -> Option<String> {
    mounts
        .lines()
        .filter_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mounted_on = PathBuf::from(mount.split(' ').nth(4)?);
            let depth = mounted_on.components().count();
            path.starts_with(&mounted_on)
                .then_some((depth, file_system.split(' ').next()?))
        })
        // Of several at the same place the last one is seen.
        .max_by_key(|(depth, _)| *depth)
        .map(|(_, kind)| kind.to_owned())
}

/// Whether one file can be given another's blocks there; tried with two empty files that have no name.
fn shares_blocks(directory: &Path) -> bool {
    let unnamed = || {
        open(
            directory,
            OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC,
            Mode::RUSR | Mode::WUSR,
        )
    };
    matches!((unnamed(), unnamed()), (Ok(to), Ok(from)) if ioctl_ficlone(&to, &from).is_ok())
}

#[cfg(test)]
mod tests {
    use super::super::Mark;
    use super::*;

    const MOUNTS: &str = "\
        22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n\
        30 22 0:26 / /var/lib rw - xfs /dev/vdb rw\n\
        31 30 0:27 / /var/lib/stencil rw master:3 - btrfs /dev/vdc rw\n\
        32 31 0:28 / /var/lib/stencil rw - tmpfs tmpfs rw\n";

    #[test]
    fn the_innermost_and_last_mount_holds_a_path() {
        let kind = |path| file_system(Path::new(path), MOUNTS);
        assert_eq!(kind("/home/me").as_deref(), Some("ext4"));
        assert_eq!(kind("/var/library").as_deref(), Some("ext4"));
        assert_eq!(kind("/var/lib/other").as_deref(), Some("xfs"));
        assert_eq!(kind("/var/lib/stencil/instances").as_deref(), Some("tmpfs"));
        assert_eq!(file_system(Path::new("/"), "nonsense\n"), None);
    }

    #[test]
    fn a_directory_that_is_not_there_yet_is_judged_by_the_one_around_it_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("not/there");
        let finding = data_directory(&data);
        assert_ne!(finding.mark, Mark::Missing, "{finding:?}");
        assert!(finding.fact.contains("free"), "{finding:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // Below a file nobody can make one, not even root.
        let finding = data_directory(Path::new("/etc/passwd/stencil"));
        assert_eq!(finding.mark, Mark::Missing, "{finding:?}");
    }
}
