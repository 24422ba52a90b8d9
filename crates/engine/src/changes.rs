//! Waiting for something to happen to an instance, without polling: its files change (inotify), an operation ends, or
//! its VMM's process does.

use futures_util::StreamExt;
use inotify::{EventStream, Inotify, WatchMask};
use stencil_core::InstanceDir;
use tokio::sync::watch;

use crate::EngineError;
use crate::registry::Slot;

/// Room for some events; that something happened is all that is taken from them.
const EVENT_BYTES: usize = 1024;

/// What happens to one instance from the moment this was made: nothing is lost between two calls of [`Changes::next`].
pub(crate) struct Changes {
    files: EventStream<[u8; EVENT_BYTES]>,
    told: watch::Receiver<()>,
}

impl Changes {
    pub(crate) fn of(slot: &Slot, dir: &InstanceDir) -> Result<Self, EngineError> {
        let told = slot.changes();
        let inotify = Inotify::init().map_err(EngineError::io("watch", dir.path()))?;
        // The console and the VMM's log grow (MODIFY), metadata are renamed into place (MOVED_TO).
        inotify
            .watches()
            .add(
                dir.path(),
                WatchMask::MODIFY | WatchMask::MOVED_TO | WatchMask::MOVE_SELF | WatchMask::DELETE,
            )
            .map_err(EngineError::io("watch", dir.path()))?;
        let files = inotify
            .into_event_stream([0; EVENT_BYTES])
            .map_err(EngineError::io("watch", dir.path()))?;
        Ok(Self { files, told })
    }

    /// Returns when something has happened since the last call.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.files.next() => {}
            _ = self.told.changed() => {}
        }
    }
}
