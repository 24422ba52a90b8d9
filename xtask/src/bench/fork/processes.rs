//! What processes hold, as the kernel tells in /proc: memory, threads, file descriptors. In bytes where nothing else is said.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use super::BenchError;

/// What one process holds.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Held {
    /// Proportional: a page that N processes have mapped counts for an Nth.
    pub(super) pss: u64,
    /// What nobody else has mapped.
    pub(super) private: u64,
    /// The page tables of its mappings.
    pub(super) page_tables: u64,
    pub(super) threads: u64,
    pub(super) descriptors: u64,
}

impl Held {
    pub(super) fn of(pid: i32) -> Result<Self, BenchError> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let rollup = Fields::read(process.join("smaps_rollup"))?;
        let status = Fields::read(process.join("status"))?;
        let descriptors = process.join("fd");
        let open = fs::read_dir(&descriptors).map_err(|source| BenchError::Io {
            what: "read",
            path: descriptors,
            source,
        })?;
        Ok(Self {
            pss: rollup.bytes("Pss")?,
            private: rollup.bytes("Private_Clean")? + rollup.bytes("Private_Dirty")?,
            page_tables: status.bytes("VmPTE")?,
            threads: status.number("Threads")?,
            descriptors: open.count() as u64,
        })
    }
}

/// What of a process nobody else has mapped, by what it is.
pub(super) fn private_by_mapping(pid: i32) -> Result<BTreeMap<&'static str, u64>, BenchError> {
    let text = read(Path::new(&format!("/proc/{pid}/smaps")))?;
    let mut found = BTreeMap::new();
    let mut mapping = "";
    for line in text.lines() {
        let Some((name, value)) = line.split_once(':').filter(|(name, _)| !name.contains(' ')) else {
            // `7f00-7f10 rw-p 00000000 00:00 0 /path`: the path may be absent.
            mapping = kind(line.split_whitespace().nth(5).unwrap_or_default());
            continue;
        };
        if name.starts_with("Private_")
            && name != "Private_Hugetlb"
            && let Some(bytes) = kibibytes(value)
        {
            *found.entry(mapping).or_default() += bytes;
        }
    }
    Ok(found)
}

/// What a mapping is for, by the path that the kernel tells of it.
fn kind(path: &str) -> &'static str {
    match path {
        "" => "anonymous memory (threads' stacks, allocator)",
        "[heap]" => "the heap",
        "[stack]" => "the main thread's stack",
        path if path.ends_with("memory-ranges") => "guest memory",
        path if path.contains("stencil-microvm") => "the VMM's program",
        path if path.contains(".so") => "libraries",
        path if path.starts_with('[') => "the kernel's own pages",
        _ => "other files",
    }
}

/// What of the host's memory is in use for what, in bytes; `MemAvailable` among it.
#[derive(Clone, Debug)]
pub(super) struct HostMemory(Fields);

impl HostMemory {
    pub(super) fn now() -> Result<Self, BenchError> {
        Fields::read(PathBuf::from("/proc/meminfo")).map(Self)
    }

    pub(super) fn available(&self) -> Result<u64, BenchError> {
        self.0.bytes("MemAvailable")
    }

    /// What there is of a kind; 0 where this kernel does not tell.
    pub(super) fn in_use(&self, kind: &'static str) -> u64 {
        self.0.bytes(kind).unwrap_or_default()
    }
}

/// A file of lines such as `Pss: 12 kB`.
#[derive(Clone, Debug)]
struct Fields {
    path: PathBuf,
    text: String,
}

impl Fields {
    fn read(path: PathBuf) -> Result<Self, BenchError> {
        let text = read(&path)?;
        Ok(Self { path, text })
    }

    fn value(&self, field: &'static str) -> Result<&str, BenchError> {
        let values = self.text.lines().filter_map(|line| line.split_once(':'));
        let value = values
            .filter(|(name, _)| *name == field)
            .map(|(_, value)| value)
            .next();
        value.ok_or_else(|| self.missing(field))
    }

    fn bytes(&self, field: &'static str) -> Result<u64, BenchError> {
        kibibytes(self.value(field)?).ok_or_else(|| self.missing(field))
    }

    fn number(&self, field: &'static str) -> Result<u64, BenchError> {
        self.value(field)?.trim().parse().map_err(|_| self.missing(field))
    }

    fn missing(&self, field: &'static str) -> BenchError {
        let path = self.path.clone();
        BenchError::NoFigure { path, field }
    }
}

/// The bytes of `12 kB`.
fn kibibytes(value: &str) -> Option<u64> {
    let number = value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?;
    number.checked_mul(1024)
}

fn read(path: &Path) -> Result<String, BenchError> {
    fs::read_to_string(path).map_err(|source| BenchError::Io {
        what: "read",
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_holds_memory_threads_and_descriptors() {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let held = Held::of(pid).expect("this process is there");
        assert!(held.pss > 0 && held.private > 0 && held.page_tables > 0);
        assert!(held.threads >= 1 && held.descriptors >= 3);
        let by_mapping = private_by_mapping(pid).expect("this process is there");
        assert!(by_mapping["the main thread's stack"] > 0);
        assert!(by_mapping.values().sum::<u64>() > 0);
    }
}
