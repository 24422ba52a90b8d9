//! The benchmark of memory: every way to restore, in turns, with the snapshot in the page cache and without.

use std::path::Path;

mod figures;
mod page_cache;
mod restores;
mod show;
mod sizes;
mod template;

use super::BenchError;
use super::{Conditions, Told, floor};
use crate::build::BuiltVmm;
use crate::interrupt::UndoneOnInterrupt;
use crate::{processes, report};
pub(super) use figures::Findings;
use figures::{Cache, Series};
use page_cache::Cached;
use restores::{Restores, Way};

/// Above this share of its pages in the page cache, the snapshot was not cold.
const COLD: f64 = 0.01;

/// How often in each round the kernel alone is measured.
const FLOOR_TIMES: usize = 10;

/// What there is to tell of it.
pub(super) fn tell(conditions: &Conditions, findings: &Findings) -> Told {
    Told {
        rows: findings.rows(),
        targets: findings.targets(),
        section: show::section(conditions, findings),
        drawings: Vec::new(),
    }
}

/// Does all of it, `rounds` times each.
pub(super) fn measure(built: &BuiltVmm, kvm_floor: &Path, rounds: usize) -> Result<Findings, BenchError> {
    let parent = std::env::temp_dir();
    let root = tempfile::Builder::new()
        .prefix("stencil-bench-")
        .tempdir_in(&parent)
        .map_err(|source| BenchError::Io {
            what: "make a directory in",
            path: parent,
            source,
        })?;
    let path = root.path().to_owned();
    let _undone = UndoneOnInterrupt::by(move || {
        processes::end_all_below(&path);
        let _ = std::fs::remove_dir_all(&path);
    });
    let mut restores = report::step("a guest has filled its 512 MiB; its snapshot is taken", || {
        Ok::<_, BenchError>(Restores {
            microvm: built.microvm.clone(),
            snapshot: template::filled(built, root.path())?,
            root: root.path().to_owned(),
            list: root.path().join("hot-pages"),
            right: Vec::new(),
        })
    })?;
    report::step("hot pages recorded", || restores.record())?;
    let (series, left_cached) = report::step("every way to restore measured, in turns", || {
        in_turns(&restores, rounds)
    })?;
    let sizes = report::step("restores of 128 MiB and of 8 GiB measured", || {
        sizes::measure(built, root.path(), rounds)
    })?;
    let floor = report::step("the same by the kernel alone", || {
        floor::measure(kvm_floor, rounds * FLOOR_TIMES, &[sizes::SMALL, sizes::LARGE])
    })?;
    let findings = Findings {
        series,
        sizes,
        left_cached: (left_cached > COLD).then_some(left_cached),
        floor,
    };
    clear(root)?;
    Ok(findings)
}

/// The ways that are tried without the page cache: `copy` reads all of it anyway, before the guest runs.
const COLD_WAYS: [Way; 4] = [Way::Cow, Way::CowHot, Way::Uffd, Way::UffdHot];

/// One run of each a round, so that noise comes to all; also the most that stayed in the page cache when it was emptied.
fn in_turns(restores: &Restores, rounds: usize) -> Result<(Vec<Series>, f64), BenchError> {
    let memory = Cached::open(&restores.snapshot.join("memory-ranges"))?;
    let mut warm = Way::ALL.map(|way| Series::new(Cache::Warm, way));
    let mut cold = COLD_WAYS.map(|way| Series::new(Cache::Cold, way));
    let mut left_cached = 0_f64;
    let bar = report::bar("restores", ((warm.len() + cold.len()) * rounds) as u64);
    for round in 0..rounds {
        memory.warm()?;
        for series in beginning_at(&mut warm, round) {
            series.runs.push(restores.measure(series.way)?);
            bar.inc(1);
        }
        for series in beginning_at(&mut cold, round) {
            left_cached = left_cached.max(memory.drop_pages()?);
            series.runs.push(restores.measure(series.way)?);
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok((warm.into_iter().chain(cold).collect(), left_cached))
}

/// All of them, each round beginning at another, so that none always follows the same one.
fn beginning_at(series: &mut [Series], round: usize) -> impl Iterator<Item = &mut Series> {
    let (before, from) = series.split_at_mut(round % series.len());
    from.iter_mut().chain(before)
}

/// Removes the directory; whatever still works in it is a failure.
fn clear(root: tempfile::TempDir) -> Result<(), BenchError> {
    let left = processes::working_below(root.path());
    processes::end_all_below(root.path());
    let path = root.path().to_owned();
    root.close().map_err(|source| BenchError::Io {
        what: "remove",
        path,
        source,
    })?;
    if left.is_empty() {
        return Ok(());
    }
    let left = left.into_iter().map(|found| format!("process {}", found.command));
    Err(BenchError::LeftBehind(left.collect()))
}
