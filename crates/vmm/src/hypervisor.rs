//! The trait that a backend implements, and what it is asked and answers.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use async_trait::async_trait;
use stencil_core::{
    GuestEnd, HypervisorName, InstanceDir, MemoryGeneration, MemoryMode, SnapshotDir, VmGeneration, VmPhase,
    VmSpec,
};
use tokio::net::UnixStream;

use crate::{Accelerator, Exit, VmmError, VmmProcess};

/// A kind of VMM: how it is started, and how its one VM is driven.
///
/// Every call but [`spawn`](Self::spawn) and [`version`](Self::version) goes to the VMM that listens on the
/// `vmm.sock` of `dir`. Each is bounded in time and fails at once when the VMM dies; wrap it in
/// [`VmmProcess::during`] to be told then how the process ended.
///
/// The calls are single steps of a VMM: which of them may follow which is the state table's business.
#[async_trait]
pub trait Hypervisor: fmt::Debug + Send + Sync {
    /// The name under which instances ask for it.
    fn name(&self) -> HypervisorName;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The version of its binary, such as `0.1.0`. The binary is asked once.
    ///
    /// # Errors
    /// [`VmmError::Spawn`] when the binary cannot be run, [`VmmError::Version`] when it does not say.
    async fn version(&self) -> Result<String, VmmError>;

    /// Starts a VMM in `dir`, which must have none. When this returns its socket accepts connections, and nothing of the
    /// guest has run.
    ///
    /// `start` says what will be asked of it next, for VMMs whose command line is the VM; the others are told by that call.
    ///
    /// Dropping the future midway kills what was started; dropping the [`VmmProcess`] does not.
    ///
    /// # Errors
    /// [`VmmError::Prepare`] or [`VmmError::Spawn`]; then there is no process and no socket.
    async fn spawn(&self, dir: &InstanceDir, start: Start<'_>) -> Result<VmmProcess, VmmError>;

    /// Defines the VM; it is not booted.
    ///
    /// # Errors
    /// [`VmmError::Rejected`] when the VMM refuses; see [`VmmError`] for the others, here and below.
    async fn create(
        &self,
        dir: &InstanceDir,
        spec: &VmSpec,
        generation: &VmGeneration,
    ) -> Result<(), VmmError>;

    /// Loads the kernel and starts the vCPUs.
    ///
    /// # Errors
    /// [`VmmError::Rejected`], for example when the kernel cannot be loaded.
    async fn boot(&self, dir: &InstanceDir) -> Result<(), VmmError>;

    /// Stops the vCPUs.
    ///
    /// # Errors
    /// [`VmmError::Rejected`] when the VM does not run.
    async fn pause(&self, dir: &InstanceDir) -> Result<(), VmmError>;

    /// Lets the vCPUs of a paused VM go on.
    ///
    /// # Errors
    /// [`VmmError::Rejected`] when the VM is not paused.
    async fn resume(&self, dir: &InstanceDir) -> Result<(), VmmError>;

    /// Writes a paused VM into `destination`, which exists and is empty. The VM stays paused.
    ///
    /// # Errors
    /// [`VmmError::Rejected`], for example when the disk is full; `destination` then holds a part of it.
    async fn snapshot(&self, dir: &InstanceDir, destination: &SnapshotDir) -> Result<(), VmmError>;

    /// Makes the VM of a VMM that has none from a snapshot; it is left paused. Answers how its memory came back.
    ///
    /// # Errors
    /// [`VmmError::Rejected`], for example when a file is truncated or of another version.
    async fn restore(&self, dir: &InstanceDir, request: &Restore<'_>) -> Result<Restored, VmmError>;

    /// What the VM does now; answers or fails within 500 ms.
    ///
    /// # Errors
    /// [`VmmError::Timeout`] and [`VmmError::Connect`] when the VMM does not answer. That there is no VM is no
    /// error: it is [`VmPhase::Undefined`].
    async fn info(&self, dir: &InstanceDir) -> Result<VmStatus, VmmError>;

    /// Gives the guest bytes to read from its serial port. `vmm` is the process that runs the VM.
    ///
    /// # Errors
    /// [`VmmError::Console`] when there is nobody to read them; [`VmmError::ConsoleFull`] when they are not read for some
    /// seconds: a part of them may have been.
    async fn console_input(&self, dir: &InstanceDir, vmm: &VmmProcess, input: &[u8]) -> Result<(), VmmError>;

    /// How the guest's pages came to it since the restore; empty where the VMM does not serve them.
    ///
    /// # Errors
    /// As [`info`](Self::info).
    async fn page_counters(&self, dir: &InstanceDir) -> Result<PageCounters, VmmError>;

    /// A stream to the agent in the guest; the VMM's part of the conversation is over, so that what comes next is the
    /// agent's own protocol. That somebody in the guest listens is not known.
    ///
    /// # Errors
    /// [`VmmError::NoAgentPort`] where [`Capabilities::agent`] is false; [`VmmError::Agent`] when the VMM does not
    /// connect.
    async fn connect_agent(&self, dir: &InstanceDir) -> Result<UnixStream, VmmError>;

    /// Why the VMM ended, where something beside it knows; `None` as a rule.
    fn last_words(&self, dir: &InstanceDir) -> Option<String>;

    /// What executes the instructions of the guest that is up in `dir`; `None` of a backend that has no choice in that.
    fn accelerator(&self, _dir: &InstanceDir) -> Option<Accelerator> {
        None
    }

    /// Presses the power button of a machine that runs; whether it has one. A guest that listens to it powers itself off, sooner
    /// or later.
    ///
    /// # Errors
    /// [`VmmError::Rejected`] when the VM does not run.
    async fn press_power_button(&self, _dir: &InstanceDir) -> Result<bool, VmmError> {
        Ok(false)
    }

    /// Ends the VMM and with it the VM, whatever they are doing: asks it, then SIGTERM, then SIGKILL, each with a
    /// bounded wait. Returns when the process is proved dead and its sockets are removed.
    ///
    /// # Errors
    /// [`ProcessError::StillAlive`](crate::ProcessError::StillAlive) when even SIGKILL did not end it in time.
    async fn stop(&self, dir: &InstanceDir, process: &VmmProcess) -> Result<Exit, VmmError>;
}

/// What a backend can do, so that a request is refused before anything is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// How a snapshot's memory can be restored.
    pub memory_modes: Vec<MemoryMode>,
    /// The most vCPUs that a VM can have.
    pub max_vcpus: u32,
    /// Whether the vCPUs are like the host's CPU, so that a snapshot goes on only where all of its features are.
    pub host_cpu: bool,
    /// Whether a VM can start firmware instead of a kernel.
    pub firmware: bool,
    /// Whether the guest's serial port takes input; see [`Hypervisor::console_input`].
    pub console_input: bool,
    /// Whether a restored guest is told who it is from now on: its generation id, its clock, and that it was restored.
    pub tells_identity: bool,
    /// How many files a disk may consist of that lie on each other, its base counted; 0 where its VMs have no disks.
    pub max_disk_layers: usize,
    /// Whether its guests have a port through which an agent in them can be reached.
    pub agent: bool,
    /// Whether the VMM stays when its guest has powered off or died. The instance is Shutdown then and tells the guest's end;
    /// else it is Stopped.
    pub outlives_guest: bool,
}

/// What a VMM is started for.
#[derive(Clone, Copy, Debug)]
pub enum Start<'a> {
    /// To be created and booted.
    Boot {
        /// The VM.
        spec: &'a VmSpec,
        /// Who the machine is.
        generation: &'a VmGeneration,
    },
    /// To be restored.
    Restore(&'a Restore<'a>),
}

