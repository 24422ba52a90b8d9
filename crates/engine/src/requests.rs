//! What the engine is asked for; parsed and checked for form by the caller.

use std::collections::BTreeMap;
use std::path::PathBuf;

use stencil_core::{HypervisorName, ImageName, InstanceName, Readiness, State};

use crate::{ExecRequest, ForkRequest};

/// A new instance. [`Engine::create`](crate::Engine::create) checks it against the host.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// A name that no other instance has; made up from the id when absent.
    pub name: Option<InstanceName>,
    /// Which hypervisor, such as `microvm`.
    pub hypervisor: HypervisorName,
    /// The image that it boots from. Without one, `kernel` is needed; with one, neither `kernel` nor `initrd` can be given.
    pub image: Option<ImageName>,
    /// Absolute path of an ELF with a PVH note or of a bzImage. It takes one of image, kernel and firmware.
    pub kernel: Option<PathBuf>,
    /// Absolute path of firmware that is started instead of a kernel; an ELF with a PVH note too.
    pub firmware: Option<PathBuf>,
    /// Absolute path of the initial RAM disk; only with a kernel.
    pub initrd: Option<PathBuf>,
    /// The kernel's command line; the image's when absent, and empty without an image.
    pub cmdline: Option<String>,
    /// Its disks, in the order in which its guest finds them; those of its image come before them.
    pub disks: Vec<DiskRequest>,
    /// vCPUs, from 1 to what the hypervisor can.
    pub vcpus: u32,
    /// Guest memory in bytes: a multiple of 4096, more than 0, at most what the host has.
    pub memory_bytes: u64,
    /// How the guest says that it is ready.
    pub readiness: Readiness,
    /// Free for the user.
    pub labels: BTreeMap<String, String>,
    /// Whether it is booted too.
    pub start: bool,
}

/// A disk of a new instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskRequest {
    /// Absolute path of the base, a raw or qcow2 image. It is never written, and must not be changed while the instance, or a
    /// fork of it, is there.
    pub path: PathBuf,
    /// Whether the guest cannot write to it.
    pub read_only: bool,
}

/// A new image. [`Engine::add_image`](crate::Engine::add_image) checks it against the host.
#[derive(Clone, Debug)]
pub struct ImageRequest {
    /// A name that no other image has.
    pub name: ImageName,
    /// Absolute path of an ELF with a PVH note or of a bzImage.
    pub kernel: PathBuf,
    /// Absolute path of the initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Absolute paths of its disks, raw or qcow2 images, in the order in which guests find them.
    pub disks: Vec<PathBuf>,
    /// The kernel's command line, for instances that do not have their own.
    pub cmdline: String,
}

/// Many forks of one source.
#[derive(Clone, Debug)]
pub struct ForksRequest {
    /// From 1 to [`MAX_FORKS_PER_CALL`](crate::MAX_FORKS_PER_CALL).
    pub count: u32,
    /// Forks are named `<prefix>-1`, `<prefix>-2`, ..., taken names left out; the source's name when absent.
    pub name_prefix: Option<InstanceName>,
    /// What each fork is to be.
    pub fork: ForkRequest,
    /// What is run in each fork as soon as it is Running.
    pub exec: Option<ExecRequest>,
    /// Each fork is deleted when its command has ended, or could not be run; only with `exec`.
    pub delete_after: bool,
}

/// Which instances a list shows; all of them by default.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only those in this state.
    pub state: Option<State>,
    /// Only forks of this template: an id, a name or an id prefix.
    pub template: Option<String>,
}
