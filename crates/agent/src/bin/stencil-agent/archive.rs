//! Files in and out as a tar stream: the agent runs itself for it, so that a guest needs no tar of its own.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

/// Why files did not get in or out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArchiveError {
    #[error("could not read {}", .0.display())]
    Read(PathBuf, #[source] io::Error),
    #[error("{} is neither a file, a directory nor a symbolic link", .0.display())]
    Kind(PathBuf),
    #[error("could not write the archive")]
    Write(#[source] io::Error),
    #[error("{} is no directory", .0.display())]
    NoDirectory(PathBuf),
    #[error("the archive is damaged, or an entry could not be written")]
    Unpack(#[source] io::Error),
    #[error("the archive's entry {} lies outside of the directory", .0.display())]
    Outside(PathBuf),
}

/// Writes `path` to standard output, under its own name. Symbolic links stay what they are.
pub(crate) fn pack(path: &Path) -> Result<(), ArchiveError> {
    let read = |error| ArchiveError::Read(path.to_owned(), error);
    let kind = fs::symlink_metadata(path).map_err(read)?.file_type();
    // Of `/` and `a/..` the name is another one, or none.
    let whole = fs::canonicalize(path).map_err(read);
    let name = match path.file_name() {
        Some(name) => name.to_owned(),
        None => whole?.file_name().unwrap_or(OsStr::new(".")).to_owned(),
    };
    let mut archive = tar::Builder::new(BufWriter::with_capacity(64 << 10, io::stdout().lock()));
    archive.follow_symlinks(false);
    if kind.is_dir() {
        archive.append_dir_all(&name, path).map_err(ArchiveError::Write)?;
    } else if kind.is_file() || kind.is_symlink() {
        archive
            .append_path_with_name(path, &name)
            .map_err(ArchiveError::Write)?;
    } else {
        return Err(ArchiveError::Kind(path.to_owned()));
    }
    let mut stdout = archive.into_inner().map_err(ArchiveError::Write)?;
    stdout.flush().map_err(ArchiveError::Write)
}

/// Unpacks standard input into `directory`.
pub(crate) fn unpack(directory: &Path) -> Result<(), ArchiveError> {
    if !directory.is_dir() {
        return Err(ArchiveError::NoDirectory(directory.to_owned()));
    }
    let mut archive = tar::Archive::new(io::stdin().lock());
    archive.set_preserve_permissions(true);
    for entry in archive.entries().map_err(ArchiveError::Unpack)? {
        let mut entry = entry.map_err(ArchiveError::Unpack)?;
        // False: a `..` is in its path. Links that lead outside are errors of their own.
        if !entry.unpack_in(directory).map_err(ArchiveError::Unpack)? {
            let path = entry.path().map_err(ArchiveError::Unpack)?;
            return Err(ArchiveError::Outside(path.into_owned()));
        }
    }
    Ok(())
}
