//! The rules of a fork: where it can come from, how it can begin, and what it inherits.

use jiff::Timestamp;
use serde_json::Map;

use crate::generation::VmGeneration;
use crate::id::InstanceId;
use crate::metadata::{MemoryMode, Metadata, Readiness, VmSpec};
use crate::name::InstanceName;
use crate::rules::{Operation, Refusal};
use crate::state::State;

/// What is asked of a fork, beside its name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ForkRequest {
    /// The source may run: it is put on standby for it, and goes on afterwards.
    pub from_running: bool,
    /// The state in which the fork is to begin; Running unless asked, Stopped for a Stopped source.
    pub target_state: Option<State>,
    /// How its memory is to be restored; the server's default unless asked.
    pub memory_mode: Option<MemoryMode>,
}

/// What a fork is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ForkFrom {
    /// The source's configuration only: it boots on its own.
    Config,
    /// The snapshot that the source has.
    Snapshot,
    /// A snapshot that the running source is to be put on standby for.
    Running,
}

/// How a fork is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ForkPlan {
    /// What it is made of.
    pub from: ForkFrom,
    /// The state in which it begins.
    pub target: State,
    /// How its memory is restored, if it is.
    pub memory_mode: MemoryMode,
    /// The template that it relies on.
    pub fork_of_template: Option<InstanceId>,
    /// Its disks begin with what the source's hold; if not, as their bases. The disks of a source that runs, and that is not
    /// interrupted for the fork, are being written.
    pub keeps_disks: bool,
}

/// Decides how to fork `source`, which is in `state`.
///
/// | source | begins by default as | made of a snapshot | made of the configuration |
/// |---|---|---|---|
/// | Stopped | Stopped |  | Stopped, Running |
/// | Running, with `from_running` | Running | Running, Paused, Standby | Stopped |
/// | Standby | Running | Running, Paused, Standby | Stopped |
/// | Template | Running | Running, Paused, Standby | Stopped |
///
/// Made of the configuration, it boots on its own, and a running source is not interrupted for it. Its disks hold what those of a
/// source at rest hold, and of a running one nothing but their bases.
///
/// # Errors
/// [`Refusal::InvalidState`] where the source cannot be forked, or not in that way; [`Refusal::InvalidTarget`] where
/// the fork cannot begin as asked.
pub fn fork(
    source: &Metadata,
    state: State,
    request: &ForkRequest,
    default_mode: MemoryMode,
) -> Result<ForkPlan, Refusal> {
    const OF_CONFIG: &[State] = &[State::Stopped, State::Running];
    const OF_SNAPSHOT: &[State] = &[State::Running, State::Paused, State::Standby, State::Stopped];
    let (from, allowed) = match (state, request.from_running) {
        (State::Stopped, false) => (ForkFrom::Config, OF_CONFIG),
        (State::Standby | State::Template, false) => (ForkFrom::Snapshot, OF_SNAPSHOT),
        (State::Running, true) => (ForkFrom::Running, OF_SNAPSHOT),
        _ => return Err(Refusal::invalid_state(Operation::Fork, state)),
    };
    let target = request.target_state.unwrap_or(allowed[0]);
    if !allowed.contains(&target) {
        return Err(Refusal::InvalidTarget {
            source_state: state,
            target,
            allowed,
        });
    }
    Ok(ForkPlan {
        from: if target == State::Stopped {
            ForkFrom::Config
        } else {
            from
        },
        target,
        memory_mode: request.memory_mode.unwrap_or(default_mode),
        fork_of_template: (state == State::Template).then_some(source.id),
        keeps_disks: state != State::Running || target != State::Stopped,
    })
}

/// Refuses `operation` on `source`, which is in `state`, where forks would be made of a snapshot in which processes of the guest's
/// users run: they would run in the forks before those are machines of their own. `frozen` is what the snapshot says of that. One
/// that says nothing is of a guest without an agent, or, where the guest is asked by its agent, of an earlier version.
///
/// # Errors
/// [`Refusal::NotFrozen`].
pub fn check_frozen(
    operation: Operation,
    source: &Metadata,
    state: State,
    frozen: Option<bool>,
) -> Result<(), Refusal> {
    if frozen.unwrap_or(source.spec.readiness != Readiness::Agent) {
        Ok(())
    } else {
        Err(Refusal::NotFrozen { operation, state })
    }
}

/// The record of a fork: built from a list of what may be inherited, so that a new field of an instance is not leaked
/// to its forks unless it is added here.
#[must_use]
pub fn fork_metadata(
    source: &Metadata,
    plan: &ForkPlan,
    id: InstanceId,
    name: InstanceName,
    generation: VmGeneration,
    created_at: Timestamp,
) -> Metadata {
    let spec = VmSpec {
        hypervisor: source.spec.hypervisor.clone(),
        image: source.spec.image.clone(),
        kernel: source.spec.kernel.clone(),
        firmware: source.spec.firmware.clone(),
        initrd: source.spec.initrd.clone(),
        cmdline: source.spec.cmdline.clone(),
        disks: source.spec.disks.clone(),
        vcpus: source.spec.vcpus,
        memory_bytes: source.spec.memory_bytes,
        readiness: source.spec.readiness.clone(),
        labels: source.spec.labels.clone(),
        other: Map::new(),
    };
    Metadata {
        fork_of_template: plan.fork_of_template,
        // Made of a configuration, it has no memory to restore. On standby, it is restored later, in the mode asked for now.
        memory_mode: (plan.from != ForkFrom::Config).then_some(plan.memory_mode),
        ..Metadata::new(id, name, spec, generation, created_at)
    }
}
