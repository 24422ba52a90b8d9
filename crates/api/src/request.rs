//! What is asked over the wire. An unknown field is refused, so that a typo is told and not ignored.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize, de};
use stencil_core::{ForkRequest, HypervisorName, ImageName, InstanceName, MemoryMode, Readiness, State};
use stencil_engine::{CreateRequest, DiskRequest, Filter, ForksRequest, ImageRequest};

use crate::error::ApiError;
use crate::exec::RunCommand;
use crate::memory_size::MemorySize;
use crate::timeout::Timeout;

/// The hypervisor of an instance that does not ask for one.
const DEFAULT_HYPERVISOR: HypervisorName = HypervisorName::from_static("microvm");

/// The body of `POST /instances`. Only an image, a kernel or firmware must be given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateInstance {
    /// A name that no other instance has; made up when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<InstanceName>,
    /// Which hypervisor is to run it; `microvm` when absent.
    #[serde(default = "default_hypervisor")]
    pub hypervisor: HypervisorName,
    /// The image that it boots from, instead of a kernel and an initial RAM disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<ImageName>,
    /// Absolute path of the kernel, as the server sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel: Option<PathBuf>,
    /// Absolute path of firmware to be started instead of a kernel, as the server sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub firmware: Option<PathBuf>,
    /// Absolute path of the initial RAM disk, as the server sees it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; when absent, that of the image, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
    /// Its disks, in the order in which its guest finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<AddDisk>,
    /// How many vCPUs; 1 when absent.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// How much memory; 512 MiB when absent.
    #[serde(default)]
    pub memory: MemorySize,
    /// How the guest says that it is ready; it is not asked when absent.
    #[serde(default)]
    pub readiness: Readiness,
    /// What its owner wants to remember of it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether it is started too; yes when absent.
    #[serde(default = "yes")]
    pub start: bool,
}

impl CreateInstance {
    /// A request that leaves everything but the kernel to the server.
    #[must_use]
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            name: None,
            hypervisor: DEFAULT_HYPERVISOR,
            image: None,
            kernel: Some(kernel.into()),
            firmware: None,
            initrd: None,
            cmdline: None,
            disks: Vec::new(),
            vcpus: one(),
            memory: MemorySize::default(),
            readiness: Readiness::None,
            labels: BTreeMap::new(),
            start: yes(),
        }
    }
}

impl From<CreateInstance> for CreateRequest {
    fn from(asked: CreateInstance) -> Self {
        Self {
            name: asked.name,
            hypervisor: asked.hypervisor,
            image: asked.image,
            kernel: asked.kernel,
            firmware: asked.firmware,
            initrd: asked.initrd,
            cmdline: asked.cmdline,
            disks: asked.disks.into_iter().map(DiskRequest::from).collect(),
            vcpus: asked.vcpus,
            memory_bytes: asked.memory.0,
            readiness: asked.readiness,
            labels: asked.labels,
            start: asked.start,
        }
    }
}

/// A disk of a new instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// Absolute path of its base, a raw or qcow2 image, as the server sees it. The base is never written: the guest writes to a
    /// layer of the instance's own.
    pub path: PathBuf,
    /// Whether the guest cannot write at all; no when absent.
    #[serde(default)]
    pub read_only: bool,
}

impl From<AddDisk> for DiskRequest {
    fn from(asked: AddDisk) -> Self {
        Self {
            path: asked.path,
            read_only: asked.read_only,
        }
    }
}

/// The body of `POST /images`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddImage {
    /// A name that no other image has.
    pub name: ImageName,
    /// Absolute path of the kernel, as the server sees it. It is copied.
    pub kernel: PathBuf,
    /// Absolute path of the initial RAM disk, as the server sees it. It is copied.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// Absolute paths of its disks, raw or qcow2 images, as the server sees them, in the order in which guests find them. They
    /// are copied.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<PathBuf>,
    /// The kernel's command line, for instances that do not have their own; empty when absent.
    #[serde(default)]
    pub cmdline: String,
}

impl From<AddImage> for ImageRequest {
    fn from(asked: AddImage) -> Self {
        Self {
            name: asked.name,
            kernel: asked.kernel,
            initrd: asked.initrd,
            disks: asked.disks,
            cmdline: asked.cmdline,
        }
    }
}

/// The query of `GET /instances`; all instances when empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListInstances {
    /// Only those in this state; upper or lower case.
    #[serde(
        default,
        deserialize_with = "some_state",
        skip_serializing_if = "Option::is_none"
    )]
    pub state: Option<State>,
    /// Only forks of this template: an id, a name, or the first 8 or more characters of an id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
}

