//! The manifest of a snapshot, written last: a snapshot without it does not exist.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::cpu::HostCpu;
use crate::generation::MemoryGeneration;
use crate::hypervisor::HypervisorName;
use crate::layout::SnapshotDir;
use crate::versioned::{self, FormatError};

/// What a snapshot consists of, and who can restore it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SnapshotManifest {
    /// The version of this file's form: [`SnapshotManifest::SCHEMA`].
    pub schema: u32,
    /// When the memory was captured.
    pub created_at: Timestamp,
    /// The backend that wrote it.
    pub hypervisor: HypervisorName,
    /// The version of that backend's binary.
    pub hypervisor_version: String,
    /// The CPU that its vCPUs are like; absent where they are like none of a host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_cpu: Option<Box<HostCpu>>,
    /// The identity of its memory.
    pub memory_generation: MemoryGeneration,
    /// The size of the guest's memory in bytes.
    pub memory_bytes: u64,
    /// Whether the guest's agent had stopped its users' processes, none of which then runs in a fork before that is a machine of its
    /// own; absent where the guest was not known to have an agent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub frozen: Option<bool>,
    /// Every file of it with its size in bytes. [`SnapshotManifest::REQUIRED`] are always among them.
    pub files: BTreeMap<String, u64>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl SnapshotManifest {
    /// The version of the form that is read and written.
    pub const SCHEMA: u32 = 1;

    /// The files without which nothing can be restored.
    pub const REQUIRED: [&str; 3] = [
        SnapshotDir::CONFIG,
        SnapshotDir::STATE,
        SnapshotDir::MEMORY_RANGES,
    ];

    /// Reads the content of a `manifest.json`.
    ///
    /// # Errors
    /// If it is no JSON, of another schema, or not of its schema's form.
    pub fn from_json(bytes: &[u8]) -> Result<Self, FormatError> {
        versioned::read(bytes, Self::SCHEMA)
    }

    /// The content of a `manifest.json`.
    ///
    /// # Errors
    /// None that is known: every field has a form in JSON.
    pub fn to_json(&self) -> Result<Vec<u8>, FormatError> {
        versioned::write(self)
    }

    /// Says what is wrong with the list of files itself, whatever is on disk.
    pub(crate) fn fault(&self) -> Option<String> {
        if let Some(missing) = Self::REQUIRED
            .iter()
            .find(|name| !self.files.contains_key(**name))
        {
            return Some(format!("its manifest does not list {missing}"));
        }
        // A name out of a file must not lead out of the snapshot's directory.
        let strange = self.files.keys().find(|name| {
            let mut parts = Path::new(name).components();
            !matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name.as_str())
                || *name == SnapshotDir::MANIFEST
        });
        strange.map(|name| format!("its manifest lists {name:?}, which cannot be a file of it"))
    }
}
