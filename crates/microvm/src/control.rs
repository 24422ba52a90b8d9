//! The control thread: owns the VM, and does what the API asks, one call after the other.

use std::io;
use std::mem;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use stencil_vmm_api::{RestoreRequest, SnapshotRequest, VmConfig, VmEnd, VmInfo, VmState};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::counters::Counters;
use crate::definition::Definition;
use crate::error::{CallError, ComponentError, RunningError, TransitionError, VmError};
use crate::events::{Event, Events};
use crate::machine::{EmptyMachine, MachineError};
use crate::restore::{self, RestoreError};
use crate::snapshot::{self, SnapshotError, directory_of};
use crate::status::Status;
use crate::tidy;
use crate::vm::{BootError, MicroVm, RunError, Surroundings, Vcpus};

/// No call for so long: then there is time to tidy up.
const QUIET: Duration = Duration::from_millis(100);

/// What the control thread is told.
pub(crate) enum Message {
    /// A call of the API.
    Call {
        call: Call,
        reply: oneshot::Sender<Result<(), CallError>>,
    },
    /// The VM says something.
    Event(Event),
    /// The process ends.
    Quit { done: oneshot::Sender<()> },
}

/// The calls that change something.
#[derive(Debug)]
pub(crate) enum Call {
    Create(Box<VmConfig>),
    Boot,
    Pause,
    Resume,
    Snapshot(SnapshotRequest),
    Restore(RestoreRequest),
    Shutdown,
    Delete,
}

/// The control thread before it runs.
pub(crate) struct Control {
    inbox: Receiver<Message>,
    status: Arc<Status>,
    surroundings: Surroundings,
    /// Made before the first call comes, for whichever needs it.
    ahead: Option<EmptyMachine>,
    /// Whether a call has come since it last tidied up.
    untidy: bool,
    vm: Slot,
}

/// The VM of this process.
enum Slot {
    Empty,
    /// Defined, without a guest: not booted, shut down, or ended for the reason given.
    Down {
        definition: Box<Definition>,
        counters: Arc<Counters>,
        end: Option<VmEnd>,
    },
    Up(Box<MicroVm>),
}

impl Slot {
    fn down(definition: Definition) -> Self {
        let counters = Arc::new(Counters::new(u32::from(definition.vcpus)));
        Self::Down {
            definition: Box::new(definition),
            counters,
            end: None,
        }
    }

    /// `None`: there is no VM.
    fn state(&self) -> Option<VmState> {
        Some(match self {
            Self::Empty => return None,
            Self::Down { end: None, .. } => VmState::Created,
            Self::Down { end: Some(_), .. } => VmState::Shutdown,
            Self::Up(vm) if vm.is_running() => VmState::Running,
            Self::Up(_) => VmState::Paused,
        })
    }
}

impl Control {
    pub(crate) fn new(
        messages: Sender<Message>,
        inbox: Receiver<Message>,
        status: Arc<Status>,
        runtime: Handle,
    ) -> Self {
        // Where nobody listens, the process is ending.
        let events = Events::new(move |event| drop(messages.send(Message::Event(event))));
        Self {
            inbox,
            status,
            surroundings: Surroundings { events, runtime },
            ahead: None,
            untidy: false,
            vm: Slot::Empty,
        }
    }

    pub(crate) fn start(mut self) -> io::Result<JoinHandle<()>> {
        thread::Builder::new()
            .name("control".to_owned())
            .spawn(move || self.run())
    }

    fn run(&mut self) {
        // Where it cannot be had, the call that needs one says why.
        self.ahead = EmptyMachine::new().ok();
        while let Some(message) = self.next() {
            match message {
                Message::Call { call, reply } => {
                    self.untidy = true;
                    let result = self.call(call);
                    self.publish();
                    // Who asked may have gone; the call is done all the same.
                    let _ = reply.send(result);
                }
                Message::Event(event) => self.look_into(event),
                Message::Quit { done } => {
                    self.stop_vcpus();
                    self.vm = Slot::Empty;
                    self.ahead = None;
                    self.status.clear();
                    let _ = done.send(());
                    return;
                }
            }
        }
    }

