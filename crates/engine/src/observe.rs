//! Observing: the facts that a state is derived from, and the instance as it is shown.

use std::time::Duration;

use futures_util::StreamExt;
use stencil_core::rules::LiveFork;
use stencil_core::{
    InstanceDir, Metadata, Observed, Readiness, SnapshotFacts, State, StoreError, VmPhase, VmmFacts,
    VmmRecord, error_chain,
};

use stencil_vmm::{Accelerator, Attached, Exit, Hypervisor, PageCounters, VmStatus, VmmError, VmmProcess};
use tokio::time::Instant;

use crate::agent::AgentState;
use crate::registry::Slot;
use crate::running::RunningVmm;
use crate::{Engine, EngineError, Filter, Instance};

/// How many instances a list observes at a time; each is one call to a VMM at most.
const OBSERVED_AT_ONCE: usize = 32;
/// For how long a VMM that lives is tried to be reached before its instance is Unknown, and after how long again.
const REACHED_WITHIN: Duration = Duration::from_secs(2);
const TRY_AGAIN: Duration = Duration::from_millis(20);

/// An instance's metadata and what they, its snapshot and its VMM say together.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) metadata: Metadata,
    pub(crate) snapshot: SnapshotFacts,
    pub(crate) observed: Observed,
}

impl Seen {
    pub(crate) fn state(&self) -> State {
        self.observed.state
    }
}

impl Engine {
    /// Metadata, snapshot and VMM of an instance, and the state that follows from them.
    pub(crate) async fn observe(&self, slot: &Slot) -> Result<Seen, EngineError> {
        let metadata = self.read(&slot.id)?;
        self.mend(slot, &metadata)?;
        let vmm = self.vmm_facts(slot, &metadata).await;
        // A VMM that is up decides alone; the snapshot is then not looked at.
        let snapshot = match vmm {
            VmmFacts::None | VmmFacts::Ended { .. } | VmmFacts::Elsewhere { .. } => {
                self.inner.store.snapshot(&slot.id)
            }
            VmmFacts::Up { .. } | VmmFacts::Silent { .. } => SnapshotFacts::Absent,
        };
        let observed = stencil_core::observe::derive(&metadata, &snapshot, &vmm);
        Ok(Seen {
            metadata,
            snapshot,
            observed,
        })
    }

    async fn vmm_facts(&self, slot: &Slot, metadata: &Metadata) -> VmmFacts {
        let Some(record) = &metadata.vmm else {
            return VmmFacts::None;
        };
        let pid = record.process.pid;
        let running = slot
            .vmm()
            .filter(|running| *running.process.identity() == record.process);
        let Some(running) = running else {
            return self.unwatched(slot, metadata, record);
        };
        let ended = |exit| self.ended(slot, metadata, format!("process {pid} {exit}"));
        let hypervisor = self.hypervisor(&metadata.spec.hypervisor);
        match (running.process.has_exited(), &hypervisor) {
            // Its guest has powered off, and it ended with its guest; unless it had to end for another reason.
            (Some(Exit::Code(0)), Ok(hypervisor))
                if !hypervisor.capabilities().outlives_guest
                    && hypervisor.last_words(&self.dir(&slot.id)).is_none() =>
            {
                return VmmFacts::None;
            }
            (Some(exit), _) => return ended(exit),
            (None, _) => {}
        }
        let dir = self.dir(&slot.id);
        let hypervisor = match hypervisor {
            Ok(hypervisor) => hypervisor,
            Err(unknown) => {
                return VmmFacts::Silent {
                    reason: unknown.to_string(),
                };
            }
        };
        match self.info(hypervisor.as_ref(), &dir, &running).await {
            Ok(status) => VmmFacts::Up {
                phase: status.phase,
                ready: running.is_ready(&dir.console_log()),
                end: status.end,
            },
            Err(error) => match running.process.has_exited() {
                Some(exit) => ended(exit),
                None => VmmFacts::Silent {
                    reason: format!("process {pid} does not answer: {}", error_chain(&error)),
                },
            },
        }
    }

