//! VMM processes that are there although nobody recorded them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use stencil_core::ProcessIdentity;

use super::spawn::is_vmm;
use super::{ProcessError, procfs};

/// A process that was found by the directory that it works in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StrayProcess {
    /// What identifies it.
    pub identity: ProcessIdentity,
    /// Its working directory, without links in its path. The kernel adds ` (deleted)` to one that was removed.
    pub directory: PathBuf,
}

/// The VMM processes whose working directory is `under` or below it: a VMM is known by how its command line tells it of
/// its socket, and its instance by its working directory, which stays the same directory when that is renamed.
///
/// This is what finds a VMM whose start was cut off by a crash of the server, before it was recorded. Processes of
/// other users and those that end meanwhile are left out. It reads all of `/proc`, which blocks.
///
/// # Errors
/// [`ProcessError::Read`] or [`ProcessError::Malformed`] when processes cannot be listed or looked at: then nobody knows
/// whether there is such a VMM.
pub fn stray_processes(under: &Path) -> Result<Vec<StrayProcess>, ProcessError> {
    processes_below(under, is_vmm)
}

/// The processes whose working directory is `under` or below it, and whose command line is such a one. This blocks.
pub(crate) fn processes_below(
    under: &Path,
    is_such: fn(&[u8]) -> bool,
) -> Result<Vec<StrayProcess>, ProcessError> {
    const PROC: &str = "/proc";
    // The kernel tells working directories without links in them.
    let under = fs::canonicalize(under).map_err(unreadable(under))?;
    let boot_id = procfs::boot_id()?;
    let mut found = Vec::new();
    for entry in fs::read_dir(PROC).map_err(unreadable(Path::new(PROC)))? {
        let entry = entry.map_err(unreadable(Path::new(PROC)))?;
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse::<u32>().ok())
        else {
            continue;
        };
        // Read before and after: the same start time says that all of it was one process.
        let start_time = match procfs::start_time(pid) {
            Ok(Some(start_time)) => start_time,
            Ok(None) => continue,
            // Hidden by the mount option `hidepid`, as only those of other users are.
            Err(ProcessError::Read { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                continue;
            }
            Err(error) => return Err(error),
        };
        let cmdline = entry.path().join("cmdline");
        let Some(arguments) = visible(fs::read(&cmdline), &cmdline)? else {
            continue;
        };
        if !is_such(&arguments) {
            continue;
        }
        let cwd = entry.path().join("cwd");
        let Some(directory) = visible(fs::read_link(&cwd), &cwd)? else {
            continue;
        };
        if directory.starts_with(&under) && procfs::start_time(pid)? == Some(start_time) {
            found.push(StrayProcess {
                identity: ProcessIdentity {
                    pid,
                    start_time,
                    boot_id: boot_id.clone(),
                },
                directory,
            });
        }
    }
    Ok(found)
}

/// What a file of `/proc/<pid>` says; `None` where the process has gone or is another user's, whose VMMs are not ours.
fn visible<T>(read: io::Result<T>, path: &Path) -> Result<Option<T>, ProcessError> {
    match read {
        Ok(read) => Ok(Some(read)),
        Err(error) if procfs::is_gone(&error) || error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
        Err(source) => Err(unreadable(path)(source)),
    }
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> ProcessError {
    let path = path.display().to_string();
    move |source| ProcessError::Read { path, source }
}
