//! One request for one or many forks, and when what happened, by the clock that the VMMs use too (CLOCK_MONOTONIC).
//!
//! | time | when |
//! |---|---|
//! | t_request | this program begins to send the request |
//! | t_vm | the VMM lets the guest's first vCPU go on |
//! | t_run | the guest has made its first exit: it has executed |
//! | t_ready | the guest's first line of its new life is in its console |
//! | t_reply | the server's answer is here |
//! | t_work | the guest has answered a question that was put to it after the reply |

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use super::BenchError;
use super::world::{World, in_parallel};
use crate::armed::TAKE;
use crate::arrivals::{Arrival, Arrivals};
use crate::bench::rows::{Quantiles, count, milliseconds};
use crate::client::{Client, Connection};
use crate::guest_console;

/// How often it is looked whether the reply has come while no fork is heard of.
const TICK: Duration = Duration::from_millis(20);

/// One request and what came of it. Times are in milliseconds since t_request.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) forks: Vec<Forked>,
    pub(super) reply: f64,
}

/// One fork.
#[derive(Clone, Debug)]
pub(super) struct Forked {
    pub(super) id: String,
    pub(super) vm: f64,
    pub(super) run: f64,
    /// Only where it was watched for.
    pub(super) ready: Option<f64>,
    pub(super) work: f64,
    /// It was prepared before.
    pub(super) armed: bool,
    /// What the server says that it did, and for how many milliseconds.
    pub(super) phases: Vec<(String, f64)>,
    /// The same of the VMM and its restore.
    pub(super) restore: Vec<(String, f64)>,
}

impl Asked {
    /// When the last of the forks ran.
    pub(super) fn all_run(&self) -> f64 {
        self.forks.iter().map(|fork| fork.run).fold(f64::NAN, f64::max)
    }

    pub(super) fn ids(&self) -> Vec<String> {
        self.forks.iter().map(|fork| fork.id.clone()).collect()
    }
}

/// Whether the guests' first lines are watched for. A second thread of this program then works while the fork is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Watch {
    Yes,
    No,
}

/// Asks for `number` forks of a template by one request, and each guest a question.
pub(super) fn ask(world: &World, template: &str, number: u32, watch: Watch) -> Result<Asked, BenchError> {
    let mut connection = Connection::open(&world.server.data().join("stencil.sock"))?;
    let (path, body) = match number {
        1 => (format!("/instances/{template}/fork"), json!({})),
        number => (format!("/instances/{template}/forks"), json!({"count": number})),
    };
    let mut arrivals = match watch {
        Watch::Yes => Some(Arrivals::watch(&world.server.instances())?),
        Watch::No => None,
    };
    let (asked, clock) = (Instant::now(), monotonic_ns());
    let (reply, replied, heard) = match &mut arrivals {
        None => {
            let reply = connection.post(&path, body)?;
            (reply, asked.elapsed(), HashMap::new())
        }
        Some(arrivals) => std::thread::scope(|scope| {
            let request = scope.spawn(|| (connection.post(&path, body), asked.elapsed()));
            let mut heard = HashMap::new();
            while heard.len() < number as usize {
                // Every guest that is ready has spoken before the reply.
                let over = request.is_finished();
                match arrivals.next_by(Instant::now() + TICK)? {
                    Some((at, Arrival::Awake(id))) => drop(heard.insert(id, milliseconds(at - asked))),
                    Some((_, Arrival::Named(_))) => {}
                    None if over => break,
                    None => {}
                }
            }
            let (reply, replied) = request
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            Ok::<_, BenchError>((reply?, replied, heard))
        })?,
    };
    let made = world.expect(reply)?;
    let instances: Vec<&Value> = match number {
        1 => vec![&made],
        _ => made["forks"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|entry| &entry["instance"])
            .collect(),
    };
    let works = in_parallel(&instances, |instance| {
        let id = instance["id"].as_str().unwrap_or_default();
        guest_console::ask_for(&world.client, id, "counter", "counter")?;
        Ok(milliseconds(asked.elapsed()))
    })?;
    let mut forks = Vec::with_capacity(instances.len());
    for (instance, work) in instances.into_iter().zip(works) {
        let id = instance["id"].as_str().unwrap_or_default().to_owned();
        let socket = world.server.instances().join(&id).join("vmm.sock");
        let counters = world.expect(Client::new(socket).get("/api/v1/vm.counters")?)?;
        // A guest that has answered has run.
        let since = |field: &'static str| match counters["run"][field].as_u64() {
            Some(at) => Ok(nanoseconds_between(clock, at) / 1e6),
            None => Err(BenchError::NoFigure {
                path: "vm.counters".into(),
                field,
            }),
        };
        let phases = phases(instance);
        forks.push(Forked {
            vm: since("first_resume_ns")?,
            run: since("first_exit_ns")?,
            ready: heard.get(&id).copied(),
            work,
            armed: phases.iter().any(|(name, _)| name == TAKE),
            restore: restore(&counters),
            phases,
            id,
        });
    }
    Ok(Asked {
        forks,
        reply: milliseconds(replied),
    })
}

pub(super) fn phases(instance: &Value) -> Vec<(String, f64)> {
    let phases = instance["timings"]["phases"].as_array().into_iter().flatten();
    let phases =
        phases.filter_map(|phase| Some((phase["name"].as_str()?.to_owned(), phase["us"].as_f64()? / 1e3)));
    phases.collect()
}

/// The middle of each phase of forks that all went through the same: `spawn 0.61, restore 1.20 ms`.
pub(super) fn middle_of_phases<'a>(forks: impl Iterator<Item = &'a [(String, f64)]> + Clone) -> String {
    let names = forks.clone().next().unwrap_or_default();
    let told: Vec<String> = names
        .iter()
        .map(|(name, _)| {
            let times = forks.clone().flatten();
            let times = times.filter(|(found, _)| found == name).map(|(_, time)| *time);
            format!("{name} {:.2}", Quantiles::of(times).p50)
        })
        .collect();
    told.join(", ") + " ms"
}

fn restore(counters: &Value) -> Vec<(String, f64)> {
    let restore = counters["restore"].as_object().into_iter().flatten();
    let times =
        restore.filter_map(|(name, us)| Some((name.strip_suffix("_us")?.to_owned(), us.as_f64()? / 1e3)));
    times.collect()
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    // The clock counts from the host's start: neither part is negative.
    let part = |part: i64| u64::try_from(part).unwrap_or_default();
    part(now.tv_sec) * 1_000_000_000 + part(now.tv_nsec)
}

/// Negative where `to` was earlier.
fn nanoseconds_between(from: u64, to: u64) -> f64 {
    let since = count(to.saturating_sub(from));
    since - count(from.saturating_sub(to))
}
