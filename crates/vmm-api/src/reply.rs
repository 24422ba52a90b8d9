//! What `vmm.ping`, `vm.info` and `vm.counters` answer.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::VmConfig;

/// Reply of `vmm.ping`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReply {
    /// The version with what the build adds to it, such as `v53.0`.
    #[serde(default)]
    pub build_version: String,
    /// The version alone, such as `53.0.0`.
    pub version: String,
    /// Process id of the VMM.
    #[serde(default)]
    pub pid: i64,
    /// What was compiled in, such as `kvm`.
    #[serde(default)]
    pub features: Vec<String>,
}

/// Reply of `vm.info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmInfo {
    /// The VM's definition, with defaults filled in.
    pub config: VmConfig,
    /// What the VM does.
    pub state: VmState,
    /// Guest memory, in bytes.
    #[serde(default)]
    pub memory_actual_size: u64,
    /// *Extension.* Why the guest is down; only with [`VmState::Shutdown`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<VmEnd>,
}

/// The states that `vm.info` knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// Defined, not booted; also after `vm.shutdown`.
    Created,
    /// The vCPUs run.
    Running,
    /// The guest ended by itself or was ended by an error.
    Shutdown,
    /// The vCPUs are stopped and can go on.
    Paused,
}

/// *Extension.* Why a guest is down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmEnd {
    /// What kind of end it was.
    pub kind: VmEndKind,
    /// The same in words, for the person who must act; with the registers where the guest failed.
    pub reason: String,
}

/// *Extension.* The ways in which a guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmEndKind {
    /// It powered itself off.
    PowerOff,
    /// It asked for a reset, which ends it here.
    Reset,
    /// A triple fault: `KVM_EXIT_SHUTDOWN`.
    TripleFault,
    /// `KVM_EXIT_INTERNAL_ERROR`: KVM could not go on.
    InternalError,
    /// `KVM_EXIT_FAIL_ENTRY`, a failed `KVM_RUN`, or an exit that the VMM does not know.
    VcpuFailed,
    /// A page of its memory could not be read. It saw no other in its place.
    MemoryLost,
}

impl VmEndKind {
    /// Whether the guest failed, rather than ended because it wanted to.
    pub fn is_failure(self) -> bool {
        match self {
            Self::PowerOff | Self::Reset => false,
            Self::TripleFault | Self::InternalError | Self::VcpuFailed | Self::MemoryLost => true,
        }
    }
}

/// Reply of `vm.counters`: per device, counters by name.
///
/// Of the microVM's: `run` has `first_resume_ns`, the CLOCK_MONOTONIC in nanoseconds at which a vCPU was first let run
/// since the boot or restore, and `first_exit_ns`, when one first came back on the guest's account, which proves that
/// the guest has executed; each is absent until then. `pages`, of a VM whose memory is served, has `recording`: 1 while
/// a recording of hot pages is open, 0 when its list is there.
pub type VmCounters = BTreeMap<String, BTreeMap<String, u64>>;
