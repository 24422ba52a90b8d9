//! Waiting: for a state, and for a guest to be ready.

use std::time::Duration;

use stencil_core::State;

use crate::changes::Changes;
use crate::registry::Slot;
use crate::{Engine, EngineError, Instance};

/// How long restore and fork wait for the guest to say that it is ready before they answer with `Initializing`.
const READY_WAIT: Duration = Duration::from_secs(10);

/// After so long without a word an instance is looked at for which somebody waits: QEMU writes nothing anywhere when its guest
/// goes down.
pub(crate) const LOOK_AGAIN: Duration = Duration::from_secs(1);

/// After so long without a word a guest that was printing is looked after: what it printed last and its end may have
/// come as one change.
const SILENCE: Duration = Duration::from_millis(50);

/// How a wait ended.
#[derive(Clone, Debug)]
pub struct WaitOutcome {
    /// Whether the instance was seen in the state that was waited for.
    pub reached: bool,
    /// The instance as it was seen last.
    pub instance: Instance,
}

impl Engine {
    /// Waits until the instance is in `state`, at most for `timeout`. It does not end early where the state cannot be told,
    /// or cannot be reached from where it is: someone may repair or change the instance meanwhile.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotFound`], also when the instance is deleted meanwhile; [`EngineError::Ambiguous`].
    pub async fn wait(
        &self,
        reference: &str,
        state: State,
        timeout: Duration,
    ) -> Result<WaitOutcome, EngineError> {
        let slot = self.inner.registry.look_up(reference)?;
        let mut changes = self.changes(&slot)?;
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let instance = self.show(&slot).await?;
            let reached = instance.state == state;
            let now = tokio::time::Instant::now();
            if reached || now >= deadline {
                return Ok(WaitOutcome { reached, instance });
            }
            // That nothing was heard is as good a reason to look.
            let _ = tokio::time::timeout_at(deadline.min(now + LOOK_AGAIN), changes.next()).await;
        }
    }

    /// Waits until the guest has said that it is ready or its agent that it cannot be, its VM is down, or [`READY_WAIT`] has passed; whether it is ready.
    pub(crate) async fn until_ready(&self, slot: &Slot, mut changes: Changes) -> Result<bool, EngineError> {
        let log = self.dir(&slot.id).console_log();
        let deadline = tokio::time::Instant::now() + READY_WAIT;
        let mut is_first = true;
        loop {
            let Some(running) = slot.vmm() else {
                return Ok(false);
            };
            let (is_ready, prints) = running.is_ready_or_prints(&log);
            if is_ready {
                return Ok(true);
            }
            if running.has_failed() {
                return Ok(false);
            }
            // A guest that prints runs, and most often it is about to print its text: its VMM is asked when something
            // else has happened, or when the guest is silent.
            if !is_first && !prints && self.observe(slot).await?.state() != State::Initializing {
                return Ok(false);
            }
            is_first = false;
            let look_again = tokio::time::Instant::now() + SILENCE;
            let limit = if prints {
                look_again.min(deadline)
            } else {
                deadline
            };
            if tokio::time::timeout_at(limit, changes.next()).await.is_err() && limit == deadline {
                return Ok(false);
            }
        }
    }
}
