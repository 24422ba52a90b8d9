//! Prints as JSON what each single run of [`kvm_floor`](stencil_benches::kvm_floor) took, in nanoseconds:
//! `[{"memory_bytes": N, "total_ns": [...], "phases_ns": {"create VM": [...], ...}}, ...]`.

use std::error::Error;
use std::process::ExitCode;

use clap::Parser;
use serde_json::{Map, Value, json};
use stencil_benches::kvm_floor::{Floor, FloorError, PHASES, Run};

/// What the kernel alone takes for a fork, each single run of it, as JSON on standard output.
#[derive(Debug, Parser)]
struct Options {
    /// Runs of each size.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    samples: u32,
    /// The guest's memory in MiB; more than one size are measured in turns.
    #[arg(long, value_name = "MIB", default_values_t = [512], value_parser = clap::value_parser!(u64).range(1..1 << 24))]
    memory: Vec<u64>,
}

fn main() -> ExitCode {
    match measure(&Options::parse()) {
        Ok(all) => {
            println!("{all}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            let source = error
                .source()
                .map_or_else(String::new, |source| format!(": {source}"));
            eprintln!("{error}{source}");
            ExitCode::FAILURE
        }
    }
}

fn measure(options: &Options) -> Result<Value, FloorError> {
    let floors: Vec<Floor> = options
        .memory
        .iter()
        .map(|mebibytes| Floor::new(mebibytes << 20))
        .collect::<Result<_, _>>()?;
    // The first run also loads what later ones find in the processor's and the kernel's caches.
    for floor in &floors {
        floor.run()?;
    }
    let mut taken = vec![Vec::new(); floors.len()];
    for _ in 0..options.samples {
        for (floor, taken) in floors.iter().zip(&mut taken) {
            let Run { total, phases, .. } = floor.run()?;
            taken.push((total, phases));
        }
    }
    let rows = options.memory.iter().zip(&taken).map(|(mebibytes, taken)| {
        let total: Vec<u128> = taken.iter().map(|(total, _)| total.as_nanos()).collect();
        let phases = PHASES.iter().enumerate().map(|(index, name)| {
            let times: Vec<u128> = taken.iter().map(|(_, phases)| phases[index].as_nanos()).collect();
            ((*name).to_owned(), json!(times))
        });
        json!({
            "memory_bytes": mebibytes << 20,
            "total_ns": total,
            "phases_ns": phases.collect::<Map<_, _>>(),
        })
    });
    Ok(rows.collect())
}
