//! Whether the host is short of memory: what is there only to be fast gives way then.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::AbortHandle;

use crate::Engine;
use crate::host::Memory;

/// Asks to be told when tasks have waited for memory for 200 ms of 2 s. A window of 2 s is what everyone may ask for
/// (Linux, Documentation/accounting/psi.rst).
const TRIGGER: &[u8] = b"some 200000 2000000\0";
/// How long it is looked whether what the kernel told is so, and the part of that time for which tasks must have waited:
/// one of so many.
const LOOK: Duration = Duration::from_millis(500);
const MUCH: u32 = 10;
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
                if !is_under_pressure().await {
                    continue;
                }
                let Some(inner) = engine.upgrade() else { return };
                inner.pressure.tell();
                (Self { inner }).disarm_all().await;
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

/// Whether tasks wait for memory now. For a process without CAP_SYS_RESOURCE some kernels count all waiting since the boot
/// into a trigger's first window (seen on 6.18), so that the first event may mean nothing.
async fn is_under_pressure() -> bool {
    let Some(before) = waited() else { return true };
    tokio::time::sleep(LOOK).await;
    waited().is_none_or(|now| now.saturating_sub(before) >= LOOK / MUCH)
}

/// For how long tasks have waited for memory since the boot: `total` of `some`, in microseconds.
fn waited() -> Option<Duration> {
    let text = fs::read_to_string(PRESSURE).ok()?;
    let some = text.lines().find(|line| line.starts_with("some "))?;
    Some(Duration::from_micros(some.rsplit_once("total=")?.1.parse().ok()?))
}

/// Whether less than the spared part of the host's memory is available. Where that cannot be read, it is not.
fn is_little_available() -> bool {
    Memory::read().is_some_and(|memory| memory.available < memory.total / SPARED)
}
