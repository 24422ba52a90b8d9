//! What a call costs with 10,000 instances on disk, against 10. They are stopped ones: records in the store's own form,
//! after the model of one that the server made, written while it is down.

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::Value;

use super::asking::{Watch, ask};
use super::figures::{Call, FEW, Kind, MANY, Series, Setting};
use super::world::World;
use super::{BenchError, Extent, MEMORY};
use crate::bench::rows::milliseconds;
use crate::build::Built;
use crate::report;

/// Digits of an id: Crockford's base 32.
const DIGITS: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// What was found.
#[derive(Debug)]
pub(super) struct Growth {
    pub(super) series: Vec<Series>,
    pub(super) calls: Vec<Call>,
}

/// A server, and what was measured on it.
struct Line {
    world: World,
    series: [Series; 2],
    calls: [Call; CALLS.len()],
}

/// What else is asked beside forks.
const CALLS: [&str; 4] = [
    "get a fork",
    "get its template, forks counted",
    "delete a fork",
    "list all",
];

pub(super) fn measure(built: &Built, extent: Extent) -> Result<Growth, BenchError> {
    let mut lines = report::step("servers with 10 and with 10,000 instances on disk", || {
        Ok::<_, BenchError>([Line::start(built, FEW)?, Line::start(built, MANY)?])
    })?;
    let times = extent.rounds * extent.singles;
    report::step("forks and other calls on both, in turns", || {
        let bar = report::bar("turns", times as u64);
        for turn in 0..times {
            // Neither always follows the other.
            let (before, from) = lines.split_at_mut(turn % 2);
            for line in from.iter_mut().chain(before) {
                line.turn(turn < extent.rounds)?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok::<_, BenchError>(())
    })?;
    let (mut series, mut calls) = (Vec::new(), Vec::new());
    for line in lines {
        for kind in Kind::BOTH {
            line.world.remove_template(kind.name())?;
        }
        // The stopped instances are no more than files, which go with the server's directory.
        line.world.terminate()?;
        series.extend(line.series);
        calls.extend(line.calls);
    }
    Ok(Growth { series, calls })
}

impl Line {
    fn start(built: &Built, instances: u32) -> Result<Self, BenchError> {
        let mut world = World::start(built)?;
        let model = world.create("model", MEMORY, false)?;
        world.server.terminate()?;
        let model = model["id"].as_str().unwrap_or_default();
        // The two templates count too.
        copy(&world.server.instances(), model, instances.saturating_sub(3))?;
        world.server.start_again()?;
        for kind in Kind::BOTH {
            world.template(kind.name(), MEMORY)?;
        }
        world.arm(Kind::Armed.name(), 1)?;
        Ok(Self {
            world,
            series: Kind::BOTH.map(|kind| Series::new(kind, MEMORY, Setting::Instances(instances))),
            calls: CALLS.map(|name| Call {
                name,
                instances,
                times: Vec::new(),
            }),
        })
    }

    /// One fork of each kind, and the other calls; all instances are listed only if `lists`.
    fn turn(&mut self, lists: bool) -> Result<(), BenchError> {
        let Self {
            world, series, calls, ..
        } = self;
        for series in series {
            let template = series.kind.name();
            let asked = ask(world, template, 1, Watch::No)?;
            let ids = asked.ids();
            let id = ids.first().map_or("", String::as_str);
            let [get, counted, deleted, listed] = &mut *calls;
            get.time(|| world.get(id).map(drop))?;
            counted.time(|| world.get(template).map(drop))?;
            if lists {
                listed.time(|| world.expect(world.client.get("/instances")?).map(drop))?;
            }
            deleted.time(|| world.delete(&ids))?;
            if series.kind == Kind::Armed {
                world.until_armed(template)?;
            }
            series.add(asked, Watch::No);
        }
        Ok(())
    }
}

impl Call {
    fn time(&mut self, call: impl FnOnce() -> Result<(), BenchError>) -> Result<(), BenchError> {
        let began = Instant::now();
        call()?;
        self.times.push(milliseconds(began.elapsed()));
        Ok(())
    }
}

/// Writes `count` further instances after the model of the one with the id `model`.
fn copy(instances: &Path, model: &str, count: u32) -> Result<(), BenchError> {
    let path = instances.join(model).join("metadata.json");
    let io = |what, path: &Path| {
        let path = path.to_owned();
        move |source| BenchError::Io { what, path, source }
    };
    let text = fs::read(&path).map_err(io("read", &path))?;
    let mut metadata: Value =
        serde_json::from_slice(&text).map_err(|error| io("read", &path)(error.into()))?;
    for number in 0..count {
        let id = sibling(model, number);
        metadata["id"] = id.clone().into();
        metadata["name"] = format!("stopped-{number}").into();
        metadata["generation"] = format!("{number:032x}").into();
        let directory = instances.join(&id);
        fs::create_dir(&directory).map_err(io("make", &directory))?;
        let path = directory.join("metadata.json");
        fs::write(&path, metadata.to_string()).map_err(io("write", &path))?;
    }
    Ok(())
}

/// An id that differs from `id` in its last digits; ids of different numbers below 2^15 differ.
fn sibling(id: &str, number: u32) -> String {
    let digits = [number >> 10, number >> 5, number].map(|digits| {
        let digit = digits & 31;
        char::from(DIGITS[digit as usize])
    });
    // An id has 26 digits, and the one before the last three is made another than the model's.
    let (kept, changed) = id.split_at(id.len().saturating_sub(4));
    let other = if changed.starts_with('0') { '1' } else { '0' };
    kept.chars().chain([other]).chain(digits).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn siblings_all_differ_and_are_none_of_them_the_model() {
        let model = "01k9z0c8mn0000000000000000";
        let all: HashSet<String> = (0..MANY).map(|number| sibling(model, number)).collect();
        assert_eq!(all.len(), MANY as usize);
        assert!(!all.contains(model) && all.iter().all(|id| id.len() == model.len()));
    }
}
