//! The sending side of a local migration: hands a VM over, step by step, each of which Cloud Hypervisor acknowledges.

use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use zerocopy::{FromZeros, IntoBytes};

use super::wire::{Command, Request, Response};
use crate::descriptor::send_with;

/// A step was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum StepError {
    /// The connection broke.
    #[error("{step}: Cloud Hypervisor closed the migration's connection; its own log says why")]
    Connection { step: Command, source: io::Error },
    /// It said no. It tells the reason to its log only.
    #[error("{step}: Cloud Hypervisor refused this step of the migration; its own log says why")]
    Refused { step: Command },
    /// What it answered is not of the protocol.
    #[error(
        "{step}: Cloud Hypervisor answered with status {status} and {length} bytes; \
         the protocol of v53 has 1 or 2, and none"
    )]
    Malformed { step: Command, status: u16, length: u64 },
}

/// The connection of the migration.
#[derive(Debug)]
pub(super) struct Sender(UnixStream);

impl Sender {
    pub(super) fn new(connection: UnixStream) -> Self {
        Self(connection)
    }

    /// Begins.
    pub(super) fn start(&mut self) -> Result<(), StepError> {
        self.send(Command::Start, &[])?;
        self.acknowledged(Command::Start)
    }

    /// Gives the file in which the guest memory of a slot is.
    pub(super) fn memory(&mut self, slot: u32, file: BorrowedFd<'_>) -> Result<(), StepError> {
        let step = Command::MemoryFd;
        let slot = slot.to_le_bytes();
        let lost = |source| StepError::Connection { step, source };
        self.0
            .write_all(Request::new(step, slot.len() as u64).as_bytes())
            .map_err(lost)?;
        let sent = send_with(&self.0, &slot, file).map_err(lost)?;
        self.0.write_all(&slot[sent..]).map_err(lost)?;
        self.acknowledged(step)
    }

    /// Gives the VM's definition.
    pub(super) fn config(&mut self, json: &[u8]) -> Result<(), StepError> {
        self.send(Command::Config, json)?;
        self.acknowledged(Command::Config)
    }

    /// Gives the state of its vCPUs and devices. Pages are asked for before this returns.
    pub(super) fn state(&mut self, json: &[u8]) -> Result<(), StepError> {
        self.send(Command::State, json)?;
        self.acknowledged(Command::State)
    }

    /// Ends; the VM is there, and paused.
    pub(super) fn complete_paused(&mut self) -> Result<(), StepError> {
        self.send(Command::CompletePaused, &[])?;
        self.acknowledged(Command::CompletePaused)
    }

    fn send(&mut self, step: Command, payload: &[u8]) -> Result<(), StepError> {
        let lost = |source| StepError::Connection { step, source };
        self.0
            .write_all(Request::new(step, payload.len() as u64).as_bytes())
            .map_err(lost)?;
        self.0.write_all(payload).map_err(lost)
    }

    fn acknowledged(&mut self, step: Command) -> Result<(), StepError> {
        let mut response = Response::new_zeroed();
        self.0
            .read_exact(response.as_mut_bytes())
            .map_err(|source| StepError::Connection { step, source })?;
        match (response.status.get(), response.length.get()) {
            (Response::OK, 0) => Ok(()),
            (Response::ERROR, 0) => Err(StepError::Refused { step }),
            (status, length) => Err(StepError::Malformed { step, status, length }),
        }
    }
}
