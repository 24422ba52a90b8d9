//! Packing: a walk over a tree, in which every entry has the length that it announces.

use std::ffi::OsStr;
use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::OFlags;
use tar::{Builder, EntryType, Header, HeaderMode};

use super::{ArchiveError, Notes};

/// A file of which no more is there is read before its length is announced.
const READ_FIRST: u64 = 1 << 20;
/// The same where the file system tells less than there is, as procfs does.
const MOST_UNTOLD: u64 = 64 << 20;

/// Writes a file or directory to `out` under `name`. Symbolic links stay what they are.
///
/// # Errors
/// [`ArchiveError::Read`] and [`ArchiveError::Kind`] of the path itself; below it, what cannot be read and what is no file is left
/// out and noted. [`ArchiveError::Write`] if nobody takes the stream.
pub fn pack(from: &Path, name: &OsStr, out: impl Write) -> Result<Notes, ArchiveError> {
    let found = fs::symlink_metadata(from).map_err(|error| ArchiveError::Read(from.to_owned(), error))?;
    if let Some(kind) = special(found.file_type()) {
        return Err(ArchiveError::Kind {
            path: from.to_owned(),
            kind,
        });
    }
    let mut packer = Packer {
        archive: Builder::new(out),
        notes: Notes::default(),
    };
    let name = Path::new(name);
    if found.is_file() {
        // What was asked for by name is there as a whole or not at all.
        packer.file(from, name)?;
    } else {
        packer.add(from, name, &found)?;
    }
    let mut out = packer.archive.into_inner().map_err(ArchiveError::Write)?;
    out.flush().map_err(ArchiveError::Write)?;
    Ok(packer.notes)
}

/// What is none of those that are copied.
fn special(kind: FileType) -> Option<&'static str> {
    if kind.is_fifo() {
        Some("pipe")
    } else if kind.is_socket() {
        Some("socket")
    } else if kind.is_block_device() || kind.is_char_device() {
        Some("device")
    } else {
        None
    }
}

struct Packer<W: Write> {
    archive: Builder<W>,
    notes: Notes,
}

impl<W: Write> Packer<W> {
    fn add(&mut self, path: &Path, name: &Path, found: &Metadata) -> Result<(), ArchiveError> {
        let kind = found.file_type();
        if let Some(special) = special(kind) {
            self.notes.left_out(path, &format!("it is a {special}"));
            Ok(())
        } else if kind.is_dir() {
            self.directory(path, name, found)
        } else if kind.is_symlink() {
            self.link(path, name, found)
        } else {
            match self.file(path, name) {
                Err(ArchiveError::Read(path, error)) => {
                    self.notes.failed(&path, &format!("could not read it: {error}"));
                    Ok(())
                }
                Err(endless @ ArchiveError::Endless { .. }) => {
                    self.notes.failed(path, &endless.to_string());
                    Ok(())
                }
                done => done,
            }
        }
    }

    fn directory(&mut self, path: &Path, name: &Path, found: &Metadata) -> Result<(), ArchiveError> {
        let mut header = header(found, EntryType::Directory);
        header.set_size(0);
        self.archive
            .append_data(&mut header, name, io::empty())
            .map_err(ArchiveError::Write)?;
        let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let mut entries = match entries {
            Ok(entries) => entries,
            Err(error) => {
                self.notes.failed(path, &format!("could not list it: {error}"));
                return Ok(());
            }
        };
        entries.sort_unstable_by_key(fs::DirEntry::file_name);
        for entry in entries {
            let below = entry.path();
            match fs::symlink_metadata(&below) {
                Ok(found) => self.add(&below, &name.join(entry.file_name()), &found)?,
                Err(error) => self.notes.failed(&below, &format!("could not read it: {error}")),
            }
        }
        Ok(())
    }

    fn link(&mut self, path: &Path, name: &Path, found: &Metadata) -> Result<(), ArchiveError> {
        match fs::read_link(path) {
            Ok(target) => {
                let mut header = header(found, EntryType::Symlink);
                header.set_size(0);
                self.archive
                    .append_link(&mut header, name, target)
                    .map_err(ArchiveError::Write)
            }
            Err(error) => {
                self.notes.failed(path, &format!("could not read it: {error}"));
                Ok(())
            }
        }
    }

    fn file(&mut self, path: &Path, name: &Path) -> Result<(), ArchiveError> {
        let unreadable = |error| ArchiveError::Read(path.to_owned(), error);
        let mut file = OpenOptions::new()
            .read(true)
            // What took its place since it was looked at is not waited for, and not followed.
            .custom_flags((OFlags::NONBLOCK | OFlags::NOFOLLOW).bits().cast_signed())
            .open(path)
            .map_err(unreadable)?;
        let found = file.metadata().map_err(unreadable)?;
        if let Some(kind) = special(found.file_type()) {
            self.notes.left_out(path, &format!("it is a {kind}"));
            return Ok(());
        }
        let mut first = Vec::new();
        (&mut file)
            .take(READ_FIRST)
            .read_to_end(&mut first)
            .map_err(unreadable)?;
        let is_all = (first.len() as u64) < READ_FIRST;
        if !is_all && found.len() <= READ_FIRST {
            (&mut file)
                .take(MOST_UNTOLD)
                .read_to_end(&mut first)
                .map_err(unreadable)?;
            if first.len() as u64 > MOST_UNTOLD {
                return Err(ArchiveError::Endless {
                    path: path.to_owned(),
                    most: MOST_UNTOLD,
                });
            }
        }
        let length = if is_all { 0 } else { found.len() }.max(first.len() as u64);
        let mut header = header(&found, EntryType::Regular);
        header.set_size(length);
        let mut content = Exactly {
            unread: (&first[..]).chain(&mut file),
            left: length,
            is_short: false,
        };
        self.archive
            .append_data(&mut header, name, &mut content)
            .map_err(ArchiveError::Write)?;
        if content.is_short {
            self.notes.failed(
                path,
                "it became shorter while it was copied; zeros are in place of the rest",
            );
        } else if length > first.len() as u64 && has_grown(&file, length) {
            self.notes.failed(
                path,
                "it became longer while it was copied; what was added is missing",
            );
        }
        Ok(())
    }
}

fn header(found: &Metadata, kind: EntryType) -> Header {
    let mut header = Header::new_gnu();
    header.set_metadata_in_mode(found, HeaderMode::Complete);
    header.set_entry_type(kind);
    header
}

fn has_grown(file: &File, length: u64) -> bool {
    file.metadata().is_ok_and(|found| found.len() > length)
}

/// So many bytes of a file, and zeros once it ends or fails before.
struct Exactly<R> {
    unread: R,
    left: u64,
    is_short: bool,
}

impl<R: Read> Read for Exactly<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let buffer = &mut buffer[..most];
        if buffer.is_empty() {
            return Ok(0);
        }
        let read = if self.is_short {
            0
        } else {
            match self.unread.read(buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => return Err(error),
                read => read.unwrap_or(0),
            }
        };
        let read = if read == 0 {
            self.is_short = true;
            buffer.fill(0);
            buffer.len()
        } else {
            read
        };
        self.left -= read as u64;
        Ok(read)
    }
}
