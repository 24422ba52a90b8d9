//! All checks and tests, each within a time limit; the last line says how many passed and failed.

use std::fmt;
use std::fs;
use std::ops::AddAssign;
use std::process::Command;
use std::time::Duration;

use tempfile::NamedTempFile;

use crate::command::{self, CommandError, Finished, Output};
use crate::{TaskError, build, guest, host, report, setup};

/// A look at files.
const SHORT: Duration = Duration::from_secs(2 * 60);
/// A cold build on a small host, and what is run after it.
const LONG: Duration = Duration::from_secs(30 * 60);
/// Names the file to which a test that this host cannot run adds a line (fixtures/skipped.rs). The harness would keep what it
/// says to itself, and count it among those that passed.
const SKIPPED: &str = "STENCIL_SKIPPED_TESTS";

/// How the tests of a step are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    /// It is one check.
    AsOne,
    /// By the lines of cargo's test harness.
    ByHarness,
    /// By the summary of nextest.
    ByNextest,
    /// By the last line of `e2e`.
    ByLastLine,
}

struct Step {
    name: &'static str,
    command: Command,
    limit: Duration,
    counted: Counted,
}

/// How many passed, failed, and could not be tried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: u64,
}

impl Tally {
    /// Those that said that they were skipped, which the harness has counted as passed.
    fn without_skipped(self, skipped: u64) -> Self {
        Self {
            passed: self.passed.saturating_sub(skipped),
            skipped: self.skipped + skipped,
            ..self
        }
    }
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)?;
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// The `ci` task; whether nothing failed.
pub(crate) fn run() -> Result<bool, TaskError> {
    setup::run()?;
    // Without KVM the demo has an act left, and the tests do not.
    host::try_kvm().map_err(setup::SetupError::from)?;
    // What is checked includes the guest as it is built.
    guest::build().map_err(|error| build::BuildError::Guest(error.into()))?;
    let mut total = Tally::default();
    let mut summary = Vec::new();
    for mut step in steps()? {
        println!("\n== {}", step.name);
        let skipped = NamedTempFile::new().map_err(TaskError::Scratch)?;
        step.command.env(SKIPPED, skipped.path());
        let finished = command::run(&mut step.command, step.limit, Output::Shown)?;
        let said = fs::read_to_string(skipped.path()).map_err(TaskError::Scratch)?;
        print!("{said}");
        let tally = tally(step.counted, &finished).without_skipped(said.lines().count() as u64);
        total += tally;
        let late = if finished.status.is_none() {
            format!(", ended after {} s", step.limit.as_secs())
        } else {
            String::new()
        };
        let took = report::duration(finished.took);
        summary.push(format!(
            "{} {:<28} {:>22}, {took}{late}",
            report::mark(tally.failed == 0),
            step.name,
            tally.to_string(),
        ));
    }
    println!("\n{}", summary.join("\n"));
    if total.skipped > 0 {
        println!("{} skipped: each has said why", total.skipped);
    }
    // The last line, for programs.
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(total.failed == 0)
}

fn steps() -> Result<Vec<Step>, TaskError> {
    // Where this program is now: building the tests puts another file into its place.
    let xtask = std::env::current_exe().map_err(|source| CommandError::Run {
        program: "xtask".to_owned(),
        source,
    })?;
    let cargo = |arguments: &str| {
        let mut cargo = build::cargo();
        cargo.args(arguments.split(' '));
        cargo
    };
    let guest = |arguments: &str| {
        let mut cargo = cargo(arguments);
        cargo.current_dir(build::workspace().join("fixtures/guest"));
        cargo
    };
    let mut docs = cargo("doc --workspace --no-deps --locked");
    docs.env("RUSTDOCFLAGS", "-D warnings");
    let mut e2e = Command::new(&xtask);
    e2e.arg("e2e");
    let mut e2e_qemu = Command::new(&xtask);
    e2e_qemu.args(["e2e", "--hypervisor", "qemu"]);
    let has_nextest = command::run(&mut cargo("nextest --version"), SHORT, Output::Kept)
        .is_ok_and(|finished| finished.succeeded());
    let (tests, counted) = if has_nextest {
        (
            cargo("nextest run --workspace --locked --no-fail-fast"),
            Counted::ByNextest,
        )
    } else {
        (
            cargo("test --workspace --locked --all-targets --no-fail-fast"),
            Counted::ByHarness,
        )
    };
    let one = |name, command, limit| Step {
        name,
        command,
        limit,
        counted: Counted::AsOne,
    };
    Ok(vec![
        one("format", cargo("fmt --all --check"), SHORT),
        one("format of the guest", guest("fmt --check"), SHORT),
        one(
            "clippy",
            cargo("clippy --workspace --all-targets --locked -- -D warnings"),
            LONG,
        ),
        one(
            "clippy of the guest",
            guest(
                "clippy --locked --target-dir ../../target/guest --target x86_64-unknown-linux-gnu -- -D warnings",
            ),
            LONG,
        ),
        one("documentation", docs, LONG),
        Step {
            name: "unit tests",
            command: tests,
            limit: LONG,
            counted,
        },
        Step {
            name: "documentation tests",
            command: cargo("test --workspace --locked --doc --no-fail-fast"),
            limit: LONG,
            counted: Counted::ByHarness,
        },
        one("release build of the server", build::release_server(), LONG),
        one("release build of the microVM", build::release_microvm(), LONG),
        one("release build of the agent", build::release_agent(), LONG),
        Step {
            name: "end-to-end scenarios",
            command: e2e,
            limit: LONG,
            counted: Counted::ByLastLine,
        },
        Step {
            name: "the same on QEMU, and Linux",
            command: e2e_qemu,
            limit: LONG,
            counted: Counted::ByLastLine,
        },
    ])
}

