//! What people are shown: aligned columns without lines, and sentences.

mod images;

use std::collections::BTreeMap;
use std::time::Duration;

use bytesize::ByteSize;
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use jiff::Timestamp;
use stencil_api::reply::{Agent, AgentStatus, ForkList, ForkOutcome, Instance, MemoryUse, Timings};
use stencil_core::{DiskSpec, InstanceId, Readiness};

use crate::doctor::{Diagnosis, Mark};
use crate::output::one_line;

pub(crate) use images::{image, images};

/// What stands where there is nothing to tell.
const NOTHING_TO_TELL: &str = "-";

/// The list of instances; `elsewhere` has the names of templates that are not in it, and `now` is what ages are counted to.
pub(crate) fn instances(
    list: &[Instance],
    elsewhere: &BTreeMap<InstanceId, String>,
    now: Timestamp,
) -> String {
    if list.is_empty() {
        return "no instances".to_owned();
    }
    let mut table = plain(&["NAME", "ID", "STATE", "VCPUS", "MEMORY", "TEMPLATE", "AGE"]);
    let mut errors = String::new();
    for instance in list {
        let state = match &instance.forks {
            Some(forks) => format!("{} ({})", instance.state, count(forks.count, "fork")),
            None => instance.state.to_string(),
        };
        let template = instance.fork_of_template.map(|id| {
            // Most often the template is in the same list.
            list.iter()
                .find(|other| other.id == id)
                .map(name)
                .or_else(|| elsewhere.get(&id).cloned())
                .unwrap_or_else(|| id.to_string())
        });
        table.add_row([
            name(instance),
            instance.id.to_string(),
            state,
            or_nothing(instance.vcpus),
            or_nothing(instance.memory.map(bytes)),
            or_nothing(template),
            or_nothing(instance.created_at.map(|made| age(made, now))),
        ]);
        if let Some(error) = &instance.state_error {
            errors.push_str(&format!("\n{}: {}", name(instance), one_line(error)));
        }
    }
    align_right(&mut table, &[3, 4, 6]);
    // Reasons are sentences: below the table they do not tear it apart.
    table.trim_fmt() + &errors
}

/// What a host can do: a line for each thing, with what to do below it.
pub(crate) fn diagnosis(diagnosis: &Diagnosis) -> String {
    let width = diagnosis
        .findings
        .iter()
        .map(|finding| finding.about.len())
        .max()
        .unwrap_or(0);
    let mut told = String::new();
    for finding in &diagnosis.findings {
        let mark = match finding.mark {
            Mark::Good => "✓",
            Mark::Limited => "!",
            Mark::Missing => "✗",
        };
        told.push_str(&format!("{mark} {:width$}  {}\n", finding.about, finding.fact));
        if let Some(advice) = &finding.advice {
            told.push_str(&format!("  {:width$}  → {advice}\n", ""));
        }
    }
    told.push_str(if diagnosis.can_run_vms {
        "\nVMs can run on this host"
    } else {
        "\nno VM can run on this host"
    });
    told
}

/// One instance, a line for each of its facts.
pub(crate) fn instance(instance: &Instance) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    let mut line = |title: &str, fact: Option<String>| {
        if let Some(fact) = fact {
            table.add_row([title.to_owned(), fact]);
        }
    };
    line("name", instance.name.as_ref().map(ToString::to_string));
    line("id", Some(instance.id.to_string()));
    line("state", Some(instance.state.to_string()));
    line("state error", instance.state_error.as_deref().map(one_line));
    line("guest's end", instance.guest_end.as_deref().map(one_line));
    line(
        "hypervisor",
        instance.hypervisor.as_ref().map(ToString::to_string),
    );
    line("vcpus", instance.vcpus.map(|vcpus| vcpus.to_string()));
    line("memory", instance.memory.map(bytes));
    line("image", instance.image.as_ref().map(ToString::to_string));
    line(
        "kernel",
        instance
            .kernel
            .as_ref()
            .map(|kernel| kernel.display().to_string()),
    );
    line(
        "firmware",
        instance
            .firmware
            .as_ref()
            .map(|firmware| firmware.display().to_string()),
    );
    line("disks", instance.disks.as_deref().map(disks));
    line("ready when", instance.readiness.as_ref().map(readiness));
    line(
        "labels",
        instance
            .labels
            .as_ref()
            .filter(|labels| !labels.is_empty())
            .map(labels),
    );
    line("fork of", instance.fork_of_template.map(|id| id.to_string()));
    line(
        "forks",
        instance.forks.as_ref().map(|forks| {
            let ids: Vec<String> = forks.ids.iter().map(ToString::to_string).collect();
            if ids.is_empty() {
                "none".to_owned()
            } else {
                ids.join("\n")
            }
        }),
    );
    line(
        "armed forks",
        instance
            .armed
            .filter(|armed| armed.target > 0)
            .map(|armed| format!("{} of {}", armed.ready, armed.target)),
    );
    line("agent", instance.agent.as_ref().map(agent));
    line(
        "generation",
        instance.generation.map(|generation| generation.to_string()),
    );
    line(
        "memory mode",
        instance
            .memory_mode
            .map(|mode| match &instance.memory_mode_reason {
                None => mode.to_string(),
                Some(reason) => format!("{mode}; {reason}"),
            }),
    );
    line(
        "hot pages",
        instance
            .hot_pages
            .filter(|known| *known)
            .map(|_| "known".to_owned()),
    );
    line("created", instance.created_at.map(|made| made.to_string()));
    line("started", instance.started_at.map(|started| started.to_string()));
    line("pid", instance.pid.map(|pid| pid.to_string()));
    line("memory use", instance.memory_use.map(memory_use));
    line("accelerator", instance.accelerator.clone());
    line("pages", instance.pages.as_ref().map(counted));
    line("last", instance.timings.as_ref().map(timings));
    column_gaps(&mut table);
    table.trim_fmt()
}

