//! Promote and demote: a template is an instance on standby that can be forked and cannot wake.

use std::sync::Arc;

use stencil_core::rules::{self, Operation};
use stencil_core::{Durability, Metadata, SnapshotFacts, State};

use crate::armed;
use crate::instance::Stopwatch;
use crate::lifecycle::Change;
use crate::registry::Slot;
use crate::{Engine, EngineError, Instance};

impl Engine {
    /// Makes an instance on standby a template, and keeps `armed` forks of it prepared (see [`Engine::arm`]). They are
    /// made behind the answer.
    ///
    /// # Errors
    ///
    /// [`EngineError::Invalid`] for more than [`MAX_ARMED`](crate::MAX_ARMED); [`EngineError::Refused`] in any other state, and
    /// where its guest's users' processes were not stopped for the snapshot.
    pub async fn promote(&self, reference: &str, armed: Option<u32>) -> Result<Instance, EngineError> {
        armed::check(armed)?;
        self.change(reference, Change::Promote(armed)).await
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
        slot: &Arc<Slot>,
        metadata: &Metadata,
        snapshot: &SnapshotFacts,
        armed: Option<u32>,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        let SnapshotFacts::Complete(manifest) = snapshot else {
            return Err(EngineError::NoSnapshot(slot.id));
        };
        rules::check_frozen(Operation::Promote, metadata, State::Standby, manifest.frozen)?;
        let promoted = rules::with_armed(&rules::promoted(metadata), armed);
        self.on_disk(move |store| store.write(&promoted, Durability::Synced))
            .await?;
        stopwatch.lap("record");
        self.refill(slot);
        Ok(())
    }

    pub(crate) async fn demote_now(
        &self,
        slot: &Arc<Slot>,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.disarm(slot).await;
        stopwatch.lap("disarm");
        self.without_hot_pages(slot, rules::demoted(metadata), stopwatch)
            .await
            // It still is a template.
            .inspect_err(|_| self.refill(slot))
    }

    pub(crate) async fn forget_hot_pages(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.without_hot_pages(slot, rules::with_hot_pages(metadata, None), stopwatch)
            .await
    }

    /// The record goes first: a list that a crash leaves is of memory that it names, and at worst used again.
    async fn without_hot_pages(
        &self,
        slot: &Slot,
        metadata: Metadata,
        stopwatch: &mut Stopwatch,
    ) -> Result<(), EngineError> {
        self.on_disk(move |store| {
            store.write(&metadata, Durability::Synced)?;
            store.discard_hot_pages(&metadata.id)
        })
        .await?;
        slot.hot_list.forget();
        stopwatch.lap("record");
        Ok(())
    }
}
