//! The benchmark of forks: the real server is asked over its socket, and each guest proves that it runs. What the kernel
//! alone takes is measured in turns with them, in the same run.
//!
//! | module | role |
//! |---|---|
//! | `world` | a server with its templates |
//! | `asking` | one request for one or many forks, and when what happened |
//! | `latency` | forks one by one and many at once, of small and large memory, armed or not |
//! | `growth` | the same with 10 and with 10,000 instances on disk |
//! | `fleet`, `processes` | a thousand live forks, and what they take of the host |
//! | `linux` | forks of a Linux on QEMU, and commands in them |
//! | `beside` | forks on another hypervisor, beside those on the microVM and beside what it takes by itself |
//! | `figures`, `show`, `charts` | rows and targets; tables, sentences and drawings |

mod asking;
pub(super) mod beside;
mod charts;
mod figures;
mod fleet;
mod growth;
mod latency;
pub(super) mod linux;
mod processes;
mod show;
mod world;

use std::path::Path;

use super::{BenchError, Conditions, Told};
use crate::build::Built;
use crate::host::Host;
use crate::hypervisor::Choice;
pub(super) use figures::Findings;

const MIB: u64 = 1 << 20;
/// The memory of most guests here.
const MEMORY: u64 = 512 * MIB;
/// The two sizes that are held against each other; both are sparse.
const SMALL: u64 = 128 * MIB;
const LARGE: u64 = 8192 * MIB;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    pub(super) common: super::Common,
    #[command(flatten)]
    pub(super) hypervisor: Choice,
    /// How many forks live at once at the end; 1000, or 100 with --quick.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100_000))]
    fleet: Option<u32>,
}

/// How much is measured.
#[derive(Clone, Copy, Debug)]
struct Extent {
    /// Rounds in which everything has its turn.
    rounds: usize,
    /// Forks of each kind in a round, one by one.
    singles: usize,
    /// Requests for 16 forks in all, and requests for 100.
    of_16: usize,
    of_100: usize,
    fleet: u32,
}

impl Extent {
    fn of(options: &Options) -> Self {
        let full = Self {
            rounds: 5,
            singles: 40,
            of_16: 10,
            of_100: 5,
            fleet: options.fleet.unwrap_or(1000),
        };
        let quick = Self {
            rounds: 2,
            singles: 10,
            of_16: 2,
            of_100: 1,
            fleet: options.fleet.unwrap_or(100),
        };
        if options.common.quick { quick } else { full }
    }
}

/// Does all of it.
pub(super) fn measure(
    built: &Built,
    kvm_floor: &Path,
    host: &Host,
    options: &Options,
) -> Result<Findings, BenchError> {
    let extent = Extent::of(options);
    let latency = latency::measure(built, kvm_floor, extent)?;
    let growth = growth::measure(built, extent)?;
    let fleet = fleet::measure(built, extent.fleet)?;
    Ok(Findings {
        floors: latency.floors,
        series: latency.series.into_iter().chain(growth.series).collect(),
        calls: growth.calls,
        fleet,
        cores: host.cores,
    })
}

/// What there is to tell of it.
pub(super) fn tell(conditions: &Conditions, findings: &Findings) -> Result<Told, BenchError> {
    Ok(Told {
        rows: findings.rows(),
        targets: findings.targets(),
        section: show::section(conditions, findings),
        drawings: vec![
            (charts::LATENCY, charts::latency(findings)?),
            (charts::MEMORY_USE, charts::memory(&findings.fleet)?),
        ],
    })
}
