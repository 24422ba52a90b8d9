//! Forks by the engine in this process, with the real VMM and the test guest: from the call until the fork's guest has
//! said that it is ready; cold, with a process that is started for it, and armed, prepared before the call. Per size of the
//! memory, of which the guest has used little. The fork is deleted, and another armed, outside of the measurement.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion};
use stencil_benches::{MEMORY_SIZES, size_name};
use stencil_core::{HypervisorName, Readiness, State};
use stencil_engine::{Config, CreateRequest, Engine, ForkRequest, Instance};
use stencil_vmm::MicroVm;
use tokio::runtime::Runtime;

type Failure = Box<dyn Error>;

/// How long a guest may take to boot.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether something has come about.
const TICK: Duration = Duration::from_millis(5);
const TEMPLATE: &str = "warm";

/// What is driven; both have been built.
struct Built {
    microvm: PathBuf,
    guest: PathBuf,
}

impl Built {
    /// The VMM is where cargo puts it beside the benchmarks' directory, the guest where `cargo xtask` puts it.
    fn find() -> Result<Self, Failure> {
        let executable = std::env::current_exe()?;
        let release = executable.parent().and_then(Path::parent).ok_or("no directory")?;
        let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let built = Self {
            microvm: release.join("stencil-microvm"),
            guest: workspace.join("target/fixtures/guest.elf"),
        };
        let missing = [&built.microvm, &built.guest]
            .into_iter()
            .find(|path| !path.exists())
            .cloned();
        match missing {
            None => Ok(built),
            Some(missing) => {
                Err(format!("{} is missing; `cargo xtask demo` builds it", missing.display()).into())
            }
        }
    }
}

/// An engine with one template, which knows its hot pages.
struct World {
    engine: Engine,
    _scratch: tempfile::TempDir,
}

impl World {
    async fn with_template(built: &Built, memory_bytes: u64) -> Result<Self, Failure> {
        let scratch = tempfile::tempdir()?;
        let engine = Engine::open(Config {
            data: scratch.path().join("data"),
            hypervisors: vec![Arc::new(MicroVm::new(built.microvm.clone()))],
            armed: 0,
            log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
        })
        .await?;
        let world = Self {
            engine,
            _scratch: scratch,
        };
        let prepared = world.prepare(built, memory_bytes).await;
        if prepared.is_err() {
            world.clear().await?;
        }
        prepared.map(|()| world)
    }

    async fn prepare(&self, built: &Built, memory_bytes: u64) -> Result<(), Failure> {
        let engine = &self.engine;
        let create = CreateRequest {
            name: Some(TEMPLATE.parse()?),
            hypervisor: HypervisorName::from_static("microvm"),
            image: None,
            kernel: Some(built.guest.canonicalize()?),
            firmware: None,
            initrd: None,
            cmdline: None,
            disks: Vec::new(),
            vcpus: 1,
            memory_bytes,
            readiness: Readiness::Console("ready epoch=".to_owned()),
            labels: [].into(),
            start: true,
        };
        engine.create(create).await?;
        if !engine.wait(TEMPLATE, State::Running, PATIENCE).await?.reached {
            return Err("the guest did not boot".into());
        }
        engine.standby(TEMPLATE).await?;
        engine.promote(TEMPLATE, None).await?;
        self.record_hot_pages().await
    }

    /// The first fork records; pausing it closes its recording.
    async fn record_hot_pages(&self) -> Result<(), Failure> {
        let engine = &self.engine;
        let fork = engine
            .fork(TEMPLATE, None, ForkRequest::default())
            .await?
            .id
            .to_string();
        engine.pause(&fork).await?;
        self.until("a list of hot pages", |template| {
            let metadata = template.metadata.as_ref();
            metadata.is_some_and(|metadata| metadata.hot_pages_path.is_some())
        })
        .await?;
        engine.delete(&fork).await?;
        Ok(())
    }

    async fn until(&self, what: &str, there: impl Fn(&Instance) -> bool) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while !there(&self.engine.get(TEMPLATE).await?) {
            if Instant::now() > deadline {
                return Err(format!("{what} did not come in {} s", PATIENCE.as_secs()).into());
            }
            tokio::time::sleep(TICK).await;
        }
        Ok(())
    }

    /// One fork: what its making took. It is deleted again, and the pool of armed forks is filled again.
    async fn fork(&self) -> Result<Duration, Failure> {
        self.until("an armed fork", |template| {
            template.armed.is_none_or(|armed| armed.ready >= armed.target)
        })
        .await?;
        let began = Instant::now();
        let fork = self.engine.fork(TEMPLATE, None, ForkRequest::default()).await?;
        let took = began.elapsed();
        if fork.state != State::Running {
            return Err(format!("the fork is {}", fork.state).into());
        }
        self.engine.delete(&fork.id.to_string()).await?;
        Ok(took)
    }

    /// No VMM outlives the benchmark.
    async fn clear(&self) -> Result<(), Failure> {
        let template = self.engine.get(TEMPLATE).await?;
        for fork in template.forks.unwrap_or_default() {
            self.engine.delete(&fork.id.to_string()).await?;
        }
        if template.state == State::Template {
            self.engine.demote(TEMPLATE).await?;
        }
        Ok(self.engine.delete(TEMPLATE).await?)
    }
}

fn main() -> Result<(), Failure> {
    let mut criterion = Criterion::default().configure_from_args();
    let built = match Built::find() {
        Ok(built) => built,
        Err(missing) => {
            eprintln!("fork is NOT measured: {missing}");
            return Ok(());
        }
    };
    if let Err(error) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("fork is NOT measured: /dev/kvm cannot be opened: {error}");
        return Ok(());
    }
    let runtime = Runtime::new()?;
    let mut group = criterion.benchmark_group("fork");
    // Each VM takes some 20 ms to go, which is not measured.
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(3));
    for bytes in MEMORY_SIZES {
        let world = runtime.block_on(World::with_template(&built, bytes))?;
        let mut failed = None;
        for (kind, armed) in [("cold", 0), ("armed", 1)] {
            runtime.block_on(world.engine.arm(TEMPLATE, Some(armed)))?;
            group.bench_function(BenchmarkId::new(kind, size_name(bytes)), |bencher| {
                bencher.iter_custom(|times| {
                    // Criterion asks for more, and takes no time of 0; none of it is shown.
                    let no_time = Duration::from_millis(times.max(1));
                    if failed.is_some() {
                        return no_time;
                    }
                    let all = async {
                        let mut total = Duration::ZERO;
                        for _ in 0..times {
                            total += world.fork().await?;
                        }
                        Ok(total)
                    };
                    runtime.block_on(all).unwrap_or_else(|error: Failure| {
                        failed = Some(error);
                        no_time
                    })
                });
            });
        }
        runtime.block_on(world.clear())?;
        if let Some(error) = failed {
            return Err(error);
        }
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}
