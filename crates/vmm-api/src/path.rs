//! Paths of the API, each below [`PREFIX`].

/// What every path begins with.
pub const PREFIX: &str = "/api/v1";

/// `GET`: [`PingReply`](crate::PingReply).
pub const VMM_PING: &str = "/api/v1/vmm.ping";
/// `PUT`: the VMM process ends, and its VM with it.
pub const VMM_SHUTDOWN: &str = "/api/v1/vmm.shutdown";
/// `PUT` of a [`VmConfig`](crate::VmConfig).
pub const VM_CREATE: &str = "/api/v1/vm.create";
/// `PUT`: the VM is forgotten; it is shut down first.
pub const VM_DELETE: &str = "/api/v1/vm.delete";
/// `PUT`: loads the kernel and starts the vCPUs.
pub const VM_BOOT: &str = "/api/v1/vm.boot";
/// `PUT`: ends the guest without asking it; the definition stays, in state `Created`.
pub const VM_SHUTDOWN: &str = "/api/v1/vm.shutdown";
/// `PUT`: stops the vCPUs.
pub const VM_PAUSE: &str = "/api/v1/vm.pause";
/// `PUT`: presses the power button of the machine; not the microVM's, which has none.
pub const VM_POWER_BUTTON: &str = "/api/v1/vm.power-button";
/// `PUT`: lets the vCPUs go on.
pub const VM_RESUME: &str = "/api/v1/vm.resume";
/// `PUT` of a [`SnapshotRequest`](crate::SnapshotRequest), of a paused VM.
pub const VM_SNAPSHOT: &str = "/api/v1/vm.snapshot";
/// `PUT` of a [`RestoreRequest`](crate::RestoreRequest), on a VMM that has no VM.
pub const VM_RESTORE: &str = "/api/v1/vm.restore";
/// `PUT` of a [`ReceiveMigrationRequest`](crate::ReceiveMigrationRequest), on a VMM that has no VM.
pub const VM_RECEIVE_MIGRATION: &str = "/api/v1/vm.receive-migration";
/// `GET`: [`VmInfo`](crate::VmInfo).
pub const VM_INFO: &str = "/api/v1/vm.info";
/// `GET`: [`VmCounters`](crate::VmCounters).
pub const VM_COUNTERS: &str = "/api/v1/vm.counters";