    /// Asks a VMM for its VM. That it could not be reached once, or was slow, says nothing: it is tried again for a while, as long
    /// as it lives.
    async fn info(
        &self,
        hypervisor: &dyn Hypervisor,
        dir: &InstanceDir,
        running: &RunningVmm,
    ) -> Result<VmStatus, VmmError> {
        let until = Instant::now() + REACHED_WITHIN;
        loop {
            match hypervisor.info(dir).await {
                Err(error)
                    if (error.lost_connection() || matches!(error, VmmError::Timeout { .. }))
                        && running.process.has_exited().is_none()
                        && Instant::now() < until =>
                {
                    tokio::time::sleep(TRY_AGAIN).await;
                }
                told => return told,
            }
        }
    }

    /// What can be told of a recorded VMM that this server does not watch.
    fn unwatched(&self, slot: &Slot, metadata: &Metadata, record: &VmmRecord) -> VmmFacts {
        let pid = record.process.pid;
        match VmmProcess::attach_in(&record.process, self.dir(&slot.id).path()) {
            Ok(Attached::Gone) => self.ended(
                slot,
                metadata,
                format!("process {pid} is gone; it ended while no server watched it"),
            ),
            Ok(Attached::Elsewhere) => VmmFacts::Elsewhere { pid },
            Ok(Attached::Here(_)) => VmmFacts::Silent {
                reason: format!(
                    "process {pid} runs, and this server does not watch it; start the server again"
                ),
            },
            Err(error) => VmmFacts::Silent {
                reason: format!("cannot tell whether process {pid} runs: {}", error_chain(&error)),
            },
        }
    }

    /// That the VMM ended, and why where something beside it knows.
    fn ended(&self, slot: &Slot, metadata: &Metadata, how: String) -> VmmFacts {
        let words = self
            .hypervisor(&metadata.spec.hypervisor)
            .ok()
            .and_then(|hypervisor| hypervisor.last_words(&self.dir(&slot.id)));
        VmmFacts::Ended {
            reason: match words {
                Some(why) => format!("{how}: {why}"),
                None => how,
            },
        }
    }

    /// One instance, by id, exact name or unique id prefix; with what its VMM holds in memory.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotFound`], [`EngineError::Ambiguous`].
    pub async fn get(&self, reference: &str) -> Result<Instance, EngineError> {
        let slot = self.inner.registry.look_up(reference)?;
        let mut instance = self.show(&slot).await?;
        if let Some(running) = slot.vmm() {
            // A process that has just ended has no memory to tell of.
            instance.memory_use = running.process.memory().ok();
            instance.pages = self.pages(&instance).await;
            instance.accelerator = self.accelerator(&instance);
        }
        Ok(instance)
    }

    /// What executes the guest's instructions, where its hypervisor has a choice in that.
    fn accelerator(&self, instance: &Instance) -> Option<Accelerator> {
        let name = &instance.metadata.as_ref()?.spec.hypervisor;
        self.hypervisor(name).ok()?.accelerator(&self.dir(&instance.id))
    }

    /// How the guest's pages came to it, where the VMM is up and counts them.
    async fn pages(&self, instance: &Instance) -> Option<PageCounters> {
        let hypervisor = self
            .hypervisor(&instance.metadata.as_ref()?.spec.hypervisor)
            .ok()?;
        let counters = hypervisor.page_counters(&self.dir(&instance.id)).await.ok()?;
        (!counters.is_empty()).then_some(counters)
    }

    /// The instances that the filter lets through, oldest first.
    ///
    /// # Errors
    ///
    /// [`EngineError::NotFound`] and [`EngineError::Ambiguous`] for the filter's template.
    pub async fn list(&self, filter: Filter) -> Result<Vec<Instance>, EngineError> {
        let template = filter
            .template
            .as_deref()
            .map(|name| self.inner.registry.look_up(name))
            .transpose()?
            .map(|t| t.id);
        let slots = match template {
            Some(template) => self.inner.registry.perhaps_forks(&template),
            None => self.inner.registry.all(),
        };
        let shown = futures_util::stream::iter(slots)
            .map(|slot| async move {
                let shown = self.show(&slot).await;
                // One without a VMM is observed without waiting: others have their turn in between.
                tokio::task::consume_budget().await;
                (slot, shown)
            })
            .buffered(OBSERVED_AT_ONCE)
            .collect::<Vec<_>>()
            .await;
        let of_template = |slot: &Slot, instance: &Instance| match &instance.metadata {
            Some(metadata) => metadata.fork_of_template == template,
            None => slot.fork_of_template() == template,
        };
        Ok(shown
            .into_iter()
            // One that was deleted meanwhile is not in the list.
            .filter_map(|(slot, shown)| Some((slot, shown.ok()?)))
            .filter(|(_, instance)| filter.state.is_none_or(|state| instance.state == state))
            .filter(|(slot, instance)| template.is_none() || of_template(slot, instance))
            .map(|(_, instance)| instance)
            .collect())
    }

