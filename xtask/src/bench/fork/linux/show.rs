//! The tables on the terminal, and the section of docs/benchmarks.md.

use super::{ARMED, Findings, MEMORY, PROGRAMS, Times};
use crate::bench::fork::asking::middle_of_phases;
use crate::bench::{Conditions, document, grid::Grid};
use crate::report;

impl Findings {
    pub(in crate::bench) fn print(&self) {
        println!("\nQEMU {}, {}", self.version, self.accelerator);
        println!("{}", grid(self.of_forks()).terminal());
        println!("{}", grid(self.of_commands()).terminal());
        let marks = [report::mark(true), report::mark(false)];
        println!("{}", Grid::of_targets(&self.targets(), marks).terminal());
        for line in self.breakdown() {
            println!("- {line}");
        }
    }

    /// What the time goes into.
    fn breakdown(&self) -> Vec<String> {
        let phases = self.lines.iter().map(|line| {
            format!(
                "{} fork, the server's phases: {}.",
                line.name,
                middle_of_phases(line.forks.iter().map(|fork| &*fork.phases))
            )
        });
        let armed = &self.line(ARMED).forks;
        let prepared = armed.iter().filter(|fork| fork.was_armed).count();
        let told = [
            format!("{prepared} of {} armed forks had been prepared.", armed.len()),
            format!(
                "`true` by way of the agent takes {:.2} ms more than the guest's own fork and exec.",
                self.overhead()
            ),
        ];
        phases.chain(told).collect()
    }
}

fn grid(rows: Vec<Times>) -> Grid {
    let mut grid = Grid::new(&["ms", "p50", "p90", "p99", "max", "n"]);
    grid.rows = rows
        .into_iter()
        .map(|(name, found)| {
            let times = [found.p50, found.p90, found.p99, found.max].map(|time| format!("{time:.2}"));
            [name]
                .into_iter()
                .chain(times)
                .chain([found.n.to_string()])
                .collect()
        })
        .collect();
    grid
}

pub(super) fn section(conditions: &Conditions, findings: &Findings) -> String {
    let targets = findings.targets();
    format!(
        "## Forks of Linux on QEMU\n\n\
        {conditions}\n\n\
        QEMU {version}; its guests' instructions are executed by {accelerator}. Command: `cargo xtask bench fork --hypervisor qemu`.\n\n\
        Forks of a Linux with {memory} (Debian's cloud kernel, busybox, and the agent as init; `cargo xtask linux`) that has booted and \
        done nothing else, asked for on a connection that is there already. A fork is Running when the agent in its guest has \
        acknowledged the new epoch: only then is the answer given. The result of `echo` is that of one request which makes a \
        fork and runs the command in it. Cold and armed forks in turns, each when nothing else is being done; the pool of one armed fork \
        is refilled between the requests.\n\n\
        {forks}\n\
        A command in a fork that runs, many times. In the guest: from before the agent forks until it knows of the end. Beside it what the \
        guest takes by itself: its shell forks, executes `true` and waits for it, {programs} times in a row.\n\n\
        {commands}\n\
        ### Targets\n\n{targets_told}\n\
        Missed:\n\n{missed}\n\
        ### Where the time goes\n\nMedians.\n\n{breakdown}\n",
        conditions = document::conditions(conditions),
        version = findings.version,
        accelerator = findings.accelerator,
        memory = report::bytes(MEMORY),
        programs = PROGRAMS,
        forks = grid(findings.of_forks()).markdown(),
        commands = grid(findings.of_commands()).markdown(),
        targets_told = Grid::of_targets(&targets, ["met", "missed"]).markdown(),
        missed = document::missed(&targets),
        breakdown = document::list(&findings.breakdown()),
    )
}
