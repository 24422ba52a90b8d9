//! Why a pager ended before its time, in a file of the instance.
//!
//! The file is there from the pager's beginning, empty and locked. A pager that fails writes into it why; one that ends in order
//! removes it. So an empty one that nobody has locked is that of a pager that was killed, which also a server sees that did not
//! start the pager.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// The file's name, in the instance's directory.
pub(in super::super) const NAME: &str = "pager-failed";

/// What is told of a pager that could not say anything itself, and whose end nobody saw.
const KILLED: &str = "its pager was killed";

/// The pager's hold of the file in its working directory.
#[derive(Debug)]
pub(super) struct LastWords(File);

impl LastWords {
    pub(super) fn begin() -> io::Result<Self> {
        let file = File::create(NAME)?;
        file.lock()?;
        Ok(Self(file))
    }

    /// It fails, and why.
    pub(super) fn say(mut self, why: &str) {
        // What cannot be written is in the log all the same, and that it failed is seen without.
        let _ = self.0.write_all(why.as_bytes());
    }

    /// It ends in order.
    pub(super) fn none(self) {
        // One that stays is taken for a pager's that was killed, and is forgotten when the next VMM starts.
        let _ = fs::remove_file(NAME);
    }
}

/// Why the pager of the VMM in `directory` ended before its time, if it did.
pub(in super::super) fn read(directory: &Path) -> Option<String> {
    let mut file = File::open(directory.join(NAME)).ok()?;
    // Looked at first: who is dead has said all of it.
    let is_dead = file.try_lock_shared().is_ok();
    let mut words = String::new();
    file.read_to_string(&mut words).ok()?;
    if !words.is_empty() {
        return Some(words);
    }
    // It may have ended in order since the file was opened.
    let is_there = file.metadata().ok()?.nlink() > 0;
    (is_dead && is_there).then(|| KILLED.to_owned())
}

/// Says how a pager ended that could not say it itself. By the descriptor: the directory may have another name by now.
pub(in super::super) fn say_for_it(directory: impl AsFd, how: &str) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::APPEND | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(
        directory,
        NAME,
        flags,
        Mode::RUSR | Mode::WUSR,
    )?);
    if file.metadata()?.len() == 0 {
        file.write_all(how.as_bytes())?;
    }
    Ok(())
}
