//! What `/proc` says of a process's identity; see proc(5).

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;

use super::ProcessError;

/// The id that the kernel gave itself at boot: start times of different boots cannot be compared.
pub(super) fn boot_id() -> Result<String, ProcessError> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    match fs::read_to_string(PATH) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(ProcessError::Read {
            path: PATH.to_owned(),
            source,
        }),
    }
}

/// When the process with this pid started, in clock ticks since boot; `None` if there is none.
pub(super) fn start_time(pid: u32) -> Result<Option<u64>, ProcessError> {
    let path = format!("/proc/{pid}/stat");
    match fs::read(&path) {
        Ok(stat) => match start_time_in(&stat) {
            Some(ticks) => Ok(Some(ticks)),
            None => Err(ProcessError::Malformed { path }),
        },
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(ProcessError::Read { path, source }),
    }
}

/// Whether `dir` is the working directory of the process, whatever path leads there; `None` if the process is gone.
pub(super) fn works_in(pid: u32, dir: &Path) -> Result<Option<bool>, ProcessError> {
    let inode = |path: &Path| {
        let metadata = fs::metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    };
    let read = |path: &Path, source: io::Error| ProcessError::Read {
        path: path.display().to_string(),
        source,
    };
    let cwd = format!("/proc/{pid}/cwd");
    match inode(Path::new(&cwd)) {
        Ok(works_in) => inode(dir)
            .map(|dir| Some(dir == works_in))
            .map_err(|source| read(dir, source)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(source) => Err(read(Path::new(&cwd), source)),
    }
}

/// Whether a file of `/proc/<pid>` could not be read because the process is gone: before it was opened, or after.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Field 22 of `/proc/<pid>/stat`. Field 2 is the program's name in parentheses, which may itself hold blanks and
/// parentheses, so that the fields are counted from the last closing one.
fn start_time_in(stat: &[u8]) -> Option<u64> {
    const FIELD: usize = 22;
    const FIRST_AFTER_NAME: usize = 3;
    let name_ends = stat.iter().rposition(|&byte| byte == b')')?;
    let rest = std::str::from_utf8(stat.get(name_ends + 1..)?).ok()?;
    rest.split_ascii_whitespace()
        .nth(FIELD - FIRST_AFTER_NAME)?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As the kernel printed it for a program named `a) R 1 (b`, cut after field 25.
    const STAT: &str = "4711 (a) R 1 (b) S 1 4711 4711 0 -1 4194560 94 0 0 0 0 0 0 0 20 0 1 0 123456 2895872 211 18446744073709551615";

    #[test]
    fn the_start_time_is_counted_from_the_last_parenthesis() {
        assert_eq!(start_time_in(STAT.as_bytes()), Some(123_456));
    }

    #[test]
    fn a_stat_file_that_ends_early_has_no_start_time() {
        assert_eq!(start_time_in(b"4711 (sleep) S 1 4711"), None);
        assert_eq!(start_time_in(b"4711 (sleep"), None);
        assert_eq!(start_time_in(b""), None);
    }

    #[test]
    fn a_program_name_that_is_not_utf8_does_no_harm() {
        let stat = [&STAT.as_bytes()[..6], b"\xff", &STAT.as_bytes()[6..]].concat();
        assert_eq!(start_time_in(&stat), Some(123_456));
    }
}
