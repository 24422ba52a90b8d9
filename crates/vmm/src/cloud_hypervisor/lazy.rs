//! A snapshot of a VM whose memory is still coming.
//!
//! Cloud Hypervisor brings in all pages that the guest has not touched behind its back, and refuses to write a snapshot
//! until that is done. It does not tell when, so that it is asked again until it agrees.

use std::time::Duration;

use stencil_core::{InstanceDir, SnapshotDir};
use tokio::time::Instant;

use crate::{VmmError, rest};

/// How it refuses meanwhile (v53, `vmm/src/vm.rs`).
const STILL_COMING: &str = "VM on-demand memory restore is still in progress";
/// How long it may take in all: it brings in some 120 MB/s, from a slow disk less.
const LIMIT: Duration = Duration::from_secs(300);
/// How often it is asked.
const EVERY: Duration = Duration::from_millis(20);

/// Writes a paused VM into `destination`, when all of its memory is there.
pub(super) async fn snapshot(dir: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError> {
    let limit = Instant::now() + LIMIT;
    loop {
        match rest::snapshot(dir, destination).await {
            Err(error) if is_still_coming(&error) && Instant::now() < limit => {
                tokio::time::sleep(EVERY).await
            }
            written => return written,
        }
    }
}

fn is_still_coming(error: &VmmError) -> bool {
    matches!(error, VmmError::Rejected { body, .. } if body.0.iter().any(|line| line == STILL_COMING))
}
