//! Benchmarks of what only the real programs can show: each is driven from outside, on real KVM, and what it found is
//! printed, written as JSON and, in a full run, into docs/benchmarks.md.

mod document;
mod figures;
mod memory;
mod page_cache;
mod restores;
mod sizes;
mod template;
mod vmm;

use std::path::PathBuf;

use rustix::io::Errno;
use serde_json::json;

use crate::client::ClientError;
use crate::host::Host;
use crate::{TaskError, build, report, setup};
use figures::Findings;

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// What a restored guest's first work costs, by the way in which its memory comes back.
    Memory(Options),
}

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Measures each way three times instead of five, and leaves docs/benchmarks.md as it is.
    #[arg(long)]
    quick: bool,
    /// Where to write the results as one JSON object.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Something failed, so that there is nothing to tell. That a target is missed is not among them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BenchError {
    #[error("could not {what} {}", path.display())]
    Io {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("{call} was answered with {status}: {message}; the VMM said:\n{log}")]
    Refused {
        call: String,
        status: u16,
        message: String,
        log: String,
    },
    #[error(
        "the guest did not print `{wanted}` {count} times in {seconds} s; it printed:\n{printed}\nthe VMM said:\n{log}"
    )]
    Silent {
        wanted: &'static str,
        count: usize,
        seconds: u64,
        printed: String,
        log: String,
    },
    #[error("the guest's input did not arrive: {arrived} of {sent} bytes")]
    InputLost { arrived: u64, sent: u64 },
    #[error("{how}: the guest read other memory than was saved: {found:?}; right is {right:?}")]
    OtherMemory {
        how: &'static str,
        found: Vec<String>,
        right: Vec<String>,
    },
    #[error("{path} does not say `{field}` of the VMM", path = path.display())]
    NoFigure { path: PathBuf, field: &'static str },
    #[error("no list of hot pages was recorded; the VMM said:\n{log}")]
    NothingRecorded { log: String },
    #[error("{how}: the list of hot pages was not used; the VMM said:\n{log}")]
    ListIgnored { how: &'static str, log: String },
    #[error("could not watch the console log")]
    Watch(#[from] Errno),
    #[error("left behind: {}", .0.join("; "))]
    LeftBehind(Vec<String>),
}

/// The `bench` task.
pub(crate) fn run(bench: &Bench) -> Result<(), TaskError> {
    let Bench::Memory(options) = bench;
    let host = setup::prepare()?;
    println!(
        "on {}, {} cores, {}, Linux {}, KVM: {}",
        host.cpu,
        host.cores,
        report::bytes(host.memory_bytes),
        host.kernel,
        host.kvm
    );
    let built = report::step("built in release, with the test guest", build::microvm)?;
    let findings = memory::measure(&built, if options.quick { 3 } else { 5 })?;
    findings.print();
    if let Some(path) = &options.json {
        write(path, &format!("{:#}\n", as_json(&host, &findings)))?;
    }
    if !options.quick {
        let path = build::workspace().join("docs/benchmarks.md");
        // Before the first run there is none.
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        write(&path, &document::text(&host, &findings, &before))?;
        println!("written: docs/benchmarks.md");
    }
    Ok(())
}

fn as_json(host: &Host, findings: &Findings) -> serde_json::Value {
    let rows: Vec<_> = findings.rows().iter().map(figures::Row::json).collect();
    let targets: Vec<_> = findings.targets().iter().map(figures::Target::json).collect();
    json!({"host": host.json(), "rows": rows, "targets": targets})
}

fn write(path: &std::path::Path, text: &str) -> Result<(), TaskError> {
    std::fs::write(path, text).map_err(|source| TaskError::Write {
        path: path.to_owned(),
        source,
    })
}
