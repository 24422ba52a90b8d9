//! Unpacking: beside the target, then in its place by one rename.

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};

use tar::{Archive, Entry, EntryType};
use tempfile::TempDir;

use super::{ArchiveError, Notes};

/// The beginning of the name of the directory in which something is unpacked.
const PREFIX: &str = ".stencil-cp-";
/// Zeros of such a piece, in bytes, stay a hole.
const PIECE: usize = 64 << 10;

/// Who packed the archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From<'a> {
    /// Somebody who may do anything here: its name is taken, and links stay what they are.
    Owner,
    /// Somebody else. It gets the name that was asked for, and no link in it leads out of it.
    Stranger(&'a OsStr),
}

/// What was unpacked and is not in its place yet. Dropped, it is removed.
#[derive(Debug)]
pub struct Unpacking {
    beside: TempDir,
    target: PathBuf,
    /// The directories in it, each before those in it, with their modes.
    directories: Vec<(PathBuf, u32)>,
    notes: Notes,
}

/// Reads an archive of one file or directory to its end. It is to be below `to` where that is a directory, else `to`.
///
/// # Errors
/// [`ArchiveError`]; nothing is left then.
pub fn unpack(archive: impl Read, to: &Path, from: From<'_>) -> Result<Unpacking, ArchiveError> {
    let (parent, name) = place(to)?;
    let beside = tempfile::Builder::new()
        .prefix(PREFIX)
        .tempdir_in(&parent)
        .map_err(|error| ArchiveError::Make(parent.clone(), error))?;
    let mut unpacker = Unpacker {
        root: beside.path().join("0"),
        is_strange: matches!(from, From::Stranger(_)),
        first: None,
        umask: umask(),
        directories: Vec::new(),
        notes: Notes::default(),
    };
    let mut archive = Archive::new(Ending {
        stream: archive,
        has_ended: false,
    });
    let mut target = None;
    for entry in archive.entries().map_err(ArchiveError::Damaged)? {
        let entry = entry.map_err(ArchiveError::Damaged)?;
        let is_directory = entry.header().entry_type().is_dir();
        unpacker.take(entry)?;
        if target.is_none() {
            let own = match from {
                From::Owner => unpacker.first.as_deref(),
                From::Stranger(asked) => Some(asked),
            };
            let path = parent.join(name.as_deref().or(own).ok_or(ArchiveError::Empty)?);
            if is_directory && path.is_dir() {
                return Err(ArchiveError::Exists(path));
            }
            target = Some(path);
        }
    }
    let mut rest = archive.into_inner();
    // An archive says where it ends. One that was cut off between two entries does not.
    if rest.has_ended {
        return Err(ArchiveError::Damaged(io::ErrorKind::UnexpectedEof.into()));
    }
    let target = target.ok_or(ArchiveError::Empty)?;
    // What may follow its end is nothing.
    io::copy(&mut rest, &mut io::sink()).map_err(ArchiveError::Damaged)?;
    Ok(Unpacking {
        beside,
        target,
        directories: unpacker.directories,
        notes: unpacker.notes,
    })
}

impl Unpacking {
    /// Puts it in its place, where a file takes that of another one, and tells what was not copied as it is.
    ///
    /// # Errors
    /// [`ArchiveError::Make`]; then it is not there, except where only a mode could not be set.
    pub fn keep(self) -> Result<Notes, ArchiveError> {
        let made = self.beside.path().join("0");
        let failed = |error| ArchiveError::Make(self.target.clone(), error);
        if fs::symlink_metadata(&made).is_err() {
            // The only entry was left out.
            return Ok(self.notes);
        }
        fs::rename(&made, &self.target).map_err(failed)?;
        for (directory, mode) in self.directories.iter().rev() {
            let path = match directory.strip_prefix(&made) {
                Ok(below) if below.as_os_str().is_empty() => self.target.clone(),
                Ok(below) => self.target.join(below),
                Err(_) => continue,
            };
            fs::set_permissions(&path, Permissions::from_mode(*mode))
                .map_err(|error| ArchiveError::Make(path.clone(), error))?;
        }
        Ok(self.notes)
    }
}

/// Knows whether its stream has ended.
struct Ending<R> {
    stream: R,
    has_ended: bool,
}

impl<R: Read> Read for Ending<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.stream.read(buffer)?;
        self.has_ended |= read == 0 && !buffer.is_empty();
        Ok(read)
    }
}

/// The directory in which it is to be, and its name there where `to` tells it.
fn place(to: &Path) -> Result<(PathBuf, Option<OsString>), ArchiveError> {
    if to.is_dir() {
        return Ok((to.to_owned(), None));
    }
    let name = to
        .file_name()
        .ok_or_else(|| ArchiveError::NoName(to.to_owned()))?;
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        return Err(ArchiveError::NoDirectory(parent.to_owned()));
    }
    Ok((parent.to_owned(), Some(name.to_owned())))
}

struct Unpacker {
    /// What becomes the target.
    root: PathBuf,
    is_strange: bool,
    /// The name under which the archive has everything.
    first: Option<OsString>,
    umask: u32,
    directories: Vec<(PathBuf, u32)>,
    notes: Notes,
}

