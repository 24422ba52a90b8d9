//! What calls cost as instances become many: the same calls with few instances on disk and with many.
//!
//! `cargo run --release -p stencil-engine --example growth [DIRECTORY]`: below DIRECTORY, by default the one for temporary
//! files, it makes a data directory with a template and its forks, none of them with a VMM, and prints the median of each
//! call in microseconds. No VMM is started and nothing is left.

use std::collections::BTreeMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use stencil_core::{
    Durability, InstanceId, MemoryGeneration, Metadata, SnapshotManifest, State, Store, VmGeneration, VmSpec,
};
use stencil_engine::{Config, Engine, EngineError, Filter, ForkRequest};
use stencil_vmm::MicroVm;

/// How many forks the template has.
const SIZES: [u32; 3] = [10, 1_000, 10_000];
/// How often each call is made.
const ROUNDS: usize = 31;

type Failed = Box<dyn Error>;

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let below = std::env::args_os()
        .nth(1)
        .map_or_else(std::env::temp_dir, PathBuf::from);
    let mut table: BTreeMap<&str, Vec<u128>> = BTreeMap::new();
    let mut order = Vec::new();
    for size in SIZES {
        for (call, took) in measured(&below, size).await? {
            if !table.contains_key(call) {
                order.push(call);
            }
            table.entry(call).or_default().push(took);
        }
    }
    println!(
        "{:<44}{}",
        "us, p50, by forks on disk",
        SIZES.map(|size| format!("{size:>10}")).concat()
    );
    for call in order {
        let row: String = table[call].iter().map(|took| format!("{took:>10}")).collect();
        println!("{call:<44}{row}");
    }
    Ok(())
}

async fn measured(below: &Path, size: u32) -> Result<Vec<(&'static str, u128)>, Failed> {
    let scratch = tempfile::tempdir_in(below)?;
    let some_fork = fill(scratch.path(), size)?;
    let begun = Instant::now();
    let engine = Engine::open(Config {
        data: scratch.path().join("data"),
        hypervisors: vec![Arc::new(MicroVm::new("/nonexistent/stencil-microvm".into()))],
        armed: 0,
        log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
    })
    .await?;
    let mut rows = vec![("open", begun.elapsed().as_micros())];
    let id = some_fork.to_string();
    let (begins, absent) = (&id[..25], "no-such-instance");
    let of_idle = || Filter {
        template: Some("idle".to_owned()),
        ..Filter::default()
    };
    let stopped = ForkRequest {
        target_state: Some(State::Stopped),
        ..ForkRequest::default()
    };

    macro_rules! row {
        ($name:expr, $call:expr) => {{
            let mut took = Vec::with_capacity(ROUNDS);
            for _ in 0..ROUNDS {
                let begun = Instant::now();
                $call;
                took.push(begun.elapsed().as_micros());
            }
            took.sort_unstable();
            rows.push(($name, took[ROUNDS / 2]));
        }};
    }

    row!("get a fork by id", engine.get(&id).await?);
    row!("get a fork by name", engine.get("warm-1").await?);
    row!("get a fork by the beginning of its id", engine.get(begins).await?);
    row!("get what is not there", engine.get(absent).await.err());
    row!("get the template with all forks", engine.get("warm").await?);
    row!("get a template without forks", engine.get("idle").await?);
    row!(
        "list the forks of a template without",
        engine.list(of_idle()).await?
    );
    row!("list all", engine.list(Filter::default()).await?);
    let mut made = Vec::new();
    row!(
        "fork, the next free number as name",
        made.push(engine.fork("warm", None, stopped).await?.id.to_string())
    );
    row!(
        "delete a fork",
        engine.delete(&made.pop().ok_or("a fork")?).await?
    );
    row!(
        "demote, refused for its forks",
        match engine.demote("warm").await {
            Err(EngineError::Refused(_)) => {}
            other => return Err(format!("{other:?}").into()),
        }
    );
    Ok(rows)
}

/// Two templates, `warm` with `size` stopped forks and `idle` with none; one of the forks.
fn fill(scratch: &Path, size: u32) -> Result<InstanceId, Failed> {
    let kernel = scratch.join("kernel.elf");
    fs::write(&kernel, include_bytes!("../../../fixtures/pvh-note.elf"))?;
    let store = Store::open(&scratch.join("data"))?;
    let spec = || Ok::<_, Failed>(VmSpec::new("microvm".parse()?, kernel.clone(), 1, 512 << 20));
    let record = |name: &str| {
        Ok::<_, Failed>(Metadata::new(
            InstanceId::generate(),
            name.parse()?,
            spec()?,
            VmGeneration::random(),
            jiff::Timestamp::now(),
        ))
    };
    let mut template = None;
    for name in ["warm", "idle"] {
        let metadata = Metadata {
            is_template: true,
            ..record(name)?
        };
        let new = store.begin(metadata.id)?;
        let snapshot = new.dir().snapshot();
        fs::create_dir(snapshot.path())?;
        let files = [snapshot.config(), snapshot.state(), snapshot.memory_ranges()];
        for file in &files {
            fs::write(file, "{}")?;
        }
        let name_of = |file: &PathBuf| Some((file.file_name()?.to_str()?.to_owned(), 2));
        let manifest = SnapshotManifest {
            schema: SnapshotManifest::SCHEMA,
            created_at: jiff::Timestamp::now(),
            hypervisor: metadata.spec.hypervisor.clone(),
            hypervisor_version: "0.1.0".to_owned(),
            host_cpu: None,
            memory_generation: MemoryGeneration::random(),
            memory_bytes: metadata.spec.memory_bytes,
            frozen: None,
            files: files.iter().filter_map(name_of).collect(),
            other: serde_json::Map::new(),
        };
        store.complete_snapshot(&snapshot, &manifest)?;
        new.commit(&metadata, Durability::Renamed)?;
        template.get_or_insert(metadata.id);
    }
    let mut last = None;
    for number in 1..=size {
        if number == size {
            // Ids of one millisecond differ in their end only; the beginning of this one is its own.
            std::thread::sleep(Duration::from_millis(2));
        }
        let metadata = Metadata {
            fork_of_template: template,
            ..record(&format!("warm-{number}"))?
        };
        store.begin(metadata.id)?.commit(&metadata, Durability::Renamed)?;
        last = Some(metadata.id);
    }
    last.ok_or_else(|| "no fork was asked for".into())
}
