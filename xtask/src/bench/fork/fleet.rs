//! Many live forks of one template at once. They are asked for in steps; after each step every new guest writes to pages of
//! its memory, and it is looked at what all of them hold. So each has really run, and has memory of its own.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::processes::{Held, HostMemory, private_by_mapping};
use super::world::{World, in_parallel};
use super::{BenchError, MEMORY};
use crate::bench::rows::{Quantiles, Row, count, milliseconds};
use crate::build::Built;
use crate::{guest_console, report};

const TEMPLATE: &str = "fleet";
/// In how many steps the forks are asked for; in no step more than one call makes.
const STEPS: u32 = 10;
const MOST_A_CALL: u32 = 1024;
/// Pages that each guest writes.
pub(super) const WRITTEN: u64 = 16;

/// What of the kernel's memory may grow with VMs, by its names in /proc/meminfo.
pub(super) const KINDS: [&str; 8] = [
    "AnonPages",
    "PageTables",
    "SecPageTables",
    "KernelStack",
    "SUnreclaim",
    "SReclaimable",
    "VmallocUsed",
    "Percpu",
];

/// What was found.
#[derive(Debug)]
pub(super) struct Fleet {
    pub(super) asked: u32,
    /// Forks that were not made, or whose guest did not write.
    pub(super) failures: u32,
    /// Why, of the first that failed.
    pub(super) failure: Option<String>,
    /// Of all calls for forks together.
    pub(super) calls: Duration,
    /// Of all guests' writes together.
    pub(super) writes: Duration,
    pub(super) steps: Vec<Step>,
    /// What the VMMs hold at the end.
    pub(super) vmms: Vec<Held>,
    /// What the server holds at the end.
    pub(super) server: Held,
    /// What is private of the VMM in the middle, by mapping.
    pub(super) middle: BTreeMap<&'static str, u64>,
    /// By how much each of [`KINDS`] grew, in bytes.
    pub(super) kernel: Vec<(&'static str, f64)>,
}

/// How it was after a step. In bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) forks: u64,
    pub(super) pss: u64,
    /// With page tables.
    pub(super) private: u64,
    /// By how much `MemAvailable` has gone down since before the first fork.
    pub(super) taken: f64,
}

impl Fleet {
    /// Of each VMM, with its page tables.
    pub(super) fn private_kib(&self) -> Quantiles {
        Quantiles::of(
            self.vmms
                .iter()
                .map(|held| count(held.private + held.page_tables) / 1024.0),
        )
    }

    /// Of the VMMs together.
    pub(super) fn sum(&self, of: impl Fn(&Held) -> u64) -> u64 {
        self.vmms.iter().map(of).sum()
    }

    /// What of the host's memory went for each fork, in KiB.
    pub(super) fn taken_kib(&self) -> f64 {
        self.steps
            .last()
            .map_or(f64::NAN, |step| step.taken / count(step.forks) / 1024.0)
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        let about = format!("{} live forks", self.asked);
        let row = |what: &str, unit, quantiles| Row {
            name: format!("{about}: {what}"),
            unit,
            quantiles,
        };
        let one = |value| Quantiles::of([value]);
        let each = |of: fn(&Held) -> u64| Quantiles::of(self.vmms.iter().map(|held| count(of(held))));
        vec![
            row("failures", "forks", one(count(u64::from(self.failures)))),
            row("time of the calls", "ms", one(milliseconds(self.calls))),
            row("time of the guests' writes", "ms", one(milliseconds(self.writes))),
            row(
                "private memory and page tables of each",
                "KiB",
                self.private_kib(),
            ),
            row("PSS, sum", "KiB", one(count(self.sum(|held| held.pss)) / 1024.0)),
            row("MemAvailable drop for each", "KiB", one(self.taken_kib())),
            row("threads of each VMM", "threads", each(|held| held.threads)),
            row(
                "file descriptors of each VMM",
                "descriptors",
                each(|held| held.descriptors),
            ),
            row(
                "threads of the server",
                "threads",
                one(count(self.server.threads)),
            ),
            row(
                "file descriptors of the server",
                "descriptors",
                one(count(self.server.descriptors)),
            ),
        ]
    }
}

