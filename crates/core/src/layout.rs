//! Where everything lies below the data directory. Paths only: nothing here looks at the disk.
//!
//! ```text
//! <data>/lock                       one server per data directory
//! <data>/boot                       the host's boot in which it was last used
//! <data>/stencil.sock               the server's default socket
//! <data>/instances/<id>/metadata.json
//!                       vmm.sock  console.sock or console.tty  agent.sock or vsock.sock  console.log  vmm.log
//!                       disk0.qcow2  disk0-0.qcow2  disk0-1.qcow2 ...
//!                       snapshot/manifest.json      put in place last
//!                                config.json  state.json  memory-ranges
//! <data>/instances/.new-<id>/       being made, or left by a crash
//! <data>/instances/.del-<id>/       being removed, or left by a crash
//! <data>/templates/<id>/hot-pages
//! <data>/images/<name>/image.json  kernel  initrd  disk0  disk1 ...
//! <data>/images/.new-<number>/      being made, or left by a crash
//! <data>/images/.del-<number>/      being removed, or left by a crash
//! ```

use std::path::{Path, PathBuf};

use crate::id::InstanceId;
use crate::image::ImageName;

/// The most bytes of a Unix socket's path: `sun_path` has 108, of which the last is a NUL (unix(7)).
pub const MAX_SOCKET_PATH: usize = 107;

/// The prefix of the directory of an instance or image while it is being made.
pub(crate) const NEW_PREFIX: &str = ".new-";
/// The same while it is being removed.
pub(crate) const DEL_PREFIX: &str = ".del-";
/// The prefix of a file that is being written, before it takes its name.
pub(crate) const TEMPORARY_PREFIX: &str = ".tmp-";

/// Whether a directory of this name among the instances or images is one that is being made or removed, and that a
/// server which starts finds only after a crash.
#[must_use]
pub fn is_leftover_name(name: &str) -> bool {
    name.starts_with(NEW_PREFIX) || name.starts_with(DEL_PREFIX)
}

/// The data directory of one server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataDir(PathBuf);

impl DataDir {
    /// The data directory at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The file that a server locks.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// The file that remembers in which boot of the host the directory was last used.
    pub(crate) fn boot(&self) -> PathBuf {
        self.0.join("boot")
    }

    /// The socket on which a server listens by default.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.join("stencil.sock")
    }

    /// The directory of all instances.
    #[must_use]
    pub fn instances(&self) -> PathBuf {
        self.0.join("instances")
    }

    /// The directory of what is kept for templates.
    #[must_use]
    pub fn templates(&self) -> PathBuf {
        self.0.join("templates")
    }

    /// The directory of all images.
    #[must_use]
    pub fn images(&self) -> PathBuf {
        self.0.join("images")
    }

    /// The directory of one image.
    #[must_use]
    pub fn image(&self, name: &ImageName) -> ImageDir {
        ImageDir::new(self.images().join(name.as_str()))
    }

    /// The directory of one instance.
    #[must_use]
    pub fn instance(&self, id: &InstanceId) -> InstanceDir {
        InstanceDir::new(self.instances().join(id.to_string()))
    }

    /// The list of a template's hot pages.
    #[must_use]
    pub fn hot_pages(&self, id: &InstanceId) -> PathBuf {
        self.template(id).join("hot-pages")
    }

    /// The directory of what is kept for one template.
    pub(crate) fn template(&self, id: &InstanceId) -> PathBuf {
        self.templates().join(id.to_string())
    }

    pub(crate) fn new_instance(&self, id: &InstanceId) -> InstanceDir {
        InstanceDir::new(self.instances().join(format!("{NEW_PREFIX}{id}")))
    }

    pub(crate) fn deleted_instance(&self, id: &InstanceId) -> PathBuf {
        self.instances().join(format!("{DEL_PREFIX}{id}"))
    }
}

/// The directory of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InstanceDir(PathBuf);

impl InstanceDir {
    /// The name of the console log in it; a VMM is told this and not a path, so that a snapshot fits every fork.
    pub const CONSOLE_LOG: &str = "console.log";
    /// The name of the console's socket in it, for the same use.
    pub const CONSOLE_SOCKET: &str = "console.sock";

    /// The name of the socket in it that leads to the agent in its guest, for the same use.
    pub const AGENT_SOCKET: &str = "agent.sock";
    /// The name of the socket in it that leads to the vsock ports of its guest, for the same use.
    pub const VSOCK_SOCKET: &str = "vsock.sock";

    /// The name under which its VMM leaves the hot pages that it recorded, for the same use.
    pub const RECORDED_HOT_PAGES: &str = "hot-pages";

    /// The instance's directory at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The instance's record.
    #[must_use]
    pub fn metadata(&self) -> PathBuf {
        self.0.join("metadata.json")
    }

    /// The socket on which its VMM answers.
    #[must_use]
    pub fn vmm_socket(&self) -> PathBuf {
        self.0.join("vmm.sock")
    }

    /// What its guest printed, of all epochs.
    #[must_use]
    pub fn console_log(&self) -> PathBuf {
        self.0.join(Self::CONSOLE_LOG)
    }

