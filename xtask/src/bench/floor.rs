//! What the kernel alone takes for a fork, as the program `kvm-floor` (benches/) measures it: each run by itself.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use super::BenchError;
use super::rows::{Quantiles, Row};
use crate::command::{self, Output};

/// How long all runs may take.
const LIMIT: Duration = Duration::from_secs(5 * 60);

/// Runs of one size of memory. Times are in milliseconds.
#[derive(Clone, Debug)]
pub(super) struct Floor {
    /// In bytes.
    pub(super) memory: u64,
    /// Each run, until the guest had executed.
    pub(super) totals: Vec<f64>,
    /// The same in parts, in their order.
    pub(super) phases: Vec<(String, Vec<f64>)>,
}

impl Floor {
    pub(super) fn total(&self) -> Quantiles {
        Quantiles::of(self.totals.iter().copied())
    }

    /// What KVM takes to be given the memory.
    pub(super) fn memory_slots(&self) -> Quantiles {
        let slots = self.phases.iter().find(|(name, _)| name == "memory slots");
        Quantiles::of(slots.into_iter().flat_map(|(_, times)| times).copied())
    }

    pub(super) fn row(&self) -> Row {
        Row {
            name: format!("kvm_floor of {} MiB", self.memory >> 20),
            unit: "ms",
            quantiles: self.total(),
        }
    }

    /// Adds further runs of the same size.
    pub(super) fn extend(&mut self, more: Self) {
        self.totals.extend(more.totals);
        for (phase, more) in self.phases.iter_mut().zip(more.phases) {
            phase.1.extend(more.1);
        }
    }
}

/// Runs it `times` times for each size, in bytes, in turns.
pub(super) fn measure(kvm_floor: &Path, times: usize, sizes: &[u64]) -> Result<Vec<Floor>, BenchError> {
    let mut program = Command::new(kvm_floor);
    program.args(["--samples", &times.to_string()]);
    for size in sizes {
        program.args(["--memory", &(size >> 20).to_string()]);
    }
    let finished = command::run(&mut program, LIMIT, Output::Kept)?;
    let found = serde_json::from_str::<Value>(&finished.output).ok();
    let found = found.as_ref().and_then(Value::as_array);
    match found {
        Some(found) if finished.succeeded() && found.len() == sizes.len() => {
            Ok(found.iter().map(parse).collect())
        }
        _ => Err(BenchError::Floor(finished.output)),
    }
}

fn parse(found: &Value) -> Floor {
    let times = |times: &Value| -> Vec<f64> {
        let times = times.as_array().into_iter().flatten();
        times
            .filter_map(Value::as_f64)
            .map(|nanoseconds| nanoseconds / 1e6)
            .collect()
    };
    let phases = found["phases_ns"].as_object().into_iter().flatten();
    Floor {
        memory: found["memory_bytes"].as_u64().unwrap_or_default(),
        totals: times(&found["total_ns"]),
        phases: phases.map(|(name, each)| (name.clone(), times(each))).collect(),
    }
}
