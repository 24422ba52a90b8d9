//! Whether a restore grows with the size of the memory: the call alone, of a small and of a large guest that have done
//! nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::BenchError;
use super::restores::Way;
use super::template::{self, MIB};
use crate::build::BuiltVmm;
use crate::vmm::Vmm;

/// The two sizes, in bytes.
pub(super) const SMALL: u64 = 128 * MIB;
pub(super) const LARGE: u64 = 8192 * MIB;
/// A restore takes a few milliseconds, so there can be more of them.
const TIMES: usize = 4;

/// Restores of one size in one way.
#[derive(Clone, Debug)]
pub(super) struct OfSize {
    pub(super) way: Way,
    pub(super) memory: u64,
    /// The call `vm.restore`.
    pub(super) restores: Vec<Duration>,
    /// What of it KVM takes to be given the memory, as the VMM's counters tell.
    pub(super) machines: Vec<Duration>,
}

/// Measures both sizes in both lazy ways, one after the other in each round.
pub(super) fn measure(built: &BuiltVmm, root: &Path, rounds: usize) -> Result<Vec<OfSize>, BenchError> {
    let mut all = Vec::new();
    let mut snapshots: Vec<PathBuf> = Vec::new();
    for memory in [SMALL, LARGE] {
        let snapshot = template::empty(built, root, memory)?;
        for way in [Way::Cow, Way::Uffd] {
            snapshots.push(snapshot.clone());
            all.push(OfSize {
                way,
                memory,
                restores: Vec::new(),
                machines: Vec::new(),
            });
        }
    }
    for _ in 0..rounds * TIMES {
        for (of_size, snapshot) in all.iter_mut().zip(&snapshots) {
            let vmm = Vmm::start(&built.microvm, root.join("fork"))?;
            let request = json!({
                "source_url": format!("file://{}", snapshot.display()),
                "memory_restore_mode": of_size.way.mode(),
            });
            let began = Instant::now();
            vmm.put("vm.restore", request)?;
            of_size.restores.push(began.elapsed());
            let machine = vmm.counter("restore", "machine_us")?;
            of_size.machines.push(Duration::from_micros(machine));
            vmm.finish()?;
        }
    }
    Ok(all)
}