impl Unpacker {
    fn take(&mut self, mut entry: Entry<'_, impl Read>) -> Result<(), ArchiveError> {
        let name = entry.path().map_err(ArchiveError::Damaged)?.into_owned();
        let below = self.below(&name)?;
        let path = if below.as_os_str().is_empty() {
            self.root.clone()
        } else {
            self.root.join(&below)
        };
        self.check_parents(&name, &below)?;
        let make = |error| ArchiveError::Make(name.clone(), error);
        let mode = entry.header().mode().map_err(ArchiveError::Damaged)? & 0o777 & !self.umask;
        match entry.header().entry_type() {
            EntryType::Directory => {
                DirBuilder::new().mode(0o700).create(&path).map_err(make)?;
                self.directories.push((path, mode));
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&path)
                    .map_err(make)?;
                copy(&mut entry, &mut file, &name)?;
                file.set_permissions(Permissions::from_mode(mode)).map_err(make)?;
            }
            EntryType::Symlink => {
                let target = entry.link_name().map_err(ArchiveError::Damaged)?;
                let target = target.ok_or(ArchiveError::Entry {
                    path: name.clone(),
                    why: "it is a link that leads nowhere",
                })?;
                if self.is_strange && leads_out(&below, &target) {
                    self.notes
                        .left_out(&name, "it is a link that leads out of what is copied");
                    return Ok(());
                }
                symlink(target, &path).map_err(make)?;
            }
            _ => {
                return Err(ArchiveError::Entry {
                    path: name,
                    why: "it is neither a file, a directory nor a symbolic link",
                });
            }
        }
        Ok(())
    }

    /// The path of an entry below what is copied; empty for that itself.
    fn below(&mut self, name: &Path) -> Result<PathBuf, ArchiveError> {
        let outside = || ArchiveError::Entry {
            path: name.to_owned(),
            why: "it lies outside of what is copied",
        };
        let mut parts = name.components().filter(|part| *part != Component::CurDir);
        let Some(Component::Normal(first)) = parts.next() else {
            return Err(outside());
        };
        match &self.first {
            None => self.first = Some(first.to_owned()),
            Some(known) if known == first => {}
            Some(_) => return Err(outside()),
        }
        parts
            .map(|part| match part {
                Component::Normal(part) => Ok(part),
                _ => Err(outside()),
            })
            .collect()
    }

    /// Everything above an entry was unpacked before it as a directory: nothing is written through a link.
    fn check_parents(&self, name: &Path, below: &Path) -> Result<(), ArchiveError> {
        let parents = below.ancestors().skip(1);
        for parent in parents {
            let path = if parent.as_os_str().is_empty() {
                self.root.clone()
            } else {
                self.root.join(parent)
            };
            if !fs::symlink_metadata(&path).is_ok_and(|found| found.is_dir()) {
                return Err(ArchiveError::Entry {
                    path: name.to_owned(),
                    why: "what it lies in is no directory of the archive",
                });
            }
        }
        Ok(())
    }
}

/// Whether a link at `below` leads out of what is copied: an absolute one does, one with too many `..`, and one with a `..` behind
/// a name, which may be that of another link.
fn leads_out(below: &Path, target: &Path) -> bool {
    // A link in place of the whole leads to its neighbours.
    let Some(parent) = below.parent() else { return true };
    let mut depth = parent.components().count();
    let mut is_named = false;
    target.components().any(|part| match part {
        Component::Normal(_) => {
            is_named = true;
            false
        }
        Component::ParentDir if depth > 0 && !is_named => {
            depth -= 1;
            false
        }
        Component::CurDir => false,
        _ => true,
    })
}

/// Writes the content of an entry, all of it; pieces of zeros stay holes.
fn copy(entry: &mut Entry<'_, impl Read>, file: &mut File, name: &Path) -> Result<(), ArchiveError> {
    let make = |error| ArchiveError::Make(name.to_owned(), error);
    let (mut length, mut buffer) = (0, vec![0; PIECE]);
    loop {
        let mut filled = 0;
        while filled < PIECE {
            match entry.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ArchiveError::Damaged(error)),
            }
        }
        let piece = &buffer[..filled];
        length += filled as u64;
        if piece.is_empty() {
            break;
        } else if piece.len() == PIECE && piece.iter().all(|byte| *byte == 0) {
            file.seek(SeekFrom::Start(length)).map_err(make)?;
        } else {
            file.write_all(piece).map_err(make)?;
        }
    }
    if length != entry.size() {
        return Err(ArchiveError::Damaged(io::ErrorKind::UnexpectedEof.into()));
    }
    file.set_len(length).map_err(make)
}

/// The umask of this process. It cannot be asked for without changing it, but by /proc: proc_pid_status(5).
fn umask() -> u32 {
    const USUAL: u32 = 0o022;
    let Ok(status) = fs::read_to_string("/proc/self/status") else {
        return USUAL;
    };
    let umask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
    umask
        .and_then(|umask| u32::from_str_radix(umask.trim(), 8).ok())
        .unwrap_or(USUAL)
}
