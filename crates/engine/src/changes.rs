//! Waiting for something to happen to an instance, without polling: its files change (inotify), an operation ends, or
//! its VMM's process does.
//!
//! One inotify instance serves everyone who waits: the kernel gives a user only 128 of them (inotify(7)).

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures_util::StreamExt;
use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask, Watches};
use stencil_core::InstanceDir;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::registry::Slot;
use crate::{Engine, EngineError};

/// Room for some events at a time.
const EVENT_BYTES: usize = 4096;

impl Engine {
    /// What happens to the instance from now on.
    pub(crate) fn changes(&self, slot: &Slot) -> Result<Changes, EngineError> {
        let told = slot.changed().subscribe();
        let dir = self.dir(&slot.id);
        let watched = &self.inner.watcher.watched;
        let watch = Watched::watch(watched, &dir, slot).map_err(EngineError::io("watch", dir.path()))?;
        Ok(Changes { told, _watch: watch })
    }
}

/// What happens to one instance from the moment this was made: nothing is lost between two calls of [`Changes::next`].
pub(crate) struct Changes {
    told: watch::Receiver<()>,
    _watch: Watch,
}

impl Changes {
    /// Returns when something has happened since the last call.
    pub(crate) async fn next(&mut self) {
        // An error means that the instance is gone, which is something that happened.
        let _ = self.told.changed().await;
    }
}

/// Tells the slots of watched directories what happens in them.
#[derive(Debug)]
pub(crate) struct Watcher {
    watched: Arc<Mutex<Watched>>,
    reading: AbortHandle,
}

impl Watcher {
    pub(crate) fn start() -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let watched = Arc::new(Mutex::new(Watched {
            watches: inotify.watches(),
            directories: HashMap::new(),
        }));
        let mut events = inotify.into_event_stream([0; EVENT_BYTES])?;
        let readers = Arc::clone(&watched);
        let reading = tokio::spawn(async move {
            while let Some(event) = events.next().await {
                // Not even an error may leave those who wait asleep; they look for themselves.
                let of = event
                    .ok()
                    .filter(|event| !event.mask.contains(EventMask::Q_OVERFLOW));
                let watched = locked(&readers);
                match of {
                    Some(event) => {
                        if let Some(directory) = watched.directories.get(&event.wd) {
                            directory.tell.send_replace(());
                        }
                    }
                    None => {
                        for directory in watched.directories.values() {
                            directory.tell.send_replace(());
                        }
                    }
                }
            }
        });
        Ok(Self {
            watched,
            reading: reading.abort_handle(),
        })
    }

    /// How many directories are watched.
    pub(crate) fn watched(&self) -> usize {
        locked(&self.watched).directories.len()
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// The directories that someone waits for.
#[derive(Debug)]
struct Watched {
    watches: Watches,
    directories: HashMap<WatchDescriptor, Directory>,
}

#[derive(Debug)]
struct Directory {
    tell: watch::Sender<()>,
    /// How many wait. The kernel gives one descriptor for one directory, however often it is asked.
    waiting: usize,
}

impl Watched {
    fn watch(watched: &Arc<Mutex<Self>>, dir: &InstanceDir, slot: &Slot) -> io::Result<Watch> {
        let mut this = locked(watched);
        // The console and the VMM's log grow (MODIFY), metadata are renamed into place (MOVED_TO).
        let descriptor = this.watches.add(
            dir.path(),
            WatchMask::MODIFY | WatchMask::MOVED_TO | WatchMask::MOVE_SELF | WatchMask::DELETE,
        )?;
        this.directories
            .entry(descriptor.clone())
            .or_insert_with(|| Directory {
                tell: slot.changed().clone(),
                waiting: 0,
            })
            .waiting += 1;
        Ok(Watch {
            watched: Arc::clone(watched),
            descriptor,
        })
    }
}

/// One who waits; the last of a directory ends its watch.
struct Watch {
    watched: Arc<Mutex<Watched>>,
    descriptor: WatchDescriptor,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = locked(&self.watched);
        let Some(directory) = watched.directories.get_mut(&self.descriptor) else {
            return;
        };
        directory.waiting -= 1;
        if directory.waiting == 0 {
            watched.directories.remove(&self.descriptor);
            // Of a directory that was deleted the kernel has ended the watch already.
            let _ = watched.watches.remove(self.descriptor.clone());
        }
    }
}

fn locked(watched: &Mutex<Watched>) -> MutexGuard<'_, Watched> {
    // Nothing panics while it holds this lock.
    watched.lock().unwrap_or_else(PoisonError::into_inner)
}
