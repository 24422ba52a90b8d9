//! Forks on another hypervisor beside those on the microVM, and beside what that hypervisor takes by itself: all of them in
//! turns on one server, in one run.
//!
//! Each fork begins Paused and is then resumed, whatever runs it: that is what a fork needs whose guest cannot be told that
//! it is one. It runs when the answer to the second call is here.

mod bare;
mod show;

use std::time::Instant;

use serde_json::{Value, json};

use super::BenchError;
use super::world::World;
use crate::armed::was_armed;
use crate::bench::rows::{Bound, Quantiles, Row, Target, milliseconds};
use crate::bench::{Conditions, Told};
use crate::build::Built;
use crate::client::Connection;
use crate::guest_console::GuestConsole;
use crate::hypervisor::Hypervisor;
use crate::report;
use bare::{Bare, Restored};

/// The memory of each guest, in bytes, and how many of its pages it has written.
const MEMORY: u64 = 512 << 20;
const WRITTEN: u64 = 4096;

/// Forks of one kind.
#[derive(Debug)]
struct Line {
    name: String,
    hypervisor: &'static str,
    template: String,
    mode: &'static str,
    armed: bool,
    /// Whether its hypervisor records hot pages.
    records: bool,
    forks: Vec<Forked>,
}

/// Times of one fork, in milliseconds since its request.
#[derive(Debug)]
struct Forked {
    /// It is there, and paused.
    paused: f64,
    /// It has been resumed.
    running: f64,
    /// Its guest has answered a question.
    answered: f64,
    /// Its guest has read all pages that its template's has written.
    worked: f64,
    was_armed: bool,
    phases: Vec<(String, f64)>,
}

/// What a run has found.
#[derive(Debug)]
pub(in crate::bench) struct Findings {
    hypervisor: String,
    version: String,
    lines: Vec<Line>,
    bare: Vec<(&'static str, Vec<Restored>)>,
}

const MICROVM: &str = "microvm";
const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";
/// A time of a fork, in milliseconds since its request.
type Time = fn(&Forked) -> f64;
const RUNNING: Time = |fork| fork.running;
/// The mode that is held against the hypervisor's own work.
const COW: &str = "cow";

/// Measures all of it.
pub(in crate::bench) fn measure(
    built: &Built,
    binary: &std::path::Path,
    hypervisor: &Hypervisor,
    is_quick: bool,
) -> Result<Findings, BenchError> {
    let rounds = if is_quick { 5 } else { 40 };
    let world = World::start_with(built, hypervisor.serve_options.clone())?;
    let mut lines = lines(hypervisor);
    for line in &lines {
        report::step(&format!("a template for: {}", line.name), || line.prepare(&world))?;
    }
    let snapshot = snapshot_of(&world, &lines)?;
    let mut bare = Bare::MODES
        .into_iter()
        .filter(|mode| hypervisor.memory_modes.iter().any(|has| has == mode))
        .map(|mode| (mode, Vec::new()))
        .collect::<Vec<_>>();
    let by_itself = Bare::new(binary, &snapshot, world.server.scratch())?;
    report::step(
        &format!("{rounds} rounds, each with a fork of every kind"),
        || {
            let bar = report::bar("rounds", rounds);
            for _ in 0..rounds {
                for (mode, restored) in &mut bare {
                    restored.push(by_itself.restore(mode)?);
                }
                for line in &mut lines {
                    line.fork(&world)?;
                }
                bar.inc(1);
            }
            bar.finish_and_clear();
            Ok::<_, BenchError>(())
        },
    )?;
    let version = by_itself.version()?;
    for line in &lines {
        world.remove_template(&line.template)?;
    }
    world.server.finish()?;
    Ok(Findings {
        hypervisor: hypervisor.name.clone(),
        version,
        lines,
        bare,
    })
}

/// What is measured: the microVM, and the hypervisor in each of its memory modes; both also armed.
fn lines(hypervisor: &Hypervisor) -> Vec<Line> {
    let has = |mode: &&str| hypervisor.memory_modes.iter().any(|has| has == mode);
    let line = |of: &'static str, mode: &'static str, armed: bool| {
        let name = format!("{of}, {mode}{}", if armed { ", armed" } else { "" });
        Line {
            template: name.replace(", ", "-"),
            name,
            hypervisor: of,
            mode,
            armed,
            records: of == MICROVM || has(&"uffd"),
            forks: Vec::new(),
        }
    };
    let modes = ["copy", "ondemand", COW, "uffd"].into_iter().filter(&has);
    let of_it = modes.map(|mode| line(CLOUD_HYPERVISOR, mode, false));
    [
        line(MICROVM, COW, false),
        line(MICROVM, "uffd", false),
        line(MICROVM, COW, true),
    ]
    .into_iter()
    .chain(of_it)
    .chain([line(CLOUD_HYPERVISOR, COW, true)])
    .collect()
}

impl Line {
    /// Makes its template: a guest that has written its pages, with its hot pages recorded where they are.
    fn prepare(&self, world: &World) -> Result<(), BenchError> {
        let name = &self.template;
        world.boot(name, self.hypervisor, MEMORY)?;
        let mut guest = GuestConsole::open(&world.client, name)?;
        guest.ask(&format!("write 0 {WRITTEN} 7"))?;
        world.act(name, "standby")?;
        world.act(name, "promote-template")?;
        // The first fork records, where that is done, until it pauses.
        let asked = json!({"target_state": "Paused"});
        let first = world.expect(world.client.post(&format!("/instances/{name}/fork"), asked)?)?;
        let id = first["id"].as_str().unwrap_or_default().to_owned();
        world.act(&id, "resume")?;
        work(&mut GuestConsole::open(&world.client, &id)?)?;
        world.act(&id, "pause")?;
        if self.records {
            world.until_hot_pages(name)?;
        }
        world.delete(&[id])?;
        if self.armed { world.arm(name, 1) } else { Ok(()) }
    }

