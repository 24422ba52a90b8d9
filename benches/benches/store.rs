//! The store and the state of instances, at 10, 1,000 and 10,000 of them: a template, nine forks of it that are stopped,
//! and others. What is asked of one instance should not grow with their number; a scan grows with it, and what is
//! counted by a scan does.

use std::error::Error;
use std::hint::black_box;
use std::time::Duration;

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, BenchmarkId, Criterion};
use stencil_core::{
    Durability, HypervisorName, InstanceId, Metadata, Scanned, Store, VmGeneration, VmSpec, VmmFacts, observe,
};
use tempfile::TempDir;

/// How many of the instances are forks of the template.
const FORKS: usize = 9;

/// A data directory full of instances.
struct World {
    store: Store,
    template: InstanceId,
    /// The last one that was made.
    last: InstanceId,
    /// Removed with its contents at the end.
    _scratch: TempDir,
}

impl World {
    fn of(instances: usize) -> Result<Self, Box<dyn Error>> {
        let scratch = tempfile::tempdir()?;
        let store = Store::open(scratch.path())?;
        let mut template = None;
        let mut last = InstanceId::generate();
        for number in 0..instances {
            last = InstanceId::generate();
            let microvm = HypervisorName::from_static("microvm");
            let spec = VmSpec::new(microvm, "/boot/guest.elf".into(), 1, 512 << 20);
            let metadata = Metadata {
                is_template: number == 0,
                fork_of_template: template.filter(|_| number <= FORKS),
                ..Metadata::new(
                    last,
                    format!("instance-{number}").parse()?,
                    spec,
                    VmGeneration::random(),
                    jiff::Timestamp::now(),
                )
            };
            store.begin(last)?.commit(&metadata, Durability::Renamed)?;
            template.get_or_insert(last);
        }
        Ok(Self {
            store,
            template: template.ok_or("there is no instance")?,
            last,
            _scratch: scratch,
        })
    }

    fn measure(&self, group: &mut BenchmarkGroup<'_, WallTime>, instances: usize) {
        let Self {
            store,
            template,
            last,
            ..
        } = self;
        group.bench_function(BenchmarkId::new("read one", instances), |bencher| {
            bencher.iter(|| black_box(store.read(last)).is_ok());
        });
        group.bench_function(BenchmarkId::new("state of one", instances), |bencher| {
            bencher.iter(|| {
                let metadata = store.read(last).ok()?;
                Some(observe::derive(&metadata, &store.snapshot(last), &VmmFacts::None))
            });
        });
        group.bench_function(BenchmarkId::new("scan", instances), |bencher| {
            bencher.iter(|| black_box(store.scan()).is_ok());
        });
        group.bench_function(
            BenchmarkId::new("live forks of one template", instances),
            |bencher| {
                bencher.iter(|| black_box(store.live_forks(template)).is_ok());
            },
        );
        group.bench_function(BenchmarkId::new("states of all", instances), |bencher| {
            bencher.iter(|| self.states_of_all());
        });
    }

    /// The states that a scan's records and snapshots come to; how many there are.
    fn states_of_all(&self) -> usize {
        let scanned = self.store.scan().unwrap_or_default().into_iter();
        let states = scanned.filter_map(|Scanned { id, metadata }| {
            let snapshot = self.store.snapshot(&id);
            Some(observe::derive(&metadata.ok()?, &snapshot, &VmmFacts::None))
        });
        states.map(black_box).count()
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("store");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    for instances in [10, 1_000, 10_000] {
        World::of(instances)?.measure(&mut group, instances);
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
