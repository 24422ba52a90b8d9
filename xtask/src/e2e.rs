//! End to end: every scenario drives the real binaries over HTTP, on a server and a data directory of its own, and
//! ends with proof that nothing of it stays.

mod access;
mod armed;
mod bad_input;
mod console;
mod continuity;
mod crashes;
mod failure;
mod fleet;
mod forks;
mod hot_pages;
mod lifecycle;
mod linux;
mod memory;
mod pressure;
mod races;
mod records;
mod snapshots;
mod states;
mod vcpus;
mod vm;
mod way;
mod world;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::host::Host;
use crate::hypervisor::{Choice, Hypervisor};
use crate::report::{self, mark};
use crate::{TaskError, build, setup};
use failure::Failure;
use way::Way;
use world::World;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    hypervisor: Choice,
    /// Only the scenarios whose name has this in it.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
    /// Where to write the results as one JSON object.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A scenario: what a user would notice, as a sentence, and how it is tried.
type Scenario = (&'static str, fn(&mut World) -> Result<(), Failure>);

/// What became of a scenario.
enum Outcome {
    Passed,
    Skipped(String),
    Failed(String),
}

struct Tried {
    name: String,
    outcome: Outcome,
    took: Duration,
}

/// The `e2e` task; whether no scenario failed.
pub(crate) fn run(options: &Options) -> Result<bool, TaskError> {
    let located = match options.hypervisor.locate() {
        Ok(located) => located,
        Err(not_there) => {
            return Ok(all_skipped(&not_there));
        }
    };
    // It needs no KVM.
    let on_qemu = options.hypervisor.is_qemu();
    if on_qemu && let Err(no_qemu) = setup::prepare_qemu() {
        return Ok(all_skipped(&no_qemu));
    }
    let host = if on_qemu {
        setup::prepare()
    } else {
        setup::prepare_with_kvm()
    }?;
    println!(
        "on {}, {} cores, Linux {}, KVM: {}",
        host.cpu, host.cores, host.kernel, host.kvm
    );
    let built = build::build()?;
    let hypervisor = Arc::new(located.ask(&built)?);
    if let Some(why) = &hypervisor.no_snapshots {
        println!("SKIPPED, all that needs standby, templates or forks: {why}");
    }
    let filter = options.filter.as_deref().unwrap_or_default().to_lowercase();
    let mut results: Vec<Tried> = scenarios(&hypervisor)
        .into_iter()
        .filter(|planned| planned.name.to_lowercase().contains(&filter))
        .map(|planned| {
            if planned.is_long && filter.is_empty() {
                let why = format!(
                    "{} takes too long over it: name it with --filter",
                    hypervisor.name
                );
                return Tried::told(planned.name, Outcome::Skipped(why), Instant::now());
            }
            try_one(planned, &built, &hypervisor)
        })
        .collect();
    if on_qemu && linux::has(&filter) {
        results.extend(match setup::prepare_linux() {
            Ok(()) => linux::run(&built, &hypervisor, &linux::Guest::build()?, &filter),
            Err(no_linux) => vec![linux::skipped(&no_linux)],
        });
    }
    if let Some(path) = &options.json {
        let json = format!("{:#}\n", json(&host, &results));
        std::fs::write(path, json).map_err(|source| TaskError::Write {
            path: path.clone(),
            source,
        })?;
    }
    let count = |fits: fn(&Outcome) -> bool| results.iter().filter(|result| fits(&result.outcome)).count();
    let passed = count(|outcome| matches!(outcome, Outcome::Passed));
    let failed = count(|outcome| matches!(outcome, Outcome::Failed(_)));
    let skipped = count(|outcome| matches!(outcome, Outcome::Skipped(_)));
    if skipped == 0 {
        println!("{passed} passed, {failed} failed");
    } else {
        println!("{passed} passed, {failed} failed, {skipped} skipped");
    }
    Ok(failed == 0)
}

/// Tells why nothing is tried, which is no failure.
fn all_skipped(why: &dyn std::error::Error) -> bool {
    println!("SKIPPED, all of it: {}", report::chain(why));
    // Who counts finds it in the last line.
    println!("0 passed, 0 failed, 1 skipped");
    true
}

/// A scenario, and how it makes its forks.
struct Planned {
    name: String,
    act: fn(&mut World) -> Result<(), Failure>,
    way: Way,
    /// Whether it takes so long that it is tried only when it is asked for.
    is_long: bool,
}

/// All scenarios, and those that fork once more for each way to do it.
fn scenarios(hypervisor: &Hypervisor) -> Vec<Planned> {
    let all = [
        lifecycle::SCENARIOS,
        console::SCENARIOS,
        states::SCENARIOS,
        continuity::SCENARIOS,
        forks::SCENARIOS,
        fleet::SCENARIOS,
        hot_pages::SCENARIOS,
        records::SCENARIOS,
        crashes::SCENARIOS,
        snapshots::SCENARIOS,
        vcpus::SCENARIOS,
        memory::SCENARIOS,
        races::SCENARIOS,
        armed::SCENARIOS,
        bad_input::SCENARIOS,
        access::SCENARIOS,
    ]
    .concat();
    let forking = [continuity::SCENARIOS, forks::SCENARIOS].concat();
    let planned = |way: Way| {
        let scenarios = if way == Way::Plain { &all } else { &forking };
        let planned = scenarios.iter().map(move |(name, act)| Planned {
            name: format!("{name}{}", way.suffix()),
            act: *act,
            way,
            is_long: !hypervisor.bears_fleets() && fleet::SCENARIOS.iter().any(|(long, _)| long == name),
        });
        planned.collect::<Vec<_>>()
    };
    Way::all(hypervisor).into_iter().flat_map(planned).collect()
}

fn try_one(
    Planned { name, act, way, .. }: Planned,
    built: &build::Built,
    hypervisor: &Arc<Hypervisor>,
) -> Tried {
    let began = Instant::now();
    let outcome = match World::new(built, hypervisor, way) {
        Err(failure) => Outcome::failed(&failure),
        Ok(mut world) => match act(&mut world).and_then(|()| world.clear()) {
            Ok(()) => Outcome::of(world.finish()),
            Err(Failure::Skipped(reason)) => Outcome::Skipped(reason),
            Err(failure) => Outcome::failed_with(&failure, &world.last_words()),
        },
    };
    Tried::told(name, outcome, began)
}

impl Outcome {
    fn of(result: Result<(), Failure>) -> Self {
        result.map_or_else(|failure| Self::failed(&failure), |()| Self::Passed)
    }

    fn failed(failure: &Failure) -> Self {
        Self::Failed(report::chain(failure))
    }

    fn failed_with(failure: &Failure, last_words: &str) -> Self {
        Self::Failed(format!("{}\n{last_words}", report::chain(failure)))
    }
}

impl Tried {
    /// What became of a scenario that began then, and tells it.
    fn told(name: String, outcome: Outcome, began: Instant) -> Self {
        let took = began.elapsed();
        let (sign, detail) = match &outcome {
            Outcome::Passed => (mark(true), ""),
            Outcome::Skipped(reason) => ("-", reason.as_str()),
            Outcome::Failed(detail) => (mark(false), detail.as_str()),
        };
        println!("{sign} {name} ({})", report::duration(took));
        for line in detail.lines() {
            println!("      {line}");
        }
        Self { name, outcome, took }
    }
}

fn json(host: &Host, results: &[Tried]) -> Value {
    let scenarios = results.iter().map(|result| {
        let (ok, detail) = match &result.outcome {
            Outcome::Passed => (true, String::new()),
            Outcome::Skipped(reason) => (true, format!("skipped: {reason}")),
            Outcome::Failed(detail) => (false, detail.clone()),
        };
        json!({"name": result.name, "ok": ok, "ms": result.took.as_secs_f64() * 1e3, "detail": detail})
    });
    json!({"host": host.json(), "scenarios": scenarios.collect::<Vec<_>>()})
}
