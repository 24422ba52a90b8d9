//! What is recorded about an instance: `metadata.json`. Its state is not among it, for that is derived.
//!
//! Fields that this version does not know are kept when the file is written again, at every level: another version
//! may have put them there. A fork takes none of them (see [`rules::fork_metadata`](crate::rules::fork_metadata)).

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::generation::{EpochId, VmGeneration};
use crate::hypervisor::HypervisorName;
use crate::id::InstanceId;
use crate::image::ImageName;
use crate::name::InstanceName;
use crate::versioned::{self, FormatError};

/// The record of one instance.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    /// The version of this record's form: [`Metadata::SCHEMA`].
    pub schema: u32,
    /// Its id, also the name of its directory.
    pub id: InstanceId,
    /// Its name, unique among the instances of a data directory.
    pub name: InstanceName,
    /// When it was made.
    pub created_at: Timestamp,
    /// The machine that was asked for.
    pub spec: VmSpec,
    /// The identity of its machine; a fork has its own.
    pub generation: VmGeneration,
    /// On standby as a template: it can be forked, and cannot wake.
    #[serde(default)]
    pub is_template: bool,
    /// Of a template: the list of the pages that its forks touch first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hot_pages_path: Option<PathBuf>,
    /// Of a template: how many forks are kept prepared, so that they only have to be named and resumed; the server's
    /// default where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub armed: Option<u32>,
    /// The template that it was forked of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fork_of_template: Option<InstanceId>,
    /// A server works on it, and it is of no use without that work: it is being booted for the first time, or was made for one
    /// command. If the server ends before, the next one deletes it.
    #[serde(default, skip_serializing_if = "is_no")]
    pub delete_after: bool,
    /// How its memory was last restored, or is to be at first; absent if there was nothing to restore.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MemoryMode>,
    /// Why that is not the mode which was asked for; absent where it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode_reason: Option<String>,
    /// The VMM process that was started for it; absent if there is to be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vmm: Option<VmmRecord>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl Metadata {
    /// The version of the form that is read and written.
    pub const SCHEMA: u32 = 1;

    /// The record of a new instance: no template, no fork, no VMM.
    #[must_use]
    pub fn new(
        id: InstanceId,
        name: InstanceName,
        spec: VmSpec,
        generation: VmGeneration,
        created_at: Timestamp,
    ) -> Self {
        Self {
            schema: Self::SCHEMA,
            id,
            name,
            created_at,
            spec,
            generation,
            is_template: false,
            hot_pages_path: None,
            armed: None,
            fork_of_template: None,
            delete_after: false,
            memory_mode: None,
            memory_mode_reason: None,
            vmm: None,
            other: Map::new(),
        }
    }

    /// Whether a boot of the host that `is_another` than its VMM's leaves nothing of it: a fork of a template that ran on since it
    /// was forked, without a disk to write. Its memory was its VMM's alone.
    pub(crate) fn dies_with(&self, is_another: impl FnOnce(&str) -> bool) -> bool {
        let writes_no_disk = self.spec.disks.iter().all(|disk| disk.read_only);
        let is_of_memory_only =
            self.fork_of_template.is_some() && self.memory_mode.is_some() && writes_no_disk;
        is_of_memory_only
            && self
                .vmm
                .as_ref()
                .is_some_and(|vmm| is_another(&vmm.process.boot_id))
    }

    /// Whether its record has to survive a power loss although its request did not wait for that. That of a fork that
    /// no power loss leaves anything of need not.
    #[must_use]
    pub fn outlives_the_host(&self) -> bool {
        !self.dies_with(|_| true)
    }

    /// Reads the content of a `metadata.json`.
    ///
    /// # Errors
    /// If it is no JSON, of another schema, or not of its schema's form.
    pub fn from_json(bytes: &[u8]) -> Result<Self, FormatError> {
        versioned::read(bytes, Self::SCHEMA)
    }

    /// The content of a `metadata.json`.
    ///
    /// # Errors
    /// If a path in it is no UTF-8.
    pub fn to_json(&self) -> Result<Vec<u8>, FormatError> {
        versioned::write(self)
    }
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
fn is_no(flag: &bool) -> bool {
    !*flag
}

