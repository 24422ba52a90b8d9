//! What must change in a snapshot's two JSON files before a VM can be brought back from it in another directory, and
//! what cannot be. Pure: bytes in, bytes out.
//!
//! MAC addresses, SMBIOS strings and open connections are in the guest's memory already, and stay what they were.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;
use stencil_vmm_api::SerialMode;

use super::snapshot::{Config, Console, Disk, Net, Pmem, SnapshotError, State};

/// Devices that two VMs cannot both have, as `config.json` names them, and why.
const UNFORKABLE: [(&str, &str); 7] = [
    (
        "fs",
        "its daemon keeps state of the VM outside of the snapshot; remove it",
    ),
    (
        "generic_vhost_user",
        "its daemon keeps state of the VM outside of the snapshot; remove it",
    ),
    (
        "devices",
        "hardware that is passed through has state that is not in the snapshot; remove it",
    ),
    (
        "user_devices",
        "its process keeps state of the VM outside of the snapshot; remove it",
    ),
    (
        "vdpa",
        "hardware that is passed through has state that is not in the snapshot; remove it",
    ),
    ("ivshmem", "its memory is shared with other programs; remove it"),
    (
        "tpm",
        "its secrets are outside of the snapshot and must not be copied; remove it",
    ),
];

/// How the VM's memory comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory<'a> {
    /// Cloud Hypervisor reads it from the snapshot.
    Read,
    /// Cloud Hypervisor maps this file, which is the snapshot's.
    Map(&'a str),
    /// Cloud Hypervisor is given it, in a file for each region.
    Serve,
}

/// What changes.
#[derive(Debug)]
pub(super) struct ForkPlan<'a> {
    /// How its memory comes.
    pub(super) memory: Memory<'a>,
    /// Size of that file in bytes.
    pub(super) memory_bytes: u64,
    /// The Unix socket of its vsock device. The guest keeps its cid.
    pub(super) vsock_socket: &'a str,
    /// Its own tap interfaces, by the network device's id.
    pub(super) taps: BTreeMap<&'a str, &'a str>,
}

/// The files as they are for the fork.
#[derive(Debug)]
pub(super) struct Rewritten {
    pub(super) config: Vec<u8>,
    pub(super) state: Vec<u8>,
    /// Why the memory is read, although it was to be mapped or served.
    pub(super) not_mapped: Option<NotMapped>,
}

/// Why a VM's memory cannot be mapped or served from its snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum NotMapped {
    /// It has a balloon, whose pages must not come back.
    Balloon,
    /// Its memory is in huge pages.
    HugePages,
    /// Memory can be added to it.
    Hotplug,
    /// It has virtio-mem.
    VirtioMem,
    /// It was created without a zone for this memory.
    NoZone { gpa: u64 },
    /// The zone with this id is shared memory.
    SharedZone(String),
    /// This memory is in no range of the memory file as a whole.
    NoRange { gpa: u64 },
}

impl fmt::Display for NotMapped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Balloon => f.write_str("the VM has a balloon"),
            Self::HugePages => f.write_str("its memory is in huge pages"),
            Self::Hotplug => f.write_str("memory can be added to it"),
            Self::VirtioMem => f.write_str("it has virtio-mem"),
            Self::NoZone { gpa } => write!(f, "its memory at {gpa:#x} is in no memory zone"),
            Self::SharedZone(id) => write!(f, "its memory zone {id} is shared memory"),
            Self::NoRange { gpa } => write!(f, "its memory at {gpa:#x} is not in one piece in the snapshot"),
        }
    }
}

