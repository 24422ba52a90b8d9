//! The REST contract between Stencil and a VMM process: the subset of Cloud Hypervisor's API that Stencil uses,
//! as serde types, for the server ([stencil-microvm]) and for the client ([stencil-vmm]) alike.
//!
//! HTTP/1.1 over the Unix socket given as `--api-socket`, every path under [`path::PREFIX`]. A call that changes
//! something is a `PUT` and answers 204 without a body; a call that asks is a `GET` and answers 200 with JSON; an
//! error is 404 (there is no VM, or no such path) or 500, with an [`ErrorBody`]. As in Cloud Hypervisor, unknown
//! fields of a request are ignored.
//!
//! Fields that Cloud Hypervisor does not have are marked *extension*; it ignores them.
//!
//! Source: Cloud Hypervisor v53.0, `vmm/src/api/openapi/cloud-hypervisor.yaml`, and replies recorded from it.
//!
//! [stencil-microvm]: ../stencil_microvm/index.html
//! [stencil-vmm]: ../stencil_vmm/index.html
//!
//! ```
//! use stencil_vmm_api::{VmInfo, VmState};
//!
//! let reply = r#"{"config": {"memory": {"size": 134217728}}, "state": "Paused", "memory_actual_size": 134217728}"#;
//! let info: VmInfo = serde_json::from_str(reply)?;
//! assert_eq!(info.state, VmState::Paused);
//! assert_eq!(info.config.memory.total_bytes(), 128 << 20);
//! # Ok::<(), serde_json::Error>(())
//! ```

mod config;
mod error;
pub mod path;
mod reply;
mod request;

pub use config::{
    ConsoleConfig, ConsoleMode, CpusConfig, DiskConfig, ImageType, MemoryConfig, MemoryZoneConfig,
    PayloadConfig, SerialConfig, SerialMode, VmConfig, VsockConfig,
};
pub use error::ErrorBody;
pub use reply::{PingReply, VmCounters, VmEnd, VmEndKind, VmInfo, VmState};
pub use request::{
    MemoryRestoreMode, MigrationMemoryMode, ReceiveMigrationRequest, RestoreRequest, SnapshotRequest,
};

/// Guest physical address of the page that holds the VM generation id: 16 bytes at offset 0, as VMGenID has it
/// (Microsoft, "Virtual Machine Generation ID"). The page is reserved in the memory map that the guest is given.
pub const GENERATION_GPA: u64 = 0x9_e000;

/// Guest physical address of the `vmclock` page (Linux, `include/uapi/linux/vmclock-abi.h`). The page is reserved
/// in the memory map that the guest is given.
pub const VMCLOCK_GPA: u64 = 0x9_f000;

/// The interrupt line (GSI, edge-triggered) that the VMM pulses before the first run after each restore, when the generation
/// id and the `vmclock` page are in place: the guest's cue to reseed, to read its clock, and to say that it is ready.
pub const RESTORE_GSI: u32 = 5;

/// The most vCPUs that a microVM can have.
pub const MICROVM_MAX_VCPUS: u32 = 16;
