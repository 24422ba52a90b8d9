//! state.json: everything of a paused VM except its memory, device by device.

use serde::{Deserialize, Serialize};

use crate::identity::Identity;
use crate::machine::MachineState;
use crate::memory::MemoryRange;
use crate::serial::SerialState;
use crate::vcpu_state::VcpuState;

/// Names of the files in a snapshot's directory.
pub(crate) const CONFIG: &str = "config.json";
pub(crate) const STATE: &str = "state.json";
pub(crate) const MEMORY: &str = "memory-ranges";

/// The version of the format that is written, and the only one that is read.
pub(crate) const STATE_VERSION: u32 = 1;

/// The content of state.json; to be written, with references for `M` and `V`.
#[derive(Serialize, Deserialize)]
pub(crate) struct VmState<M = MachineState, V = Vec<VcpuState>> {
    /// [`STATE_VERSION`].
    pub(crate) version: u32,
    /// Which VMM wrote it, such as `stencil-microvm 0.1.0`.
    pub(crate) vmm: String,
    /// Where the contents of memory-ranges belong; they lie in it one after the other.
    pub(crate) memory_ranges: Vec<MemoryRange>,
    pub(crate) identity: Identity,
    pub(crate) machine: M,
    pub(crate) vcpus: V,
    pub(crate) devices: DeviceStates,
}

/// Devices outside KVM, each a field.
#[derive(Serialize, Deserialize)]
pub(crate) struct DeviceStates {
    pub(crate) serial: Option<SerialState>,
}

/// The version alone, to be read where the rest cannot be.
#[derive(Deserialize)]
pub(crate) struct StateHeader {
    pub(crate) version: u32,
}