/// What came of each fork.
pub(crate) fn forks(list: &ForkList) -> String {
    let mut table = plain(&["NAME", "ID", "STATE", "TIME"]);
    let mut errors = String::new();
    for fork in &list.forks {
        match &fork.outcome {
            ForkOutcome::Instance(instance) => table.add_row([
                fork.name.to_string(),
                instance.id.to_string(),
                instance.state.to_string(),
                or_nothing(instance.timings.as_ref().map(|timings| millis(timings.total_us))),
            ]),
            ForkOutcome::Error(error) => {
                errors.push_str(&format!("\n{}: {} [{}]", fork.name, error.message, error.code));
                table.add_row([fork.name.as_str(), NOTHING_TO_TELL, "failed", NOTHING_TO_TELL])
            }
        };
    }
    align_right(&mut table, &[3]);
    table.trim_fmt() + &errors
}

/// What an instance became by what was asked of it.
pub(crate) fn changed(instance: &Instance) -> String {
    let mut sentence = format!("{} is {}", name(instance), instance.state);
    if let Some(timings) = &instance.timings {
        sentence.push_str(&format!(
            " ({} took {})",
            timings.operation,
            millis(timings.total_us)
        ));
    }
    if let Some(error) = &instance.state_error {
        sentence.push_str(&format!("\n{}", one_line(error)));
    }
    sentence
}

/// Its name, or its id where its name cannot be read.
pub(crate) fn name(instance: &Instance) -> String {
    instance
        .name
        .as_ref()
        .map_or_else(|| instance.id.to_string(), ToString::to_string)
}

fn plain(header: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_header(header.iter().copied());
    column_gaps(&mut table);
    table
}

/// Two spaces between columns and none before the first.
fn column_gaps(table: &mut Table) {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
}