/// The machine that was asked for. A fork inherits it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmSpec {
    /// Which backend runs it.
    pub hypervisor: HypervisorName,
    /// The image that it was made of, whose files the paths below then name. It stays as long as a record names it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// The kernel to boot; absolute. Either this or `firmware` is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// The firmware that is started instead of a kernel; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// The initial ramdisk; absolute.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line.
    #[serde(default)]
    pub cmdline: String,
    /// Its disks, in the order in which its guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskSpec>,
    /// How many vCPUs.
    pub vcpus: u32,
    /// The size of its memory in bytes.
    pub memory_bytes: u64,
    /// How its guest says that it is ready.
    #[serde(default)]
    pub readiness: Readiness,
    /// What its owner wants to remember of it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl VmSpec {
    /// A machine of no image that boots a kernel with an empty command line, without ramdisk, disks, readiness and labels;
    /// `memory_bytes` in bytes.
    #[must_use]
    pub fn new(hypervisor: HypervisorName, kernel: PathBuf, vcpus: u32, memory_bytes: u64) -> Self {
        Self {
            hypervisor,
            image: None,
            kernel: Some(kernel),
            firmware: None,
            initrd: None,
            cmdline: String::new(),
            disks: Vec::new(),
            vcpus,
            memory_bytes,
            readiness: Readiness::None,
            labels: BTreeMap::new(),
            other: Map::new(),
        }
    }
}

/// A disk. Its base is never written: what the guest writes goes to a layer of the instance's own,
/// [`InstanceDir::disk`](crate::InstanceDir::disk).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskSpec {
    /// The base, an image file; absolute.
    pub path: PathBuf,
    /// What the base is.
    pub format: DiskFormat,
    /// The length of the base's file in bytes when the instance was made; absent in records of earlier versions. It must stay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The guest cannot write: then there is no layer, and the VMM reads the base.
    #[serde(default)]
    pub read_only: bool,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's bytes, and nothing else.
    Raw,
    /// QEMU's format, version 2 or 3 (docs/interop/qcow2.rst of QEMU).
    Qcow2,
}

impl fmt::Display for DiskFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// How a guest says that it is ready. In JSON `"none"`, `{"console": "text"}` or `"agent"`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Readiness {
    /// It is not asked: a VM that runs is ready.
    #[default]
    None,
    /// By this text on its console, in each epoch anew.
    Console(String),
    /// By its agent, which has made it a new machine: each epoch is acknowledged.
    Agent,
}

/// How the memory of a snapshot comes back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryMode {
    /// Everything is read before the VM runs.
    Copy,
    /// The memory file is mapped privately: clean pages stay shared.
    #[default]
    Cow,
    /// Each page is served through userfaultfd when it is touched first.
    Uffd,
    /// Cloud Hypervisor's own: it serves pages as they are touched, and reads all others meanwhile.
    #[serde(rename = "ondemand")]
    OnDemand,
}

impl fmt::Display for MemoryMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Copy => "copy",
            Self::Cow => "cow",
            Self::Uffd => "uffd",
            Self::OnDemand => "ondemand",
        })
    }
}

/// What was to be a memory mode is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a memory mode is \"copy\", \"cow\", \"uffd\" or \"ondemand\"")]
pub struct MemoryModeError;

impl FromStr for MemoryMode {
    type Err = MemoryModeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "copy" => Ok(Self::Copy),
            "cow" => Ok(Self::Cow),
            "uffd" => Ok(Self::Uffd),
            "ondemand" => Ok(Self::OnDemand),
            _ => Err(MemoryModeError),
        }
    }
}

/// The VMM process that was started for an instance.
///
/// In JSON one flat object, so that unknown fields of all its parts are kept in `other`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmmRecord {
    /// Which process it is.
    #[serde(flatten)]
    pub process: ProcessIdentity,
    /// The version that its binary said it is.
    pub version: String,
    /// When it was started.
    pub started_at: Timestamp,
    /// What its guest went through last.
    #[serde(flatten)]
    pub epoch: Epoch,
    /// Fields that this version does not know.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// One process of one boot of one host: a pid alone is given anew after its process is gone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its process id.
    pub pid: u32,
    /// When it was started, in clock ticks since the host's boot: field 22 of `/proc/<pid>/stat`.
    pub start_time: u64,
    /// The host's boot: `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

/// The time since a guest last found itself on a new machine; readiness counts within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Epoch {
    /// Which one it is. A record of an earlier version has none: it gets one that nobody has acknowledged.
    #[serde(rename = "epoch_id", default = "EpochId::random")]
    pub id: EpochId,
    /// How it began.
    pub began: EpochKind,
    /// How many bytes of the console log are of earlier epochs.
    pub console_offset: u64,
}

/// How an epoch began.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EpochKind {
    /// The guest was booted.
    Boot,
    /// It went on from its own snapshot.
    Restore,
    /// It went on from another instance's snapshot.
    Fork,
}
