//! Tar streams on this side: made of what is here, and unpacked without ever leaving the place that they are for.
//!
//! A guest is a stranger: of what it packs only files, directories and links are taken, and nothing lies outside.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::path::Path;
use std::sync::mpsc::Receiver;

use bytes::{Buf, Bytes};
use tar::EntryType;
use tokio::sync::mpsc;

/// Bytes of an archive that are passed on at a time.
const CHUNK: usize = 32 << 10;

/// Packs `from` under `name`, or its own one. Symbolic links stay what they are.
pub(super) fn pack(from: &Path, name: Option<&str>, chunks: mpsc::Sender<Bytes>) -> io::Result<()> {
    let kind = fs::symlink_metadata(from)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", from.display())))?
        .file_type();
    let own = match from.file_name() {
        Some(own) => own.to_owned(),
        // Of `.` and `a/..`.
        None => fs::canonicalize(from)?
            .file_name()
            .ok_or_else(|| wrong(format!("{} has no name to be copied under", from.display())))?
            .to_owned(),
    };
    let name = name.map_or(own.as_os_str(), OsStr::new);
    let mut archive = tar::Builder::new(BufWriter::with_capacity(CHUNK, Chunks(chunks)));
    archive.follow_symlinks(false);
    if kind.is_dir() {
        archive.append_dir_all(name, from)?;
    } else if kind.is_file() || kind.is_symlink() {
        archive.append_path_with_name(from, name)?;
    } else {
        return Err(wrong(format!(
            "{} is neither a file, a directory nor a symbolic link",
            from.display()
        )));
    }
    archive.into_inner()?.flush()
}

/// Unpacks an archive of one file or directory: below `to` if that is a directory, else as `to`. Nothing is there before the
/// archive is known to be whole.
pub(super) fn unpack(to: &Path, chunks: mpsc::Receiver<Bytes>, is_whole: &Receiver<()>) -> io::Result<()> {
    let below = to.is_dir();
    let place = match (below, to.parent()) {
        (true, _) => to,
        (false, Some(parent)) if !parent.as_os_str().is_empty() => parent,
        (false, _) => Path::new("."),
    };
    let made = tempfile::Builder::new()
        .prefix(".stencil-cp-")
        .tempdir_in(place)?;
    let mut stream = Stream {
        chunks,
        unread: Bytes::new(),
    };
    let mut archive = tar::Archive::new(&mut stream);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let kind = entry.header().entry_type();
        let path = entry.path()?.into_owned();
        if !matches!(
            kind,
            EntryType::Regular | EntryType::Directory | EntryType::Symlink | EntryType::Link
        ) {
            return Err(wrong(format!(
                "{} is neither a file, a directory nor a link",
                path.display()
            )));
        }
        if !entry.unpack_in(made.path())? {
            return Err(wrong(format!(
                "{} lies outside of what is copied",
                path.display()
            )));
        }
    }
    // What may follow the end of an archive is nothing.
    io::copy(&mut stream, &mut io::sink())?;
    if is_whole.recv().is_err() {
        // Why, the guest tells.
        return Ok(());
    }
    let mut entries = fs::read_dir(made.path())?;
    let (Some(entry), None) = (entries.next(), entries.next()) else {
        return Err(wrong("the guest did not send one file or directory".to_owned()));
    };
    let entry = entry?;
    let target = if below {
        to.join(entry.file_name())
    } else {
        to.to_owned()
    };
    if entry.file_type()?.is_dir() && target.is_dir() {
        return Err(wrong(format!("{} is there already", target.display())));
    }
    fs::rename(entry.path(), &target)
        .map_err(|error| io::Error::new(error.kind(), format!("cannot make {}: {error}", target.display())))
}

fn wrong(why: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why)
}