pub(super) fn measure(built: &Built, asked: u32) -> Result<Fleet, BenchError> {
    let world = World::start(built)?;
    world.template(TEMPLATE, MEMORY)?;
    let what = format!("{asked} live forks, each of which writes");
    let fleet = report::step(&what, || grow(&world, asked))?;
    report::step("all of them deleted again", || {
        let forks = &world.get(TEMPLATE)?["forks"]["ids"];
        let forks = forks.as_array().into_iter().flatten().filter_map(Value::as_str);
        world.delete(&forks.map(str::to_owned).collect::<Vec<_>>())
    })?;
    world.remove_template(TEMPLATE)?;
    world.server.finish()?;
    Ok(fleet)
}

/// A fork of the fleet.
struct Member {
    id: String,
    pid: i32,
}

fn grow(world: &World, asked: u32) -> Result<Fleet, BenchError> {
    let before = HostMemory::now()?;
    let mut members: Vec<Member> = Vec::new();
    let (mut failures, mut failure) = (0, None);
    let (mut calls, mut writes) = (Duration::ZERO, Duration::ZERO);
    let (mut steps, mut vmms) = (Vec::new(), Vec::new());
    let bar = report::bar("forks that have written", asked.into());
    let step = asked.div_ceil(STEPS).min(MOST_A_CALL);
    let mut left = asked;
    while left > 0 {
        let number = step.min(left);
        left -= number;
        let began = Instant::now();
        let (made, failed) = fork(world, number)?;
        calls += began.elapsed();
        let began = Instant::now();
        let wrote = in_parallel(&made, |member| Ok(write(world, &member.id).err()))?;
        writes += began.elapsed();
        for failed in failed.into_iter().chain(wrote.into_iter().flatten()) {
            failures += 1;
            failure.get_or_insert(failed);
        }
        bar.inc(made.len() as u64);
        members.extend(made);
        vmms = members
            .iter()
            .map(|member| Held::of(member.pid))
            .collect::<Result<Vec<_>, _>>()?;
        steps.push(Step {
            forks: members.len() as u64,
            pss: vmms.iter().map(|held| held.pss).sum(),
            private: vmms.iter().map(|held| held.private + held.page_tables).sum(),
            taken: count(before.available()?) - count(HostMemory::now()?.available()?),
        });
    }
    bar.finish_and_clear();
    let after = HostMemory::now()?;
    let mut by_size: Vec<usize> = (0..vmms.len()).collect();
    by_size.sort_by_key(|index| vmms[*index].private);
    let middle = by_size
        .get(by_size.len() / 2)
        .and_then(|index| members.get(*index));
    Ok(Fleet {
        asked,
        failures,
        failure,
        calls,
        writes,
        steps,
        vmms,
        server: Held::of(world.server.pid()?.as_raw_nonzero().get())?,
        middle: middle.map_or_else(|| Ok(BTreeMap::new()), |member| private_by_mapping(member.pid))?,
        kernel: KINDS
            .map(|kind| (kind, count(after.in_use(kind)) - count(before.in_use(kind))))
            .into(),
    })
}

/// Asks for forks; those that were made, and why others were not.
fn fork(world: &World, number: u32) -> Result<(Vec<Member>, Vec<String>), BenchError> {
    let path = format!("/instances/{TEMPLATE}/forks");
    let reply = world.client.post(&path, json!({"count": number}))?;
    let entries = reply.body["forks"].as_array();
    let Some(entries) = entries else {
        let why = format!("{}: {}", reply.status, reply.body);
        return Ok((Vec::new(), vec![why; number as usize]));
    };
    let (mut made, mut failed) = (Vec::new(), Vec::new());
    for entry in entries {
        match member(&entry["instance"]) {
            Some(member) => made.push(member),
            None => failed.push(entry.to_string()),
        }
    }
    Ok((made, failed))
}

/// A fork counts if it runs.
fn member(instance: &Value) -> Option<Member> {
    Some(Member {
        id: instance["id"].as_str()?.to_owned(),
        pid: instance["pid"].as_i64()?.try_into().ok()?,
    })
    .filter(|_| instance["state"] == "Running")
}

/// Lets a guest write; why it did not.
fn write(world: &World, id: &str) -> Result<(), String> {
    let command = format!("write 0 {WRITTEN} 42");
    match guest_console::ask_for(&world.client, id, &command, "written") {
        Ok(written) if written == WRITTEN.to_string() => Ok(()),
        Ok(written) => Err(format!("{id} wrote {written} pages")),
        Err(error) => Err(report::chain(&error)),
    }
}
