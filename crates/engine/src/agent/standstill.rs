//! Looks whether a guest still runs in which commands run: one that is down, or stands still, tells of no end.

use std::sync::Arc;
use std::time::Duration;

use stencil_core::{InstanceDir, VmPhase};
use stencil_vmm::{Hypervisor, VmStatus};
use tokio::sync::{mpsc, watch};
use tokio::time::sleep;

/// How often it is looked while commands run.
const LOOK: Duration = Duration::from_secs(1);

/// Says why the guest does not run, whenever that is so while it `is_busy`. It ends when nobody hears it.
pub(super) async fn watch(
    hypervisor: Arc<dyn Hypervisor>,
    dir: InstanceDir,
    mut is_busy: watch::Receiver<bool>,
    still: mpsc::Sender<String>,
) {
    loop {
        if is_busy.wait_for(|is_busy| *is_busy).await.is_err() {
            return;
        }
        sleep(LOOK).await;
        if !*is_busy.borrow() {
            continue;
        }
        // Of one that does not answer nothing is known.
        let Ok(status) = hypervisor.info(&dir).await else {
            continue;
        };
        if let Some(why) = why(status)
            && still.send(why).await.is_err()
        {
            return;
        }
    }
}

/// Why a guest does not run, as part of a sentence.
fn why(status: VmStatus) -> Option<String> {
    let what = match status.phase {
        VmPhase::Running => return None,
        VmPhase::Paused if status.end.is_some() => "its VMM stopped its VM",
        VmPhase::Paused => "its VM was paused",
        VmPhase::Shutdown => "its guest is down",
        VmPhase::Undefined | VmPhase::Created => "its VM does not run",
    };
    Some(match status.end {
        Some(end) => format!("{what}: {}", end.reason),
        None => what.to_owned(),
    })
}
