//! A guest is asked to power itself off before its VMM is ended, so that it can write what it has only in its memory.

use std::sync::Arc;
use std::time::Duration;

use stencil_core::{InstanceDir, Metadata, VmPhase, VmSpec, error_chain};
use stencil_vmm::Hypervisor;
use tokio::time::{Instant, timeout_at};

use crate::admission::open;
use crate::changes::Changes;
use crate::registry::Slot;
use crate::running::RunningVmm;
use crate::{Engine, kernel};

/// How long a guest may take whose agent was asked: an agent that is init gives the other processes 3 s of it.
const BY_AGENT: Duration = Duration::from_secs(10);
/// How long a guest may take whose power button was pressed: whether it listens to that, nobody knows.
const BY_BUTTON: Duration = Duration::from_secs(5);
/// How soon it is looked again whether the guest is down: not everything that tells of it is a change.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

impl Engine {
    /// Asks the guest of a running VM to power itself off, by its agent, or else by the power button if it is likely to listen;
    /// whether it was asked. Returns when it is down or its time is over.
    pub(crate) async fn power_off(&self, slot: &Slot, metadata: &Metadata) -> bool {
        let (Some(running), Ok(hypervisor)) = (slot.vmm(), self.hypervisor(&metadata.spec.hypervisor)) else {
            return false;
        };
        let changes = match self.changes(slot) {
            Ok(changes) => changes,
            Err(error) => {
                tracing::warn!(instance = %slot.id, error = error_chain(&error), "its guest is not asked to power off");
                return false;
            }
        };
        let dir = self.dir(&slot.id);
        let now = Instant::now();
        let agent = running.agent.as_ref();
        let by_agent = agent.map(|link| timeout_at(now + BY_AGENT, link.power_off()));
        let deadline = if let Some(asked) = by_agent
            && asked.await == Ok(true)
        {
            now + BY_AGENT
        } else if listens_to_button(&metadata.spec) {
            match hypervisor.press_power_button(&dir).await {
                Ok(true) => Instant::now() + BY_BUTTON,
                Ok(false) => return false,
                Err(error) => {
                    tracing::debug!(instance = %slot.id, error = error_chain(&error), "its power button cannot be pressed");
                    return false;
                }
            }
        } else {
            return false;
        };
        if !is_down_by(deadline, &running, hypervisor, &dir, changes).await {
            tracing::warn!(instance = %slot.id, "its guest did not power off in time; its VMM is ended all the same");
        }
        true
    }
}

/// Whether the guest is likely to power off when its button is pressed. What is started by firmware or in Linux's own format
/// is an operating system; an ELF is anything.
fn listens_to_button(spec: &VmSpec) -> bool {
    let is_bzimage = |path: &_| open("kernel", path).is_ok_and(|file| kernel::is_bzimage(&file));
    spec.firmware.is_some() || spec.kernel.as_deref().is_some_and(is_bzimage)
}

/// Waits until the guest is down, or its VMM has ended, at most until `deadline`; whether that is so.
async fn is_down_by(
    deadline: Instant,
    running: &RunningVmm,
    hypervisor: &Arc<dyn Hypervisor>,
    dir: &InstanceDir,
    mut changes: Changes,
) -> bool {
    loop {
        if running.process.has_exited().is_some() {
            return true;
        }
        // A VMM that does not answer may be about to end.
        if let Ok(status) = hypervisor.info(dir).await
            && status.phase == VmPhase::Shutdown
        {
            return true;
        }
        let now = Instant::now();
        if now >= deadline {
            return false;
        }
        // That nothing happened is as good a reason to look.
        let _ = timeout_at(deadline.min(now + LOOK_AGAIN), changes.next()).await;
    }
}
