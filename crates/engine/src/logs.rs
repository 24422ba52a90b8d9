//! Keeps logs bounded: of what a guest prints, and of what its VMM says, the last part stays on disk.
//!
//! The beginning of a log becomes a hole. So whoever writes it appends as before, and every offset into it still means the same:
//! where an epoch began, how far somebody has read. Who reads skips the hole ([`first_data`]).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::Engine;
use crate::engine::Inner;
use crate::registry::Slot;

/// How many bytes of each log are kept by default.
pub const DEFAULT_LOG_LIMIT: u64 = 16 << 20;

/// How often logs are looked at.
const LOOK: Duration = Duration::from_secs(1);
/// A hole ends at a block of the file system, of which most have this size.
const BLOCK: u64 = 4 << 10;
/// Less than this is kept of no log.
pub(crate) const SMALLEST_LOG: u64 = 64 << 10;

impl Engine {
    /// Bounds the logs of VMs that run, for as long as the engine is there.
    pub(crate) fn bound_logs(&self) {
        let engine = Arc::downgrade(&self.inner);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                let Some(inner) = engine.upgrade() else { return };
                let slots = inner.registry.all();
                let limit = inner.log_limit;
                let dirs: Vec<_> = slots
                    .into_iter()
                    .filter(|slot| slot.vmm().is_some())
                    .map(|slot| (inner.store.data().instance(&slot.id), slot))
                    .collect();
                // It keeps nothing of the engine while it works.
                drop::<Arc<Inner>>(inner);
                if dirs.is_empty() {
                    continue;
                }
                let bounded = tokio::task::spawn_blocking(move || {
                    for (dir, slot) in &dirs {
                        bound(&dir.console_log(), limit, Some(slot));
                        bound(&dir.vmm_log(), limit, None);
                    }
                });
                if bounded.await.is_err() {
                    // The runtime ends.
                    return;
                }
            }
        });
    }
}

/// Bounds one log. What it says of the guest's readiness is read before it goes.
fn bound(path: &Path, limit: u64, says_ready: Option<&Slot>) {
    let bounded = excess(path, limit).and_then(|excess| {
        let Some(end) = excess else { return Ok(()) };
        if let Some(running) = says_ready.and_then(Slot::vmm) {
            running.read_up_to(path, end);
        }
        let log = OpenOptions::new().write(true).open(path)?;
        Ok(fallocate(
            &log,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            0,
            end,
        )?)
    });
    if let Err(error) = bounded
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "a log could not be bounded");
    }
}

/// Where what is too much of a log ends, once that is worth the trouble.
fn excess(path: &Path, limit: u64) -> io::Result<Option<u64>> {
    let found = std::fs::metadata(path)?;
    let held = found.blocks() * 512;
    let end = found.len().saturating_sub(limit) / BLOCK * BLOCK;
    Ok((held > limit + limit / 4 && end > 0).then_some(end))
}

/// The first byte of a log from `offset` on that is there; `offset` if there is none yet, for one may just be written. It moves the
/// file's position.
pub(crate) fn first_data(log: &File, offset: u64) -> io::Result<u64> {
    match seek(log, SeekFrom::Data(offset)) {
        Ok(data) => Ok(data),
        Err(Errno::NXIO) => Ok(offset),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn of_a_log_that_is_just_being_begun_nothing_is_passed_over() {
        let mut log = tempfile::NamedTempFile::new().unwrap();
        let reader = File::open(log.path()).unwrap();
        assert_eq!(first_data(&reader, 0).unwrap(), 0);
        log.write_all(b"ready").unwrap();
        assert_eq!(first_data(&reader, 0).unwrap(), 0);
        assert_eq!(first_data(&reader, 5).unwrap(), 5);
    }

    #[test]
    fn of_a_log_the_last_part_stays_where_it_is() {
        const LIMIT: u64 = 1 << 20;
        let mut log = tempfile::NamedTempFile::new().unwrap();
        let line = b"the same again and again\n";
        for _ in 0..200_000 {
            log.write_all(line).unwrap();
        }
        log.flush().unwrap();
        let length = log.as_file().metadata().unwrap().len();
        bound(log.path(), LIMIT, None);
        let found = log.as_file().metadata().unwrap();
        assert_eq!(found.len(), length);
        assert!(found.blocks() * 512 <= LIMIT + BLOCK, "{} blocks", found.blocks());
        let reader = File::open(log.path()).unwrap();
        let begin = first_data(&reader, 0).unwrap();
        assert!(length - begin >= LIMIT, "{begin} of {length}");
        let mut rest = vec![0; usize::try_from(length - begin).unwrap()];
        reader.read_exact_at(&mut rest, begin).unwrap();
        assert!(rest.ends_with(line) && !rest.contains(&0));
        // It grows on, and what is within the limit stays.
        log.write_all(b"more\n").unwrap();
        bound(log.path(), LIMIT, None);
        assert_eq!(first_data(&reader, 0).unwrap(), begin);
        assert_eq!(first_data(&reader, length + 5).unwrap(), length + 5);
    }
}
