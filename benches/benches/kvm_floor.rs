//! What the kernel alone takes for a fork, per size of its memory.

use std::error::Error;
use std::time::Duration;

use criterion::{BenchmarkId, Criterion};
use stencil_benches::kvm_floor::{Floor, FloorError};
use stencil_benches::{MEMORY_SIZES, size_name};

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = Criterion::default().configure_from_args();
    let mut group = criterion.benchmark_group("kvm_floor");
    // Each VM takes some 20 ms to go, which is not measured.
    group.sample_size(30).measurement_time(Duration::from_secs(3));
    for bytes in MEMORY_SIZES {
        let floor = match Floor::new(bytes) {
            Err(FloorError::Open(error)) => {
                eprintln!("kvm_floor is NOT measured: /dev/kvm cannot be opened: {error}");
                return Ok(());
            }
            floor => floor?,
        };
        let mut failed = None;
        group.bench_function(BenchmarkId::from_parameter(size_name(bytes)), |bencher| {
            bencher.iter_custom(|times| {
                let runs = (0..times).map(|_| floor.run().map(|run| run.total));
                runs.sum::<Result<Duration, _>>().unwrap_or_else(|error| {
                    failed = Some(error);
                    // Criterion takes no time of 0.
                    Duration::from_nanos(times.max(1))
                })
            });
        });
        if let Some(error) = failed {
            return Err(error.into());
        }
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
