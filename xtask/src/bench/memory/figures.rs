//! From runs to figures: rows, and the targets that they are held against.

use std::time::Duration;

use super::restores::{Measured, Way};
use super::sizes::{LARGE, OfSize, SMALL};
use super::template::MIB;
use crate::bench::floor::Floor;
use crate::bench::rows::{Bound, Quantiles, Row, Target, count, milliseconds};

/// Whether the snapshot was in the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cache {
    Warm,
    Cold,
}

impl Cache {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Warm => "warm",
            Self::Cold => "cold",
        }
    }
}

/// The runs of one way.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) cache: Cache,
    pub(super) way: Way,
    pub(super) runs: Vec<Measured>,
}

impl Series {
    pub(super) fn new(cache: Cache, way: Way) -> Self {
        Self {
            cache,
            way,
            runs: Vec::new(),
        }
    }

    pub(super) fn quantiles(&self, figure: impl Fn(&Measured) -> f64) -> Quantiles {
        Quantiles::of(self.runs.iter().map(figure))
    }
}

/// All that a run of the benchmark found.
#[derive(Debug)]
pub(in crate::bench) struct Findings {
    pub(super) series: Vec<Series>,
    pub(super) sizes: Vec<OfSize>,
    /// The share of the snapshot that could not be dropped from the page cache, if it was too much.
    pub(super) left_cached: Option<f64>,
    /// What the kernel alone takes for a VM of the small and of the large size.
    pub(super) floor: Vec<Floor>,
}

impl Findings {
    /// A figure of one way; not a number where it was not measured.
    pub(super) fn p50(&self, cache: Cache, way: Way, figure: impl Fn(&Measured) -> f64) -> f64 {
        let series = self
            .series
            .iter()
            .find(|series| series.cache == cache && series.way == way);
        series.map_or(f64::NAN, |series| series.quantiles(figure).p50)
    }

    pub(super) fn of_size(&self, way: Way, memory: u64, figure: impl Fn(&OfSize) -> &[Duration]) -> f64 {
        let found = self
            .sizes
            .iter()
            .find(|of_size| of_size.way == way && of_size.memory == memory);
        found.map_or(f64::NAN, |of_size| {
            Quantiles::of(figure(of_size).iter().copied().map(milliseconds)).p50
        })
    }

    /// A figure of the kernel alone, in milliseconds; not a number where it was not measured.
    pub(super) fn floor_of(&self, memory: u64, figure: impl Fn(&Floor) -> Quantiles) -> f64 {
        let found = self.floor.iter().find(|floor| floor.memory == memory);
        found.map_or(f64::NAN, |floor| figure(floor).p50)
    }

    pub(in crate::bench) fn rows(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        for series in &self.series {
            let about = format!("{} ({} page cache)", series.way.name(), series.cache.name());
            for (what, unit, figure) in [
                ("resume to done", "ms", run as fn(&Measured) -> f64),
                ("restore", "ms", restore),
                ("demand faults", "faults", |run| count(run.demand_faults)),
                ("prefetched", "pages", |run| count(run.prefetched)),
                ("prefetched as written", "pages", |run| {
                    count(run.prefetched_written)
                }),
                ("write-protect faults", "faults", |run| {
                    count(run.write_protect_faults)
                }),
                ("host page faults", "faults", |run| count(run.host_faults)),
                ("private memory", "MiB", private),
            ] {
                rows.push(Row {
                    name: format!("{about}: {what}"),
                    unit,
                    quantiles: series.quantiles(figure),
                });
            }
        }
        for of_size in &self.sizes {
            rows.push(Row {
                name: format!("{} of {} MiB: restore", of_size.way.name(), of_size.memory / MIB),
                unit: "ms",
                quantiles: Quantiles::of(of_size.restores.iter().copied().map(milliseconds)),
            });
        }
        rows.extend(self.floor.iter().map(Floor::row));
        rows
    }

    pub(in crate::bench) fn targets(&self) -> Vec<Target> {
        use Cache::{Cold, Warm};
        let target = |name: &str, value, bound| Target::new(name, value, bound);
        let ratio = |cache, way, to, figure: fn(&Measured) -> f64| {
            self.p50(cache, way, figure) / self.p50(cache, to, figure)
        };
        let faults = |run: &Measured| count(run.demand_faults);
        let mut targets = vec![
            target(
                "demand faults of uffd with hot pages, to those of uffd",
                ratio(Warm, Way::UffdHot, Way::Uffd, faults),
                Bound::AtMost(0.01),
            ),
            target(
                "time of uffd recording, to uffd",
                ratio(Warm, Way::UffdRecording, Way::Uffd, run),
                Bound::AtMost(1.25),
            ),
        ];
        // All memory is there in both; the one that is the faster of them is the harder to reach.
        for (resident, base) in [("copy", Way::Copy), ("cow with prefault", Way::CowResident)] {
            for (name, way, most) in [("cow", Way::CowHot, 1.05), ("uffd", Way::UffdHot, 1.10)] {
                targets.push(target(
                    &format!("time of {name} with hot pages, to {resident}"),
                    ratio(Warm, way, base, run),
                    Bound::AtMost(most),
                ));
            }
        }
        for (name, plain, hot) in [("uffd", Way::Uffd, Way::UffdHot), ("cow", Way::Cow, Way::CowHot)] {
            targets.push(target(
                &format!("cold: time of {name}, to {name} with hot pages"),
                ratio(Cold, plain, hot, run),
                Bound::AtLeast(3.0),
            ));
            targets.push(target(
                &format!("cold: restore and time of {name}, to those of {name} with hot pages"),
                ratio(Cold, plain, hot, whole),
                Bound::AtLeast(3.0),
            ));
        }
        for way in [Way::Cow, Way::Uffd] {
            let of = |memory| self.of_size(way, memory, |of_size| &of_size.restores);
            targets.push(target(
                &format!("restore of 8 GiB, to that of 128 MiB, in {}", way.name()),
                of(LARGE) / of(SMALL),
                Bound::AtMost(1.15),
            ));
        }
        targets
    }
}

pub(super) fn run(run: &Measured) -> f64 {
    milliseconds(run.run)
}

pub(super) fn restore(run: &Measured) -> f64 {
    milliseconds(run.restore)
}

pub(super) fn whole(run: &Measured) -> f64 {
    milliseconds(run.restore + run.run)
}

pub(super) fn private(run: &Measured) -> f64 {
    count(run.private_bytes) / count(MIB)
}
