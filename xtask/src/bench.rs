//! Benchmarks of what only the real programs can show: each is driven from outside, on real VMs, and what it found is
//! printed, written as JSON and, in a full run, into docs/benchmarks.md.

mod document;
mod floor;
mod fork;
mod grid;
mod memory;
mod rows;

use std::path::{Path, PathBuf};

use rustix::io::Errno;
use serde_json::json;

use crate::client::ClientError;
use crate::command::CommandError;
use crate::guest_console::GuestError;
use crate::host::Host;
use crate::hypervisor::Located;
use crate::server::ServerError;
use crate::vmm::VmmError;
use crate::{TaskError, build, linux, report, setup};
use rows::{Row, Target};

#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// What a restored guest's first work costs, by the way in which its memory comes back.
    Memory(Common),
    /// What a fork costs, from the request to the guest's answer; and what a thousand of them do.
    Fork(fork::Options),
}

/// What every benchmark can be told.
#[derive(Debug, clap::Args)]
pub(crate) struct Common {
    /// Measures less, and leaves docs/benchmarks.md as it is.
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
    #[error(transparent)]
    Vmm(#[from] VmmError),
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
    #[error("could not watch for what guests print")]
    Watch(#[from] Errno),
    #[error("left behind: {}", .0.join("; "))]
    LeftBehind(Vec<String>),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("`kvm-floor` failed:\n{0}")]
    Floor(String),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Guest(#[from] GuestError),
    #[error("{call} was answered with {status}: {body}; the server said:\n{log}")]
    Api {
        call: String,
        status: u16,
        body: String,
        log: String,
    },
    #[error("{what} did not come in {seconds} s; the server said:\n{log}")]
    Late { what: String, seconds: u64, log: String },
    #[error("{what} did not come to what it should: {result}")]
    Wrong { what: String, result: String },
    #[error("the {what} cannot be drawn: {why}")]
    Chart { what: &'static str, why: String },
}

/// Where and when something was measured.
#[derive(Debug)]
struct Conditions {
    host: Host,
    /// The load of the host, before and after.
    load: [String; 2],
}

impl Conditions {
    /// After a benchmark, of which the load before it is known.
    fn now(host: Host, load_before: String) -> Self {
        Self {
            host,
            load: [load_before, load()],
        }
    }
}

/// What a benchmark has to tell.
struct Told {
    rows: Vec<Row>,
    targets: Vec<Target>,
    /// Its section of docs/benchmarks.md.
    section: String,
    /// Drawings that the section shows: their names in docs/, and what they are.
    drawings: Vec<(&'static str, String)>,
}

/// The `bench` task.
pub(crate) fn run(bench: &Bench) -> Result<(), TaskError> {
    match bench {
        Bench::Memory(options) => {
            let host = prepare()?;
            let kvm_floor = kvm_floor()?;
            let built = report::step(BUILT, build::microvm)?;
            let before = load();
            let findings = memory::measure(&built, &kvm_floor, if options.quick { 3 } else { 5 })?;
            findings.print();
            let conditions = Conditions::now(host, before);
            finish(
                "memory",
                options,
                &memory::tell(&conditions, &findings),
                &conditions,
            )
        }
        Bench::Fork(options) if options.hypervisor.is_qemu() => forks_of_linux(options),
        Bench::Fork(options) => match options.hypervisor.locate() {
            Ok(located) => match located.binary() {
                None => forks(options),
                Some(binary) => forks_beside(options, &located, binary),
            },
            Err(not_there) => {
                println!("SKIPPED: {not_there}");
                Ok(())
            }
        },
    }
}

const BUILT: &str = "built in release, with the test guest";

/// Forks on the microVM.
fn forks(options: &fork::Options) -> Result<(), TaskError> {
    let host = prepare()?;
    let kvm_floor = kvm_floor()?;
    let built = report::step(BUILT, build::build)?;
    let before = load();
    let findings = fork::measure(&built, &kvm_floor, &host, options)?;
    findings.print();
    let conditions = Conditions::now(host, before);
    let told = fork::tell(&conditions, &findings)?;
    finish("fork", &options.common, &told, &conditions)
}

/// Forks on another hypervisor, beside those on the microVM.
fn forks_beside(options: &fork::Options, located: &Located, binary: &Path) -> Result<(), TaskError> {
    let host = prepare()?;
    let built = report::step(BUILT, build::build)?;
    let hypervisor = located.ask(&built)?;
    if let Some(why) = &hypervisor.no_snapshots {
        println!("SKIPPED: {why}");
        return Ok(());
    }
    let before = load();
    let findings = fork::beside::measure(&built, binary, &hypervisor, options.common.quick)?;
    findings.print();
    let conditions = Conditions::now(host, before);
    let told = fork::beside::tell(&conditions, &findings);
    let name = format!("fork --hypervisor {}", hypervisor.name);
    finish(&name, &options.common, &told, &conditions)
}

/// Forks of a Linux on QEMU, with KVM or without.
fn forks_of_linux(options: &fork::Options) -> Result<(), TaskError> {
    setup::prepare_linux()?;
    let host = told(setup::prepare()?);
    let (built, image) = report::step("built in release, and a Linux guest with the agent", || {
        Ok::<_, TaskError>((build::build()?, linux::image()?))
    })?;
    let before = load();
    let findings = fork::linux::measure(&built, &image, options.common.quick)?;
    findings.print();
    let conditions = Conditions::now(host, before);
    let told = fork::linux::tell(&conditions, &findings);
    finish("fork --hypervisor qemu", &options.common, &told, &conditions)
}

/// What every benchmark on KVM begins with.
fn prepare() -> Result<Host, TaskError> {
    Ok(told(setup::prepare_with_kvm()?))
}

/// Says what the host is.
fn told(host: Host) -> Host {
    println!(
        "on {}, {} cores, {}, Linux {}, KVM: {}",
        host.cpu,
        host.cores,
        report::bytes(host.memory_bytes),
        host.kernel,
        host.kvm
    );
    host
}

fn kvm_floor() -> Result<PathBuf, TaskError> {
    let what = "the measure of the kernel alone built in release";
    Ok(report::step(what, build::kvm_floor)?)
}

/// Writes down what a benchmark found.
fn finish(name: &str, options: &Common, told: &Told, conditions: &Conditions) -> Result<(), TaskError> {
    let [before, after] = &conditions.load;
    println!("load of the host {before} before, {after} after");
    if let Some(path) = &options.json {
        let rows: Vec<_> = told.rows.iter().map(Row::json).collect();
        let targets: Vec<_> = told.targets.iter().map(Target::json).collect();
        let json = json!({"host": conditions.host.json(), "rows": rows, "targets": targets});
        write(path, &format!("{json:#}\n"))?;
    }
    if !options.quick {
        let docs = build::workspace().join("docs");
        for (name, drawing) in &told.drawings {
            write(&docs.join(name), drawing)?;
        }
        let path = docs.join("benchmarks.md");
        // Before the first run there is none.
        let before = std::fs::read_to_string(&path).unwrap_or_default();
        write(&path, &document::with_section(&before, name, &told.section))?;
        println!("written: docs/benchmarks.md");
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<(), TaskError> {
    std::fs::write(path, text).map_err(|source| TaskError::Write {
        path: path.to_owned(),
        source,
    })
}

/// Programs that wanted to run in the last minute, as the kernel counts them.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}
