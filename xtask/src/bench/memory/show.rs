//! What is shown: the tables on the terminal, and the section of docs/benchmarks.md.

use super::figures::{self, Cache, Findings};
use super::restores::{Measured, Way};
use super::sizes::{LARGE, SMALL};
use super::template::TOUCHED;
use crate::bench::Conditions;
use crate::bench::document;
use crate::bench::floor::Floor;
use crate::bench::grid::Grid;
use crate::bench::rows::count;
use crate::report;

fn ways(findings: &Findings) -> Grid {
    let mut grid = Grid::new(&[
        "way",
        "page cache",
        "restore ms",
        "run ms",
        "run max",
        "demand faults",
        "prefetched",
        "as written",
        "host faults",
        "private MiB",
    ]);
    for series in &findings.series {
        let p50 = |figure: fn(&Measured) -> f64| series.quantiles(figure).p50;
        grid.rows.push(vec![
            series.way.name().to_owned(),
            series.cache.name().to_owned(),
            format!("{:.1}", p50(figures::restore)),
            format!("{:.1}", p50(figures::run)),
            format!("{:.1}", series.quantiles(figures::run).max),
            format!("{:.0}", p50(|run| count(run.demand_faults))),
            format!("{:.0}", p50(|run| count(run.prefetched))),
            format!("{:.0}", p50(|run| count(run.prefetched_written))),
            format!("{:.0}", p50(|run| count(run.host_faults))),
            format!("{:.1}", p50(figures::private)),
        ]);
    }
    grid
}

fn sizes(findings: &Findings) -> Grid {
    let mut grid = Grid::new(&[
        "restore alone",
        "128 MiB ms",
        "8 GiB ms",
        "of it in KVM, 128 MiB",
        "8 GiB",
    ]);
    let mut floor = vec!["the kernel alone, until the guest has run".to_owned()];
    floor.extend([SMALL, LARGE].map(|memory| format!("{:.2}", findings.floor_of(memory, Floor::total))));
    floor.extend(
        [SMALL, LARGE].map(|memory| format!("{:.2}", findings.floor_of(memory, Floor::memory_slots))),
    );
    grid.rows.push(floor);
    for way in [Way::Cow, Way::Uffd] {
        let restore = |memory| findings.of_size(way, memory, |of_size| &of_size.restores);
        let machine = |memory| findings.of_size(way, memory, |of_size| &of_size.machines);
        let cells = [restore(SMALL), restore(LARGE), machine(SMALL), machine(LARGE)];
        let cells = cells.into_iter().map(|value| format!("{value:.2}"));
        grid.rows
            .push([way.name().to_owned()].into_iter().chain(cells).collect());
    }
    grid
}

impl Findings {
    /// To the terminal.
    pub(in crate::bench) fn print(&self) {
        println!("\n{}", ways(self).terminal());
        println!("{}", sizes(self).terminal());
        println!(
            "{}",
            Grid::of_targets(&self.targets(), [report::mark(true), report::mark(false)]).terminal()
        );
        println!("medians");
        if let Some(warning) = self.warning() {
            println!("{warning}");
        }
    }

    fn warning(&self) -> Option<String> {
        self.left_cached.map(|share| {
            format!(
                "The snapshot was not cold: {:.0} % of it stayed in the page cache when it was dropped.",
                share * 100.0
            )
        })
    }

