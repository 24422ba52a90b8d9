//! What `vm.counters` answers.

use std::collections::BTreeMap;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use stencil_vmm_api::VmCounters;

use crate::restore::RestoreTimes;

/// Counters of one VM, from its boot or restore on.
pub(crate) struct Counters {
    /// `KVM_RUN` returns, per vCPU.
    pub(crate) exits: Box<[AtomicU64]>,
    /// Bytes that the guest wrote to its serial port.
    pub(crate) serial_out: AtomicU64,
    /// Bytes that clients sent to the guest's serial port.
    pub(crate) serial_in: AtomicU64,
    /// Clients of the console that were dropped because they did not keep up.
    pub(crate) clients_dropped: AtomicU64,
    /// How long the restore took; empty in a VM that was booted.
    pub(crate) restore: OnceLock<RestoreTimes>,
}

impl Counters {
    pub(crate) fn new(vcpus: u32) -> Self {
        Self {
            exits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            serial_out: AtomicU64::new(0),
            serial_in: AtomicU64::new(0),
            clients_dropped: AtomicU64::new(0),
            restore: OnceLock::new(),
        }
    }

    pub(crate) fn read(&self) -> VmCounters {
        let mut all = VmCounters::new();
        for (index, exits) in self.exits.iter().enumerate() {
            all.insert(format!("vcpu{index}"), device([("exits", exits.load(Relaxed))]));
        }
        let serial = [
            ("bytes_out", self.serial_out.load(Relaxed)),
            ("bytes_in", self.serial_in.load(Relaxed)),
            ("clients_dropped", self.clients_dropped.load(Relaxed)),
        ];
        all.insert("serial".to_owned(), device(serial));
        if let Some(times) = self.restore.get() {
            all.insert("restore".to_owned(), device(times.microseconds()));
        }
        all
    }
}

fn device<const N: usize>(counters: [(&str, u64); N]) -> BTreeMap<String, u64> {
    counters
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}
