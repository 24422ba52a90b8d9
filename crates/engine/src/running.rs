//! The VMM of an instance while it runs, and its guest's word that it is ready.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use stencil_core::Readiness;
use stencil_vmm::VmmProcess;

use crate::agent::AgentLink;
use crate::readiness::ReadyScan;

/// A VMM that this server started or found again, in one epoch of its guest.
#[derive(Debug)]
pub(crate) struct RunningVmm {
    pub(crate) process: VmmProcess,
    /// The link to its guest's agent, where the hypervisor has a port for it.
    pub(crate) agent: Option<AgentLink>,
    word: Word,
}

/// Who says that the guest is ready in this epoch.
#[derive(Debug)]
enum Word {
    Console(Mutex<ReadyScan>),
    Agent,
}

impl RunningVmm {
    /// `console_offset` is how many bytes of the console log are of earlier epochs.
    pub(crate) fn new(
        process: VmmProcess,
        agent: Option<AgentLink>,
        readiness: &Readiness,
        console_offset: u64,
    ) -> Self {
        let word = match readiness {
            Readiness::Agent => Word::Agent,
            Readiness::None => Word::Console(Mutex::new(ReadyScan::new(None, console_offset))),
            Readiness::Console(text) => Word::Console(Mutex::new(ReadyScan::new(Some(text), console_offset))),
        };
        Self { process, agent, word }
    }

    /// Reads on in the console log, if that is where it is said; whether the guest has said that it is ready.
    pub(crate) fn is_ready(&self, log: &Path) -> bool {
        self.is_ready_or_prints(log).0
    }

    /// The same, and whether it has printed something since the last look.
    pub(crate) fn is_ready_or_prints(&self, log: &Path) -> (bool, bool) {
        match &self.word {
            Word::Console(scan) => {
                // Nothing panics while it holds this lock.
                let mut scan = scan.lock().unwrap_or_else(PoisonError::into_inner);
                let before = scan.seen();
                (scan.advance(log), scan.seen() > before)
            }
            Word::Agent => {
                let taken = self.agent.as_ref().is_some_and(AgentLink::has_taken_epoch);
                (taken, false)
            }
        }
    }

    /// Reads on in the console log up to `end`, if that is where the guest says that it is ready.
    pub(crate) fn read_up_to(&self, log: &Path, end: u64) {
        if let Word::Console(scan) = &self.word {
            let mut scan = scan.lock().unwrap_or_else(PoisonError::into_inner);
            let mut before = None;
            while scan.seen() < end && before != Some(scan.seen()) {
                before = Some(scan.seen());
                if scan.advance(log) {
                    return;
                }
            }
        }
    }

    /// Whether it is its agent's word that is waited for, and the agent cannot give it.
    pub(crate) fn has_failed(&self) -> bool {
        matches!(self.word, Word::Agent) && self.agent.as_ref().is_some_and(AgentLink::has_failed)
    }
}
