//! A VMM's binary: where it is, and what it says of its version.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;

use crate::VmmError;

/// How long `--version` may take: it prints and ends.
const VERSION_DEADLINE: Duration = Duration::from_secs(10);

/// The first executable file with this name: in the directory `beside`, else in those of `path`.
pub(crate) fn find_in(name: &str, beside: Option<&Path>, path: &OsStr) -> Option<PathBuf> {
    let is_executable = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
    };
    let directories = beside
        .map(Path::to_owned)
        .into_iter()
        .chain(env::split_paths(path));
    directories
        .map(|directory| directory.join(name))
        .find(is_executable)
}

/// Runs `<binary> --version`, which prints so many words and then the version.
pub(crate) async fn ask_version(binary: &Path, words_before: usize) -> Result<String, VmmError> {
    let spawn = |source| VmmError::Spawn {
        binary: binary.to_owned(),
        source,
    };
    let asked = Command::new(binary)
        .arg("--version")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(VERSION_DEADLINE, asked).await {
        Ok(output) => output.map_err(spawn)?,
        Err(_elapsed) => return Err(spawn(io::ErrorKind::TimedOut.into())),
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let is_version = |word: &&str| {
        word.trim_start_matches('v')
            .starts_with(|first: char| first.is_ascii_digit())
    };
    match said.split_ascii_whitespace().nth(words_before).filter(is_version) {
        Some(version) if output.status.success() => Ok(version.to_owned()),
        _ => Err(VmmError::Version {
            binary: binary.to_owned(),
            said: said.chars().take(200).collect(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "some-vmm";

    /// Makes a file with the binary's name and these permissions in a new directory below `root`.
    fn place(root: &Path, directory: &str, mode: u32) -> PathBuf {
        let directory = root.join(directory);
        fs::create_dir(&directory).unwrap();
        fs::write(directory.join(NAME), "").unwrap();
        fs::set_permissions(directory.join(NAME), fs::Permissions::from_mode(mode)).unwrap();
        directory
    }

    #[test]
    fn the_binary_beside_the_executable_goes_before_those_of_path() {
        let root = tempfile::tempdir().unwrap();
        let beside = place(root.path(), "beside", 0o755);
        let first = place(root.path(), "first", 0o755);
        let path = env::join_paths([&first]).unwrap();
        assert_eq!(find_in(NAME, Some(&beside), &path), Some(beside.join(NAME)));
        assert_eq!(find_in(NAME, Some(root.path()), &path), Some(first.join(NAME)));
    }

    #[test]
    fn what_cannot_be_executed_is_passed_over() {
        let root = tempfile::tempdir().unwrap();
        let text = place(root.path(), "text", 0o644);
        let program = place(root.path(), "program", 0o755);
        let path = env::join_paths([Path::new("/nonexistent"), &text, &program]).unwrap();
        assert_eq!(find_in(NAME, None, &path), Some(program.join(NAME)));
        assert_eq!(find_in(NAME, None, text.as_os_str()), None);
    }
}
