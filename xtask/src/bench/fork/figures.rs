//! From what was measured to rows and targets.

use super::asking::{Asked, Forked, Watch};
use super::fleet::Fleet;
use super::{LARGE, MEMORY, MIB, SMALL};
use crate::bench::floor::Floor;
use crate::bench::rows::{Bound, Quantiles, Row, Target, count};

/// How many instances are on disk in the two servers that are compared.
pub(super) const FEW: u32 = 10;
pub(super) const MANY: u32 = 10_000;

/// How a fork is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A process is started for it.
    Cold,
    /// It was prepared.
    Armed,
}

impl Kind {
    pub(super) const BOTH: [Self; 2] = [Self::Cold, Self::Armed];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Armed => "armed",
        }
    }
}

/// Under which circumstances forks were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Setting {
    /// One by one, and the pool was full each time.
    Single,
    /// So many by one request.
    AtOnce(u32),
    /// One by one, with so many instances on disk.
    Instances(u32),
    /// One after the other, without waiting for the pool.
    BackToBack,
}

/// Forks of one kind under the same circumstances.
#[derive(Clone, Debug)]
pub(super) struct Series {
    pub(super) kind: Kind,
    /// Of each guest, in bytes.
    pub(super) memory: u64,
    pub(super) setting: Setting,
    asked: Vec<Asked>,
    /// Forks that were watched, which is a little in the way: only their first lines are told of.
    watched: Vec<Forked>,
}

/// A time of a fork, in milliseconds since its request.
pub(super) type Time = fn(&Forked) -> f64;

/// The times that are told of each fork.
const TIMES: [(&str, Time); 3] = [("t_vm", VM), ("t_run", RUN), ("t_work", WORK)];
pub(super) const VM: Time = |fork| fork.vm;
pub(super) const RUN: Time = |fork| fork.run;
pub(super) const WORK: Time = |fork| fork.work;

impl Series {
    pub(super) fn new(kind: Kind, memory: u64, setting: Setting) -> Self {
        Self {
            kind,
            memory,
            setting,
            asked: Vec::new(),
            watched: Vec::new(),
        }
    }

    pub(super) fn add(&mut self, asked: Asked, watch: Watch) {
        match watch {
            Watch::Yes => self.watched.extend(asked.forks),
            Watch::No => self.asked.push(asked),
        }
    }

    pub(super) fn name(&self) -> String {
        let of = format!("{} fork of {} MiB", self.kind.name(), self.memory / MIB);
        match self.setting {
            Setting::Single => of,
            Setting::AtOnce(number) => format!("{of}, {number} at once"),
            Setting::Instances(number) => format!("{of}, {number} instances on disk"),
            Setting::BackToBack => format!("{of}, back to back"),
        }
    }

    pub(super) fn forks(&self) -> impl Iterator<Item = &Forked> {
        self.asked.iter().flat_map(|asked| &asked.forks)
    }

    pub(super) fn time(&self, time: Time) -> Quantiles {
        Quantiles::of(self.forks().map(time))
    }

    /// The first line.
    pub(super) fn ready(&self) -> Quantiles {
        Quantiles::of(self.watched.iter().filter_map(|fork| fork.ready))
    }

    /// The answer to the request.
    pub(super) fn reply(&self) -> Quantiles {
        Quantiles::of(self.asked.iter().map(|asked| asked.reply))
    }

    /// What of the reply's time is in none of the server's phases: the request and the reply on their ways.
    pub(super) fn outside_phases(&self) -> Quantiles {
        let phases = |fork: &Forked| fork.phases.iter().map(|(_, time)| time).sum::<f64>();
        let longest = |asked: &Asked| asked.forks.iter().map(phases).fold(0.0, f64::max);
        Quantiles::of(self.asked.iter().map(|asked| asked.reply - longest(asked)))
    }

    /// When all forks of a request ran.
    pub(super) fn all_run(&self) -> Quantiles {
        Quantiles::of(self.asked.iter().map(Asked::all_run))
    }

    /// How many of the forks had been prepared, and of how many.
    pub(super) fn armed(&self) -> [usize; 2] {
        [
            self.forks().filter(|fork| fork.armed).count(),
            self.forks().count(),
        ]
    }

    /// The middle of each phase that `of` tells of, in the order in which they come.
    pub(super) fn phases(&self, of: fn(&Forked) -> &[(String, f64)]) -> Vec<(String, f64)> {
        let names = self.forks().next().map_or(&[][..], of);
        let middle = |name: &str| {
            let times = self.forks().flat_map(of).filter(|(found, _)| found == name);
            Quantiles::of(times.map(|(_, time)| *time)).p50
        };
        names
            .iter()
            .map(|(name, _)| (name.clone(), middle(name)))
            .collect()
    }

    fn rows(&self) -> Vec<Row> {
        let name = self.name();
        let row = |what: &str, quantiles| Row {
            name: format!("{name}: request to {what}"),
            unit: "ms",
            quantiles,
        };
        let mut rows: Vec<Row> = TIMES
            .into_iter()
            .map(|(what, time)| row(what, self.time(time)))
            .collect();
        rows.push(row("reply", self.reply()));
        if self.setting == Setting::Single {
            rows.push(row("t_ready", self.ready()));
        }
        if matches!(self.setting, Setting::AtOnce(_)) {
            rows.push(row("t_run of the last", self.all_run()));
        }
        rows
    }
}

