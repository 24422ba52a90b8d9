//! Promote and demote: a template is an instance on standby that can be forked and cannot wake.

use stencil_core::{Durability, Metadata, rules};

use crate::instance::Stopwatch;
use crate::lifecycle::Change;
use crate::{Engine, EngineError, Instance};

impl Engine {
    /// Makes an instance on standby a template.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] in any other state.
    pub async fn promote(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Promote).await
    }

    /// Makes a template an instance on standby again.
    ///
    /// # Errors
    ///
    /// [`EngineError::Refused`] if it is no template or has live forks; [`EngineError::Store`] if they cannot be counted.
    pub async fn demote(&self, reference: &str) -> Result<Instance, EngineError> {
        self.change(reference, Change::Demote).await
    }

    pub(crate) async fn promote_now(
        &self,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.record(rules::promoted(metadata), stopwatch).await
    }

    pub(crate) async fn demote_now(
        &self,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.record(rules::demoted(metadata), stopwatch).await
    }

    async fn record(&self, metadata: Metadata, stopwatch: &mut Stopwatch) -> Result<(), EngineError> {
        self.on_disk(move |store| store.write(&metadata, Durability::Synced))
            .await?;
        stopwatch.lap("record");
        Ok(())
    }
}
