//! What is shown: the tables on the terminal, and the section of docs/benchmarks.md.

use super::asking::Forked;
use super::charts::{LATENCY, MEMORY_USE};
use super::figures::{FEW, Findings, Kind, MANY, RUN, Series, Setting, VM, WORK};
use super::fleet::{Fleet, WRITTEN};
use super::world::place;
use super::{LARGE, MEMORY, SMALL};
use crate::bench::grid::Grid;
use crate::bench::rows::{Quantiles, Row, count, milliseconds};
use crate::bench::{Conditions, document};
use crate::report;

/// Until the guests ran, beside the kernel alone.
fn until_run(findings: &Findings) -> Grid {
    let mut grid = Grid::new(&[
        "ms, until the guest runs",
        "t_vm p50",
        "t_run p50",
        "p90",
        "p99",
        "max",
        "the last of a request, p50",
        "n",
    ]);
    let mut row = |name, vm: String, run: Quantiles, last: String| {
        let cells = [vm]
            .into_iter()
            .chain(quantiles(run))
            .chain([last, run.n.to_string()]);
        grid.rows.push([name].into_iter().chain(cells).collect());
    };
    for floor in &findings.floors {
        row(floor.row().name, String::new(), floor.total(), String::new());
    }
    for series in &findings.series {
        let last = match series.setting {
            Setting::AtOnce(_) => shown(series.all_run().p50),
            _ => String::new(),
        };
        let vm = shown(series.time(VM).p50);
        row(series.name(), vm, series.time(RUN), last);
    }
    grid
}

/// Until the guests had answered.
fn until_answered(findings: &Findings) -> Grid {
    let mut grid = Grid::new(&[
        "ms, until the guest answers",
        "t_ready p50",
        "reply p50",
        "t_work p50",
        "p90",
        "p99",
        "max",
        "n",
    ]);
    for series in &findings.series {
        let ready = match series.setting {
            Setting::Single => shown(series.ready().p50),
            _ => String::new(),
        };
        let work = series.time(WORK);
        let cells = [series.name(), ready, shown(series.reply().p50)];
        let cells = cells
            .into_iter()
            .chain(quantiles(work))
            .chain([work.n.to_string()]);
        grid.rows.push(cells.collect());
    }
    grid
}

fn quantiles(of: Quantiles) -> [String; 4] {
    [of.p50, of.p90, of.p99, of.max].map(shown)
}

fn shown(value: f64) -> String {
    format!("{value:.2}")
}

/// The other calls, side by side.
fn growth(findings: &Findings) -> Grid {
    let mut grid = Grid::new(&["ms, p50", "10 instances", "10,000", "ratio"]);
    let mut row = |name: String, few: f64, many: f64| {
        let cells = [few, many, many / few].map(|value| format!("{value:.2}"));
        grid.rows.push([name].into_iter().chain(cells).collect());
    };
    for kind in Kind::BOTH {
        let run = |instances| {
            let setting = Setting::Instances(instances);
            findings.of(kind, MEMORY, setting, |series| series.time(RUN)).p50
        };
        row(format!("{} fork, to t_run", kind.name()), run(FEW), run(MANY));
    }
    for few in findings.calls.iter().filter(|call| call.instances == FEW) {
        let many = findings
            .calls
            .iter()
            .find(|call| call.instances == MANY && call.name == few.name);
        let many = many.map_or(f64::NAN, |call| call.quantiles().p50);
        row(few.name.to_owned(), few.quantiles().p50, many);
    }
    grid
}

fn fleet(fleet: &Fleet) -> Grid {
    let mut grid = Grid::new(&["", "unit", "p50", "max", "n"]);
    for Row {
        name,
        unit,
        quantiles,
    } in fleet.rows()
    {
        let values = [quantiles.p50, quantiles.max].map(|value| format!("{value:.0}"));
        let cells = [name, unit.to_owned()].into_iter().chain(values);
        grid.rows.push(cells.chain([quantiles.n.to_string()]).collect());
    }
    grid
}