/// A call beside forks. Times are in milliseconds.
#[derive(Clone, Debug)]
pub(super) struct Call {
    pub(super) name: &'static str,
    /// On disk.
    pub(super) instances: u32,
    pub(super) times: Vec<f64>,
}

impl Call {
    pub(super) fn quantiles(&self) -> Quantiles {
        Quantiles::of(self.times.iter().copied())
    }
}

/// All that a run of the benchmark found.
#[derive(Debug)]
pub(in crate::bench) struct Findings {
    /// The kernel alone.
    pub(super) floors: Vec<Floor>,
    pub(super) series: Vec<Series>,
    pub(super) calls: Vec<Call>,
    pub(super) fleet: Fleet,
    /// Of the host.
    pub(super) cores: usize,
}

/// The most that is aimed at for the private memory of a fork, in KiB.
const PRIVATE: f64 = 768.0;
const PRIVATE_STRETCH: f64 = 256.0;

impl Findings {
    pub(super) fn series_of(&self, kind: Kind, memory: u64, setting: Setting) -> Option<&Series> {
        self.series
            .iter()
            .find(|series| series.kind == kind && series.memory == memory && series.setting == setting)
    }

    /// Quantiles of a series; not numbers where there is none.
    pub(super) fn of(
        &self,
        kind: Kind,
        memory: u64,
        setting: Setting,
        figure: impl Fn(&Series) -> Quantiles,
    ) -> Quantiles {
        self.series_of(kind, memory, setting)
            .map_or_else(|| Quantiles::of([]), figure)
    }

    /// The kernel alone, with so much memory.
    pub(super) fn floor(&self, memory: u64) -> Quantiles {
        let floor = self.floors.iter().find(|floor| floor.memory == memory);
        floor.map_or_else(|| Quantiles::of([]), Floor::total)
    }

    pub(super) fn rows(&self) -> Vec<Row> {
        let floors = self.floors.iter().map(Floor::row);
        let series = self.series.iter().flat_map(Series::rows);
        let calls = self.calls.iter().map(|call| Row {
            name: format!("{}, {} instances on disk", call.name, call.instances),
            unit: "ms",
            quantiles: call.quantiles(),
        });
        floors
            .chain(series)
            .chain(calls)
            .chain(self.fleet.rows())
            .collect()
    }

    pub(super) fn targets(&self) -> Vec<Target> {
        use Setting::{AtOnce, Instances, Single};
        let run = |kind, memory, setting| self.of(kind, memory, setting, |series| series.time(RUN));
        let floor = self.floor(MEMORY).p50;
        let mut targets = vec![
            Target::new(
                "armed fork, request to t_run, p50, to kvm_floor",
                run(Kind::Armed, MEMORY, Single).p50 / floor,
                Bound::AtMost(1.0),
            ),
            Target::new(
                "armed fork, request to t_run, p99, to kvm_floor",
                run(Kind::Armed, MEMORY, Single).p99 / floor,
                Bound::AtMost(3.0),
            ),
            Target::new(
                "cold fork, request to t_run, p50, to kvm_floor",
                run(Kind::Cold, MEMORY, Single).p50 / floor,
                Bound::AtMost(3.0),
            ),
        ];
        for kind in Kind::BOTH {
            targets.push(Target::new(
                format!("{} fork of 8 GiB, to one of 128 MiB, t_run, p50", kind.name()),
                run(kind, LARGE, Single).p50 / run(kind, SMALL, Single).p50,
                Bound::AtMost(1.1),
            ));
        }
        let shared = floor * 100.0 / count(self.cores as u64);
        for kind in Kind::BOTH {
            let last = self.of(kind, MEMORY, AtOnce(100), Series::all_run);
            targets.push(Target::new(
                format!(
                    "100 {} forks by one call, t_run of the last, to 100 kvm_floor / cores",
                    kind.name()
                ),
                last.p50 / shared,
                Bound::AtMost(2.0),
            ));
        }
        for kind in Kind::BOTH {
            targets.push(Target::new(
                format!(
                    "{} fork with 10,000 instances on disk, to one with 10, t_run, p50",
                    kind.name()
                ),
                run(kind, MEMORY, Instances(MANY)).p50 / run(kind, MEMORY, Instances(FEW)).p50,
                Bound::AtMost(1.2),
            ));
        }
        let live = self.fleet.asked;
        targets.push(Target::new(
            format!("{live} live forks: failures"),
            count(u64::from(self.fleet.failures)),
            Bound::AtMost(0.0),
        ));
        let private = self.fleet.private_kib().max;
        for (name, most) in [("", PRIVATE), (", stretch", PRIVATE_STRETCH)] {
            targets.push(Target::new(
                format!("{live} live forks: private KiB of the largest, page tables counted{name}"),
                private,
                Bound::AtMost(most),
            ));
        }
        targets
    }
}
