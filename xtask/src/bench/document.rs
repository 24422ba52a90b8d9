//! What is shown: the tables on the terminal, and docs/benchmarks.md, which keeps its part that people write.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};

use super::figures::{self, Bound, Cache, Findings, Target, count};
use super::restores::{Measured, Way};
use super::sizes::{LARGE, SMALL};
use super::template::TOUCHED;
use crate::host::Host;
use crate::report;

/// The part between these two lines is written by people, and kept.
const KEPT: [&str; 2] = [
    "<!-- written by people from here -->",
    "<!-- written by people up to here -->",
];

/// A rule above, below and under the header.
const RULED: TableStyle = TableStyle::new()
    .top_border(LineStyle::none().fill('─').junction('─'))
    .header_separator(LineStyle::none().fill('─').junction('─'))
    .bottom_border(LineStyle::none().fill('─').junction('─'));

/// A table of texts: the first column to the left, the others to the right.
struct Grid {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Grid {
    fn new(header: &[&str]) -> Self {
        Self {
            header: header.iter().map(|&text| text.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    fn terminal(&self) -> String {
        let mut table = Table::new();
        table.load_style(RULED);
        table.set_header(&self.header).add_rows(&self.rows);
        for column in table.column_iter_mut().skip(1) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        table.to_string()
    }

    fn markdown(&self) -> String {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let rule = format!("|---|{}\n", "---:|".repeat(self.header.len().saturating_sub(1)));
        let rows: String = self.rows.iter().map(|row| line(row)).collect();
        line(&self.header) + &rule + &rows
    }
}

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

fn targets(targets: &[Target], marks: [&str; 2]) -> Grid {
    let mut grid = Grid::new(&["target", "is", "aim", ""]);
    for target in targets {
        let aim = match target.bound {
            Bound::AtMost(aim) => format!("at most {aim}"),
            Bound::AtLeast(aim) => format!("at least {aim}"),
        };
        let mark = marks[usize::from(!target.is_met())];
        grid.rows.push(vec![
            target.name.clone(),
            format!("{:.3}", target.value),
            aim,
            mark.to_owned(),
        ]);
    }
    grid
}

impl Findings {
    /// To the terminal.
    pub(super) fn print(&self) {
        println!("\n{}", ways(self).terminal());
        println!("{}", sizes(self).terminal());
        println!(
            "{}",
            targets(&self.targets(), [report::mark(true), report::mark(false)]).terminal()
        );
        println!(
            "medians; load of the host {} before, {} after",
            self.load[0], self.load[1]
        );
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
        lines
    }
}

/// The text of docs/benchmarks.md; `before` is what is there now.
pub(super) fn text(host: &Host, findings: &Findings, before: &str) -> String {
    let all = findings.targets();
    let missed: Vec<String> = all
        .iter()
        .filter(|target| !target.is_met())
        .map(|target| format!("- {}: {:.3}\n", target.name, target.value))
        .collect();
    let missed = if missed.is_empty() {
        "None.\n".to_owned()
    } else {
        missed.concat()
    };
    let breakdown: String = findings
        .breakdown()
        .iter()
        .map(|line| format!("- {line}\n"))
        .collect();
    let warning = findings
        .warning()
        .map_or_else(String::new, |warning| format!("\n**{warning}**\n"));
    format!(
        "# Benchmarks\n\n\
        Written by `cargo xtask bench memory`; only the part between the two marks is written by people, and kept.\n\n\
        {date}, {cpu}, {cores} cores, {memory}, Linux {kernel}, KVM: {kvm}. Load before {before_load}, after {after_load}; \
        {runs} runs of each way in turns. Times of one host: trust the ratios.\n\n\
        ## What is measured\n\n\
        A guest with 512 MiB, of which it has filled all, is snapshotted with its next work waiting: {TOUCHED} pages \
        (64 MiB) in four sweeps over the whole memory, 124 KiB from one page to the next. A new VMM restores it, and from \
        `vm.resume` on its work is timed until the guest has said the last sum, which is checked. Warm: the snapshot is in \
        the page cache; cold: it was dropped from it before the restore. Host faults are the page faults of the VMM's \
        process during the work, demand faults those that its page server answered; private memory is what is neither \
        shared nor a clean page of the snapshot; prefetched as written are hot pages that `cow` copied ahead. Medians, unless it says max.\n{warning}\n\
        {ways}\n{sizes}\n\
        ## Targets\n\n{targets}\n\
        Missed:\n\n{missed}\n\
        ## Where the time goes\n\n{breakdown}\n\
        {begin}\n{kept}{end}\n",
        date = jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
        cpu = host.cpu,
        cores = host.cores,
        memory = report::bytes(host.memory_bytes),
        kernel = host.kernel,
        kvm = host.kvm,
        before_load = findings.load[0],
        after_load = findings.load[1],
        runs = findings.series.first().map_or(0, |series| series.runs.len()),
        ways = ways(findings).markdown(),
        sizes = sizes(findings).markdown(),
        targets = targets(&all, ["met", "missed"]).markdown(),
        begin = KEPT[0],
        end = KEPT[1],
        kept = kept(before),
    )
}

/// What people have written, with the end of its last line.
fn kept(before: &str) -> &str {
    before
        .split_once(KEPT[0])
        .and_then(|(_, rest)| rest.split_once(KEPT[1]))
        .map_or("", |(kept, _)| kept.trim_start_matches('\n'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_people_wrote_is_kept_and_nothing_else() {
        let [begin, end] = KEPT;
        assert_eq!(kept(&format!("old\n{begin}\nby hand\n{end}\nold\n")), "by hand\n");
        assert_eq!(kept("no marks"), "");
        assert_eq!(kept(""), "");
    }
}