fn align_right(table: &mut Table, columns: &[usize]) {
    for column in columns {
        if let Some(column) = table.column_mut(*column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
}

fn or_nothing(fact: Option<impl ToString>) -> String {
    fact.map_or_else(|| NOTHING_TO_TELL.to_owned(), |fact| fact.to_string())
}

fn count(number: usize, what: &str) -> String {
    if number == 1 {
        format!("1 {what}")
    } else {
        format!("{number} {what}s")
    }
}

/// `512 MiB`, `1.5 GiB`.
pub(crate) fn bytes(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string().replace(".0 ", " ")
}

/// `1.82 ms`, from microseconds.
fn millis(us: u64) -> String {
    format!("{:.2} ms", Duration::from_micros(us).as_secs_f64() * 1e3)
}

/// `12s`, `3m`, `5h`, `2d`: the largest unit that fits.
fn age(made: Timestamp, now: Timestamp) -> String {
    let seconds = now.duration_since(made).as_secs().max(0);
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..86_400 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

fn readiness(readiness: &Readiness) -> String {
    match readiness {
        Readiness::None => "it runs".to_owned(),
        Readiness::Console(text) => format!("its console says {text:?}"),
        Readiness::Agent => "its agent says so".to_owned(),
    }
}

fn agent(agent: &Agent) -> String {
    match (agent.status, &agent.error) {
        (AgentStatus::Absent, _) => "none has answered".to_owned(),
        (AgentStatus::Connected, _) => "has answered, and is not ready".to_owned(),
        (AgentStatus::Ready, _) => "ready".to_owned(),
        (AgentStatus::Failed, Some(why)) => format!("failed: {}", one_line(why)),
        (AgentStatus::Failed, None) => "failed".to_owned(),
    }
}

fn disks(disks: &[DiskSpec]) -> String {
    let disks: Vec<String> = disks
        .iter()
        .map(|disk| {
            let read_only = if disk.read_only { ", read-only" } else { "" };
            format!("{} ({}{read_only})", disk.path.display(), disk.format)
        })
        .collect();
    disks.join("\n")
}

fn labels(labels: &std::collections::BTreeMap<String, String>) -> String {
    labels
        .iter()
        .map(|(key, value)| one_line(&format!("{key}={value}")))
        .collect::<Vec<_>>()
        .join("\n")
}

fn counted(counters: &BTreeMap<String, u64>) -> String {
    let counted: Vec<String> = counters
        .iter()
        .map(|(what, count)| format!("{what} {count}"))
        .collect();
    counted.join(", ")
}

fn memory_use(held: MemoryUse) -> String {
    format!(
        "{} private, {} shared ({} proportional, {} resident)",
        bytes(held.private),
        bytes(held.shared),
        bytes(held.pss),
        bytes(held.rss)
    )
}

fn timings(timings: &Timings) -> String {
    let phases: Vec<String> = timings
        .phases
        .iter()
        .map(|phase| format!("{} {}", phase.name, millis(phase.us)))
        .collect();
    format!(
        "{} {} ({})",
        timings.operation,
        millis(timings.total_us),
        phases.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn example(changes: Value) -> Instance {
        let mut instance = json!({
            "id": "01k6h2v9d3e4f5g6h7j8k9m0n1",
            "name": "web",
            "state": "Running",
            "hypervisor": "microvm",
            "vcpus": 1,
            "memory": 536_870_912,
            "is_template": false,
            "generation": "00112233445566778899aabbccddeeff",
            "hot_pages": false,
            "labels": {},
            "readiness": "none",
            "kernel": "/boot/guest.elf",
            "created_at": "2026-01-02T03:04:05Z",
        });
        for (key, value) in changes.as_object().unwrap() {
            instance[key] = value.clone();
        }
        serde_json::from_value(instance).unwrap()
    }

    fn now() -> Timestamp {
        "2026-01-02T05:04:05Z".parse().unwrap()
    }

    #[test]
    fn a_list_is_aligned_and_names_templates_and_reasons() {
        let template = "01k6h2v9d3e4f5g6h7j8k9m0n0";
        let list = [
            example(
                json!({ "id": template, "name": "warm", "state": "Template", "is_template": true,
                "forks": { "count": 1, "ids": ["01k6h2v9d3e4f5g6h7j8k9m0n1"] } }),
            ),
            example(json!({ "name": "warm-1", "fork_of_template": template, "vcpus": 2 })),
            example(
                json!({ "id": "01k6h2v9d3e4f5g6h7j8k9m0n2", "name": "a-much-longer-name", "state": "Shutdown",
                "memory": 1_610_612_736_u64, "created_at": "2025-12-24T00:00:00Z",
                "state_error": "the guest is down: triple fault" }),
            ),
            serde_json::from_value(json!({ "id": "01k6h2v9d3e4f5g6h7j8k9m0n3", "state": "Unknown",
                "state_error": "the metadata cannot be read" }))
            .unwrap(),
        ];
        insta::assert_snapshot!(instances(&list, &BTreeMap::new(), now()));
        let elsewhere = BTreeMap::from([(template.parse().unwrap(), "warm".to_owned())]);
        let fork = instances(&list[1..2], &elsewhere, now());
        assert!(fork.contains(" warm ") && !fork.contains(template), "{fork}");
    }

    #[test]
    fn an_empty_list_says_so() {
        assert_eq!(instances(&[], &BTreeMap::new(), now()), "no instances");
    }

    #[test]
    fn one_instance_tells_all_that_is_known_and_nothing_else() {
        let full = example(json!({
            "state": "Running", "labels": { "team": "db", "tier": "1" }, "readiness": { "console": "ready epoch=" },
            "fork_of_template": "01k6h2v9d3e4f5g6h7j8k9m0n0", "memory_mode": "copy",
            "memory_mode_reason": "the memory could not be mapped: the VM has a balloon", "pid": 4711,
            "started_at": "2026-01-02T03:04:06Z",
            "agent": { "status": "ready", "version": 1 },
            "memory_use": { "pss": 1_048_576, "private": 786_432, "shared": 8_388_608, "rss": 9_175_040 },
            "timings": { "operation": "fork", "total_us": 1820,
                "phases": [{ "name": "spawn", "us": 700 }, { "name": "restore", "us": 1120 }] },
        }));
        insta::assert_snapshot!(instance(&full));
    }

    #[test]
    fn forks_that_failed_are_in_the_table_and_their_reasons_below() {
        let list: ForkList = serde_json::from_value(json!({ "forks": [
            { "name": "warm-1", "instance": example(json!({ "name": "warm-1",
                "timings": { "operation": "fork", "total_us": 1820, "phases": [] } })) },
            { "name": "warm-2", "error": { "code": "internal", "message": "the VMM failed", "details": {} } },
        ] }))
        .unwrap();
        insta::assert_snapshot!(forks(&list));
    }

    #[test]
    fn ages_have_one_unit() {
        let made = |text: &str| age(text.parse().unwrap(), now());
        assert_eq!(made("2026-01-02T05:04:00Z"), "5s");
        assert_eq!(made("2026-01-02T05:00:00Z"), "4m");
        assert_eq!(made("2026-01-01T06:00:00Z"), "23h");
        assert_eq!(made("2025-12-01T00:00:00Z"), "32d");
        assert_eq!(made("2026-01-02T06:00:00Z"), "0s", "a clock that was set back");
    }
}
