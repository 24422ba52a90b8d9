//! What is answered over the wire. What does not apply is absent; a client ignores what it does not know.

mod images;
mod observed;

pub(crate) use self::observed::micros;

use std::collections::BTreeMap;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use stencil_core::{
    DiskFormat, DiskSpec, HypervisorName, ImageName, InstanceId, InstanceName, MemoryMode, Readiness, State,
    VmGeneration,
};

use crate::ErrorBody;
use crate::exec::CommandResult;

/// One instance, as it was observed.
///
/// Where its metadata cannot be read, its state is [`State::Unknown`], and what they would tell is absent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Its name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<InstanceName>,
    /// Its state.
    pub state: State,
    /// Why the state cannot be told, or what went wrong on the way to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_error: Option<String>,
    /// How its guest came to its end, where it is Shutdown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_end: Option<String>,
    /// Which hypervisor runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hypervisor: Option<HypervisorName>,
    /// How many vCPUs it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vcpus: Option<u32>,
    /// Its guest's memory in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<u64>,
    /// Whether it is a template.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is_template: Option<bool>,
    /// The template that it relies on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork_of_template: Option<InstanceId>,
    /// Of a template: its live forks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forks: Option<Forks>,
    /// Of a template: its armed forks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub armed: Option<Armed>,
    /// What is known of the agent in its guest; only of a VM that is up on a hypervisor that has a port for one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub agent: Option<Agent>,
    /// The identity of its machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<VmGeneration>,
    /// How its memory was last restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MemoryMode>,
    /// Why it was not restored in the mode that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode_reason: Option<String>,
    /// Whether the pages that its forks touch first are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hot_pages: Option<bool>,
    /// What its owner wants to remember of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub labels: Option<BTreeMap<String, String>>,
    /// How its guest says that it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub readiness: Option<Readiness>,
    /// The image that it was made of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// The kernel that it boots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The firmware that it starts instead of a kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Its disks, in the order in which its guest finds them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskSpec>>,
    /// When it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// When its VMM was started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<Timestamp>,
    /// The process id of its VMM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How long its last operation took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timings: Option<Timings>,
    /// What its VMM takes of the host's memory; only of one that was asked for alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_use: Option<MemoryUse>,
    /// What executes its guest's instructions, `kvm` or `tcg`; of one that is asked for by itself and is up on a hypervisor
    /// that has a choice in that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// How its guest's pages came to it, as its VMM counts them: `demand_faults`, `prefetched`, `prefetch_hits`, ...; of one
    /// that is asked for by itself and is served or given pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pages: Option<BTreeMap<String, u64>>,
}

/// The live forks of a template.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forks {
    /// How many.
    pub count: usize,
    /// Which.
    pub ids: Vec<InstanceId>,
}

/// The armed forks of a template: prepared before anybody asks for them. They are no instances.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Armed {
    /// How many are to be kept.
    pub target: usize,
    /// How many can be taken now.
    pub ready: usize,
}

/// The agent in a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agent {
    /// What is known of it.
    pub status: AgentStatus,
    /// The version of the protocol that it speaks, where it has answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<u8>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What is known of the agent in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentStatus {
    /// Nobody in the guest has answered.
    Absent,
    /// It has answered, and has not acknowledged the epoch yet.
    Connected,
    /// The guest is the machine that it is to be; commands can be run.
    Ready,
    /// It could not do its part; `error` says why.
    Failed,
}

/// How long an operation took, in microseconds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Which one, such as `fork`.
    pub operation: String,
    /// All of it.
    pub total_us: u64,
    /// One after the other; they add up to the whole, but for what is lost by rounding down.
    pub phases: Vec<Phase>,
}

/// A part of an operation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What was done.
    pub name: String,
    /// For how many microseconds.
    pub us: u64,
}

/// What a VMM's process takes of the host's memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryUse {
    /// Proportional: each shared page counts for its part.
    pub pss: u64,
    /// What nobody else has mapped.
    pub private: u64,
    /// What others have mapped too.
    pub shared: u64,
    /// All that is mapped.
    pub rss: u64,
}

/// The reply of `GET /instances`, oldest first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct InstanceList {
    /// The instances.
    pub instances: Vec<Instance>,
}

/// The reply of `POST /instances/{id}/forks`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForkList {
    /// What came of each, in the order of their numbers.
    pub forks: Vec<ForkEntry>,
}

/// What came of one fork of many: `{name, instance}` or `{name, error}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ForkEntry {
    /// The name that it has or would have had.
    pub name: InstanceName,
    /// The fork, or why there is none.
    #[serde(flatten)]
    pub outcome: ForkOutcome,
    /// What came of the command that was to be run in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<ForkExec>,
    /// Whether it was deleted afterwards; only where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deleted: Option<bool>,
}

/// What came of the command in a fork: `{result}` or `{error}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForkExec {
    /// It ended.
    Result(Box<CommandResult>),
    /// It was not run, or is lost.
    Error(ErrorBody),
}

/// The fork, or why there is none.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ForkOutcome {
    /// It was made.
    Instance(Box<Instance>),
    /// It was not.
    Error(ErrorBody),
}

/// One image. Where it cannot be used, `error` says why, and what its record would tell is absent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name.
    pub name: ImageName,
    /// Why it cannot be used.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// When it was added.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<Timestamp>,
    /// Its kernel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<ImageFile>,
    /// Its initial RAM disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<ImageFile>,
    /// Its disks, in the order in which guests find them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<ImageDisk>>,
    /// The kernel's command line, for instances that do not have their own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

/// A file of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageFile {
    /// Its size in bytes.
    pub bytes: u64,
    /// The SHA-256 of its content, in hexadecimal digits.
    pub sha256: String,
}

/// A disk of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageDisk {
    /// What its file is.
    pub format: DiskFormat,
    /// Its file, as that of a kernel.
    #[serde(flatten)]
    pub file: ImageFile,
}

/// The reply of `GET /images`, in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageList {
    /// The images.
    pub images: Vec<Image>,
}

/// The reply of `GET /instances/{id}/wait`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Waited {
    /// Whether the state was reached.
    pub reached: bool,
    /// The instance as it was seen last.
    pub instance: Instance,
}

/// The reply of `GET /health`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `ok`.
    pub status: String,
}

/// The reply of `GET /version`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// The server's version.
    pub version: String,
}

/// The reply of `GET /hypervisors`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorList {
    /// By name.
    pub hypervisors: Vec<Hypervisor>,
}

/// What instances can ask for as their hypervisor, and what it can do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hypervisor {
    /// Its name.
    pub name: HypervisorName,
    /// How a snapshot's memory can be restored.
    pub memory_modes: Vec<MemoryMode>,
    /// The most vCPUs that an instance can have.
    pub max_vcpus: u32,
    /// Whether an instance can start firmware instead of a kernel.
    pub firmware: bool,
    /// Whether guests can be given console input.
    pub console_input: bool,
    /// Whether a fork's guest is told that it is a new machine.
    pub tells_identity: bool,
    /// How many files a disk may consist of that lie on each other, its base counted; 0 where its VMs have no disks.
    #[serde(default)]
    pub max_disk_layers: usize,
    /// Whether an agent in its guests can be reached.
    pub agent: bool,
    /// Whether an instance whose guest has powered off or died is Shutdown; else it is Stopped.
    pub outlives_guest: bool,
}
