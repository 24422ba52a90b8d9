//! docs/benchmarks.md: each benchmark owns the section between its two marks; all else is written by people, and kept.

use super::Conditions;
use super::rows::Target;
use crate::report;

/// What a document begins with that is not there yet.
const BEGINNING: &str = "# Benchmarks\n";

/// The first line of a benchmark's section.
fn begins(benchmark: &str) -> String {
    format!("<!-- from here to the next mark: written by `cargo xtask bench {benchmark}` -->\n")
}

/// The last line of it.
fn ends(benchmark: &str) -> String {
    format!("<!-- up to here: written by `cargo xtask bench {benchmark}` -->\n")
}

/// The document `before`, with `section` in the place of what this benchmark wrote last; at the end, if it never did.
pub(super) fn with_section(before: &str, benchmark: &str, section: &str) -> String {
    let (begins, ends) = (begins(benchmark), ends(benchmark));
    let section = format!("{begins}{section}{ends}");
    let parts = before.split_once(&begins).and_then(|(above, rest)| {
        let (_, below) = rest.split_once(&ends)?;
        Some((above, below))
    });
    match parts {
        Some((above, below)) => format!("{above}{section}{below}"),
        None if before.is_empty() => format!("{BEGINNING}\n{section}"),
        None => format!("{before}\n{section}"),
    }
}

/// When and where it was measured, in a line.
pub(super) fn conditions(conditions: &Conditions) -> String {
    let Conditions { host, load } = conditions;
    format!(
        "{date}, {cpu}, {cores} cores, {memory}, Linux {kernel}, KVM: {kvm}. Load of the host before {before}, after {after}. \
         Times of one host: trust the ratios.",
        date = jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC"),
        cpu = host.cpu,
        cores = host.cores,
        memory = report::bytes(host.memory_bytes),
        kernel = host.kernel,
        kvm = host.kvm,
        before = load[0],
        after = load[1],
    )
}

/// The targets that were missed, each in a line.
pub(super) fn missed(targets: &[Target]) -> String {
    let missed = targets.iter().filter(|target| !target.is_met());
    let missed: String = missed
        .map(|target| format!("- {}: {:.3}\n", target.name, target.value))
        .collect();
    if missed.is_empty() {
        "None.\n".to_owned()
    } else {
        missed
    }
}

/// Lines of a list.
pub(super) fn list(lines: &[String]) -> String {
    lines.iter().map(|line| format!("- {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_takes_the_place_of_the_one_before_and_all_else_stays() {
        let first = with_section("", "fork", "old\n");
        let both = with_section(&first, "memory", "of memory\n") + "\nby hand\n";
        let again = with_section(&both, "fork", "new\n");
        assert_eq!(again, both.replace("old\n", "new\n"));
        assert!(again.starts_with(BEGINNING) && again.ends_with("\nby hand\n"));
    }

    #[test]
    fn a_document_without_the_section_gets_it_at_its_end() {
        let found = with_section("# By hand\n", "fork", "figures\n");
        assert!(found.starts_with("# By hand\n"));
        assert!(found.ends_with(&format!("figures\n{}", ends("fork"))));
    }
}
