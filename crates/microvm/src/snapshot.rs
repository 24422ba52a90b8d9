//! Writing a snapshot: config.json, state.json, and memory-ranges with a hole wherever the guest's memory is zero.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::Serialize;

use crate::VERSION;
use crate::machine::MachineError;
use crate::memory::{GuestRam, MemoryRange, PAGE_BYTES};
use crate::pagemap;
use crate::start::Saved;
use crate::state::{CONFIG, DeviceStates, MEMORY, STATE, STATE_VERSION, VmState};
use crate::vcpu::Vcpu;
use crate::vcpu_state::{VcpuState, VcpuStateError, msr_candidates};
use crate::vm::MicroVm;

/// Memory is copied in pieces of so many bytes, which fit a core's cache.
const CHUNK: usize = 256 << 10;

/// The snapshot cannot be written; nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    #[error("{0:?} is not the URL of a directory; right is file:// and an absolute path")]
    Url(String),
    #[error("Destination is not a directory: {0:?}")]
    NotADirectory(PathBuf),
    #[error("Destination is not empty: {0:?}")]
    NotEmpty(PathBuf),
    #[error("vCPU {index} cannot be saved")]
    Vcpu { index: u8, source: VcpuStateError },
    #[error("the MSRs to be saved are not known")]
    Msrs(#[source] VcpuStateError),
    #[error("the interrupt controllers and timers cannot be saved")]
    Machine(#[from] MachineError),
    #[error("the pages that the guest has touched are not known")]
    Pagemap(#[source] io::Error),
    #[error("guest memory from gpa {gpa:#x} on cannot be read")]
    Memory { gpa: u64, source: io::Error },
    #[error(
        "guest memory from gpa {gpa:#x} on cannot be read, at byte {offset} of the file that it was restored from"
    )]
    Base {
        gpa: u64,
        offset: u64,
        source: io::Error,
    },
    #[error("the file that guest memory was restored from cannot be looked at")]
    BaseLength(#[source] io::Error),
    #[error(
        "the file that guest memory was restored from has {found} bytes instead of {expected}: it was cut"
    )]
    BaseCut { found: u64, expected: u64 },
    #[error("{path:?} cannot be written")]
    Write { path: PathBuf, source: io::Error },
    #[error("{path:?} cannot be written as JSON")]
    Json {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// The directory that a `file://` URL names.
pub(crate) fn directory_of(url: &str) -> Option<PathBuf> {
    url.strip_prefix("file://")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
}

/// Writes a paused VM, whose vCPUs are `vcpus`, into `directory`, which exists and is empty.
pub(crate) fn write(vm: &MicroVm, vcpus: &[Vcpu], directory: &Path) -> Result<(), SnapshotError> {
    let began = Instant::now();
    let is_empty = match fs::read_dir(directory) {
        Ok(mut entries) => entries.next().is_none(),
        Err(_) => return Err(SnapshotError::NotADirectory(directory.to_owned())),
    };
    if !is_empty {
        return Err(SnapshotError::NotEmpty(directory.to_owned()));
    }
    let now;
    let Saved { machine, vcpus } = match &vm.unstarted {
        Some(saved) => saved,
        None => {
            now = save(vm, vcpus)?;
            &now
        }
    };
    let state = VmState {
        version: STATE_VERSION,
        vmm: format!("stencil-microvm {VERSION}"),
        memory_ranges: vm.ram.ranges().map(|mapped| mapped.range).collect(),
        identity: vm.identity.clone(),
        machine,
        vcpus,
        devices: DeviceStates {
            serial: vm.ports.serial.as_ref().map(|serial| serial.save()),
        },
    };
    let mut files = NewFiles {
        directory,
        made: Vec::new(),
    };
    files.write_json(CONFIG, &vm.definition.config)?;
    files.write_json(STATE, &state)?;
    let (file, path) = files.create(MEMORY)?;
    let written = write_memory(&vm.ram, &file, &path)?;
    files.made.clear();
    tracing::info!(directory = %directory.display(), bytes = written, elapsed = ?began.elapsed(), "snapshot written");
    Ok(())
}

/// What KVM has.
fn save(vm: &MicroVm, vcpus: &[Vcpu]) -> Result<Saved, SnapshotError> {
    let msrs = msr_candidates(&vm.machine.kvm).map_err(SnapshotError::Msrs)?;
    let vcpus = vcpus
        .iter()
        .map(|vcpu| {
            VcpuState::save(&vm.machine.vm, &vcpu.fd, &vcpu.cpuid, &msrs).map_err(|source| {
                SnapshotError::Vcpu {
                    index: vcpu.index,
                    source,
                }
            })
        })
        .collect::<Result<_, _>>()?;
    Ok(Saved {
        machine: vm.machine.save()?,
        vcpus,
    })
}

/// The files of an unfinished snapshot; dropped, they are removed.
struct NewFiles<'a> {
    directory: &'a Path,
    made: Vec<PathBuf>,
}

impl NewFiles<'_> {
    /// Never opens a file that exists: it may be another's memory.
    fn create(&mut self, name: &str) -> Result<(File, PathBuf), SnapshotError> {
        let path = self.directory.join(name);
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(file) => {
                self.made.push(path.clone());
                Ok((file, path))
            }
            Err(source) => Err(SnapshotError::Write { path, source }),
        }
    }

    fn write_json(&mut self, name: &str, value: &impl Serialize) -> Result<(), SnapshotError> {
        let (file, path) = self.create(name)?;
        let text = serde_json::to_vec(value).map_err(|source| SnapshotError::Json {
            path: path.clone(),
            source,
        })?;
        file.write_all_at(&text, 0)
            .map_err(|source| SnapshotError::Write { path, source })
    }
}

