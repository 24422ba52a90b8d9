//! Whether the host is short of memory: what is there only to be fast gives way then.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::Engine;
use crate::armed::end_all;
use crate::host::Memory;

/// Asks to be told when tasks have waited for memory for 600 ms of 2 s. A window of 2 s is what everyone may ask for
/// (Linux, Documentation/accounting/psi.rst).
const TRIGGER: &[u8] = b"some 600000 2000000\0";
/// Where the kernel tells.
const PRESSURE: &str = "/proc/pressure/memory";
/// How long after it was told the host still counts as short.
const LATELY: Duration = Duration::from_secs(10);
/// One part of so many of the host's memory is left alone.
const SPARED: u64 = 16;

/// What is known of the host's memory.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    told: Mutex<Option<Instant>>,
    watching: OnceLock<AbortHandle>,
}

impl Pressure {
    /// Whether the kernel has told of pressure lately, or little memory is available.
    pub(crate) fn is_short(&self) -> bool {
        // Nothing panics while it holds this lock.
        let told = *self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.is_some_and(|told| told.elapsed() < LATELY) || is_little_available()
    }

    fn tell(&self) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

impl Drop for Pressure {
    fn drop(&mut self) {
        if let Some(watching) = self.watching.get() {
            watching.abort();
        }
    }
}

impl Engine {
    /// Lets all armed forks go whenever the host runs short of memory. On a host that does not tell, they only cease to
    /// be made when little is available.
    pub(crate) fn watch_pressure(&self) {
        let pressure = match trigger() {
            Ok(pressure) => pressure,
            Err(error) => {
                tracing::debug!(%error, "{PRESSURE} tells nothing: armed forks stay when memory runs short");
                return;
            }
        };
        let engine = Arc::downgrade(&self.inner);
        let watching = tokio::spawn(async move {
            // An error means that the runtime ends.
            while let Ok(mut told) = pressure.ready(Interest::PRIORITY).await {
                told.clear_ready();
                let Some(inner) = engine.upgrade() else { return };
                inner.pressure.tell();
                let engine = Self { inner };
                let mut forks = Vec::new();
                for slot in engine.inner.registry.all() {
                    let gone = slot.pool.empty();
                    if !gone.is_empty() {
                        // It finds the host short of memory, and looks again later.
                        engine.refill(&slot);
                        forks.extend(gone);
                    }
                }
                if !forks.is_empty() {
                    tracing::warn!(armed = forks.len(), "the host is short of memory: armed forks go");
                    end_all(forks).await;
                }
            }
        });
        // It is started once, with the engine.
        let _ = self.inner.pressure.watching.set(watching.abort_handle());
    }
}

fn trigger() -> io::Result<AsyncFd<File>> {
    let mut file = OpenOptions::new().read(true).write(true).open(PRESSURE)?;
    file.write_all(TRIGGER)?;
    // SAFETY: a `File` is open and the same descriptor until it is dropped, and nothing takes it out of the `AsyncFd`,
    // which is only ever lent out shared.
    unsafe { AsyncFd::register_with_interest(file, Interest::PRIORITY) }.map_err(|error| error.into_parts().1)
}

/// Whether less than the spared part of the host's memory is available. Where that cannot be read, it is not.
fn is_little_available() -> bool {
    Memory::read().is_some_and(|memory| memory.available < memory.total / SPARED)
}
