//! The engine: what it owns, and how it is opened on a data directory.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures_util::future::join_all;
use stencil_core::{Durability, HypervisorName, InstanceDir, InstanceId, Metadata, Store, StoreError};
use stencil_vmm::Hypervisor;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, Semaphore, SemaphorePermit};

use crate::EngineError;
use crate::armed;
use crate::changes::Watcher;
use crate::host::Host;
use crate::limits::Promises;
use crate::logs::SMALLEST_LOG;
use crate::pressure::Pressure;
use crate::registry::{Registry, Slot};
use crate::write_behind::WriteBehind;

/// What an engine is opened with.
#[derive(Debug)]
pub struct Config {
    /// The data directory; made if it is not there.
    pub data: PathBuf,
    /// The hypervisors that instances can ask for by name.
    pub hypervisors: Vec<Arc<dyn Hypervisor>>,
    /// How many forks of a template are kept prepared that does not say itself: 0 to [`MAX_ARMED`](crate::MAX_ARMED).
    pub armed: u32,
    /// How many bytes of each VM's console log and VMM log are kept, the last ones: 64 KiB at least; see
    /// [`DEFAULT_LOG_LIMIT`](crate::DEFAULT_LOG_LIMIT).
    pub log_limit: u64,
}

/// Manages the instances of one data directory. Cheap to clone; every clone is the same engine.
#[derive(Clone, Debug)]
pub struct Engine {
    pub(crate) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) store: Store,
    pub(crate) registry: Arc<Registry>,
    pub(crate) hypervisors: BTreeMap<HypervisorName, Arc<dyn Hypervisor>>,
    /// How many VMMs are brought up at a time: more than a few for each core only makes each of them later.
    pub(crate) bring_up: Semaphore,
    /// One fork is armed at a time, behind those that are waited for. Closed with the engine.
    pub(crate) arming: Arc<Semaphore>,
    pub(crate) armed_by_default: u32,
    pub(crate) log_limit: u64,
    pub(crate) pressure: Pressure,
    pub(crate) watcher: Watcher,
    pub(crate) host: Host,
    /// What forks that are being made may count on.
    pub(crate) promises: Arc<Promises>,
    pub(crate) write_behind: WriteBehind,
}

impl Engine {
    /// Opens a data directory: takes its lock, reads what is there, reattaches to VMMs that went on running and sweeps
    /// what a crash left behind. [`Engine::close`] is its counterpart.
    ///
    /// # Errors
    ///
    /// [`EngineError::Invalid`] for more armed forks than can be kept; [`EngineError::Store`] if the directory is in use by another server, or cannot be read.
    pub async fn open(config: Config) -> Result<Self, EngineError> {
        armed::check(Some(config.armed))?;
        let store = Store::open(&config.data)?;
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let engine = Self {
            inner: Arc::new(Inner {
                write_behind: WriteBehind::start(store.data().clone()),
                store,
                registry: Arc::default(),
                hypervisors: config.hypervisors.into_iter().map(|h| (h.name(), h)).collect(),
                bring_up: Semaphore::new((2 * cores).max(4)),
                arming: Arc::new(Semaphore::new(1)),
                armed_by_default: config.armed,
                log_limit: config.log_limit.max(SMALLEST_LOG),
                pressure: Pressure::default(),
                host: Host::read(),
                promises: Arc::default(),
                watcher: Watcher::start().map_err(EngineError::io("watch files in", &config.data))?,
            }),
        };
        let templates = engine.reconcile().await?;
        engine.watch_pressure();
        engine.bound_logs();
        join_all(templates.iter().map(|template| engine.find_recording(template))).await;
        for template in &templates {
            engine.refill(template);
        }
        Ok(engine)
    }

    /// The hypervisors that instances can ask for, by name.
    pub fn hypervisors(&self) -> impl Iterator<Item = &dyn Hypervisor> {
        self.inner.hypervisors.values().map(Arc::as_ref)
    }

    /// The backend that runs this instance's VM.
    pub(crate) fn hypervisor(&self, name: &HypervisorName) -> Result<&Arc<dyn Hypervisor>, EngineError> {
        self.inner.hypervisors.get(name).ok_or_else(|| {
            let known: Vec<&str> = self
                .inner
                .hypervisors
                .keys()
                .map(HypervisorName::as_str)
                .collect();
            EngineError::Invalid(format!(
                "hypervisor `{name}` is not known here; this server has: {}",
                known.join(", ")
            ))
        })
    }

    pub(crate) fn dir(&self, id: &InstanceId) -> InstanceDir {
        self.inner.store.data().instance(id)
    }

    /// Waits for a turn to bring a VM up.
    pub(crate) async fn turn_to_bring_up(&self) -> SemaphorePermit<'_> {
        // It is never closed.
        #[expect(clippy::expect_used, reason = "only a closed semaphore refuses")]
        self.inner
            .bring_up
            .acquire()
            .await
            .expect("the semaphore is open")
    }

    /// Takes the instance's lock for a change; fails if it was deleted while waiting for it.
    pub(crate) async fn exclusive(&self, slot: &Arc<Slot>) -> Result<OwnedRwLockWriteGuard<()>, EngineError> {
        let guard = Arc::clone(&slot.lock).write_owned().await;
        self.still_there(slot).map(|()| guard)
    }

    /// Takes the instance's lock for something that leaves it as it is, side by side with others that do.
    pub(crate) async fn shared(&self, slot: &Arc<Slot>) -> Result<OwnedRwLockReadGuard<()>, EngineError> {
        let guard = Arc::clone(&slot.lock).read_owned().await;
        self.still_there(slot).map(|()| guard)
    }

    fn still_there(&self, slot: &Slot) -> Result<(), EngineError> {
        if self.inner.registry.holds(slot) {
            Ok(())
        } else {
            Err(EngineError::NotFound(slot.id.to_string()))
        }
    }

    /// Runs store work that may wait for the disk (fsync, scans, removals) off the async threads.
    pub(crate) async fn on_disk<T, F>(&self, work: F) -> Result<T, EngineError>
    where
        T: Send + 'static,
        F: FnOnce(&Store) -> Result<T, StoreError> + Send + 'static,
    {
        self.with_files(|store| Ok(work(store)?)).await
    }

    /// The same of work with other files, too.
    pub(crate) async fn with_files<T, F>(&self, work: F) -> Result<T, EngineError>
    where
        T: Send + 'static,
        F: FnOnce(&Store) -> Result<T, EngineError> + Send + 'static,
    {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner.store)).await {
            Ok(done) => done,
            // The closure cannot be cancelled, so the join fails only by its panic, which goes on here.
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }

    pub(crate) fn read(&self, id: &InstanceId) -> Result<Metadata, EngineError> {
        Ok(self.inner.store.read(id)?)
    }

    /// Writes the record of an instance that is there. One that need not be on disk before the answer is synced behind it.
    pub(crate) async fn rewrite(
        &self,
        metadata: &Metadata,
        durability: Durability,
    ) -> Result<(), EngineError> {
        let record = metadata.clone();
        self.on_disk(move |store| store.write(&record, durability))
            .await?;
        if durability == Durability::Renamed {
            self.inner.write_behind.sync(metadata);
        }
        Ok(())
    }
}
