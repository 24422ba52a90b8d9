//! The shim against real Unix sockets and real processes.

#![expect(
    clippy::unwrap_used,
    reason = "what fails here fails the test, also in what tests share"
)]

mod cloud_hypervisor;
mod cloud_hypervisor_agent;
mod cloud_hypervisor_console;
mod cloud_hypervisor_faults;
mod cloud_hypervisor_forks;
mod directory;
mod documentation;
mod failures;
mod fake;
mod pager;
mod pager_faults;
mod processes;
mod qemu;
mod qemu_monitor;
mod replayer;
mod requests;
#[path = "../../../../fixtures/skipped.rs"]
mod skipped;
mod spawning;
mod stopping;
mod tiny_guest;
