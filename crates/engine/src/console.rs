//! The guest's serial console: what it printed, and what it is given to read.
//!
//! The console log on disk is the one source for output, whatever the hypervisor: it survives the VMM and the server,
//! and growth is told by inotify. Input goes the hypervisor's way.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use futures_util::Stream;
use futures_util::stream::BoxStream;
use stencil_core::InstanceDir;
use stencil_vmm::VmmError;

use crate::changes::Changes;
use crate::logs::first_data;
use crate::registry::Slot;
use crate::{Engine, EngineError};

/// Bytes that are read from a log at a time.
const CHUNK: usize = 64 << 10;

/// What a guest printed, chunk by chunk; with `follow`, as it comes, until its VM is down.
pub type ConsoleStream = BoxStream<'static, Result<Bytes, EngineError>>;

impl Engine {
    /// What the guest printed: all of it, or the last `tail` lines; with `follow` the stream goes on as the guest prints,
    /// until its VM is down.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotFound`], [`EngineError::Ambiguous`]; [`EngineError::Io`] if the log cannot be read.
    pub async fn console(
        &self,
        reference: &str,
        tail: Option<u64>,
        follow: bool,
    ) -> Result<ConsoleStream, EngineError> {
        let slot = self.inner.registry.look_up(reference)?;
        let dir = self.dir(&slot.id);
        // Watched before it is read, so that nothing is missed in between.
        let changes = follow.then(|| self.changes(&slot)).transpose()?;
        let path = dir.console_log();
        let log = self.with_files(move |_| open_log(&path, tail)).await?;
        Ok(Box::pin(follow_log(Follow {
            log,
            dir,
            slot,
            changes,
        })))
    }

    /// Gives the guest bytes to read from its console.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotFound`]; [`EngineError::NoConsole`] while its VM is down;
    /// [`EngineError::Invalid`] if its hypervisor gives guests no input; [`EngineError::Vmm`] if they cannot be given, with
    /// [`VmmError::ConsoleFull`] if the guest does not read them.
    pub async fn console_write(&self, reference: &str, input: &[u8]) -> Result<(), EngineError> {
        let slot = self.inner.registry.find(reference)?;
        let name = self.read(&slot.id)?.spec.hypervisor;
        let hypervisor = self.hypervisor(&name)?;
        if !hypervisor.capabilities().console_input {
            return Err(EngineError::Invalid(format!(
                "instance {} runs on {name}, whose guests get no console input; reach them by another way",
                slot.id
            )));
        }
        let running = slot.vmm().ok_or(EngineError::NoConsole(slot.id))?;
        let dir = self.dir(&slot.id);
        let call = hypervisor.console_input(&dir, &running.process, input);
        running.process.during(call).await.map_err(|failed| match failed {
            VmmError::Ended { .. } => EngineError::NoConsole(slot.id),
            failed => EngineError::vmm(slot.id)(failed),
        })
    }
}

struct Follow {
    log: Option<File>,
    dir: InstanceDir,
    slot: std::sync::Arc<Slot>,
    changes: Option<Changes>,
}

fn follow_log(follow: Follow) -> impl Stream<Item = Result<Bytes, EngineError>> + Send {
    futures_util::stream::try_unfold(follow, |mut follow| async move {
        loop {
            // Asked before the log is read: what a VM printed before it went down is still delivered.
            let up = follow
                .slot
                .vmm()
                .is_some_and(|running| running.process.has_exited().is_none());
            let path = follow.dir.console_log();
            if follow.log.is_none() {
                follow.log = File::open(&path).ok();
            }
            if let Some(log) = &mut follow.log {
                skip_what_is_gone(log).map_err(EngineError::io("read", &path))?;
                let mut chunk = vec![0; CHUNK];
                let read = log.read(&mut chunk).map_err(EngineError::io("read", path))?;
                if read > 0 {
                    chunk.truncate(read);
                    return Ok(Some((Bytes::from(chunk), follow)));
                }
            }
            match &mut follow.changes {
                Some(changes) if up => changes.next().await,
                _ => return Ok(None),
            }
        }
    })
}

/// Moves on over the part of a log that is not kept any more; to its beginning where somebody has cut it off.
fn skip_what_is_gone(log: &mut File) -> std::io::Result<()> {
    let position = log.stream_position()?;
    let next = if log.metadata()?.len() < position {
        0
    } else {
        position
    };
    let data = first_data(log, next)?;
    log.seek(SeekFrom::Start(data))?;
    Ok(())
}

/// The log, if there is one; at the beginning of its last `tail` lines.
fn open_log(path: &Path, tail: Option<u64>) -> Result<Option<File>, EngineError> {
    let mut log = match File::open(path) {
        Ok(log) => log,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(EngineError::io("read", path)(error)),
    };
    if let Some(lines) = tail {
        seek_to_last_lines(&mut log, lines).map_err(EngineError::io("read", path))?;
    }
    Ok(Some(log))
}

/// Moves the file's position to the beginning of its last `lines` lines.
fn seek_to_last_lines(log: &mut File, lines: u64) -> std::io::Result<()> {
    let end = log.seek(SeekFrom::End(0))?;
    if lines == 0 {
        return Ok(());
    }
    let begin = first_data(log, 0)?;
    let mut chunk = vec![0; CHUNK];
    let mut chunk_end = end;
    let mut newlines = 0;
    while chunk_end > begin {
        let chunk_begin = chunk_end.saturating_sub(CHUNK as u64).max(begin);
        let part = &mut chunk[..usize::try_from(chunk_end - chunk_begin).unwrap_or(CHUNK)];
        log.read_exact_at(part, chunk_begin)?;
        for (index, _) in part.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n') {
            let next_line = chunk_begin + index as u64 + 1;
            // The newline that ends the last line begins no further one.
            if next_line != end {
                newlines += 1;
            }
            if newlines == lines {
                log.seek(SeekFrom::Start(next_line))?;
                return Ok(());
            }
        }
        chunk_end = chunk_begin;
    }
    log.seek(SeekFrom::Start(begin))?;
    Ok(())
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

    fn tail(content: &[u8], lines: u64) -> String {
        let file = log(content);
        let mut reader = File::open(file.path()).unwrap();
        seek_to_last_lines(&mut reader, lines).unwrap();
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        rest
    }

    #[test]
    fn the_tail_is_the_last_lines_whether_or_not_the_last_one_has_ended() {
        assert_eq!(tail(b"a\nb\nc\n", 2), "b\nc\n");
        assert_eq!(tail(b"a\nb\nc", 2), "b\nc");
        assert_eq!(tail(b"a\nb\n", 9), "a\nb\n");
        assert_eq!(tail(b"a\nb\n", 0), "");
        assert_eq!(tail(b"", 3), "");
    }

    #[test]
    fn a_log_that_was_cut_off_is_read_from_its_beginning() {
        let file = log(b"long before\n");
        let mut reader = File::open(file.path()).unwrap();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        file.as_file().set_len(0).unwrap();
        std::fs::write(file.path(), "anew\n").unwrap();
        skip_what_is_gone(&mut reader).unwrap();
        text.clear();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "anew\n");
    }

    #[test]
    fn the_tail_reaches_over_chunks() {
        let long = [vec![b'x'; CHUNK * 2], b"\nlast\n".to_vec()].concat();
        assert_eq!(tail(&long, 1), "last\n");
        assert_eq!(tail(&long, 2).len(), long.len());
    }
}
