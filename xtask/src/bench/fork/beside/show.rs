//! The table on the terminal, and the section of docs/benchmarks.md.

use super::{CLOUD_HYPERVISOR, COW, Findings, MEMORY, RUNNING, Restored, Time, WRITTEN};
use crate::bench::fork::asking::middle_of_phases;
use crate::bench::rows::Quantiles;
use crate::bench::{Conditions, document, grid::Grid};
use crate::{host, report};

impl Findings {
    pub(in crate::bench) fn print(&self) {
        println!("\n{}", self.forks().terminal());
        let marks = [report::mark(true), report::mark(false)];
        println!("{}", Grid::of_targets(&self.targets(), marks).terminal());
        for line in self.breakdown() {
            println!("- {line}");
        }
    }

    fn forks(&self) -> Grid {
        let header = [
            "ms",
            "paused p50",
            "running p50",
            "p90",
            "p99",
            "answer p50",
            "work done p50",
            "n",
        ];
        let mut grid = Grid::new(&header);
        let cell = |value: f64| format!("{value:.2}");
        for (mode, _) in &self.bare {
            let own = self.bare(mode);
            let name = format!("{} by itself, {mode}", self.hypervisor);
            let [p50, p90, p99] = [own.p50, own.p90, own.p99].map(cell);
            grid.rows.push(vec![
                name,
                String::new(),
                p50,
                p90,
                p99,
                String::new(),
                String::new(),
                own.n.to_string(),
            ]);
        }
        for line in &self.lines {
            let p50 = |time: Time| cell(line.time(time).p50);
            let running = line.time(RUNNING);
            grid.rows.push(vec![
                line.name.clone(),
                p50(|fork| fork.paused),
                cell(running.p50),
                cell(running.p90),
                cell(running.p99),
                p50(|fork| fork.answered),
                p50(|fork| fork.worked),
                running.n.to_string(),
            ]);
        }
        grid
    }

    /// What the time goes into.
    fn breakdown(&self) -> Vec<String> {
        let mut lines = Vec::new();
        for (mode, restored) in &self.bare {
            let p50 = |step: fn(&Restored) -> f64| Quantiles::of(restored.iter().map(step)).p50;
            lines.push(format!(
                "{} by itself, {mode}: spawn {:.2}, restore {:.2}, resume {:.2} ms.",
                self.hypervisor,
                p50(|step| step.spawn),
                p50(|step| step.restore),
                p50(|step| step.resume),
            ));
        }
        for line in &self.lines {
            lines.push(format!(
                "{}, the server's phases until it is paused: {}.",
                line.name,
                middle_of_phases(line.forks.iter().map(|fork| &*fork.phases))
            ));
            if line.armed {
                let armed = line.forks.iter().filter(|fork| fork.was_armed).count();
                lines.push(format!(
                    "{}: {armed} of {} had been prepared.",
                    line.name,
                    line.forks.len()
                ));
            }
        }
        let [cow, own] = [self.running(CLOUD_HYPERVISOR, COW, false).p50, self.bare(COW).p50];
        lines.push(format!(
            "In cow, request to running is {:.2} times {}'s own spawn, restore and resume: {:+.2} ms.",
            cow / own,
            self.hypervisor,
            cow - own
        ));
        lines
    }
}

pub(super) fn section(conditions: &Conditions, findings: &Findings) -> String {
    let targets = findings.targets();
    let not_as_released = if host::has_hardware_kvm() {
        ""
    } else {
        " A released Cloud Hypervisor cannot write snapshots on a host with kvm-pvm: the one that was measured leaves the state of \
         nested virtualisation out of them, and is the release in all else."
    };
    format!(
        "## Forks on {name}, beside the microVM\n\n\
        {conditions}\n\n\
        {name} {version}.{not_as_released} Command: `cargo xtask bench fork --hypervisor {name} --cloud-hypervisor PATH`.\n\n\
        Forks of templates with {memory} whose guest has written {written}. Each is asked for Paused and then resumed, by two calls on a \
        connection that is there already, on either VMM: it runs when the second is answered. Then its guest is asked a question \
        (answer), and reads all pages that its template's guest had written (work done). Where a mode has hot pages they are known. \
        \"By itself\" is {name} without Stencil: the same binary is started, restores the same snapshot (in cow rewritten beforehand so \
        that its memory is mapped) and resumes it. All of this in turns, on one server.\n\n\
        {forks}\n\
        ### Targets\n\n{grid}\n\
        Missed:\n\n{missed}\n\
        ### Where the time goes\n\nMedians.\n\n{breakdown}\n",
        name = findings.hypervisor,
        version = findings.version,
        memory = report::bytes(MEMORY),
        written = report::bytes(WRITTEN * 4096),
        conditions = document::conditions(conditions),
        forks = findings.forks().markdown(),
        grid = Grid::of_targets(&targets, ["met", "missed"]).markdown(),
        missed = document::missed(&targets),
        breakdown = document::list(&findings.breakdown()),
    )
}