impl Drop for NewFiles<'_> {
    fn drop(&mut self) {
        for path in &self.made {
            if let Err(error) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), %error, "a file of the failed snapshot is left");
            }
        }
    }
}

/// Writes all pages that are not zero; says how many bytes those are. A page that the guest has touched is read where
/// it is. Any other is what the file below the memory has, and is read there: none is brought in for this. (Nothing
/// here discards memory, so a page that is not there was never touched.)
fn write_memory(ram: &GuestRam, file: &File, path: &Path) -> Result<u64, SnapshotError> {
    let mut writer = Writer {
        file,
        path,
        buffer: vec![0; CHUNK],
        written: 0,
    };
    let mut offset = 0;
    for mapped in ram.ranges() {
        let MemoryRange { gpa, length } = mapped.range;
        let touched = pagemap::touched(mapped.host_address(), length).map_err(SnapshotError::Pagemap)?;
        for extent in touched.iter() {
            writer.copy(extent, offset, |at, buffer| {
                let lost = |source| SnapshotError::Memory {
                    gpa: gpa + at,
                    source,
                };
                mapped.read(at, buffer).map_err(lost)
            })?;
        }
        if let Some(base) = &ram.base {
            let lost = |at, source| SnapshotError::Base {
                gpa: gpa + at,
                offset: offset + at,
                source,
            };
            let data =
                pagemap::file_data(base, &(offset..offset + length)).map_err(|error| lost(0, error))?;
            for extent in data.minus(&touched).iter() {
                writer.copy(extent, offset, |at, buffer| {
                    base.read_exact_at(buffer, offset + at)
                        .map_err(|error| lost(at, error))
                })?;
            }
        }
        offset += length;
    }
    if let Some(base) = &ram.base {
        check_length(base, offset)?;
    }
    file.set_len(offset).map_err(|source| writer.failed(source))?;
    Ok(writer.written)
}

/// A file that was cut has no data where it ended, and that must not pass for zeros.
fn check_length(base: &File, expected: u64) -> Result<(), SnapshotError> {
    let found = base.metadata().map_err(SnapshotError::BaseLength)?.len();
    if found < expected {
        return Err(SnapshotError::BaseCut { found, expected });
    }
    Ok(())
}

struct Writer<'a> {
    file: &'a File,
    path: &'a Path,
    buffer: Vec<u8>,
    written: u64,
}

impl Writer<'_> {
    fn failed(&self, source: io::Error) -> SnapshotError {
        SnapshotError::Write {
            path: self.path.to_owned(),
            source,
        }
    }

    /// Writes the pages of `extent` that are not zero, each as far behind `offset` as it is in its range.
    fn copy(
        &mut self,
        extent: Range<u64>,
        offset: u64,
        read: impl Fn(u64, &mut [u8]) -> Result<(), SnapshotError>,
    ) -> Result<(), SnapshotError> {
        let mut at = extent.start;
        while at < extent.end {
            let length = usize::try_from(extent.end - at).map_or(CHUNK, |left| left.min(CHUNK));
            let chunk = &mut self.buffer[..length];
            read(at, chunk)?;
            for run in nonzero_runs(&self.buffer[..length]) {
                let data = &self.buffer[run.clone()];
                self.file
                    .write_all_at(data, offset + at + run.start as u64)
                    .map_err(|source| self.failed(source))?;
                self.written += data.len() as u64;
            }
            at += length as u64;
        }
        Ok(())
    }
}

/// The runs of pages that are not all zero.
fn nonzero_runs(bytes: &[u8]) -> impl Iterator<Item = Range<usize>> {
    let mut pages = bytes.chunks(PAGE_BYTES).map(is_zero).enumerate().peekable();
    std::iter::from_fn(move || {
        let (first, _) = pages.find(|(_, zero)| !zero)?;
        let mut end = first + 1;
        while pages.next_if(|(_, zero)| !zero).is_some() {
            end += 1;
        }
        Some(first * PAGE_BYTES..(end * PAGE_BYTES).min(bytes.len()))
    })
}

fn is_zero(page: &[u8]) -> bool {
    // In blocks, so that the compiler uses vector instructions, and a page that is not zero is soon told.
    page.chunks(256)
        .all(|block| block.iter().fold(0, |bits, byte| bits | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_skip_zero_pages_and_join_neighbours() {
        let mut bytes = vec![0; 6 * 4096];
        (bytes[4096], bytes[2 * 4096 + 4095], bytes[5 * 4096 + 7]) = (1, 1, 1);
        let runs: Vec<_> = nonzero_runs(&bytes).collect();
        assert_eq!(runs, [4096..3 * 4096, 5 * 4096..6 * 4096]);
        assert_eq!(nonzero_runs(&[0; 8192]).count(), 0);
    }

    #[test]
    fn a_url_names_an_absolute_directory() {
        assert_eq!(directory_of("file:///a/b"), Some("/a/b".into()));
        assert_eq!(directory_of("file://a"), None);
        assert_eq!(directory_of("/a/b"), None);
    }
}
