//! Which instances there are, what they are called, and what belongs to each while the server runs: its lock, the
//! process of its VMM, who waits for it.
//!
//! An index over the store, rebuilt from a scan when the engine opens. It answers "which instance is meant", keeps
//! names apart, and knows which forks a template has to show: no call reads the records of other instances. What an
//! instance *is* is always read from disk, and whether a template may go is decided by a scan.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use stencil_core::rules::LiveFork;
use stencil_core::{InstanceId, InstanceName, Metadata};
use tokio::sync::{OwnedRwLockWriteGuard, RwLock, watch};

use crate::hot_list::HotList;
use crate::names::{Holder, Names};
use crate::pool::Pool;
use crate::running::RunningVmm;
use crate::{EngineError, Timings};

#[derive(Debug, Default)]
pub(crate) struct Registry {
    index: Mutex<Index>,
    /// Taken by who finds that a record can be read that could not be read before.
    mending: Mutex<()>,
    /// A VMM could not be ended, or nobody knows whether it runs: only the host's processes tell where one is left.
    lost_a_vmm: AtomicBool,
}

#[derive(Debug, Default)]
struct Index {
    slots: BTreeMap<InstanceId, Arc<Slot>>,
    names: Names,
    /// The forks of each template that has any.
    forks: HashMap<InstanceId, BTreeSet<InstanceId>>,
    /// Those whose record could not be read: each may be anybody's fork.
    unread: BTreeSet<InstanceId>,
    /// Something among the instances is none, so that forks cannot be counted.
    has_strangers: bool,
}

impl Index {
    fn by_id(&self, text: &str) -> Option<&Arc<Slot>> {
        self.slots.get(&text.parse().ok()?)
    }

    /// By id before name: no name is another instance's id.
    fn exactly(&self, reference: &str) -> Option<&Arc<Slot>> {
        self.by_id(reference).or_else(|| {
            let holder = self.names.holder(&reference.parse().ok()?)?;
            self.slots.get(&holder.instance()?)
        })
    }

    fn know(&mut self, id: InstanceId, known: &Known) {
        self.names.give(known.name.clone(), Holder::Instance(id));
        if let Some(template) = known.fork_of_template {
            self.forks.entry(template).or_default().insert(id);
        }
    }
}

/// What belongs to one instance while the server runs.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: InstanceId,
    /// What its record says and never changes; not set before that could be read.
    known: OnceLock<Known>,
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

/// What never changes of an instance.
#[derive(Debug)]
struct Known {
    name: InstanceName,
    /// The template that it was forked of.
    fork_of_template: Option<InstanceId>,
}

impl Known {
    fn of(metadata: &Metadata) -> Self {
        Self {
            name: metadata.name.clone(),
            fork_of_template: metadata.fork_of_template,
        }
    }
}

#[derive(Debug, Default)]
struct Runtime {
    vmm: Option<Arc<RunningVmm>>,
    timings: Option<Timings>,
}

