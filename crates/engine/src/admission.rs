//! Checks of a request against the host, before anything is made.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use stencil_core::rules::{ForkFrom, ForkPlan};
use stencil_core::{DiskSpec, MemoryMode, Readiness, State, VmSpec};

use crate::disk_image::Base;
use crate::kernel::Kernel;
use crate::limits::{Needs, Promise, Shortage};
use crate::registry::Slot;
use crate::{CreateRequest, DiskRequest, Engine, EngineError, disk_image, disks, kernel};

/// Guest memory is given out in pages of this many bytes.
const PAGE_BYTES: u64 = 4096;
/// Less than this holds no kernel.
const LEAST_MEMORY_BYTES: u64 = 2 << 20;
/// More than this many disks nobody has asked for; each takes a place on the VM's PCI bus, which has 31.
const MOST_DISKS: usize = 16;
/// Longest text that a guest is expected to print when it is ready, in bytes.
const LONGEST_READY_TEXT: usize = 1024;

fn invalid<T>(message: impl Into<String>) -> Result<T, EngineError> {
    Err(EngineError::Invalid(message.into()))
}

impl Engine {
    /// The checked specification of a new instance.
    pub(crate) fn admit(&self, request: &CreateRequest) -> Result<VmSpec, EngineError> {
        let hypervisor = &request.hypervisor;
        let able = self.hypervisor(hypervisor)?.capabilities();
        let most_vcpus = able.max_vcpus;
        if request.vcpus == 0 || request.vcpus > most_vcpus {
            return invalid(format!(
                "vcpus is {}; {hypervisor} takes 1 to {most_vcpus}",
                request.vcpus
            ));
        }
        check_memory(request.memory_bytes)?;
        if let Readiness::Console(text) = &request.readiness
            && (text.is_empty() || text.len() > LONGEST_READY_TEXT)
        {
            return invalid(format!(
                "readiness.console is {} bytes long; it takes 1 to {LONGEST_READY_TEXT} bytes that the guest prints when it is ready",
                text.len()
            ));
        }
        if request.readiness == Readiness::Agent && !able.agent {
            return invalid(format!(
                "readiness is agent; {hypervisor} gives its guests no port for one: take a hypervisor that does, or readiness.console"
            ));
        }
        let boot = self.boot_files(request)?;
        let spec = VmSpec {
            hypervisor: hypervisor.clone(),
            image: request.image.clone(),
            kernel: boot.kernel,
            firmware: boot.firmware,
            initrd: boot.initrd,
            cmdline: boot.cmdline,
            disks: admit_disks(request, boot.disks, able.max_disk_layers)?,
            vcpus: request.vcpus,
            memory_bytes: request.memory_bytes,
            readiness: request.readiness.clone(),
            labels: request.labels.clone(),
            other: serde_json::Map::new(),
        };
        if spec.firmware.is_some() && !able.firmware {
            return invalid(format!("{hypervisor} starts no firmware; give it a kernel"));
        }
        check_boot_files(&spec)?;
        Ok(spec)
    }

    /// What it boots: its image's files, or those that are named one by one.
    fn boot_files(&self, request: &CreateRequest) -> Result<BootFiles, EngineError> {
        match (&request.image, &request.kernel, &request.firmware) {
            (Some(name), None, None) if request.initrd.is_none() => {
                let image = self.inner.store.image(name)?;
                let dir = self.inner.store.data().image(name);
                Ok(BootFiles {
                    kernel: Some(dir.kernel()),
                    firmware: None,
                    initrd: image.initrd.map(|_| dir.initrd()),
                    cmdline: request.cmdline.clone().unwrap_or(image.cmdline),
                    disks: (0..image.disks.len())
                        .map(|number| DiskRequest {
                            path: dir.disk(number),
                            read_only: false,
                        })
                        .collect(),
                })
            }
            (Some(_), ..) => {
                invalid("an image has its own kernel and initrd; give image, or kernel and perhaps initrd")
            }
            (None, ..) => Ok(BootFiles {
                kernel: request.kernel.clone(),
                firmware: request.firmware.clone(),
                initrd: request.initrd.clone(),
                cmdline: request.cmdline.clone().unwrap_or_default(),
                disks: Vec::new(),
            }),
        }
    }

