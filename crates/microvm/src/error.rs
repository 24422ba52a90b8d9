//! What a call of the API answers when it fails: Cloud Hypervisor's first lines, and below them the cause.

use std::error::Error;

use stencil_vmm_api::{ErrorBody, VmState};

use crate::definition::DefinitionError;
use crate::restore::RestoreError;
use crate::snapshot::SnapshotError;
use crate::vm::{BootError, RunError};

/// A call failed: which one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CallError {
    #[error("The VM could not be created")]
    Create(#[source] VmError),
    #[error("The VM info is not available")]
    Info(#[source] VmError),
    #[error("The VM could not be paused")]
    Pause(#[source] VmError),
    #[error("The VM could not resume")]
    Resume(#[source] VmError),
    #[error("The VM could not boot")]
    Boot(#[source] VmError),
    #[error("The VM could not shutdown")]
    Shutdown(#[source] VmError),
    #[error("The VM could not be snapshotted")]
    Snapshot(#[source] VmError),
    #[error("The VM could not be restored")]
    Restore(#[source] VmError),
}

impl CallError {
    /// Whether it failed because there is no VM: 404 rather than 500.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(
            self,
            Self::Info(VmError::NotCreated) | Self::Boot(VmError::MissingConfig)
        )
    }

    pub(crate) fn body(&self) -> ErrorBody {
        ErrorBody::of(self)
    }
}

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    #[error("VM is not created")]
    NotCreated,
    #[error("VM config is missing")]
    MissingConfig,
    #[error("VM is already created")]
    AlreadyCreated,
    #[error("VM is not running")]
    NotRunning,
    /// The control thread is gone; only while the process ends.
    #[error("The VMM is shutting down")]
    Ending,
    #[error("The VM config is not valid")]
    Definition(#[source] DefinitionError),
    #[error("Cannot boot VM")]
    Boot(#[source] BootError),
    #[error("Cannot boot VM")]
    BootState(#[source] TransitionError),
    #[error("Cannot pause VM")]
    Pause(#[source] ComponentError<TransitionError>),
    #[error("Cannot resume VM")]
    Resume(#[source] ComponentError<TransitionError>),
    #[error("Cannot resume VM")]
    Run(#[source] RunError),
    #[error("Cannot snapshot VM")]
    SnapshotState(#[source] ComponentError<RunningError>),
    #[error("Cannot send VM snapshot")]
    Snapshot(#[source] ComponentError<SnapshotError>),
    #[error("Cannot restore VM")]
    RestoreSource(#[source] ComponentError<RestoreError>),
    #[error("Cannot restore VM")]
    Restore(#[source] RestoreError),
}

/// Cloud Hypervisor's line in the middle.
#[derive(Debug, thiserror::Error)]
#[error("Failed to {action}")]
pub(crate) struct ComponentError<E: Error + 'static> {
    action: &'static str,
    source: E,
}

impl<E: Error> ComponentError<E> {
    pub(crate) fn pause(source: E) -> Self {
        Self {
            action: "pause migratable component",
            source,
        }
    }

    pub(crate) fn resume(source: E) -> Self {
        Self {
            action: "resume migratable component",
            source,
        }
    }

    pub(crate) fn snapshot(source: E) -> Self {
        Self {
            action: "snapshot migratable component",
            source,
        }
    }

    pub(crate) fn send(source: E) -> Self {
        Self {
            action: "send migratable component snapshot",
            source,
        }
    }
}

/// The VM is in a state that does not allow it.
#[derive(Debug, thiserror::Error)]
#[error("Invalid transition: InvalidStateTransition({from:?}, {to:?})")]
pub(crate) struct TransitionError {
    pub(crate) from: VmState,
    pub(crate) to: VmState,
}

/// Only a paused VM can be saved.
#[derive(Debug, thiserror::Error)]
#[error("Trying to snapshot while VM is running")]
pub(crate) struct RunningError;