/// What a step counts for. One that did not succeed counts as a failure, whatever it printed.
fn tally(counted: Counted, finished: &Finished) -> Tally {
    let mut tally = match counted {
        Counted::AsOne => Tally {
            passed: finished.succeeded().into(),
            ..Tally::default()
        },
        Counted::ByHarness => by_harness(&finished.output),
        Counted::ByNextest => by_nextest(&finished.output),
        Counted::ByLastLine => finished.output.lines().last().map(counts).unwrap_or_default(),
    };
    if !finished.succeeded() && tally.failed == 0 {
        tally.failed = 1;
    }
    tally
}

/// `test result: ok. 3 passed; 0 failed; 1 ignored; ...`, a line for each binary.
fn by_harness(output: &str) -> Tally {
    let mut sum = Tally::default();
    for line in output.lines().filter(|line| line.starts_with("test result:")) {
        sum += counts(line);
    }
    sum
}

/// `Summary [   0.1s] 4 tests run: 2 passed (1 slow), 1 failed, 1 timed out, 0 skipped`.
fn by_nextest(output: &str) -> Tally {
    let summary = output
        .lines()
        .rfind(|line| line.trim_start().starts_with("Summary ["));
    let run = summary.and_then(|line| Some(line.split_once("run:")?.1));
    run.map(counts).unwrap_or_default()
}

/// The numbers before `passed`, `skipped`, and words for failures.
fn counts(line: &str) -> Tally {
    let words: Vec<&str> = line
        .split(|character: char| !character.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .collect();
    words.windows(2).fold(Tally::default(), |mut tally, pair| {
        let number = pair[0].parse().unwrap_or(0);
        match pair[1] {
            "passed" => tally.passed += number,
            // nextest: "1 timed out", "1 exec failed".
            "failed" | "timed" | "exec" => tally.failed += number,
            // The harness: "1 ignored".
            "skipped" | "ignored" => tally.skipped += number,
            _ => {}
        }
        tally
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(passed: u64, failed: u64, skipped: u64) -> Tally {
        Tally {
            passed,
            failed,
            skipped,
        }
    }

    #[test]
    fn the_harness_is_counted_over_all_binaries() {
        let output = "running 3 tests\ntest result: ok. 3 passed; 0 failed; 1 ignored\ntest result: FAILED. 2 passed; 1 failed; 0 ignored\n";
        assert_eq!(by_harness(output), of(5, 1, 1));
    }

    #[test]
    fn nextest_is_counted_by_its_summary() {
        let output = "  PASS [ 0.1s] a\n------\n     Summary [   0.1s] 5 tests run: 3 passed (1 slow), 1 failed, 1 timed out, 2 skipped\n";
        assert_eq!(by_nextest(output), of(3, 2, 2));
    }

    #[test]
    fn scenarios_are_counted_by_the_last_line() {
        assert_eq!(counts("12 passed, 1 failed, 1 skipped"), of(12, 1, 1));
    }

    #[test]
    fn a_test_that_says_that_it_was_skipped_has_not_passed() {
        let tally = of(12, 1, 1).without_skipped(2);
        assert_eq!(tally, of(10, 1, 3));
        assert_eq!(tally.to_string(), "10 passed, 1 failed, 3 skipped");
        assert_eq!(of(10, 0, 0).to_string(), "10 passed, 0 failed");
    }
}
