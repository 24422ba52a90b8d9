//! What a VM is made of: the body of `vm.create`, and `config.json` in a snapshot.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// A VM's definition.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VmConfig {
    /// vCPUs.
    pub cpus: CpusConfig,
    /// Guest memory.
    pub memory: MemoryConfig,
    /// What is booted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<PayloadConfig>,
    /// Virtio block devices.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<DiskConfig>,
    /// The 16550 serial port, COM1.
    pub serial: SerialConfig,
    /// The virtio console; Stencil turns it off.
    pub console: ConsoleConfig,
    /// The vsock device; the microVM has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// *Extension.* The VM generation id that the guest has when it boots, 32 hexadecimal digits.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<String>,
    /// Every other field, kept as it is; those of the parts above are not.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// vCPUs of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpusConfig {
    /// vCPUs at boot, from 1.
    pub boot_vcpus: u32,
    /// The most that the VM can ever have.
    pub max_vcpus: u32,
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self {
            boot_vcpus: 1,
            max_vcpus: 1,
        }
    }
}

/// A virtio block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// Its name.
    pub id: String,
    /// The image file.
    pub path: String,
    /// Whether the guest cannot write to it.
    #[serde(default)]
    pub readonly: bool,
    /// What the file is. Never left to the VMM to guess: a guest could write what makes it another format.
    pub image_type: ImageType,
    /// Whether the file may lie on another one that it names.
    #[serde(default)]
    pub backing_files: bool,
}

/// The format of an image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageType {
    /// The disk's bytes.
    Raw,
    /// QEMU's format.
    Qcow2,
}

/// Guest memory: either one `size`, or zones with a `size` of 0.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryConfig {
    /// In bytes; 0 where there are zones.
    pub size: u64,
    /// Named parts of the memory.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub zones: Vec<MemoryZoneConfig>,
}

impl MemoryConfig {
    /// All of the guest's memory, in bytes; saturates.
    pub fn total_bytes(&self) -> u64 {
        self.zones
            .iter()
            .fold(self.size, |sum, zone| sum.saturating_add(zone.size))
    }
}

/// A named part of guest memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryZoneConfig {
    /// Its name.
    pub id: String,
    /// In bytes.
    pub size: u64,
    /// The file that backs it; anonymous memory without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// Whether it is mapped `MAP_SHARED`.
    pub shared: bool,
}

/// What is booted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PayloadConfig {
    /// Path of an ELF with a PVH note, or of a bzImage.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<String>,
    /// Path of the firmware, instead of a kernel; the microVM takes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub firmware: Option<String>,
    /// Path of the initial RAM disk.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initramfs: Option<String>,
    /// The kernel's command line.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cmdline: Option<String>,
}

/// A vsock device, by which programs on the host reach ports of the guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VsockConfig {
    /// The guest's address, from 3.
    pub cid: u32,
    /// The Unix socket that the VMM listens on; a relative path is relative to its working directory.
    pub socket: String,
}

/// Where the serial port goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SerialConfig {
    /// What kind of place.
    pub mode: SerialMode,
    /// With [`SerialMode::File`]: output is appended to it. *Extension:* also with [`SerialMode::Socket`]. A relative
    /// path is relative to the VMM's working directory, so that a snapshot's `config.json` fits every fork.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<String>,
    /// With [`SerialMode::Socket`]: a Unix socket that the VMM listens on. Who connects gets the output from then
    /// on, and what they send is the guest's input. Any number may be connected at once (Cloud Hypervisor: one).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<String>,
}

/// What kind of place the serial port goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SerialMode {
    /// There is no serial port.
    Off,
    /// Output is thrown away, and there is no input.
    #[default]
    Null,
    /// Output goes to a file; there is no input.
    File,
    /// A Unix socket, both ways; and to a file where one is named.
    Socket,
    /// The VMM's standard output, and its standard input if that is a terminal; the microVM does not have it.
    Tty,
    /// A pseudo-terminal; the microVM does not have it.
    Pty,
}

/// Where the virtio console goes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleConfig {
    /// What kind of place.
    pub mode: ConsoleMode,
}

/// What kind of place the virtio console goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleMode {
    /// There is none.
    #[default]
    Off,
    /// Output is thrown away.
    Null,
    /// The VMM's own terminal.
    Tty,
    /// A pseudo-terminal.
    Pty,
    /// A file.
    File,
    /// A Unix socket.
    Socket,
}