impl ForkPlan<'_> {
    /// The snapshot's files, changed.
    pub(super) fn apply(&self, config: &[u8], state: &[u8]) -> Result<Rewritten, SnapshotError> {
        let mut config = Config::read(config)?;
        let mut state = State::read(state)?;
        self.check_memory_file(&state)?;
        self.redirect_devices(&mut config)?;
        let not_mapped = self.place_memory(&mut config, &mut state)?;
        Ok(Rewritten {
            config: config.write()?,
            state: state.write()?,
            not_mapped,
        })
    }

    /// A page beyond the file's end would be a zero page when it is read, and the VM's death when it is mapped.
    fn check_memory_file(&self, state: &State) -> Result<(), SnapshotError> {
        let ranges = &state.memory.memory_ranges.data;
        let needs = ranges
            .iter()
            .fold(0u64, |sum, range| sum.saturating_add(range.length));
        if needs > self.memory_bytes {
            return Err(SnapshotError::Truncated {
                has: self.memory_bytes,
                needs,
            });
        }
        Ok(())
    }

    fn redirect_devices(&self, config: &mut Config) -> Result<(), SnapshotError> {
        for (kind, why) in UNFORKABLE {
            if let Some(found) = config.other.get(kind).filter(|found| is_there(found)) {
                return Err(refused(kind, id_in(found), why));
            }
        }
        if let Some(serial) = &mut config.serial {
            redirect(serial, SerialMode::Tty);
        }
        for console in [&mut config.console, &mut config.debug_console]
            .into_iter()
            .flatten()
        {
            redirect(console, SerialMode::Null);
        }
        if let Some(vsock) = &mut config.vsock {
            self.vsock_socket.clone_into(&mut vsock.socket);
        }
        config.disks.iter().flatten().try_for_each(Self::check_disk)?;
        config
            .net
            .iter_mut()
            .flatten()
            .try_for_each(|net| self.redirect_net(net))?;
        config.pmem.iter().flatten().try_for_each(check_pmem)
    }

    fn check_disk(disk: &Disk) -> Result<(), SnapshotError> {
        let refused = |why| Err(refused("disks", disk.id.as_deref(), why));
        if disk.vhost_user {
            return refused("its vhost-user daemon keeps state of the VM outside of the snapshot; remove it");
        }
        // A relative path is in the VMM's working directory, so that each VM has its own file under it.
        let is_own = disk
            .path
            .as_deref()
            .is_some_and(|path| Path::new(path).is_relative());
        if !disk.readonly && !is_own {
            return refused(
                "it can be written to, and its file would be another VM's too; make it read-only",
            );
        }
        Ok(())
    }

    fn redirect_net(&self, net: &mut Net) -> Result<(), SnapshotError> {
        let refused = |why| Err(refused("net", net.id.as_deref(), why));
        if net.vhost_user {
            return refused("its vhost-user daemon keeps state of the VM outside of the snapshot; remove it");
        }
        let Some(tap) = net.id.as_deref().and_then(|id| self.taps.get(id)) else {
            return refused("there is no other tap interface for it; remove it");
        };
        net.tap = Some((*tap).to_owned());
        // Descriptors of the process that wrote the snapshot.
        net.fds = None;
        Ok(())
    }

    /// Lets the memory be read from the directory's own memory file or, where that is asked for and possible, mapped or
    /// given.
    fn place_memory(
        &self,
        config: &mut Config,
        state: &mut State,
    ) -> Result<Option<NotMapped>, SnapshotError> {
        let zones = config.memory.zones.iter().flatten();
        if let Some(shared) = zones.clone().find(|zone| zone.shared && zone.file.is_some()) {
            let why =
                "its file is shared with other programs and not in the snapshot; create the VM without it";
            return Err(refused("memory zone", Some(&shared.id), why));
        }
        let offsets = match self.memory {
            Memory::Read => None,
            Memory::Map(_) | Memory::Serve => Some(file_offsets(config, state)),
        };
        let mappings = state.memory.guest_ram_mappings.iter_mut();
        let (file, not_mapped) = match (self.memory, offsets) {
            (Memory::Map(file), Some(Ok(offsets))) => {
                for (mapping, offset) in mappings.zip(offsets) {
                    mapping.file_offset = offset;
                }
                // Nothing is left to be read.
                state.memory.memory_ranges.data.clear();
                (Some(file), None)
            }
            (_, Some(Ok(_))) => {
                // Each has a file of its own.
                mappings.for_each(|mapping| mapping.file_offset = 0);
                (None, None)
            }
            (_, Some(Err(why))) => (None, Some(why)),
            (_, None) => (None, None),
        };
        for zone in config.memory.zones.iter_mut().flatten() {
            zone.file = file.map(str::to_owned);
            zone.prefault = false;
        }
        Ok(not_mapped)
    }
}

/// Where in the memory file each mapping begins, in bytes.
fn file_offsets(config: &Config, state: &State) -> Result<Vec<u64>, NotMapped> {
    let zones = config.memory.zones.as_deref().unwrap_or_default();
    if config.other.get("balloon").is_some_and(is_there) {
        return Err(NotMapped::Balloon);
    }
    if config.memory.hugepages || zones.iter().any(|zone| zone.hugepages) {
        return Err(NotMapped::HugePages);
    }
    let hotplug_sizes = zones.iter().map(|zone| zone.hotplug_size);
    if hotplug_sizes
        .chain([config.memory.hotplug_size])
        .flatten()
        .any(|size| size > 0)
    {
        return Err(NotMapped::Hotplug);
    }
    if let Some(shared) = zones.iter().find(|zone| zone.shared) {
        return Err(NotMapped::SharedZone(shared.id.clone()));
    }
    let mappings = state.memory.guest_ram_mappings.iter();
    mappings
        .map(|mapping| {
            let gpa = mapping.gpa;
            if mapping.virtio_mem {
                return Err(NotMapped::VirtioMem);
            }
            if !zones.iter().any(|zone| zone.id == mapping.zone_id) {
                return Err(NotMapped::NoZone { gpa });
            }
            file_offset(state, gpa, mapping.size).ok_or(NotMapped::NoRange { gpa })
        })
        .collect()
}

/// Where in the memory file this guest memory is, if it is there as a whole.
fn file_offset(state: &State, gpa: u64, size: u64) -> Option<u64> {
    let mut begin = 0u64;
    for range in &state.memory.memory_ranges.data {
        let into = gpa.checked_sub(range.gpa);
        if let Some(into) = into.filter(|into| into.checked_add(size).is_some_and(|end| end <= range.length))
        {
            return begin.checked_add(into);
        }
        begin = begin.checked_add(range.length)?;
    }
    None
}

/// A console that is there goes on being there: its device is in the guest. Only where its bytes go changes.
fn redirect(console: &mut Console, mode: SerialMode) {
    if console.mode != SerialMode::Off {
        console.mode = mode;
    }
    console.file = None;
    console.socket = None;
}

fn check_pmem(pmem: &Pmem) -> Result<(), SnapshotError> {
    if pmem.discard_writes {
        return Ok(());
    }
    let why = "what the guest writes goes to its file; give it `discard_writes`";
    Err(refused("pmem", pmem.id.as_deref(), why))
}

/// Whether a field of `config.json` says that there is such a device.
fn is_there(field: &Value) -> bool {
    match field {
        Value::Null => false,
        Value::Array(devices) => !devices.is_empty(),
        _ => true,
    }
}

/// The id of a device, or of the first in a list of them.
fn id_in(field: &Value) -> Option<&str> {
    field.get(0).unwrap_or(field).get("id")?.as_str()
}

fn refused(kind: &str, id: Option<&str>, why: &'static str) -> SnapshotError {
    let device = id.map_or_else(|| kind.to_owned(), |id| format!("{kind} {id}"));
    SnapshotError::Device { device, why }
}

#[cfg(test)]
mod tests;