    /// What comes next; `None` when nobody can send any more. Tidies up once when nothing comes.
    fn next(&mut self) -> Option<Message> {
        if self.untidy {
            match self.inbox.recv_timeout(QUIET) {
                Ok(message) => return Some(message),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    if let Err(error) = tidy::give_back_stack() {
                        tracing::debug!(%error, "unused stack is kept");
                    }
                    self.untidy = false;
                }
            }
        }
        self.inbox.recv().ok()
    }

    fn look_into(&mut self, event: Event) {
        // What a VM or a run said that is gone meanwhile says nothing about this one.
        let Slot::Up(vm) = &mut self.vm else { return };
        match event {
            _ if vm.has_ended() => self.stop_vcpus(),
            Event::RecordingClosed => vm.ram.save_recording(),
            Event::VcpuEnded | Event::MemoryLost => {}
        }
    }

    fn publish(&self) {
        let (definition, counters, end) = match &self.vm {
            Slot::Empty => return self.status.clear(),
            Slot::Down {
                definition,
                counters,
                end,
            } => (&**definition, counters, end.clone()),
            Slot::Up(vm) => (&vm.definition, &vm.counters, None),
        };
        let info = VmInfo {
            config: definition.config.clone(),
            state: self.vm.state().unwrap_or(VmState::Created),
            memory_actual_size: definition.memory_bytes,
            end,
        };
        self.status.publish(info, Arc::clone(counters));
    }

    fn call(&mut self, call: Call) -> Result<(), CallError> {
        match call {
            Call::Create(config) => self.create(*config).map_err(CallError::Create),
            Call::Boot => self.boot().map_err(CallError::Boot),
            Call::Pause => self.pause().map_err(CallError::Pause),
            Call::Resume => self.resume().map_err(CallError::Resume),
            Call::Snapshot(request) => self.snapshot(&request).map_err(CallError::Snapshot),
            Call::Restore(request) => self.restore(&request).map_err(CallError::Restore),
            Call::Shutdown => self.shutdown().map_err(CallError::Shutdown),
            Call::Delete => {
                self.stop_vcpus();
                self.vm = Slot::Empty;
                Ok(())
            }
        }
    }

    fn empty_machine(&mut self) -> Result<EmptyMachine, MachineError> {
        self.ahead.take().map_or_else(EmptyMachine::new, Ok)
    }

    fn create(&mut self, config: VmConfig) -> Result<(), VmError> {
        if self.vm.state().is_some() {
            return Err(VmError::AlreadyCreated);
        }
        self.vm = Slot::down(Definition::new(config).map_err(VmError::Definition)?);
        Ok(())
    }

    fn boot(&mut self) -> Result<(), VmError> {
        let definition = match &self.vm {
            Slot::Empty => return Err(VmError::MissingConfig),
            Slot::Down { definition, .. } => Definition::clone(definition),
            Slot::Up(_) => return Err(VmError::BootState(self.transition(VmState::Running))),
        };
        let mut vm = self
            .empty_machine()
            .map_err(BootError::from)
            .and_then(|empty| MicroVm::boot(definition, empty, self.surroundings.clone()))
            .map_err(VmError::Boot)?;
        vm.resume()
            .map_err(|error| VmError::Boot(BootError::Run(error)))?;
        self.vm = Slot::Up(Box::new(vm));
        Ok(())
    }

    fn pause(&mut self) -> Result<(), VmError> {
        match self.vm.state() {
            None | Some(VmState::Created) => return Err(VmError::NotRunning),
            Some(VmState::Running) => self.stop_vcpus(),
            Some(VmState::Paused | VmState::Shutdown) => return Err(self.pause_refused()),
        }
        // The guest may have ended by itself meanwhile.
        if self.vm.state() == Some(VmState::Paused) {
            Ok(())
        } else {
            Err(self.pause_refused())
        }
    }

    fn pause_refused(&self) -> VmError {
        VmError::Pause(ComponentError::pause(self.transition(VmState::Paused)))
    }

    fn resume(&mut self) -> Result<(), VmError> {
        let refused = ComponentError::resume(self.transition(VmState::Running));
        match (&mut self.vm, refused) {
            (Slot::Empty | Slot::Down { end: None, .. }, _) => Err(VmError::NotRunning),
            (Slot::Up(vm), _) if !vm.is_running() => {
                let result = vm.resume();
                match &result {
                    Ok(()) | Err(RunError::Thread(_) | RunError::Start(_)) => {}
                    Err(RunError::MemoryLost(_)) => self.stop_vcpus(),
                }
                result.map_err(VmError::Run)
            }
            (_, refused) => Err(VmError::Resume(refused)),
        }
    }

    fn snapshot(&mut self, request: &SnapshotRequest) -> Result<(), VmError> {
        let Slot::Up(vm) = &self.vm else {
            return Err(VmError::NotRunning);
        };
        let Vcpus::Paused(vcpus) = &vm.vcpus else {
            return Err(VmError::SnapshotState(ComponentError::snapshot(RunningError)));
        };
        directory_of(&request.destination_url)
            .ok_or_else(|| SnapshotError::Url(request.destination_url.clone()))
            .and_then(|directory| snapshot::write(vm, vcpus, &directory))
            .map_err(|error| VmError::Snapshot(ComponentError::send(error)))
    }

    fn restore(&mut self, request: &RestoreRequest) -> Result<(), VmError> {
        if self.vm.state().is_some() {
            return Err(VmError::AlreadyCreated);
        }
        let mut vm = directory_of(&request.source_url)
            .ok_or_else(|| RestoreError::Url(request.source_url.clone()))
            .and_then(|directory| {
                let empty = self.empty_machine()?;
                restore::restore(&directory, request, empty, self.surroundings.clone())
            })
            .map_err(|error| match error {
                RestoreError::NotADirectory(_) => VmError::RestoreSource(ComponentError::send(error)),
                error => VmError::Restore(error),
            })?;
        if request.resume {
            vm.resume().map_err(VmError::Run)?;
        } else if let Err(error) = vm.start_threads() {
            // The resume tries again, and tells it.
            tracing::warn!(%error, "no thread waits for a vCPU");
        }
        self.vm = Slot::Up(Box::new(vm));
        Ok(())
    }

    fn shutdown(&mut self) -> Result<(), VmError> {
        self.stop_vcpus();
        let definition = match &self.vm {
            Slot::Empty | Slot::Down { end: None, .. } => return Err(VmError::NotRunning),
            Slot::Down { definition, .. } => Definition::clone(definition),
            Slot::Up(vm) => vm.definition.clone(),
        };
        self.vm = Slot::down(definition);
        Ok(())
    }

    /// Stops the vCPUs: then the VM is paused, or, where its guest has ended, down.
    fn stop_vcpus(&mut self) {
        let Slot::Up(vm) = &mut self.vm else { return };
        let end = vm.pause();
        if end.as_ref().is_none_or(|end| !end.kind.is_failure()) {
            vm.ram.save_recording();
        }
        let Some(end) = end else { return };
        if end.kind.is_failure() {
            tracing::error!(kind = ?end.kind, "the guest failed: {}", end.reason);
        } else {
            tracing::info!(kind = ?end.kind, "{}", end.reason);
        }
        let definition = Box::new(vm.definition.clone());
        let counters = Arc::clone(&vm.counters);
        let down = Slot::Down {
            definition,
            counters,
            end: Some(end),
        };
        let vm = mem::replace(&mut self.vm, down);
        // Told before the VM is taken apart, which takes the kernel some 20 ms.
        self.publish();
        drop(vm);
    }

    fn transition(&self, to: VmState) -> TransitionError {
        TransitionError {
            from: self.vm.state().unwrap_or(VmState::Created),
            to,
        }
    }
}
