//! One measurement: a new VMM restores the snapshot in one way, and its guest does its work.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::BenchError;
use super::template::{SWEEPS, SWEPT};
use crate::vmm::Vmm;

/// Which memory the snapshot holds; a list of hot pages belongs to it.
const MEMORY_GENERATION: &str = "00112233445566778899aabbccddeeff";
/// The machine that a restore makes is a fork.
const FORK: &str = "0f0e0d0c0b0a09080706050403020100";

/// How the guest's memory comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Copy,
    /// All of it mapped before the guest runs.
    CowResident,
    Cow,
    CowHot,
    Uffd,
    UffdHot,
    UffdRecording,
}

impl Way {
    pub(super) const ALL: [Self; 7] = [
        Self::Copy,
        Self::CowResident,
        Self::Cow,
        Self::CowHot,
        Self::Uffd,
        Self::UffdHot,
        Self::UffdRecording,
    ];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::CowResident => "cow, prefault",
            Self::Cow => "cow",
            Self::CowHot => "cow, hot pages",
            Self::Uffd => "uffd",
            Self::UffdHot => "uffd, hot pages",
            Self::UffdRecording => "uffd, recording",
        }
    }

    /// `memory_restore_mode` of `vm.restore`.
    pub(super) fn mode(self) -> &'static str {
        match self {
            Self::Copy => "Copy",
            Self::CowResident | Self::Cow | Self::CowHot => "Cow",
            Self::Uffd | Self::UffdHot | Self::UffdRecording => "Uffd",
        }
    }

    pub(super) fn has_hot_pages(self) -> bool {
        matches!(self, Self::CowHot | Self::UffdHot)
    }
}

/// What is restored, and by what.
#[derive(Debug)]
pub(super) struct Restores {
    pub(super) microvm: PathBuf,
    pub(super) snapshot: PathBuf,
    /// Each VMM's directory is made in it.
    pub(super) root: PathBuf,
    /// The list of hot pages, where it is recorded.
    pub(super) list: PathBuf,
    /// What the guest says of its work, the same each time.
    pub(super) right: Vec<String>,
}

/// What one restore, and the work after it, came to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    /// The call `vm.restore`.
    pub(super) restore: Duration,
    /// From the call `vm.resume` until the guest has said that its work is done.
    pub(super) run: Duration,
    /// Faults that the page server answered; 0 without one.
    pub(super) demand_faults: u64,
    /// Pages that came before they were touched.
    pub(super) prefetched: u64,
    /// Those of them that came as private copies, because they were recorded as written; only told in `cow`.
    pub(super) prefetched_written: u64,
    /// Faults of the guest's first writes to pages that it had read, which only a recording asks for.
    pub(super) write_protect_faults: u64,
    /// Page faults of the VMM's process meanwhile.
    pub(super) host_faults: u64,
    /// What the VM shares with nobody, when its work is done.
    pub(super) private_bytes: u64,
}

impl Restores {
    /// Records the list of hot pages, and notes what the guest says of its work.
    pub(super) fn record(&mut self) -> Result<(), BenchError> {
        let vmm = Vmm::start(&self.microvm, self.root.join("fork"))?;
        vmm.put("vm.restore", self.request(Way::UffdRecording, &self.list))?;
        vmm.put("vm.resume", Value::Null)?;
        let (_, said) = vmm.wait_for(SWEPT, SWEEPS)?;
        // Pausing closes the recording, and the answer comes when the list is there.
        vmm.put("vm.pause", Value::Null)?;
        if !self.list.exists() {
            return Err(BenchError::NothingRecorded { log: vmm.log() });
        }
        self.right = said;
        Ok(vmm.finish()?)
    }

    /// Measures one restore in a way.
    pub(super) fn measure(&self, way: Way) -> Result<Measured, BenchError> {
        let vmm = Vmm::start(&self.microvm, self.root.join("fork"))?;
        let elsewhere = vmm.path().join("recorded");
        let began = Instant::now();
        vmm.put("vm.restore", self.request(way, &elsewhere))?;
        let restore = began.elapsed();
        let before = vmm.footprint()?;
        let began = Instant::now();
        vmm.put("vm.resume", Value::Null)?;
        let (ended, said) = vmm.wait_for(SWEPT, SWEEPS)?;
        let after = vmm.footprint()?;
        if said != self.right {
            return Err(BenchError::OtherMemory {
                how: way.name(),
                found: said,
                right: self.right.clone(),
            });
        }
        let pages = vmm.get("vm.counters")?["pages"].take();
        let count = |name: &str| pages[name].as_u64().unwrap_or(0);
        if way.has_hot_pages() && (count("prefetch_ignored") > 0 || count("prefetched") == 0) {
            return Err(BenchError::ListIgnored {
                how: way.name(),
                log: vmm.log(),
            });
        }
        let measured = Measured {
            restore,
            run: ended.saturating_duration_since(began),
            demand_faults: count("demand_faults"),
            prefetched: count("prefetched"),
            prefetched_written: count("prefetched_written"),
            write_protect_faults: count("write_protect_faults"),
            host_faults: after.faults.saturating_sub(before.faults),
            private_bytes: after.private_bytes,
        };
        vmm.finish()?;
        Ok(measured)
    }

    fn request(&self, way: Way, recording: &Path) -> Value {
        let mut request = json!({
            "source_url": format!("file://{}", self.snapshot.display()),
            "memory_restore_mode": way.mode(),
            "generation": FORK,
            "memory_generation": MEMORY_GENERATION,
            "prefault": way == Way::CowResident,
        });
        if way.has_hot_pages() {
            request["hot_pages"] = json!(self.list);
        }
        if way == Way::UffdRecording {
            request["record_hot_pages"] = json!(recording);
        }
        request
    }
}
