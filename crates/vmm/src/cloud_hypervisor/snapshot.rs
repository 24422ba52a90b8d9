//! The two JSON files of a snapshot, as far as a fork must change them. Every other field is kept as it is.
//!
//! Source: Cloud Hypervisor v51 to v53, `vmm/src/vm_config.rs` and `vmm/src/memory_manager.rs`.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use stencil_vmm_api::SerialMode;

/// Where `state.json` has the memory manager's state: a string that is JSON itself.
const MEMORY_MANAGER: &str = "/snapshots/memory-manager/snapshot_data/state";

/// Where `state.json` has what belongs to the VM as a whole: a string that is JSON itself.
const VM: &str = "/snapshot_data/state";

/// Why a VM cannot be brought back from its snapshot. No message has a path of the host in it.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file is not JSON, or not of the form that Cloud Hypervisor v51 to v53 gives it.
    #[error("{file} is not what Cloud Hypervisor v51 to v53 writes")]
    Malformed {
        /// Name of the file.
        file: &'static str,
        /// Where it is wrong.
        source: serde_json::Error,
    },
    /// The state of the guest's memory is not where Cloud Hypervisor v51 to v53 puts it.
    #[error("state.json has no memory manager in it")]
    NoMemoryManager,
    /// The CPUID that the VM's vCPUs have is not where Cloud Hypervisor v53 puts it.
    #[error("state.json has no CPUID of the VM in it")]
    NoCpuid,
    /// The memory file is shorter than the ranges that are said to be in it.
    #[error("memory-ranges has {has} bytes and the VM's memory {needs}; the snapshot is cut off")]
    Truncated {
        /// The file's size, in bytes.
        has: u64,
        /// What the ranges add up to, in bytes.
        needs: u64,
    },
    /// The VM has a device that two VMs cannot both have.
    #[error("its device {device} cannot be brought back: {why}")]
    Device {
        /// Kind and id of the device, such as `fs myfs`.
        device: String,
        /// Why not, and what would be right.
        why: &'static str,
    },
}

/// `config.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Config {
    pub(super) memory: Memory,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) serial: Option<Console>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) console: Option<Console>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) debug_console: Option<Console>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) disks: Option<Vec<Disk>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) net: Option<Vec<Net>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) vsock: Option<Vsock>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) pmem: Option<Vec<Pmem>>,
    #[serde(flatten)]
    pub(super) other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    #[serde(default)]
    pub(super) hugepages: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hotplug_size: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) zones: Option<Vec<Zone>>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Zone {
    pub(super) id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) file: Option<String>,
    #[serde(default)]
    pub(super) shared: bool,
    #[serde(default)]
    pub(super) hugepages: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) hotplug_size: Option<u64>,
    #[serde(default)]
    pub(super) prefault: bool,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Console {
    pub(super) mode: SerialMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) file: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) socket: Option<String>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Disk {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
    #[serde(default)]
    pub(super) readonly: bool,
    #[serde(default)]
    pub(super) vhost_user: bool,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Net {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) tap: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) fds: Option<Value>,
    #[serde(default)]
    pub(super) vhost_user: bool,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Vsock {
    pub(super) socket: String,
    #[serde(flatten)]
    other: Map<String, Value>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Pmem {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) id: Option<String>,
    #[serde(default)]
    pub(super) discard_writes: bool,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// What a migration says of a VM before its state (v53, `vmm/src/lib.rs`, `VmMigrationConfig`).
#[derive(Debug, Serialize)]
struct MigrationConfig<'a> {
    vm_config: Value,
    common_cpuid: Value,
    memory_manager_data: &'a MemoryManager,
}

/// What is of `state.json` behind [`MEMORY_MANAGER`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MemoryManager {
    pub(super) memory_ranges: MemoryRanges,
    pub(super) guest_ram_mappings: Vec<Mapping>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// What `memory-ranges` holds: these ranges, one after the other.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MemoryRanges {
    pub(super) data: Vec<Range>,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Guest memory in `memory-ranges`, in bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Range {
    pub(super) gpa: u64,
    pub(super) length: u64,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// Guest memory as it is mapped, in bytes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Mapping {
    pub(super) slot: u32,
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) zone_id: String,
    pub(super) virtio_mem: bool,
    pub(super) file_offset: u64,
    #[serde(flatten)]
    other: Map<String, Value>,
}

/// `state.json`: the memory manager's state, and all around it.
#[derive(Debug)]
pub(super) struct State {
    whole: Value,
    pub(super) memory: MemoryManager,
}

impl Config {
    pub(super) fn read(json: &[u8]) -> Result<Self, SnapshotError> {
        serde_json::from_slice(json).map_err(in_file("config.json"))
    }

    pub(super) fn write(&self) -> Result<Vec<u8>, SnapshotError> {
        serde_json::to_vec(self).map_err(in_file("config.json"))
    }
}

impl State {
    pub(super) fn read(json: &[u8]) -> Result<Self, SnapshotError> {
        let whole: Value = serde_json::from_slice(json).map_err(in_file("state.json"))?;
        let memory = whole
            .pointer(MEMORY_MANAGER)
            .and_then(Value::as_str)
            .ok_or(SnapshotError::NoMemoryManager)?;
        let memory = serde_json::from_str(memory).map_err(in_file("state.json"))?;
        Ok(Self { whole, memory })
    }

    /// What a migration says of the VM before its state; `config` is what is in `config.json`.
    pub(super) fn migration_config(&self, config: &[u8]) -> Result<Vec<u8>, SnapshotError> {
        let vm = self
            .whole
            .pointer(VM)
            .and_then(Value::as_str)
            .ok_or(SnapshotError::NoCpuid)?;
        let mut vm: Value = serde_json::from_str(vm).map_err(in_file("state.json"))?;
        let common_cpuid = vm
            .get_mut("common_cpuid")
            .map(Value::take)
            .ok_or(SnapshotError::NoCpuid)?;
        let migration = MigrationConfig {
            vm_config: serde_json::from_slice(config).map_err(in_file("config.json"))?,
            common_cpuid,
            memory_manager_data: &self.memory,
        };
        serde_json::to_vec(&migration).map_err(in_file("state.json"))
    }

    pub(super) fn write(mut self) -> Result<Vec<u8>, SnapshotError> {
        let memory = serde_json::to_string(&self.memory).map_err(in_file("state.json"))?;
        let place = self
            .whole
            .pointer_mut(MEMORY_MANAGER)
            .ok_or(SnapshotError::NoMemoryManager)?;
        *place = Value::String(memory);
        serde_json::to_vec(&self.whole).map_err(in_file("state.json"))
    }
}

fn in_file(file: &'static str) -> impl Fn(serde_json::Error) -> SnapshotError {
    move |source| SnapshotError::Malformed { file, source }
}
