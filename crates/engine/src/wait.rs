//! Waiting for a state.

use std::time::Duration;

use stencil_core::State;

use crate::changes::Changes;
use crate::{Engine, EngineError, Instance};

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
        let slot = self.inner.registry.find(reference)?;
        let mut changes = Changes::of(&slot, &self.dir(&slot.id))?;
        let deadline = tokio::time::Instant::now() + timeout;
        loop {
            let instance = self.show(&slot).await?;
            if instance.state == state {
                return Ok(WaitOutcome {
                    reached: true,
                    instance,
                });
            }
            if tokio::time::timeout_at(deadline, changes.next()).await.is_err() {
                return Ok(WaitOutcome {
                    reached: false,
                    instance,
                });
            }
        }
    }
}
