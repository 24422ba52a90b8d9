//! Whether a guest has said that it is ready: the text that it is to print in each epoch, looked for in its console log.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::logs::first_data;

/// Bytes that are read from a log at a time.
const CHUNK: usize = 64 << 10;
/// Bytes that one look reads at most: others have their turn in between.
const MOST_AT_ONCE: u64 = 4 << 20;

/// Looks for the guest's word that it is ready, in what it printed in this epoch; each byte is looked at once.
#[derive(Debug)]
pub(crate) struct ReadyScan {
    /// What to look for; `None` once it was found, or when nothing is asked of the guest.
    wanted: Option<Vec<u8>>,
    /// Where in the log to go on.
    offset: u64,
    /// The last bytes seen, in case the text began in them.
    carried: Vec<u8>,
}

impl ReadyScan {
    /// A scan for `text`, if anything is asked of the guest, of the epoch that begins at `offset` bytes into the log.
    pub(crate) fn new(text: Option<&str>, offset: u64) -> Self {
        Self {
            wanted: text.map(|text| text.as_bytes().to_vec()),
            offset,
            carried: Vec::new(),
        }
    }

    /// How many bytes of the log were looked at.
    pub(crate) fn seen(&self) -> u64 {
        self.offset
    }

    /// Reads on in the log, not more than is read in a moment; whether the guest is ready.
    pub(crate) fn advance(&mut self, log: &Path) -> bool {
        if self.wanted.is_none() {
            return true;
        }
        // A log that is not there yet, or cannot be read, holds no word of the guest.
        let Ok(log) = File::open(log) else { return false };
        // What is gone holds no word any more.
        if let Ok(data) = first_data(&log, self.offset)
            && data > self.offset
        {
            self.offset = data;
            self.carried.clear();
        }
        let end = self.offset + MOST_AT_ONCE;
        let mut chunk = vec![0; CHUNK];
        while let Some(wanted) = &self.wanted {
            if self.offset >= end {
                return false;
            }
            let read = match log.read_at(&mut chunk, self.offset) {
                Ok(0) | Err(_) => return false,
                Ok(read) => read,
            };
            self.offset += read as u64;
            self.carried.extend_from_slice(&chunk[..read]);
            if self.carried.windows(wanted.len()).any(|window| window == wanted) {
                self.wanted = None;
                self.carried = Vec::new();
            } else {
                let keep = wanted.len() - 1;
                self.carried.drain(..self.carried.len().saturating_sub(keep));
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn log(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn ready_is_found_when_its_text_comes_in_two_pieces() {
        let mut file = log(b"booting\nrea");
        let mut scan = ReadyScan::new(Some("ready"), 0);
        assert!(!scan.advance(file.path()));
        file.write_all(b"dy\n").unwrap();
        assert!(scan.advance(file.path()));
        assert!(scan.advance(file.path()), "and stays so");
    }

    #[test]
    fn ready_of_an_earlier_epoch_does_not_count() {
        let file = log(b"ready\n");
        let mut scan = ReadyScan::new(Some("ready"), 6);
        assert!(!scan.advance(file.path()));
    }

    #[test]
    fn no_readiness_asked_is_ready_without_a_log() {
        assert!(ReadyScan::new(None, 0).advance(Path::new("/nonexistent")));
    }
}