/// Passes on what is written, chunk by chunk.
struct Chunks(mpsc::Sender<Bytes>);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let chunk = &bytes[..bytes.len().min(CHUNK)];
        match self.0.blocking_send(Bytes::copy_from_slice(chunk)) {
            Ok(()) => Ok(chunk.len()),
            Err(_) => Err(ErrorKind::BrokenPipe.into()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads what is passed on.
struct Stream {
    chunks: mpsc::Receiver<Bytes>,
    unread: Bytes,
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.unread.is_empty() {
            match self.chunks.blocking_recv() {
                Some(chunk) => self.unread = chunk,
                None => return Ok(0),
            }
        }
        let length = buffer.len().min(self.unread.len());
        self.unread.copy_to_slice(&mut buffer[..length]);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An archive with these entries, whatever their names; a link where there is a target.
    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, kind, target) in entries {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_mode(0o644);
            header.set_entry_type(*kind);
            let content: &[u8] = if kind.is_file() { b"evil" } else { b"" };
            if !target.is_empty() {
                header.set_link_name_literal(target).unwrap();
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            archive.append(&header, content).unwrap();
        }
        archive.into_inner().unwrap()
    }

    fn unpacked(to: &Path, archive: Vec<u8>) -> io::Result<()> {
        let (sender, chunks) = mpsc::channel(1024);
        for chunk in archive.chunks(CHUNK) {
            sender.try_send(Bytes::copy_from_slice(chunk)).unwrap();
        }
        drop(sender);
        let (whole, is_whole) = std::sync::mpsc::channel();
        whole.send(()).unwrap();
        unpack(to, chunks, &is_whole)
    }

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_packed_is_unpacked_under_the_name_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("tree");
        fs::create_dir_all(tree.join("a")).unwrap();
        fs::write(tree.join("a/data"), vec![7; 300_000]).unwrap();
        std::os::unix::fs::symlink("a/data", tree.join("link")).unwrap();
        let (chunks, mut packed) = mpsc::channel(1024);
        pack(&tree, Some("other"), chunks).unwrap();
        let mut bytes = Vec::new();
        while let Some(chunk) = packed.blocking_recv() {
            bytes.extend(chunk);
        }
        let to = dir.path().join("to");
        fs::create_dir(&to).unwrap();
        unpacked(&to, bytes.clone()).unwrap();
        assert_eq!(fs::read(to.join("other/link")).unwrap(), vec![7; 300_000]);
        unpacked(&to.join("new"), bytes.clone()).unwrap();
        assert_eq!(names(&to), ["new", "other"]);
        let again = unpacked(&to, bytes).unwrap_err();
        assert!(again.to_string().ends_with("other is there already"), "{again}");
        assert_eq!(names(&to), ["new", "other"]);
    }

    #[test]
    fn nothing_gets_out_of_the_place_that_it_is_for() {
        let outside = tempfile::tempdir().unwrap();
        let to = outside.path().join("to");
        fs::create_dir(&to).unwrap();
        let path = outside.path().to_str().unwrap();
        let (file, link, hard) = (EntryType::Regular, EntryType::Symlink, EntryType::Link);
        for entries in [
            vec![("../evil", file, "")],
            vec![("a/../../evil", file, "")],
            vec![("link", link, path), ("link/evil", file, "")],
            vec![("link", link, ".."), ("link/evil", file, "")],
            vec![("link", link, "../.."), ("link/evil", file, "")],
            vec![("hard", hard, "/etc/hostname")],
            vec![("hard", hard, "../../etc/hostname")],
            vec![("device", EntryType::Char, "")],
            vec![("pipe", EntryType::Fifo, "")],
            vec![("one", file, ""), ("two", file, "")],
            vec![],
        ] {
            assert!(unpacked(&to, archive(&entries)).is_err(), "{entries:?}");
            assert_eq!(names(&to), [] as [&str; 0], "{entries:?}");
            assert_eq!(names(outside.path()), ["to"], "{entries:?}");
        }
    }

    #[test]
    fn what_is_cut_off_takes_no_place() {
        let dir = tempfile::tempdir().unwrap();
        let mut cut = archive(&[("file", EntryType::Regular, "")]);
        cut.truncate(514);
        assert!(unpacked(dir.path(), cut).is_err());
        assert_eq!(names(dir.path()), [] as [&str; 0]);
    }
}