    /// Promises those of `count` forks that are not `armed` what they need of this host, before any is begun. Those that
    /// begin without a VMM need nothing of it.
    pub(crate) fn admit_forks(
        &self,
        source: &Slot,
        spec: &VmSpec,
        plan: &ForkPlan,
        count: u32,
        armed: usize,
    ) -> Result<Option<Promise>, EngineError> {
        let able = self.hypervisor(&spec.hypervisor)?.capabilities();
        let begins_as_another = plan.from != ForkFrom::Config && plan.target == State::Running;
        if begins_as_another && !able.tells_identity && spec.readiness == Readiness::None {
            let by_agent = if able.agent {
                "readiness agent, whose agent renews them, or "
            } else {
                ""
            };
            return invalid(format!(
                "{} cannot tell a fork's guest that it is a new machine, so it would run with its source's random numbers and \
                 names; it takes a source with {by_agent}readiness.console, the text that its guest prints when it has renewed \
                 them, or target_state Paused",
                spec.hypervisor
            ));
        }
        if plan.keeps_disks {
            let layers = disks::layers_of_fork(&self.dir(&source.id), spec)?;
            if layers > able.max_disk_layers {
                return invalid(format!(
                    "a disk of this fork would lie on {} others; {} takes {}: fork an instance that is fewer forks away from its base",
                    layers - 1,
                    spec.hypervisor,
                    able.max_disk_layers - 1
                ));
            }
        }
        let modes = able.memory_modes;
        if !modes.contains(&plan.memory_mode) {
            let modes: Vec<String> = modes.iter().map(ToString::to_string).collect();
            return invalid(format!(
                "memory_mode is {}; {} takes {}",
                plan.memory_mode,
                spec.hypervisor,
                modes.join(" or ")
            ));
        }
        // It is not more than `count`.
        let armed = u32::try_from(armed).unwrap_or(count);
        let count = count.saturating_sub(armed);
        if count == 0 || !matches!(plan.target, State::Running | State::Paused) {
            return Ok(None);
        }
        let data_bytes = match (plan.memory_mode, plan.from) {
            // Shared, or not there before the guest has booted.
            (MemoryMode::Cow, _) | (_, ForkFrom::Config) => 0,
            // Also its zeros are put in place page by page.
            (MemoryMode::OnDemand, _) => spec.memory_bytes,
            (_, ForkFrom::Snapshot) => allocated_bytes(&self.dir(&source.id).snapshot().memory_ranges()),
            // Its snapshot will have at most what its VMM holds now.
            (_, ForkFrom::Running) => source
                .vmm()
                .and_then(|running| running.process.memory().ok())
                .map_or(spec.memory_bytes, |held| held.rss.min(spec.memory_bytes)),
        };
        let each = Needs::of_fork(plan.memory_mode, spec.vcpus, data_bytes);
        let watched = self.inner.watcher.watched() as u64;
        let supplies = self.inner.host.supplies(watched);
        let promise = self.inner.promises.promise(count, each, &supplies);
        Ok(Some(promise.map_err(|shortage| Shortage { armed, ..shortage })?))
    }
}

struct BootFiles {
    kernel: Option<PathBuf>,
    firmware: Option<PathBuf>,
    initrd: Option<PathBuf>,
    cmdline: String,
    /// Those of the image.
    disks: Vec<DiskRequest>,
}

/// What a file takes on disk in bytes, holes left out; 0 if it is not there, which others will tell.
fn allocated_bytes(path: &Path) -> u64 {
    // st_blocks counts in 512 bytes whatever the file system's blocks are (stat(2)).
    std::fs::metadata(path).map_or(0, |found| found.blocks() * 512)
}

