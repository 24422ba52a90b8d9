//! The embedded VMM: one process, one VM, on `/dev/kvm`. It serves the [`stencil_vmm_api`] contract on a Unix socket.
//!
//! # Threads
//!
//! ```text
//!  main            tokio: API (hyper), console socket       never waits for the VM
//!    | commands        ^ status: what vm.info answers
//!    v                 |
//!  control         owns the one MicroVm: memory, KVM fds, devices, config
//!    | starts, joins   ^ events: a vCPU has ended, a page cannot be read, hot pages are recorded
//!    v                 |
//!  vcpu0..N        run the guest: pausing ends them, and each gives back its VcpuFd; those of a restored VM wait for it
//!  pages-0         fills guest memory in `Uffd`: started before KVM sees the memory, ended when KVM is gone
//! ```
//!
//! What takes long and waits for nothing is done beside the rest: control makes an empty VM in KVM before the first call
//! comes, and while it makes a VM, main opens the console's files. A process in which nothing happens does nothing: no
//! thread wakes up on its own, but control once, 0.1 s after the last call, to give unused stack back.
//!
//! So everything that makes up a paused VM is in one value in one thread, and can be saved, dropped or built again there.
//!
//! # A restored VM may wait
//!
//! `vm.restore` leaves the VM paused, for as long as its owner likes. What time passes through is kept as it was saved
//! until `vm.resume`, and set then: kvmclock, TSCs, LAPICs, PIT, the vmclock page. The guest's own time goes on where the
//! snapshot stopped, UTC is right, and the restore interrupt comes first.
//!
//! # What the guest finds
//!
//! | address | what |
//! |---|---|
//! | gpa 0 up to 3 GiB, and from 4 GiB | RAM, one region or two |
//! | gpa 0x9e000 | generation page ([`stencil_vmm_api::GENERATION_GPA`]): 16 bytes, new at each fork |
//! | gpa 0x9f000 | vmclock page ([`stencil_vmm_api::VMCLOCK_GPA`]) |
//! | gpa 0xf0000 | MP table (Intel MultiProcessor Specification 1.4): the vCPUs and the IOAPIC |
//! | port 0x3f8, GSI 4 | 16550 serial port |
//! | GSI 5 | pulsed before the first run after each restore ([`stencil_vmm_api::RESTORE_GSI`]) |
//! | port 0x600 | writing 0x34 powers off, 1 resets (Cloud Hypervisor's ACPI shutdown device) |
//! | port 0x64 | writing 0xfe resets (i8042) |
//! | in KVM | PIC, IOAPIC, LAPICs, PIT, kvmclock |
//!
//! A reset ends the VM; reads of anything else give all ones. The guest is not offered nested virtualisation, so no
//! nested state has to be saved.
//!
//! ```
//! use stencil_microvm::ApiSocket;
//!
//! assert_eq!("fd=0".parse::<ApiSocket>()?, ApiSocket::Inherited(0));
//! assert_eq!("path=/run/vm.sock".parse::<ApiSocket>()?, ApiSocket::Path("/run/vm.sock".into()));
//! assert!("".parse::<ApiSocket>().is_err());
//! # Ok::<(), stencil_microvm::SocketError>(())
//! ```

mod api;
mod boot;
mod bzimage;
mod console;
mod control;
mod counters;
mod cpuid;
mod definition;
mod error;
mod events;
mod identity;
mod kernel;
mod kick;
mod locked;
mod machine;
mod memory;
mod mptable;
mod page_figures;
mod page_service;
mod pagemap;
mod ports;
mod pvh;
mod raw;
mod registers;
mod restore;
mod restored_memory;
mod serial;
mod server;
mod snapshot;
mod socket;
mod start;
mod state;
mod status;
mod tidy;
mod transfer;
mod vcpu;
mod vcpu_state;
mod vm;

pub use server::{ServeError, serve};
pub use socket::{ApiSocket, SocketError};

/// The version of this VMM, as `--version` and `vmm.ping` give it.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