    /// The instance as it is shown; unreadable metadata make it [`State::Unknown`], deletion an error.
    pub(crate) async fn show(&self, slot: &Slot) -> Result<Instance, EngineError> {
        let mut instance = unseen(slot);
        match self.observe(slot).await {
            Ok(seen) => {
                instance.state = seen.observed.state;
                instance.state_error = seen.observed.error;
                instance.guest_end = seen.observed.guest_end;
                if seen.metadata.is_template {
                    instance.armed = Some(self.armed(slot, &seen.metadata));
                    match self.forks_to_show(slot).await {
                        Ok(forks) => instance.forks = Some(forks),
                        Err(error) => {
                            instance.state_error.get_or_insert(format!(
                                "its forks cannot be counted: {}",
                                error_chain(&error)
                            ));
                        }
                    }
                }
                if matches!(
                    seen.observed.state,
                    State::Stopped | State::Standby | State::Template
                ) {
                    // Of a VMM that ended by itself.
                    instance.agent = None;
                }
                if let (State::Initializing, Readiness::Agent, Some(AgentState::Failed(why))) =
                    (instance.state, &seen.metadata.spec.readiness, &instance.agent)
                {
                    instance.state_error = Some(format!("its agent failed: {why}"));
                }
                instance.metadata = Some(seen.metadata);
            }
            Err(_) if !self.inner.registry.holds(slot) => {
                return Err(EngineError::NotFound(slot.id.to_string()));
            }
            Err(EngineError::Store(StoreError::Unreadable { source, .. })) => {
                instance.state_error = Some(format!("its metadata cannot be read: {}", error_chain(&source)));
            }
            Err(conflict @ EngineError::NameConflict { .. }) => {
                instance.state_error = Some(format!(
                    "its metadata could not be read before, and now {conflict}"
                ));
            }
            Err(error) => return Err(error),
        }
        Ok(instance)
    }

    /// An instance that was just let run and whose guest is ready, as it is shown.
    pub(crate) fn show_running(&self, slot: &Slot, metadata: Metadata) -> Instance {
        let up = VmmFacts::Up {
            phase: VmPhase::Running,
            ready: true,
            end: None,
        };
        let observed = stencil_core::observe::derive(&metadata, &SnapshotFacts::Absent, &up);
        Instance {
            metadata: Some(metadata),
            state: observed.state,
            state_error: observed.error,
            ..unseen(slot)
        }
    }

    /// The live forks of a template as they are shown: from the index where it knows all instances.
    async fn forks_to_show(&self, slot: &Slot) -> Result<Vec<LiveFork>, EngineError> {
        match self.inner.registry.live_forks(&slot.id) {
            Some(forks) => Ok(forks),
            None => self.live_forks(slot).await,
        }
    }

    /// The live forks of a template for a decision, counted from the metadata on disk.
    pub(crate) async fn live_forks(&self, slot: &Slot) -> Result<Vec<LiveFork>, EngineError> {
        let id = slot.id;
        self.on_disk(move |store| store.live_forks(&id)).await
    }
}

fn agent_state(slot: &Slot) -> Option<AgentState> {
    Some(slot.vmm()?.agent.as_ref()?.state())
}

/// What is known of an instance that was not looked at.
fn unseen(slot: &Slot) -> Instance {
    Instance {
        id: slot.id,
        name: slot.name().cloned(),
        metadata: None,
        state: State::Unknown,
        state_error: None,
        guest_end: None,
        forks: None,
        armed: None,
        agent: agent_state(slot),
        memory_use: None,
        accelerator: None,
        pages: None,
        timings: slot.timings(),
    }
}
