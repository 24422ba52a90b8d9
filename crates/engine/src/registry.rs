//! Which instances there are, what they are called, and what belongs to each while the server runs: its lock, the
//! process of its VMM, who waits for it.
//!
//! An index over the store, rebuilt from a scan when the engine opens. It answers "which instance is meant" and keeps
//! names apart; what an instance *is* is always read from disk.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use stencil_core::{InstanceId, InstanceName};
use stencil_vmm::VmmProcess;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, watch};

use crate::armed::Pool;
use crate::hot_list::HotList;
use crate::readiness::ReadyScan;
use crate::{EngineError, Timings};

#[derive(Debug, Default)]
pub(crate) struct Registry {
    index: Mutex<Index>,
}

#[derive(Debug, Default)]
struct Index {
    slots: BTreeMap<InstanceId, Arc<Slot>>,
    names: HashMap<InstanceName, Holder>,
}

impl Index {
    fn by_id(&self, text: &str) -> Option<&Arc<Slot>> {
        self.slots.get(&text.parse().ok()?)
    }
}

/// Who has a name.
#[derive(Clone, Copy, Debug)]
enum Holder {
    Instance(InstanceId),
    /// An instance that is being made.
    Reserved,
}

/// What belongs to one instance while the server runs.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: InstanceId,
    pub(crate) name: Option<InstanceName>,
    /// Exclusive for operations that change the instance, shared while forks are taken from it.
    pub(crate) lock: Arc<RwLock<()>>,
    /// Told whenever an operation ended, the VMM's process did, or, while someone waits, a file of the instance changed.
    changed: watch::Sender<()>,
    /// Of a template: what is known of its hot pages.
    pub(crate) hot_list: Arc<HotList>,
    /// Of a template: its armed forks.
    pub(crate) pool: Pool,
    runtime: Mutex<Runtime>,
}

#[derive(Debug, Default)]
struct Runtime {
    vmm: Option<Arc<RunningVmm>>,
    timings: Option<Timings>,
}

/// A VMM that this server started or found again, in one epoch of its guest.
#[derive(Debug)]
pub(crate) struct RunningVmm {
    pub(crate) process: VmmProcess,
    /// Whether the guest has said in this epoch that it is ready.
    pub(crate) ready: Mutex<ReadyScan>,
}

impl RunningVmm {
    /// Reads on in the console log; whether the guest has said that it is ready.
    pub(crate) fn is_ready(&self, log: &Path) -> bool {
        // Nothing panics while it holds this lock.
        self.ready
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .advance(log)
    }
}

impl Slot {
    pub(crate) fn new(id: InstanceId, name: Option<InstanceName>) -> Self {
        Self {
            id,
            name,
            lock: Arc::default(),
            changed: watch::Sender::new(()),
            hot_list: Arc::default(),
            pool: Pool::default(),
            runtime: Mutex::default(),
        }
    }

    pub(crate) fn vmm(&self) -> Option<Arc<RunningVmm>> {
        self.runtime().vmm.clone()
    }

    pub(crate) fn set_vmm(&self, vmm: Option<Arc<RunningVmm>>) {
        self.runtime().vmm = vmm;
    }

    pub(crate) fn timings(&self) -> Option<Timings> {
        self.runtime().timings.clone()
    }

    /// Records how long an operation took and tells those who wait.
    pub(crate) fn finished(&self, timings: Timings) {
        self.runtime().timings = Some(timings);
        self.tell();
    }

    /// Tells those who wait that they should look again.
    pub(crate) fn tell(&self) {
        self.changed.send_replace(());
    }

    /// Told when something happens to the instance.
    pub(crate) fn changed(&self) -> &watch::Sender<()> {
        &self.changed
    }

    fn runtime(&self) -> std::sync::MutexGuard<'_, Runtime> {
        // Nothing panics while it holds this lock, and each value in it is whole at any time.
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    pub(crate) fn add(&self, slot: Slot) -> Arc<Slot> {
        let slot = Arc::new(slot);
        let mut index = self.index();
        if let Some(name) = &slot.name {
            index.names.insert(name.clone(), Holder::Instance(slot.id));
        }
        index.slots.insert(slot.id, Arc::clone(&slot));
        slot
    }

    pub(crate) fn remove(&self, slot: &Slot) {
        let mut index = self.index();
        index.slots.remove(&slot.id);
        if let Some(name) = &slot.name {
            index.names.remove(name);
        }
        slot.tell();
    }