fn check_memory(bytes: u64) -> Result<(), EngineError> {
    if !bytes.is_multiple_of(PAGE_BYTES) {
        return invalid(format!(
            "memory is {bytes} bytes; it takes a multiple of {PAGE_BYTES}"
        ));
    }
    if bytes < LEAST_MEMORY_BYTES {
        return invalid(format!(
            "memory is {bytes} bytes; it takes at least {LEAST_MEMORY_BYTES}"
        ));
    }
    let host = host_memory_bytes();
    if bytes > host {
        return invalid(format!("memory is {bytes} bytes; this host has {host}"));
    }
    Ok(())
}

fn host_memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit))
}

/// That what is booted is there, readable and of a kind that can be booted, and fits the machine.
pub(crate) fn check_boot_files(spec: &VmSpec) -> Result<(), EngineError> {
    let (field, path) = match (&spec.kernel, &spec.firmware) {
        (Some(kernel), None) => ("kernel", kernel),
        (None, Some(firmware)) => ("firmware", firmware),
        (None, None) => return invalid("there is nothing to boot; give image, kernel or firmware"),
        (Some(_), Some(_)) => return invalid("kernel and firmware are both given; it takes one of them"),
    };
    if spec.firmware.is_some() && (spec.initrd.is_some() || !spec.cmdline.is_empty()) {
        return invalid("initrd and cmdline are a kernel's; firmware finds by itself what it boots");
    }
    let kernel = check_kernel(field, &open(field, path)?, path)?;
    check_cmdline(&spec.cmdline, &kernel, path)?;
    let initrd = match &spec.initrd {
        Some(initrd) => Some((initrd, length(&open("initrd", initrd)?, "initrd", initrd)?)),
        None => None,
    };
    let needed = kernel.end.saturating_add(initrd.map_or(0, |(_, bytes)| bytes));
    if needed > spec.memory_bytes {
        let with_initrd = initrd.map_or_else(String::new, |(initrd, bytes)| {
            format!(" with initrd `{}`, which has {bytes} bytes", initrd.display())
        });
        return invalid(format!(
            "memory is {} bytes; {field} `{}` takes at least {needed}{with_initrd}: give it more memory",
            spec.memory_bytes,
            path.display()
        ));
    }
    check_bases(&spec.disks)
}

/// That the bases of an instance's disks are there, and what they were when the instance was made.
pub(crate) fn check_bases(disks: &[DiskSpec]) -> Result<(), EngineError> {
    for disk in disks {
        let shown = disk.path.display();
        let file = open("disk", &disk.path)?;
        let wrong = |why| invalid(format!("disk `{shown}` {why}"));
        // Only of a file whose length is not known, all has to be looked at.
        let found = match disk.bytes {
            Some(_) => disk_image::look_at(&file),
            None => disk_image::check_base(&file),
        };
        let found = found.or_else(wrong)?;
        let was = disk.bytes.unwrap_or(found.bytes);
        if found.format != disk.format {
            return invalid(format!(
                "disk `{shown}` is {}, and was {} when the instance was made; put that file back",
                found.format, disk.format
            ));
        }
        if found.bytes != was {
            return invalid(format!(
                "disk `{shown}` has {} bytes, and had {was} when the instance was made; put that file back",
                found.bytes
            ));
        }
    }
    Ok(())
}

/// That the kernel at `path` takes this command line.
pub(crate) fn check_cmdline(cmdline: &str, kernel: &Kernel, path: &Path) -> Result<(), EngineError> {
    let not_of_a_line = cmdline.bytes().position(|byte| matches!(byte, b'\n' | b'\r' | 0));
    if let Some(place) = not_of_a_line {
        let what = if cmdline.as_bytes()[place] == 0 {
            "a NUL"
        } else {
            "a line break"
        };
        return invalid(format!(
            "cmdline has {what} at byte {place}; a kernel takes one line of text"
        ));
    }
    if cmdline.len() > kernel.longest_cmdline {
        return invalid(format!(
            "cmdline has {} bytes; kernel `{}` takes at most {}",
            cmdline.len(),
            path.display(),
            kernel.longest_cmdline
        ));
    }
    Ok(())
}