impl Findings {
    /// To the terminal.
    pub(in crate::bench) fn print(&self) {
        println!("\n{}", until_run(self).terminal());
        println!("{}", until_answered(self).terminal());
        println!("{}", growth(self).terminal());
        println!("{}", fleet(&self.fleet).terminal());
        let marks = [report::mark(true), report::mark(false)];
        println!("{}", Grid::of_targets(&self.targets(), marks).terminal());
        for line in self.breakdown() {
            println!("- {line}");
        }
        for warning in self.warnings() {
            println!("{warning}");
        }
    }

    /// What a reader must know to trust the figures.
    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        for series in &self.series {
            let [armed, all] = series.armed();
            let expected = match series.kind {
                Kind::Cold => 0,
                Kind::Armed => all,
            };
            if armed != expected && series.setting != Setting::BackToBack {
                warnings.push(format!("{}: {armed} of {all} had been prepared.", series.name()));
            }
        }
        if let Some(failure) = &self.fleet.failure {
            let failures = self.fleet.failures;
            warnings.push(format!(
                "{failures} of the live forks failed; the first: {failure}"
            ));
        }
        warnings
    }

    /// Where time and memory go, in sentences.
    fn breakdown(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for floor in &self.floors {
            let phases = floor
                .phases
                .iter()
                .map(|(name, times)| (name.clone(), Quantiles::of(times.iter().copied()).p50));
            lines.push(format!("{}: {}.", floor.row().name, told(phases)));
        }
        for (memory, setting) in [
            (MEMORY, Setting::Single),
            (LARGE, Setting::Single),
            (MEMORY, Setting::AtOnce(100)),
        ] {
            for kind in Kind::BOTH {
                if let Some(series) = self.series_of(kind, memory, setting) {
                    lines.extend(of_time(series));
                }
            }
        }
        let large = |kind| {
            let run = |memory| {
                self.of(kind, memory, Setting::Single, |series| series.time(RUN))
                    .p50
            };
            run(LARGE) - run(SMALL)
        };
        let slots = |memory| {
            let floor = self.floors.iter().find(|floor| floor.memory == memory);
            floor.map_or(f64::NAN, |floor| floor.memory_slots().p50)
        };
        lines.push(format!(
            "8 GiB take {:.2} ms longer to t_run than 128 MiB in a cold fork, {:.2} ms in an armed one, {:.2} ms in the kernel \
             alone, where {:.2} ms of it are KVM's tables for the memory (KVM_SET_USER_MEMORY_REGION).",
            large(Kind::Cold),
            large(Kind::Armed),
            self.floor(LARGE).p50 - self.floor(SMALL).p50,
            slots(LARGE) - slots(SMALL),
        ));
        if let Some(series) = self.series_of(Kind::Armed, MEMORY, Setting::BackToBack) {
            let [armed, all] = series.armed();
            lines.push(format!(
                "Back to back, {armed} of {all} forks were prepared when they were asked for."
            ));
        }
        lines.extend(of_memory(&self.fleet));
        lines
    }
}

/// What a fork's time goes into.
fn of_time(series: &Series) -> [String; 2] {
    let name = series.name();
    let before = match series.kind {
        Kind::Cold => "",
        Kind::Armed => " (before the request)",
    };
    [
        format!(
            "{name}, the server's phases: {}; the reply comes after {:.2} ms, of which {:.2} are in none of them.",
            told(series.phases(phases_of)),
            series.reply().p50,
            series.outside_phases().p50
        ),
        format!(
            "{name}, the VMM's restore{before}: {}.",
            told(series.phases(restore_of))
        ),
    ]
}

fn phases_of(fork: &Forked) -> &[(String, f64)] {
    &fork.phases
}

fn restore_of(fork: &Forked) -> &[(String, f64)] {
    &fork.restore
}

/// `spawn 0.61, restore 1.20 ms`.
fn told(phases: impl IntoIterator<Item = (String, f64)>) -> String {
    let phases: Vec<String> = phases
        .into_iter()
        .map(|(name, time)| format!("{name} {time:.2}"))
        .collect();
    phases.join(", ") + " ms"
}