/// What to restore, and how.
#[derive(Clone, Copy, Debug)]
pub struct Restore<'a> {
    /// The snapshot; for a fork, that of the instance that is forked or a link to it.
    pub snapshot: &'a SnapshotDir,
    /// How its memory comes back.
    pub memory_mode: MemoryMode,
    /// Who the machine is from now on. With another identity than the snapshot has, it is a new machine: a fork.
    pub generation: &'a VmGeneration,
    /// Which memory the snapshot holds.
    pub memory_generation: &'a MemoryGeneration,
    /// What is done about the pages that the guest touches first.
    pub hot_pages: HotPages<'a>,
}

/// How a VM's memory came back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    /// In which mode.
    pub memory_mode: MemoryMode,
    /// Why not in the one that was asked for; `None` where it is that one.
    pub reason: Option<String>,
}

impl Restored {
    /// It came back in the mode that was asked for.
    pub fn as_asked(memory_mode: MemoryMode) -> Self {
        Self {
            memory_mode,
            reason: None,
        }
    }
}

/// Counters of pages by name, as the VMM gives them: `demand_faults`, `prefetched`, `prefetch_hits`, `bytes_read`, ...
pub type PageCounters = BTreeMap<String, u64>;

/// What a restore does about the pages that the guest touches first.
#[derive(Clone, Copy, Debug)]
pub enum HotPages<'a> {
    /// Nothing.
    Unused,
    /// Those in this list are there before the vCPUs run; a list that cannot be used is ignored.
    Prefetch(&'a Path),
    /// They are recorded, which takes [`MemoryMode::Uffd`]. The list appears as
    /// [`InstanceDir::recorded_hot_pages`] when the recording closes.
    Record,
}

/// What [`Hypervisor::info`] answers.
#[derive(Clone, Debug, PartialEq)]
pub struct VmStatus {
    /// What the VM does.
    pub phase: VmPhase,
    /// Why the guest is down, or why its VMM stopped it unasked; only with [`VmPhase::Shutdown`] and [`VmPhase::Paused`], and only
    /// from a VMM that tells.
    pub end: Option<GuestEnd>,
}
