//! Forks one by one and many at once, cold and armed, of small and large memory; in turns with the kernel alone.

use std::path::Path;

use super::asking::{Watch, ask};
use super::figures::{Kind, Series, Setting};
use super::world::World;
use super::{BenchError, Extent, LARGE, MEMORY, MIB, SMALL};
use crate::bench::floor::{self, Floor};
use crate::build::Built;
use crate::report;

const SIZES: [u64; 3] = [SMALL, MEMORY, LARGE];
/// Armed forks that are kept where they are taken back to back.
const KEPT: u32 = 4;
/// Of how many forks one is watched for its first line.
const WATCHED: usize = 4;

/// What was found.
#[derive(Debug)]
pub(super) struct Latency {
    pub(super) floors: Vec<Floor>,
    pub(super) series: Vec<Series>,
}

/// A template, and the forks of it.
struct Line {
    template: String,
    series: Series,
    /// Those that are still there: the kernel is busy for some 20 ms with a VM that goes, so they go after the round.
    alive: Vec<String>,
}

impl Line {
    fn new(kind: Kind, memory: u64) -> Self {
        Self {
            template: format!("{}-{}", kind.name(), memory / MIB),
            series: Series::new(kind, memory, Setting::Single),
            alive: Vec::new(),
        }
    }
}

pub(super) fn measure(built: &Built, kvm_floor: &Path, extent: Extent) -> Result<Latency, BenchError> {
    let world = World::start(built)?;
    let mut lines: Vec<Line> = SIZES
        .into_iter()
        .flat_map(|memory| Kind::BOTH.map(|kind| Line::new(kind, memory)))
        .collect();
    report::step(
        "templates of 128 MiB, 512 MiB and 8 GiB made, hot pages recorded",
        || {
            for line in &lines {
                world.template(&line.template, line.series.memory)?;
                if line.series.kind == Kind::Armed {
                    world.arm(&line.template, 1)?;
                }
            }
            Ok::<_, BenchError>(())
        },
    )?;
    let mut floors: Vec<Floor> = Vec::new();
    report::step("forks one by one, in turns with the kernel alone", || {
        let bar = report::bar("rounds", extent.rounds as u64);
        for _ in 0..extent.rounds {
            let more = floor::measure(kvm_floor, extent.singles, &SIZES)?;
            if floors.is_empty() {
                floors = more;
            } else {
                for (floor, more) in floors.iter_mut().zip(more) {
                    floor.extend(more);
                }
            }
            for number in 0..extent.singles {
                for line in &mut lines {
                    single(&world, line, number)?;
                }
            }
            for line in &mut lines {
                world.delete(&std::mem::take(&mut line.alive))?;
            }
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok::<_, BenchError>(())
    })?;
    let mut series: Vec<Series> = Vec::new();
    for (number, times) in [(16, extent.of_16), (100, extent.of_100)] {
        let what = format!("{number} forks by one request, {times} times");
        series.extend(report::step(&what, || at_once(&world, number, times))?);
    }
    let singles = extent.singles;
    series.push(report::step(
        "armed forks back to back, while the pool is refilled",
        || back_to_back(&world, singles),
    )?);
    for line in &lines {
        world.remove_template(&line.template)?;
    }
    world.server.finish()?;
    let singles = lines.into_iter().map(|line| line.series);
    Ok(Latency {
        floors,
        series: singles.chain(series).collect(),
    })
}

/// One fork by itself; every fourth is watched for its first line, and counts for that alone.
fn single(world: &World, line: &mut Line, number: usize) -> Result<(), BenchError> {
    let watch = if number.is_multiple_of(WATCHED) {
        Watch::Yes
    } else {
        Watch::No
    };
    let asked = ask(world, &line.template, 1, watch)?;
    line.alive.extend(asked.ids());
    if line.series.kind == Kind::Armed {
        world.until_armed(&line.template)?;
    }
    line.series.add(asked, watch);
    Ok(())
}

/// Many by one request, cold and armed in turns.
fn at_once(world: &World, number: u32, times: usize) -> Result<[Series; 2], BenchError> {
    let mut both = Kind::BOTH.map(|kind| Line {
        series: Series::new(kind, MEMORY, Setting::AtOnce(number)),
        ..Line::new(kind, MEMORY)
    });
    for _ in 0..times {
        for line in &mut both {
            // Armed while the other kind is asked for, they would take part in it.
            if line.series.kind == Kind::Armed {
                world.arm(&line.template, number)?;
            }
            let asked = ask(world, &line.template, number, Watch::No)?;
            if line.series.kind == Kind::Armed {
                world.arm(&line.template, 1)?;
            }
            world.delete(&asked.ids())?;
            line.series.add(asked, Watch::No);
        }
    }
    Ok(both.map(|line| line.series))
}

/// One request after the other, without waiting for the pool.
fn back_to_back(world: &World, times: usize) -> Result<Series, BenchError> {
    let mut line = Line::new(Kind::Armed, MEMORY);
    line.series.setting = Setting::BackToBack;
    world.arm(&line.template, KEPT)?;
    let mut ids = Vec::new();
    for _ in 0..times {
        let asked = ask(world, &line.template, 1, Watch::No)?;
        ids.extend(asked.ids());
        line.series.add(asked, Watch::No);
    }
    world.delete(&ids)?;
    Ok(line.series)
}
