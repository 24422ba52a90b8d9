//! Syncs records behind the operations that wrote them, many at once, so that a power loss of the host takes none that is
//! older than a moment.

use std::collections::BTreeSet;
use std::time::Duration;

use stencil_core::layout::DataDir;
use stencil_core::{InstanceId, Metadata, error_chain, sync_records};
use tokio::sync::mpsc;

/// For how long records are gathered before they are synced.
const GATHERED: Duration = Duration::from_millis(500);

/// Leads to the task that syncs records. The task ends when this is dropped and what it was told is synced.
#[derive(Debug)]
pub(crate) struct WriteBehind(mpsc::UnboundedSender<InstanceId>);

impl WriteBehind {
    pub(crate) fn start(data: DataDir) -> Self {
        let (written, queue) = mpsc::unbounded_channel();
        tokio::spawn(sync_all(data, queue));
        Self(written)
    }

    /// Syncs this record soon, if a power loss leaves anything of its instance.
    pub(crate) fn sync(&self, written: &Metadata) {
        if written.outlives_the_host() {
            // The task receives for as long as this is there.
            let _ = self.0.send(written.id);
        }
    }
}

async fn sync_all(data: DataDir, mut queue: mpsc::UnboundedReceiver<InstanceId>) {
    while let Some(first) = queue.recv().await {
        tokio::time::sleep(GATHERED).await;
        let mut ids = BTreeSet::from([first]);
        while let Ok(id) = queue.try_recv() {
            ids.insert(id);
        }
        let ids: Vec<InstanceId> = ids.into_iter().collect();
        let data = data.clone();
        match tokio::task::spawn_blocking(move || sync_records(&data, &ids)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(
                    error = error_chain(&error),
                    "a record may not survive a power loss"
                );
            }
            // The runtime ends.
            Err(_) => return,
        }
    }
}
