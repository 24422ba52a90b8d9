//! The hypervisor shim: everything that Stencil knows about driving a VMM process, behind one trait.
//!
//! ```text
//!   engine ── Hypervisor ──> MicroVm ──── Client ── HTTP, one connection a call ──┐
//!     │       (the trait)   (a backend)                                           v
//!     │                         │                                  vmm.sock  ┌─────────┐
//!     │                         └─ binds vmm.sock, starts ── inherited ────> │   VMM   │──> /dev/kvm
//!     │                                                                      │ process │──> console.sock
//!     └── VmmProcess ── pidfd: is it alive, how did it end, make it end ──>  └─────────┘──> console.log, vmm.log
//! ```
//!
//! - [`Hypervisor`] is the trait; [`MicroVm`], [`CloudHypervisor`] and [`Qemu`] are its backends. A backend knows one VM at a time and
//!   no template. It keeps no state for an instance: each call names the instance's directory, and everything else is found
//!   there.
//! - [`Client`] speaks the REST contract of `stencil-vmm-api` to any VMM that has it, the microVM and Cloud
//!   Hypervisor alike: each call has its deadline, its own connection, and a bounded reply.
//! - [`VmmProcess`] is a handle on a VMM's process that can never mean another process, also after the server was
//!   started again and the pid was given to somebody else.
//!
//! VMMs outlive the server: nothing here kills one because a handle is dropped, but for [`KillGuard`], which is
//! how a start that is given up halfway leaves nothing behind.
//!
//! ```no_run
//! use stencil_core::{DataDir, InstanceId, VmGeneration, VmSpec};
//! use stencil_vmm::{Hypervisor, MicroVm, Start, VmmError};
//!
//! async fn first_boot(data: &DataDir, id: &InstanceId, spec: &VmSpec) -> Result<(), VmmError> {
//!     let hypervisor = MicroVm::new(MicroVm::find()?);
//!     let dir = data.instance(id);
//!     let generation = VmGeneration::random();
//!     let start = Start::Boot { spec, generation: &generation };
//!     let process = hypervisor.spawn(&dir, start).await?;
//!     // `during`: if the VMM dies instead of answering, the error says so, and how.
//!     process.during(hypervisor.create(&dir, spec, &generation)).await?;
//!     process.during(hypervisor.boot(&dir)).await?;
//!     println!("{:?}", hypervisor.info(&dir).await?.phase);
//!     println!("{}", hypervisor.stop(&dir, &process).await?);
//!     Ok(())
//! }
//! ```

mod binary;
mod client;
mod cloud_hypervisor;
mod console;
mod descriptor;
mod error;
mod hypervisor;
mod kvm;
mod microvm;
mod process;
mod qemu;
mod rest;

pub use client::{Call, Client, MAX_REPLY_BYTES};
pub use cloud_hypervisor::{CloudHypervisor, PagerCommand, SnapshotError, pager};
pub use error::VmmError;
pub use hypervisor::{Capabilities, HotPages, Hypervisor, PageCounters, Restore, Restored, Start, VmStatus};
pub use kvm::{KvmError, KvmKind, probe_kvm};
pub use microvm::MicroVm;
pub use process::{
    Attached, Exit, KillGuard, MemoryUse, ProcessError, StrayProcess, VmmProcess, stray_processes,
};
pub use qemu::{Accelerator, Qemu};