/// What the live forks' memory is.
fn of_memory(fleet: &Fleet) -> Vec<String> {
    let kibibytes = |bytes: f64| format!("{:.0} KiB", bytes / 1024.0);
    let forks = count(fleet.vmms.len() as u64);
    let private: Vec<String> = fleet
        .middle
        .iter()
        .filter(|(_, bytes)| **bytes > 0)
        .map(|(what, bytes)| format!("{what} {}", kibibytes(count(*bytes))))
        .collect();
    let kernel: Vec<String> = fleet
        .kernel
        .iter()
        .map(|(kind, bytes)| format!("{kind} {}", kibibytes(bytes / forks)))
        .collect();
    vec![
        format!(
            "Private memory of the VMM in the middle: {}; page tables {} in the mean. Its guest has written {WRITTEN} pages, {}.",
            private.join(", "),
            kibibytes(count(fleet.sum(|held| held.page_tables)) / forks),
            kibibytes(count(WRITTEN * 4096)),
        ),
        format!(
            "For each live fork the host has {:.0} KiB less available. By kinds of /proc/meminfo, for each fork: {}.",
            fleet.taken_kib(),
            kernel.join(", ")
        ),
        format!(
            "The calls for {} forks took {:.1} s, {:.1} ms a fork, and their guests' writes {:.1} s.",
            fleet.asked,
            fleet.calls.as_secs_f64(),
            milliseconds(fleet.calls) / forks,
            fleet.writes.as_secs_f64()
        ),
    ]
}

/// The section of docs/benchmarks.md.
pub(super) fn section(conditions: &Conditions, findings: &Findings) -> String {
    let targets = findings.targets();
    let warnings: String = findings
        .warnings()
        .iter()
        .map(|warning| format!("**{warning}**\n\n"))
        .collect();
    format!(
        "## Forks: from the request to the guest's answer\n\n\
        {conditions}\n\n\
        The server is asked over its socket, on a connection that is there already, for forks of templates whose guest has booted and done \
        nothing else; hot pages are recorded. Each guest is asked a question and answers it. All by the clock of the host, \
        from the moment (t_request) at which the request begins to be sent: t_vm, the VMM lets the vCPU go on; t_run, the guest has \
        made its first exit, so it has executed; t_ready, its first line is in its console (of forks that were watched for it, \
        one of four, which count for nothing else); t_work, its answer to a question put after the server's reply is here. \
        A cold fork starts a process, an armed one was prepared before; the pool is refilled between the requests. \
        `kvm_floor` makes a VM like a fork's in one process, without server or VMM, until its guest has made its first exit. Forks and \
        `kvm_floor` are measured in turns. Many at once are asked for by one request; their questions are put by eight threads. \
        The servers' directories lie in {place}: on ext4, each of a fork's seven files takes up to a millisecond to make while the file \
        system remembers thousands of inodes that were deleted in the last minutes, such as those of a run before.\n\n\
        {warnings}\
        ![Distribution of times]({LATENCY})\n\n\
        {until_run}\n{until_answered}\n\
        ### With 10,000 instances on disk\n\n{growth}\n\
        ### Many live forks\n\n\
        Forks of one 512 MiB template, all alive at once. Each guest has run and written {WRITTEN} pages. Private is what no other process \
        has mapped, with the process's page tables; `MemAvailable` also has what the kernel takes for a VM.\n\n\
        ![Memory by number of forks]({MEMORY_USE})\n\n\
        {fleet}\n\
        ### Targets\n\n{targets}\n\
        Missed:\n\n{missed}\n\
        ### Where time and memory go\n\nMedians.\n\n{breakdown}\n",
        conditions = document::conditions(conditions),
        place = place().display(),
        until_run = until_run(findings).markdown(),
        until_answered = until_answered(findings).markdown(),
        growth = growth(findings).markdown(),
        fleet = fleet(&findings.fleet).markdown(),
        missed = document::missed(&targets),
        targets = Grid::of_targets(&targets, ["met", "missed"]).markdown(),
        breakdown = document::list(&findings.breakdown()),
    )
}
