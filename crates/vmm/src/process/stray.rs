//! VMM processes that are there although nobody recorded them.

use std::fs;
use std::path::Path;

use stencil_core::ProcessIdentity;

use super::procfs;
use super::spawn::is_vmm;

/// The VMM processes whose working directory is `under` or below it: a VMM is known by how its command line tells it of
/// its socket, and its instance by its working directory, which stays the same directory when that is renamed.
///
/// This is what finds a VMM whose start was cut off by a crash of the server, before it was recorded. Processes of
/// other users and those that end meanwhile are left out. It reads all of `/proc`, which blocks.
pub fn stray_processes(under: &Path) -> Vec<ProcessIdentity> {
    processes_below(under, is_vmm)
}

/// The processes whose working directory is `under` or below it, and whose command line is such a one. This blocks.
pub(crate) fn processes_below(under: &Path, is_such: fn(&[u8]) -> bool) -> Vec<ProcessIdentity> {
    // The kernel tells working directories without links in them.
    let (Ok(under), Ok(boot_id), Ok(entries)) =
        (fs::canonicalize(under), procfs::boot_id(), fs::read_dir("/proc"))
    else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            // Read before and after: the same start time says that all of it was one process.
            let start_time = procfs::start_time(pid).ok()??;
            let is_such = is_such(&fs::read(entry.path().join("cmdline")).ok()?);
            let is_under = fs::read_link(entry.path().join("cwd")).ok()?.starts_with(&under);
            let is_same = procfs::start_time(pid).ok()? == Some(start_time);
            (is_such && is_under && is_same).then(|| ProcessIdentity {
                pid,
                start_time,
                boot_id: boot_id.clone(),
            })
        })
        .collect()
}
