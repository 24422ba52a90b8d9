//! One file or directory as a tar stream, for both sides: what is packed on one side of a machine's border is unpacked on the other.
//!
//! - What is packed is what was read: every entry has exactly the length that it announces, whatever the file system says of the
//!   file's size. What changed meanwhile, and what cannot be copied, is told in [`Notes`].
//! - What is unpacked lies beside its target, in a directory of its own, until it is whole; then it is renamed. Nothing is written
//!   through a link, and the names in the stream lead nowhere else.
//! - Modes obey the umask, and never make a file run as somebody else. Those of directories are set last.

mod pack;
mod unpack;

use std::borrow::Cow;
use std::io;
use std::path::{Path, PathBuf};

pub use pack::pack;
pub use unpack::{From, Unpacking, unpack};

/// The most notes that are kept; of the others the number is told.
const MOST_NOTES: usize = 50;

/// How the agent's `pack` ends where something is missing that should have been copied, which it has told.
pub const PARTIAL: u8 = 3;

/// Why nothing was packed or unpacked.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Something that was to be copied cannot be read.
    #[error("could not read {}", shown(.0))]
    Read(PathBuf, #[source] io::Error),
    /// It is no file, directory or link.
    #[error(
        "{} is a {kind}; only files, directories and symbolic links are copied",
        shown(path)
    )]
    Kind {
        /// Where it is.
        path: PathBuf,
        /// What it is.
        kind: &'static str,
    },
    /// A file that does not tell how much is in it, and has more than is kept in memory.
    #[error("{} has more than {most} bytes and does not tell its size", shown(path))]
    Endless {
        /// The file.
        path: PathBuf,
        /// The most bytes of such a file that are copied.
        most: u64,
    },
    /// Nobody takes the stream any more.
    #[error("could not write the archive")]
    Write(#[source] io::Error),
    /// The stream is no archive, or ends early.
    #[error("the archive is damaged")]
    Damaged(#[source] io::Error),
    /// An entry is not what a copy of one file or directory consists of.
    #[error("the archive has an entry that does not belong there, {}: {why}", shown(path))]
    Entry {
        /// The entry's name.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The archive has no entry.
    #[error("the archive is empty")]
    Empty,
    /// What was unpacked cannot be written.
    #[error("could not write {}", shown(.0))]
    Make(PathBuf, #[source] io::Error),
    /// The target's directory is not there.
    #[error("{} is no directory; name one that is there", shown(.0))]
    NoDirectory(PathBuf),
    /// A directory does not take the place of another one.
    #[error("{} is there already", shown(.0))]
    Exists(PathBuf),
    /// The target has no name.
    #[error("{} has no name to be copied under; give one", shown(.0))]
    NoName(PathBuf),
}

/// What was not copied as it is, a sentence each.
#[derive(Debug, Default)]
pub struct Notes {
    said: Vec<String>,
    more: usize,
    is_partial: bool,
}

impl Notes {
    /// Something was left out because of what it is: a pipe, a device, a link that leads out.
    fn left_out(&mut self, path: &Path, why: &str) {
        self.say(format!("left out {}: {why}", shown(path)));
    }

    /// Something should have been copied, and was not, or not as it is now.
    fn failed(&mut self, path: &Path, why: &str) {
        self.is_partial = true;
        self.say(format!("{}: {why}", shown(path)));
    }

    fn say(&mut self, note: String) {
        if self.said.len() < MOST_NOTES {
            self.said.push(note);
        } else {
            self.more += 1;
        }
    }

    /// Whether something is missing that should have been copied, or changed while it was.
    #[must_use]
    pub fn is_partial(&self) -> bool {
        self.is_partial
    }

    /// The sentences, without control characters.
    pub fn lines(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let more = (self.more > 0).then(|| Cow::from(format!("and {} more", self.more)));
        self.said.iter().map(|note| Cow::from(note.as_str())).chain(more)
    }
}

/// A path as it can be shown on any terminal.
fn shown(path: &Path) -> String {
    let text = path.to_string_lossy();
    text.chars()
        .flat_map(|char| {
            let escaped = char.is_control().then(|| char.escape_default());
            let itself = escaped.is_none().then_some(char);
            escaped.into_iter().flatten().chain(itself)
        })
        .collect()
}

#[cfg(test)]
mod tests;
