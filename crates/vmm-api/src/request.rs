//! Bodies of `vm.snapshot` and `vm.restore`; that of `vm.create` is a [`VmConfig`](crate::VmConfig).

use serde::{Deserialize, Serialize};

/// Body of `vm.snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest {
    /// `file://` and the absolute path of an empty directory.
    pub destination_url: String,
}

/// Body of `vm.restore`. The VM is left paused unless `resume`; no time passes in its guest until it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreRequest {
    /// `file://` and the absolute path of a directory that `vm.snapshot` wrote.
    pub source_url: String,
    /// Whether all of the guest's memory is made resident before the call answers.
    #[serde(default)]
    pub prefault: bool,
    /// How the guest's memory comes back.
    #[serde(default)]
    pub memory_restore_mode: MemoryRestoreMode,
    /// Whether the vCPUs run when the call answers.
    #[serde(default)]
    pub resume: bool,
    /// *Extension.* The VM generation id of the machine, 32 hexadecimal digits. Another id than the snapshot has makes
    /// it a new machine, a fork; without one, or with the same, the guest stays who it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    /// *Extension.* Which memory the snapshot holds, 32 hexadecimal digits; needed with either of the two below.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_generation: Option<String>,
    /// *Extension.* Absolute path of a list of hot pages: with `Cow` and `Uffd` they are there before the vCPUs run. A list
    /// that cannot be used is ignored, which `vm.counters` tells.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hot_pages: Option<String>,
    /// *Extension.* Path, relative to the VMM's working directory or absolute, at which the list of the pages that this guest touches first appears when its recording
    /// closes; only with `Uffd`, and not beside `hot_pages`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub record_hot_pages: Option<String>,
}

/// Body of `vm.receive-migration`, which the microVM does not have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiveMigrationRequest {
    /// `unix:` and the path, as it is, of a socket that the VMM makes and on which it waits for the sender.
    pub receiver_url: String,
    /// How the guest's memory comes.
    #[serde(default)]
    pub memory_mode: MigrationMemoryMode,
}

/// How `vm.receive-migration` takes the guest's memory; v53 and later, others ignore it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MigrationMemoryMode {
    /// All of it before the VM is there.
    #[default]
    Precopy,
    /// Page by page, as it is touched; and all that nobody touches, meanwhile.
    Postcopy,
}

/// How `vm.restore` brings back the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryRestoreMode {
    /// Reads all of it before the call answers.
    #[default]
    Copy,
    /// Cloud Hypervisor's own lazy restore; the microVM does not have it.
    OnDemand,
    /// *Extension.* Maps the memory file privately: clean pages stay in the page cache, shared by all who map it.
    Cow,
    /// *Extension.* Serves each page through userfaultfd when it is touched first.
    Uffd,
}