impl Slot {
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            known: OnceLock::from(Known::of(metadata)),
            ..Self::unread(metadata.id)
        }
    }

    /// Of an instance whose record cannot be read.
    pub(crate) fn unread(id: InstanceId) -> Self {
        Self {
            id,
            known: OnceLock::new(),
            lock: Arc::default(),
            changed: watch::Sender::new(()),
            hot_list: Arc::default(),
            pool: Pool::default(),
            runtime: Mutex::default(),
        }
    }

    /// Absent as long as its record could not be read.
    pub(crate) fn name(&self) -> Option<&InstanceName> {
        self.known.get().map(|known| &known.name)
    }

    /// The template that it was forked of, where that is known.
    pub(crate) fn fork_of_template(&self) -> Option<InstanceId> {
        self.known.get()?.fork_of_template
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

    fn runtime(&self) -> MutexGuard<'_, Runtime> {
        // Nothing panics while it holds this lock, and each value in it is whole at any time.
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registry {
    pub(crate) fn add(&self, slot: Slot) -> Arc<Slot> {
        let slot = Arc::new(slot);
        let mut index = self.index();
        match slot.known.get() {
            Some(known) => index.know(slot.id, known),
            None => drop(index.unread.insert(slot.id)),
        }
        index.slots.insert(slot.id, Arc::clone(&slot));
        slot
    }

    /// The record of an instance could be read after all. `take_up` does what is to be done before the instance counts as
    /// known; it is called once, whoever sees the record first.
    ///
    /// # Errors
    /// [`EngineError::NameConflict`] when another instance has got the name meanwhile: the instance stays unread.
    pub(crate) fn mend(
        &self,
        slot: &Slot,
        metadata: &Metadata,
        take_up: impl FnOnce(Arc<Slot>),
    ) -> Result<(), EngineError> {
        // Nothing panics while it holds this lock.
        let _turn = self.mending.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.name().is_some() {
            return Ok(());
        }
        let Some(slot) = self.index().slots.get(&slot.id).cloned() else {
            return Err(EngineError::NotFound(slot.id.to_string()));
        };
        let holder = self.index().names.holder(&metadata.name);
        if let Some(holder) = holder {
            return Err(EngineError::NameConflict {
                name: metadata.name.to_string(),
                holder: holder.instance(),
            });
        }
        take_up(Arc::clone(&slot));
        let known = Known::of(metadata);
        let mut index = self.index();
        index.unread.remove(&slot.id);
        index.know(slot.id, &known);
        // It is set nowhere else, and this has the turn.
        let _ = slot.known.set(known);
        Ok(())
    }

    /// The instance is gone. Its name, if it has one, is free when the reservation is dropped.
    pub(crate) fn remove(self: &Arc<Self>, slot: &Slot) -> Option<Reservation> {
        let mut index = self.index();
        index.slots.remove(&slot.id);
        index.unread.remove(&slot.id);
        if let Some(name) = slot.name() {
            index.names.give(name.clone(), Holder::Reserved);
        }
        if let Some(template) = slot.fork_of_template()
            && let Some(forks) = index.forks.get_mut(&template)
        {
            forks.remove(&slot.id);
            if forks.is_empty() {
                index.forks.remove(&template);
            }
        }
        slot.tell();
        slot.name().cloned().map(|name| Reservation {
            registry: Arc::clone(self),
            name: Some(name),
        })
    }

    /// Something among the instances is none, and may be anybody's fork.
    pub(crate) fn add_stranger(&self) {
        self.index().has_strangers = true;
    }

    /// The forks of a template, to be shown; `None` where there are records that could not be read, and only a scan
    /// can tell. No decision is made by it.
    pub(crate) fn live_forks(&self, template: &InstanceId) -> Option<Vec<LiveFork>> {
        let index = self.index();
        if index.has_strangers || !index.unread.is_empty() {
            return None;
        }
        let forks = index.forks.get(template).into_iter().flatten();
        let live_fork = |id: &InstanceId| {
            let name = index.slots.get(id)?.name()?.clone();
            Some(LiveFork { id: *id, name })
        };
        Some(forks.filter_map(live_fork).collect())
    }

    /// Whether an instance is known that was forked of this one.
    pub(crate) fn has_forks(&self, template: &InstanceId) -> bool {
        self.index().forks.contains_key(template)
    }

    /// The instances that may be forks of a template: its forks, and those whose record could not be read.
    pub(crate) fn perhaps_forks(&self, template: &InstanceId) -> Vec<Arc<Slot>> {
        let index = self.index();
        let forks = index.forks.get(template).into_iter().flatten();
        // In the order of their ids.
        let ids: BTreeSet<&InstanceId> = forks.chain(&index.unread).collect();
        ids.into_iter()
            .filter_map(|id| index.slots.get(id).cloned())
            .collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Slot>> {
        self.index().slots.values().cloned().collect()
    }

    /// A VMM may be there that no slot has.
    pub(crate) fn lose_vmm(&self) {
        self.lost_a_vmm.store(true, Ordering::Relaxed);
    }

    /// Whether a VMM may be there that no slot has.
    pub(crate) fn has_lost_a_vmm(&self) -> bool {
        self.lost_a_vmm.load(Ordering::Relaxed)
    }

    /// Whether the instance may have a VMM that its slot does not have.
    pub(crate) fn may_have_lost_vmm(&self, slot: &Slot) -> bool {
        slot.name().is_none() || self.has_lost_a_vmm()
    }

    /// The instance that `reference` means, for what changes it: a whole id or an exact name. A prefix would mean another
    /// instance as soon as the one that it was meant for is gone.
    pub(crate) fn find(&self, reference: &str) -> Result<Arc<Slot>, EngineError> {
        let found = self.index().exactly(reference).cloned();
        found.ok_or_else(|| EngineError::NotFound(reference.to_owned()))
    }

    /// The instance that `reference` means, for what only reads: also a prefix of an id that only that one has.
    pub(crate) fn look_up(&self, reference: &str) -> Result<Arc<Slot>, EngineError> {
        let index = self.index();
        if let Some(slot) = index.exactly(reference) {
            return Ok(Arc::clone(slot));
        }
        let mut candidates = InstanceId::beginning_with(reference)
            .filter(|_| reference.len() >= InstanceId::SHORTEST_PREFIX)
            .into_iter()
            .flat_map(|ids| index.slots.range(ids))
            .map(|(_, slot)| slot);
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
        match index.names.holder(&name) {
            Some(Holder::Instance(id)) => conflict(Some(id)),
            Some(Holder::Reserved) => conflict(None),
            None => {
                index.names.give(name.clone(), Holder::Reserved);
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
        // A name with a number in it is nobody's id, so only names can stand in the way.
        let names = self.index().names.reserve_numbered(prefix, count)?;
        let reservation = |name| Reservation {
            registry: Arc::clone(self),
            name: Some(name),
        };
        Ok(names.into_iter().map(reservation).collect())
    }

    fn index(&self) -> MutexGuard<'_, Index> {
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
    pub(crate) fn commit(mut self, metadata: &Metadata) -> (Arc<Slot>, OwnedRwLockWriteGuard<()>) {
        let slot = Slot::of(metadata);
        self.name = None;
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
            self.registry.index().names.free(name);
        }
    }
}
