//! Creating an instance.

use stencil_core::rules::Operation;
use stencil_core::{Durability, InstanceId, InstanceName, Metadata, VmGeneration};

use crate::disks;
use crate::instance::Stopwatch;
use crate::registry::Reservation;
use crate::{CreateRequest, Engine, EngineError, Instance};

impl Engine {
    /// Makes an instance and, unless it is asked not to, boots it. It does not wait for the guest to be ready: that is
    /// what [`Engine::wait`] is for. If it cannot be booted, it is not made.
    ///
    /// # Errors
    ///
    /// [`EngineError::Invalid`] for what this host cannot do, [`EngineError::NameConflict`]; [`EngineError::Vmm`] if
    /// the VMM fails.
    pub async fn create(&self, request: CreateRequest) -> Result<Instance, EngineError> {
        let engine = self.clone();
        crate::lifecycle::detached(async move { engine.create_now(request).await }).await
    }

    async fn create_now(&self, request: CreateRequest) -> Result<Instance, EngineError> {
        let stopwatch = Stopwatch::start(Operation::Start);
        let engine = self.clone();
        let (spec, request) = self
            .with_files(move |_| Ok((engine.admit(&request)?, request)))
            .await?;
        let id = InstanceId::generate();
        let reservation = self.reserve_for(id, request.name)?;
        let metadata = Metadata::new(
            id,
            reservation.name().clone(),
            spec,
            VmGeneration::random(),
            jiff::Timestamp::now(),
        );
        let first = until_booted(&metadata, request.start);
        self.with_files(move |store| {
            let new = store.begin(id)?;
            disks::make_first(new.dir(), &first.spec)?;
            disks::sync(new.dir(), &first.spec)?;
            Ok(new.commit(&first, Durability::Synced)?)
        })
        .await?;
        self.boot_first(reservation, metadata, request.start, stopwatch)
            .await
    }

    /// Boots an instance that was just made, if it is to run, and shows it. If it cannot be booted, it is not made.
    pub(crate) async fn boot_first(
        &self,
        reservation: Reservation,
        metadata: Metadata,
        is_to_run: bool,
        mut stopwatch: Stopwatch,
    ) -> Result<Instance, EngineError> {
        let (slot, _guard) = reservation.commit(&metadata);
        stopwatch.lap("create");
        if is_to_run
            && let Err(failed) = self
                .boot(&slot, metadata, Durability::Synced, &mut stopwatch)
                .await
        {
            self.discard(&slot).await?;
            return Err(failed);
        }
        slot.finished(stopwatch.timings());
        self.show(&slot).await
    }

    /// Takes the name that was asked for, or one made from the end of the id, where ids of one moment differ.
    fn reserve_for(&self, id: InstanceId, name: Option<InstanceName>) -> Result<Reservation, EngineError> {
        let name = match name {
            Some(name) => name,
            None => {
                let id = id.to_string();
                format!("vm-{}", &id[id.len() - 8..]).parse().map_err(|reason| {
                    EngineError::Invalid(format!("no name can be made from the id {id}: {reason}"))
                })?
            }
        };
        self.inner.registry.reserve(name)
    }
}

/// The first record of an instance. One that is to run is not made before it is booted: if the server dies before that, the next
/// one deletes it.
pub(crate) fn until_booted(metadata: &Metadata, is_to_run: bool) -> Metadata {
    Metadata {
        delete_after: is_to_run || metadata.delete_after,
        ..metadata.clone()
    }
}