    /// The socket that leads to its guest's serial port.
    #[must_use]
    pub fn console_socket(&self) -> PathBuf {
        self.0.join(Self::CONSOLE_SOCKET)
    }

    /// The socket that leads to the agent in its guest, where the VMM gives the guest a port of its own for it.
    #[must_use]
    pub fn agent_socket(&self) -> PathBuf {
        self.0.join(Self::AGENT_SOCKET)
    }

    /// The link to the terminal that leads to its guest's serial port, for VMMs that take input from one. It is right for as
    /// long as the VMM lives that it was made for.
    #[must_use]
    pub fn console_terminal(&self) -> PathBuf {
        self.0.join("console.tty")
    }

    /// The socket that leads to the vsock ports of its guest, where the VMM reaches the agent by one.
    #[must_use]
    pub fn vsock_socket(&self) -> PathBuf {
        self.0.join(Self::VSOCK_SOCKET)
    }

    /// The hot pages that its VMM recorded, until its template has them.
    #[must_use]
    pub fn recorded_hot_pages(&self) -> PathBuf {
        self.0.join(Self::RECORDED_HOT_PAGES)
    }

    /// What its VMM said about itself.
    #[must_use]
    pub fn vmm_log(&self) -> PathBuf {
        self.0.join("vmm.log")
    }

    /// The name of the layer that the guest writes of the disk of this number, counted from 0.
    ///
    /// A VMM is told this and not a path, so that a snapshot fits every fork. The layers lie in the instance's directory itself:
    /// a name of a backing file is right there both for VMMs that look for it where the layer is, and for those that look in their
    /// working directory (Cloud Hypervisor before v53).
    #[must_use]
    pub fn disk_name(disk: usize) -> String {
        format!("disk{disk}.qcow2")
    }

    /// The name of a layer of that disk that is never written again: the first, 0, lies on the disk's base, each other one on
    /// that before it.
    #[must_use]
    pub fn frozen_disk_name(disk: usize, layer: usize) -> String {
        format!("disk{disk}-{layer}.qcow2")
    }

    /// The layer that the guest writes of the disk of this number.
    #[must_use]
    pub fn disk(&self, disk: usize) -> PathBuf {
        self.0.join(Self::disk_name(disk))
    }

    /// A layer of that disk that is never written again.
    #[must_use]
    pub fn frozen_disk(&self, disk: usize, layer: usize) -> PathBuf {
        self.0.join(Self::frozen_disk_name(disk, layer))
    }

    /// The name of a layer that is being made; one that a crash leaves is swept.
    #[must_use]
    pub fn new_disk(&self, disk: usize) -> PathBuf {
        self.0
            .join(format!("{TEMPORARY_PREFIX}{}", Self::disk_name(disk)))
    }

    /// Its snapshot.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotDir {
        SnapshotDir::new(self.0.join("snapshot"))
    }
}

/// The directory of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotDir(PathBuf);

impl SnapshotDir {
    pub(crate) const MANIFEST: &str = "manifest.json";
    pub(crate) const CONFIG: &str = "config.json";
    pub(crate) const STATE: &str = "state.json";
    pub(crate) const MEMORY_RANGES: &str = "memory-ranges";

    /// The snapshot's directory at `path`.
    #[must_use]
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// What the snapshot consists of; without it, there is none.
    #[must_use]
    pub fn manifest(&self) -> PathBuf {
        self.0.join(Self::MANIFEST)
    }

    /// The manifest of a snapshot that was prepared in this boot of the host, and is not there yet.
    pub(crate) fn prepared_manifest(&self, boot: &str) -> PathBuf {
        self.0.join(format!("manifest.prepared-{boot}"))
    }

    /// The manifest of a snapshot that was set aside.
    pub(crate) fn spent_manifest(&self) -> PathBuf {
        self.0.join("manifest.spent")
    }

    /// The VM's configuration.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.0.join(Self::CONFIG)
    }

    /// The state of its vCPUs and devices.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.0.join(Self::STATE)
    }

    /// Its memory.
    #[must_use]
    pub fn memory_ranges(&self) -> PathBuf {
        self.0.join(Self::MEMORY_RANGES)
    }
}

/// The directory of one image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageDir(PathBuf);

impl ImageDir {
    /// The name of the kernel in it.
    pub const KERNEL: &str = "kernel";
    /// The name of the initial ramdisk in it.
    pub const INITRD: &str = "initrd";

    pub(crate) fn new(path: PathBuf) -> Self {
        Self(path)
    }

    /// The directory itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The image's record.
    #[must_use]
    pub fn record(&self) -> PathBuf {
        self.0.join("image.json")
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.0.join(Self::KERNEL)
    }

    /// The initial ramdisk, if it has one.
    #[must_use]
    pub fn initrd(&self) -> PathBuf {
        self.0.join(Self::INITRD)
    }

    /// The name of its disk of this number, from 0 on.
    #[must_use]
    pub fn disk_name(number: usize) -> String {
        format!("disk{number}")
    }

    /// Its disk of this number, from 0 on.
    #[must_use]
    pub fn disk(&self, number: usize) -> PathBuf {
        self.0.join(Self::disk_name(number))
    }
}