impl From<ListInstances> for Filter {
    fn from(asked: ListInstances) -> Self {
        Self {
            state: asked.state,
            template: asked.template,
        }
    }
}

/// The body of `POST /instances/{id}/promote-template`; no body leaves everything to the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromoteTemplate {
    /// How many forks of it are kept prepared, from 0 to [`MAX_ARMED`](stencil_engine::MAX_ARMED); the server's default when
    /// absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub armed: Option<u32>,
}

/// The body of `PATCH /instances/{id}`: what of a template is to be another way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeInstance {
    /// As in [`PromoteTemplate`]; `null` is the server's default.
    #[serde(deserialize_with = "number_or_null")]
    pub armed: Option<u32>,
}

/// The body of `POST /instances/{id}/fork`; no body asks for nothing in particular.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkOne {
    /// The fork's name; `<source>-<number>` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<InstanceName>,
    /// Whether a running source may be put on standby for it; it goes on afterwards.
    #[serde(default)]
    pub from_running: bool,
    /// The state in which it begins; Running when absent, Stopped for a Stopped source.
    #[serde(
        default,
        deserialize_with = "some_state",
        skip_serializing_if = "Option::is_none"
    )]
    pub target_state: Option<State>,
    /// How its memory comes back; the server's default when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MemoryMode>,
}

impl ForkOne {
    /// All but the name, as the rules take it.
    pub(crate) fn request(&self) -> ForkRequest {
        ForkRequest {
            from_running: self.from_running,
            target_state: self.target_state,
            memory_mode: self.memory_mode,
        }
    }
}

/// The body of `POST /instances/{id}/forks`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForkMany {
    /// How many, from 1 to [`MAX_FORKS_PER_CALL`](stencil_engine::MAX_FORKS_PER_CALL).
    pub count: u32,
    /// They are named `<prefix>-1`, `<prefix>-2` and so on, taken names left out; the source's name when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name_prefix: Option<InstanceName>,
    /// As in [`ForkOne`].
    #[serde(default)]
    pub from_running: bool,
    /// As in [`ForkOne`].
    #[serde(
        default,
        deserialize_with = "some_state",
        skip_serializing_if = "Option::is_none"
    )]
    pub target_state: Option<State>,
    /// As in [`ForkOne`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mode: Option<MemoryMode>,
    /// What is run in each fork as soon as it is Running; nothing when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<RunCommand>,
    /// Whether each fork is deleted when its command has ended, or could not be run.
    #[serde(default)]
    pub delete_after: bool,
}

impl ForkMany {
    /// A request for `count` forks that leaves everything else to the server.
    #[must_use]
    pub const fn new(count: u32) -> Self {
        Self {
            count,
            name_prefix: None,
            from_running: false,
            target_state: None,
            memory_mode: None,
            exec: None,
            delete_after: false,
        }
    }

    /// As the engine takes it.
    pub(crate) fn request(self) -> Result<ForksRequest, ApiError> {
        Ok(ForksRequest {
            count: self.count,
            name_prefix: self.name_prefix,
            fork: ForkRequest {
                from_running: self.from_running,
                target_state: self.target_state,
                memory_mode: self.memory_mode,
            },
            exec: self.exec.map(RunCommand::request).transpose()?,
            delete_after: self.delete_after,
        })
    }
}

/// The query of `GET /instances/{id}/wait`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitFor {
    /// Which state; upper or lower case.
    #[serde(deserialize_with = "state")]
    pub state: State,
    /// How long; 30 seconds when absent.
    #[serde(default)]
    pub timeout: Timeout,
}

/// The query of `GET /instances/{id}/console`; everything so far when empty.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReadConsole {
    /// Only so many last lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tail: Option<u64>,
    /// Whether to go on as the guest prints, until its VM is down.
    #[serde(default)]
    pub follow: bool,
}

fn default_hypervisor() -> HypervisorName {
    DEFAULT_HYPERVISOR
}

const fn one() -> u32 {
    1
}

const fn yes() -> bool {
    true
}

/// A field that must be there, and may be `null`.
fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    Option::deserialize(deserializer)
}

/// A state in upper or lower case.
fn state<'de, D: Deserializer<'de>>(deserializer: D) -> Result<State, D::Error> {
    String::deserialize(deserializer)?
        .parse()
        .map_err(de::Error::custom)
}

fn some_state<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<State>, D::Error> {
    Option::<String>::deserialize(deserializer)?
        .map(|text| text.parse())
        .transpose()
        .map_err(de::Error::custom)
}