    pub(crate) fn all(&self) -> Vec<Arc<Slot>> {
        self.index().slots.values().cloned().collect()
    }

    /// The instance that `reference` means: an id, an exact name, or a prefix that only one id has; in this order.
    pub(crate) fn find(&self, reference: &str) -> Result<Arc<Slot>, EngineError> {
        let index = self.index();
        let by_id = index.by_id(reference);
        let by_name = || {
            let name: InstanceName = reference.parse().ok()?;
            match index.names.get(&name)? {
                Holder::Instance(id) => index.slots.get(id),
                Holder::Reserved => None,
            }
        };
        if let Some(slot) = by_id.or_else(by_name) {
            return Ok(Arc::clone(slot));
        }
        let mut candidates = index
            .slots
            .values()
            .filter(|slot| !reference.is_empty() && slot.id.to_string().starts_with(reference));
        match (candidates.next(), candidates.next()) {
            (Some(only), None) => Ok(Arc::clone(only)),
            (Some(first), Some(second)) => Err(EngineError::Ambiguous {
                reference: reference.to_owned(),
                candidates: [first, second]
                    .into_iter()
                    .chain(candidates)
                    .map(|slot| slot.id)
                    .collect(),
            }),
            _ => Err(EngineError::NotFound(reference.to_owned())),
        }
    }

    /// Whether the instance is still the one in the index; it is not once it was deleted.
    pub(crate) fn holds(&self, slot: &Slot) -> bool {
        self.index().slots.contains_key(&slot.id)
    }

    /// Takes a name for an instance that is being made; given back when the reservation is dropped.
    pub(crate) fn reserve(self: &Arc<Self>, name: InstanceName) -> Result<Reservation, EngineError> {
        let mut index = self.index();
        let conflict = |holder| {
            Err(EngineError::NameConflict {
                name: name.to_string(),
                holder,
            })
        };
        // An id is looked up before a name: a name that is another instance's id would lead to that one.
        if let Some(slot) = index.by_id(name.as_str()) {
            return conflict(Some(slot.id));
        }
        match index.names.get(&name) {
            Some(Holder::Instance(id)) => conflict(Some(*id)),
            Some(Holder::Reserved) => conflict(None),
            None => {
                index.names.insert(name.clone(), Holder::Reserved);
                Ok(Reservation {
                    registry: Arc::clone(self),
                    name: Some(name),
                })
            }
        }
    }

    /// Takes the first `count` names `<prefix>-1`, `<prefix>-2`, ... that are free.
    pub(crate) fn reserve_numbered(
        self: &Arc<Self>,
        prefix: &str,
        count: u32,
    ) -> Result<Vec<Reservation>, EngineError> {
        let mut taken = Vec::new();
        let mut number = 0_u64;
        while taken.len() < count as usize {
            number += 1;
            let name = format!("{prefix}-{number}");
            let name = name
                .parse()
                .map_err(|reason| EngineError::Invalid(format!("no fork can be named `{name}`: {reason}")))?;
            if let Ok(reservation) = self.reserve(name) {
                taken.push(reservation);
            }
        }
        Ok(taken)
    }

    fn index(&self) -> std::sync::MutexGuard<'_, Index> {
        // Nothing panics while it holds this lock.
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A name that is kept for an instance that is being made.
#[derive(Debug)]
pub(crate) struct Reservation {
    registry: Arc<Registry>,
    name: Option<InstanceName>,
}

impl Reservation {
    pub(crate) fn name(&self) -> &InstanceName {
        // The name is taken out only by `commit`, which consumes the reservation, and by drop.
        #[expect(clippy::expect_used, reason = "present until the reservation is gone")]
        self.name.as_ref().expect("a reservation has its name")
    }

    /// The instance is made: it holds the name from now on. Its lock is taken before anyone else can see it.
    pub(crate) fn commit(mut self, id: InstanceId) -> (Arc<Slot>, OwnedRwLockWriteGuard<()>) {
        let slot = Slot::new(id, self.name.take());
        #[expect(clippy::expect_used, reason = "nobody else has the slot yet")]
        let guard = Arc::clone(&slot.lock)
            .try_write_owned()
            .expect("the lock of a new slot is free");
        (self.registry.add(slot), guard)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            self.registry.index().names.remove(name);
        }
    }
}
