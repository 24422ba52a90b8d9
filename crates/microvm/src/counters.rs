//! What `vm.counters` answers.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use stencil_vmm_api::VmCounters;

use crate::page_figures::{PageFigures, nanoseconds};

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
    /// When the guest first ran.
    pub(crate) run: FirstRun,
    pages: OnceLock<Arc<PageFigures>>,
}

/// When a VM first ran since its boot or restore, in nanoseconds of CLOCK_MONOTONIC; 0 before.
#[derive(Default)]
pub(crate) struct FirstRun {
    resume: AtomicU64,
    exit: AtomicU64,
}

impl FirstRun {
    /// A vCPU is about to enter the guest.
    pub(crate) fn resumed(&self) {
        note(&self.resume);
    }

    /// A vCPU has left the guest on the guest's account.
    pub(crate) fn exited(&self) {
        note(&self.exit);
    }

    fn read(&self) -> BTreeMap<String, u64> {
        [("first_resume_ns", &self.resume), ("first_exit_ns", &self.exit)]
            .into_iter()
            .map(|(name, time)| (name.to_owned(), time.load(Relaxed)))
            .filter(|(_, time)| *time != 0)
            .collect()
    }
}

/// Keeps the time at the first call; later ones only look.
fn note(first: &AtomicU64) {
    if first.load(Relaxed) == 0 {
        let now = clock_gettime(ClockId::Monotonic);
        let now = Duration::try_from(now).unwrap_or_default();
        // Where another vCPU was first, its time stays.
        let _ = first.compare_exchange(0, nanoseconds(now), Relaxed, Relaxed);
    }
}

/// How long each phase of a restore took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RestoreTimes {
    /// Reading config.json and state.json.
    pub(crate) read: Duration,
    /// Mapping the memory; reading it in `copy`, populating hot pages in `cow`, starting the page server in `uffd`.
    pub(crate) memory: Duration,
    /// Making the VM in KVM, without vCPUs, from an empty one that was there.
    pub(crate) machine: Duration,
    /// Making the vCPUs and giving them their state.
    pub(crate) vcpus: Duration,
    /// Interrupt controllers, serial port, identity.
    pub(crate) devices: Duration,
    /// Waiting for the hot pages in `uffd`, which come while the rest is done.
    pub(crate) pages: Duration,
    pub(crate) total: Duration,
}

impl RestoreTimes {
    fn microseconds(&self) -> [(&'static str, u64); 7] {
        [
            ("read_us", self.read),
            ("memory_us", self.memory),
            ("machine_us", self.machine),
            ("vcpus_us", self.vcpus),
            ("devices_us", self.devices),
            ("pages_us", self.pages),
            ("total_us", self.total),
        ]
        .map(|(name, time)| (name, u64::try_from(time.as_micros()).unwrap_or(u64::MAX)))
    }
}

impl Counters {
    pub(crate) fn new(vcpus: u32) -> Self {
        Self {
            exits: (0..vcpus).map(|_| AtomicU64::new(0)).collect(),
            serial_out: AtomicU64::new(0),
            serial_in: AtomicU64::new(0),
            clients_dropped: AtomicU64::new(0),
            restore: OnceLock::new(),
            run: FirstRun::default(),
            pages: OnceLock::new(),
        }
    }

    /// Those of the pages of a restored VM; only such a VM has them.
    pub(crate) fn of_pages(&self) -> &Arc<PageFigures> {
        self.pages.get_or_init(Arc::default)
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
        all.insert("run".to_owned(), self.run.read());
        if let Some(times) = self.restore.get() {
            all.insert("restore".to_owned(), device(times.microseconds()));
        }
        if let Some(pages) = self.pages.get() {
            all.insert("pages".to_owned(), pages.read());
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