    fn fork(&mut self, world: &World) -> Result<(), BenchError> {
        if self.armed {
            world.until_armed(&self.template)?;
        }
        let mut connection = Connection::open(&world.server.data().join("stencil.sock"))?;
        let mut body = json!({"target_state": "Paused"});
        if self.mode != COW {
            body["memory_mode"] = json!(self.mode);
        }
        let path = format!("/instances/{}/fork", self.template);
        let asked = Instant::now();
        let forked = connection.post(&path, body)?;
        let paused = milliseconds(asked.elapsed());
        let forked = world.expect(forked)?;
        let id = forked["id"].as_str().unwrap_or_default().to_owned();
        let resumed = connection.post(&format!("/instances/{id}/resume"), Value::Null)?;
        let running = milliseconds(asked.elapsed());
        world.expect(resumed)?;
        let mut guest = GuestConsole::open(&world.client, &id)?;
        guest.ask("ping")?;
        let answered = milliseconds(asked.elapsed());
        work(&mut guest)?;
        let worked = milliseconds(asked.elapsed());
        world.delete(&[id])?;
        self.forks.push(Forked {
            paused,
            running,
            answered,
            worked,
            was_armed: was_armed(&forked),
            phases: super::asking::phases(&forked),
        });
        Ok(())
    }

    fn time(&self, time: Time) -> Quantiles {
        Quantiles::of(self.forks.iter().map(time))
    }
}

/// The guest reads all that its template's has written.
fn work(guest: &mut GuestConsole) -> Result<(), BenchError> {
    guest.ask(&format!("touch 0 {WRITTEN} 1"))?;
    Ok(())
}

/// The snapshot that the hypervisor's own work is measured with: that of its template in `cow`.
fn snapshot_of(world: &World, lines: &[Line]) -> Result<std::path::PathBuf, BenchError> {
    let template = lines
        .iter()
        .find(|line| line.hypervisor == CLOUD_HYPERVISOR && line.mode == COW && !line.armed)
        .map_or("", |line| line.template.as_str());
    let shown = world.get(template)?;
    let id = shown["id"].as_str().unwrap_or_default();
    Ok(world.server.instances().join(id).join("snapshot"))
}

impl Findings {
    fn line(&self, hypervisor: &str, mode: &str, armed: bool) -> Option<&Line> {
        self.lines
            .iter()
            .find(|line| line.hypervisor == hypervisor && line.mode == mode && line.armed == armed)
    }

    fn running(&self, hypervisor: &str, mode: &str, armed: bool) -> Quantiles {
        let line = self.line(hypervisor, mode, armed);
        line.map_or_else(|| Quantiles::of([]), |line| line.time(RUNNING))
    }

    /// The hypervisor's own spawn, restore and resume.
    fn bare(&self, mode: &str) -> Quantiles {
        let found = self.bare.iter().find(|(found, _)| *found == mode);
        Quantiles::of(
            found
                .iter()
                .flat_map(|(_, restored)| restored)
                .map(Restored::total),
        )
    }

    pub(in crate::bench) fn rows(&self) -> Vec<Row> {
        let times: [(&str, Time); 4] = [
            ("paused", |fork| fork.paused),
            ("running", RUNNING),
            ("answer", |fork| fork.answered),
            ("work done", |fork| fork.worked),
        ];
        let of_line = |line: &Line| {
            times.map(|(what, time)| Row {
                name: format!("{}: request to {what}", line.name),
                unit: "ms",
                quantiles: line.time(time),
            })
        };
        let bare = self.bare.iter().map(|(mode, _)| Row {
            name: format!("{} by itself, {mode}: spawn, restore and resume", self.hypervisor),
            unit: "ms",
            quantiles: self.bare(mode),
        });
        bare.chain(self.lines.iter().flat_map(of_line)).collect()
    }

    pub(in crate::bench) fn targets(&self) -> Vec<Target> {
        vec![
            Target::new(
                format!(
                    "{} in cow, request to running, p50, less its own spawn, restore and resume, ms",
                    self.hypervisor
                ),
                self.running(CLOUD_HYPERVISOR, COW, false).p50 - self.bare(COW).p50,
                Bound::AtMost(1.0),
            ),
            Target::new(
                format!("{} armed, request to running, p50, ms", self.hypervisor),
                self.running(CLOUD_HYPERVISOR, COW, true).p50,
                Bound::AtMost(3.0),
            ),
        ]
    }
}

/// What there is to tell of it.
pub(in crate::bench) fn tell(conditions: &Conditions, findings: &Findings) -> Told {
    Told {
        rows: findings.rows(),
        targets: findings.targets(),
        section: show::section(conditions, findings),
        drawings: Vec::new(),
    }
}