fn length(file: &File, field: &str, path: &Path) -> Result<u64, EngineError> {
    match file.metadata() {
        Ok(found) => Ok(found.len()),
        Err(error) => invalid(format!(
            "{field} `{}` cannot be read by the server: {error}",
            path.display()
        )),
    }
}

/// The disks of its image, and then its own.
fn admit_disks(
    request: &CreateRequest,
    of_image: Vec<DiskRequest>,
    max_layers: usize,
) -> Result<Vec<DiskSpec>, EngineError> {
    let hypervisor = &request.hypervisor;
    let disks = [of_image, request.disks.clone()].concat();
    if max_layers == 0 && !disks.is_empty() {
        return invalid(match &request.image {
            Some(image) if request.disks.is_empty() => {
                format!(
                    "image {image} has disks, and the VMs of {hypervisor} have none; give another hypervisor"
                )
            }
            _ => format!("the VMs of {hypervisor} have no disks; give none, or another hypervisor"),
        });
    }
    check_disk_count(disks.len())?;
    let disks = disks.iter().map(|disk| {
        utf8(&disk.path)?;
        let base = check_disk(&disk.path)?;
        Ok(DiskSpec {
            path: disk.path.clone(),
            format: base.format,
            bytes: Some(base.bytes),
            read_only: disk.read_only,
        })
    });
    disks.collect()
}

pub(crate) fn check_disk_count(count: usize) -> Result<(), EngineError> {
    if count > MOST_DISKS {
        return invalid(format!(
            "there are {count} disks; an instance takes at most {MOST_DISKS}"
        ));
    }
    Ok(())
}

/// That this file can be the base of a disk, and what it is.
pub(crate) fn check_disk(path: &Path) -> Result<Base, EngineError> {
    check_disk_file(&open("disk", path)?, path)
}

/// The same of a file that the client knows as `path`.
pub(crate) fn check_disk_file(file: &File, path: &Path) -> Result<Base, EngineError> {
    disk_image::check_base(file).or_else(|why| invalid(format!("disk `{}` {why}", path.display())))
}

/// A path as it can stand in a disk's layer.
pub(crate) fn utf8(path: &Path) -> Result<&str, EngineError> {
    path.to_str().map_or_else(
        || {
            invalid(format!(
                "disk `{}` is no UTF-8; give it another name",
                path.display()
            ))
        },
        Ok,
    )
}

/// That this file, which the client knows as the `path` of a `field`, can be booted; what is known of it.
pub(crate) fn check_kernel(field: &str, file: &File, path: &Path) -> Result<Kernel, EngineError> {
    kernel::check(file).or_else(|why| {
        invalid(format!(
            "{field} `{}` {why}; it takes an x86-64 ELF with a PVH note, or a bzImage",
            path.display()
        ))
    })
}

/// Opens a file that the request names. Its path is the client's own, so the message may repeat it.
pub(crate) fn open(field: &str, path: &Path) -> Result<File, EngineError> {
    let shown = path.display();
    if !path.is_absolute() {
        return invalid(format!(
            "{field} `{shown}` is a relative path; it takes an absolute one, as the server sees it"
        ));
    }
    // A pipe without a writer would hold the server up; it is told below that it is no regular file.
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
        .open(path);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return invalid(format!(
                "{field} `{shown}` is not there; it takes a file that the server can read"
            ));
        }
        Err(error) => return invalid(format!("{field} `{shown}` cannot be read by the server: {error}")),
    };
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        Ok(_) => invalid(format!("{field} `{shown}` is no regular file")),
        Err(error) => invalid(format!("{field} `{shown}` cannot be read by the server: {error}")),
    }
}