    /// Where the time goes, in sentences.
    fn breakdown(&self) -> Vec<String> {
        let run = |cache, way| self.p50(cache, way, figures::run);
        let resident = run(Cache::Warm, Way::CowResident);
        let pages = count(TOUCHED);
        let each = |way| (run(Cache::Warm, way) - resident) * 1e3 / pages;
        let faults = |way| self.p50(Cache::Warm, way, |run| count(run.demand_faults));
        let mut lines = vec![
            format!(
                "With all memory there, {TOUCHED} pages take {:.1} ms after `copy`, and {resident:.1} ms where `cow` has mapped them all ahead: {:.1} us a page, which KVM takes to map a page that the host has, with some milliseconds of output.",
                run(Cache::Warm, Way::Copy),
                resident * 1e3 / pages
            ),
            format!(
                "Compared with the latter, a page costs {:+.1} us in `cow`, {:+.1} us in `uffd`, {:+.1} us while recording; with hot pages {:+.1} us in `cow`, {:+.1} us in `uffd`.",
                each(Way::Cow),
                each(Way::Uffd),
                each(Way::UffdRecording),
                each(Way::CowHot),
                each(Way::UffdHot)
            ),
            format!(
                "At the end of the work, {:.0} MiB are private in plain `uffd`, for 64 MiB that were touched: the rest was read around.",
                self.p50(Cache::Warm, Way::Uffd, figures::private)
            ),
            format!(
                "A demand fault brings {:.1} pages of the work in `uffd`, {:.1} while recording.",
                pages / faults(Way::Uffd),
                pages / faults(Way::UffdRecording)
            ),
        ];
        for (cache, way) in [
            (Cache::Warm, Way::CowHot),
            (Cache::Warm, Way::UffdHot),
            (Cache::Cold, Way::CowHot),
            (Cache::Cold, Way::UffdHot),
        ] {
            lines.push(format!(
                "{}, {} page cache: hot pages are there when the restore is done, which takes {:.1} ms, and {:.1} ms until the work is done.",
                way.name(),
                cache.name(),
                self.p50(cache, way, figures::restore),
                self.p50(cache, way, figures::whole)
            ));
        }
        for way in [Way::Cow, Way::Uffd] {
            let grown = |figure: fn(&super::sizes::OfSize) -> &[std::time::Duration]| {
                self.of_size(way, LARGE, figure) - self.of_size(way, SMALL, figure)
            };
            lines.push(format!(
                "8 GiB take {:.2} ms longer to restore in `{}` than 128 MiB; {:.2} ms of that pass while KVM makes its tables for the memory.",
                grown(|of_size| &of_size.restores),
                way.name(),
                grown(|of_size| &of_size.machines)
            ));
        }
        lines.push(format!(
            "The kernel alone, without a VMM, takes {:.2} ms for 128 MiB and {:.2} ms for 8 GiB, of which {:.2} and {:.2} ms are \
             its tables for the memory (KVM_SET_USER_MEMORY_REGION): no restore on this host grows by less.",
            self.floor_of(SMALL, Floor::total),
            self.floor_of(LARGE, Floor::total),
            self.floor_of(SMALL, Floor::memory_slots),
            self.floor_of(LARGE, Floor::memory_slots),
        ));
        lines
    }
}

/// The section of docs/benchmarks.md.
pub(in crate::bench) fn section(conditions: &Conditions, findings: &Findings) -> String {
    let targets = findings.targets();
    let warning = findings
        .warning()
        .map_or_else(String::new, |warning| format!("\n**{warning}**\n"));
    format!(
        "## Memory: a restored guest's first work\n\n\
        {conditions} {runs} runs of each way in turns.\n\n\
        A guest with 512 MiB, of which it has filled all, is snapshotted with its next work waiting: {TOUCHED} pages \
        (64 MiB) in four sweeps over the whole memory, 124 KiB from one page to the next. A new VMM restores it, and from \
        `vm.resume` on its work is timed until the guest has said the last sum, which is checked. Warm: the snapshot is in \
        the page cache; cold: it was dropped from it before the restore. Host faults are the page faults of the VMM's \
        process during the work, demand faults those that its page server answered; private memory is what is neither \
        shared nor a clean page of the snapshot; prefetched as written are hot pages that `cow` copied ahead. Medians, unless it says max.\n{warning}\n\
        {ways}\n{sizes}\n\
        ### Targets\n\n{targets}\n\
        Missed:\n\n{missed}\n\
        ### Where the time goes\n\n{breakdown}\n",
        conditions = document::conditions(conditions),
        runs = findings.series.first().map_or(0, |series| series.runs.len()),
        ways = ways(findings).markdown(),
        sizes = sizes(findings).markdown(),
        missed = document::missed(&targets),
        targets = Grid::of_targets(&targets, ["met", "missed"]).markdown(),
        breakdown = document::list(&findings.breakdown()),
    )
}
