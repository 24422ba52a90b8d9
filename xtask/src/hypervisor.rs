//! The hypervisor that a task drives: where its binary is, what the server says that it can do, and whether this host lets it.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::build::Built;
use crate::client::ClientError;
use crate::host;
use crate::interrupt::UndoneOnInterrupt;
use crate::processes;
use crate::server::{Server, ServerError};
use crate::vmm::{Vmm, VmmError};

const CLOUD_HYPERVISOR: &str = "cloud-hypervisor";
const QEMU: &str = "qemu";
/// Memory of the guest by which it is tried whether snapshots can be written, in bytes.
const TRIED_MEMORY: u64 = 64 << 20;

/// Which hypervisor is driven.
#[derive(Debug, clap::Args)]
pub(crate) struct Choice {
    /// Which hypervisor the instances ask for: microvm, cloud-hypervisor or qemu.
    #[arg(long = "hypervisor", default_value = "microvm", value_name = "NAME")]
    name: String,
    /// The cloud-hypervisor binary, where it is driven [default: in PATH].
    #[arg(long, value_name = "PATH")]
    cloud_hypervisor: Option<PathBuf>,
}

/// There is no binary of the hypervisor, so that there is nothing to drive.
#[derive(Debug, thiserror::Error)]
#[error(
    "there is no `{CLOUD_HYPERVISOR}` in PATH. Put the binary of a release, v51 to v53, in PATH \
     (https://github.com/cloud-hypervisor/cloud-hypervisor/releases has a static one), or name it with --cloud-hypervisor PATH"
)]
pub(crate) struct NotThere;

/// What a hypervisor can do could not be found out.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HypervisorError {
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the server does not offer the hypervisor `{name}`; it offers {}", offered.join(", "))]
    NotOffered { name: String, offered: Vec<String> },
    #[error("Cloud Hypervisor could not be tried")]
    NotTried(#[from] VmmError),
    #[error("could not make a directory to try Cloud Hypervisor in")]
    Scratch(#[source] std::io::Error),
}

/// A hypervisor whose binary was found.
#[derive(Clone, Debug)]
pub(crate) struct Located {
    name: String,
    cloud_hypervisor: Option<PathBuf>,
}

/// A hypervisor, and what it can do.
#[derive(Clone, Debug)]
pub(crate) struct Hypervisor {
    pub(crate) name: String,
    /// What a server is told so that it offers it.
    pub(crate) serve_options: Vec<OsString>,
    pub(crate) memory_modes: Vec<String>,
    /// Whether a fork's guest is told that it is a new machine. If not, a fork does not run of itself.
    pub(crate) tells_identity: bool,
    /// Whether an instance whose guest has powered off or died is Shutdown; else it is Stopped, and of a death nothing is told.
    pub(crate) outlives_guest: bool,
    /// Why it cannot write snapshots on this host, if it cannot.
    pub(crate) no_snapshots: Option<String>,
}

impl Hypervisor {
    /// Whether it tells how pages came to a guest in this memory mode. No server tells it.
    pub(crate) fn counts_pages(&self, mode: &str) -> bool {
        match self.name.as_str() {
            QEMU => false,
            CLOUD_HYPERVISOR => mode == "uffd",
            _ => true,
        }
    }

    /// Whether its VMM can be asked for a VM that is as before its boot, which speaks REST. No server tells it.
    pub(crate) fn unboots(&self) -> bool {
        self.name != QEMU
    }

    /// Whether fleets of its VMs come up in the time of a test run. QEMU needs some 50 ms to start and restore each.
    pub(crate) fn bears_fleets(&self) -> bool {
        self.name != QEMU
    }

    /// Whether it tells a guest's fault from its wish to be reset. No server tells it.
    pub(crate) fn tells_faults(&self) -> bool {
        self.name != QEMU
    }

    /// Whether memory that its guests never wrote takes no room in a snapshot. No server tells it.
    pub(crate) fn leaves_holes(&self) -> bool {
        self.name != CLOUD_HYPERVISOR
    }
}

impl Choice {
    /// Whether it is the one that runs on any host, with KVM or without, and Linux guests too.
    pub(crate) fn is_qemu(&self) -> bool {
        self.name == QEMU
    }

    /// Looks for the binary; the microVM's is built, and QEMU is found by the server.
    pub(crate) fn locate(&self) -> Result<Located, NotThere> {
        let cloud_hypervisor = if self.name == CLOUD_HYPERVISOR {
            Some(self.cloud_hypervisor.clone().or_else(in_path).ok_or(NotThere)?)
        } else {
            None
        };
        Ok(Located {
            name: self.name.clone(),
            cloud_hypervisor,
        })
    }
}

impl Located {
    /// Its binary, where it is not the microVM's.
    pub(crate) fn binary(&self) -> Option<&Path> {
        self.cloud_hypervisor.as_deref()
    }

    fn serve_options(&self) -> Vec<OsString> {
        let named = |path: &PathBuf| ["--cloud-hypervisor".into(), path.into()];
        self.cloud_hypervisor.iter().flat_map(named).collect()
    }

    /// Asks a server what it can do, and tries what depends on the host.
    pub(crate) fn ask(&self, built: &Built) -> Result<Hypervisor, HypervisorError> {
        let server = Server::start_with(&built.stencil, self.serve_options())?;
        let told = server.client().get("/hypervisors")?.body;
        server.finish()?;
        let offered = told["hypervisors"].as_array().map_or(&[][..], Vec::as_slice);
        let texts = |values: &Value| -> Vec<String> {
            let values = values.as_array().into_iter().flatten();
            values
                .filter_map(|value| value.as_str().map(str::to_owned))
                .collect()
        };
        let able = offered
            .iter()
            .find(|offered| offered["name"] == self.name.as_str())
            .ok_or_else(|| HypervisorError::NotOffered {
                name: self.name.clone(),
                offered: texts(&offered.iter().map(|offered| offered["name"].clone()).collect()),
            })?;
        // Where ring 0 runs by the processor a snapshot that fails is a failure, and no fact of the host.
        let no_snapshots = match &self.cloud_hypervisor {
            Some(binary) if !host::has_hardware_kvm() => why_no_snapshots(binary, &built.guest)?,
            _ => None,
        };
        Ok(Hypervisor {
            name: self.name.clone(),
            serve_options: self.serve_options(),
            memory_modes: texts(&able["memory_modes"]),
            tells_identity: able["tells_identity"] == true,
            outlives_guest: able["outlives_guest"] == true,
            no_snapshots,
        })
    }
}

/// The first one in `PATH` that can be executed.
fn in_path() -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    let found = env::split_paths(&path).map(|directory| directory.join(CLOUD_HYPERVISOR));
    found.into_iter().find(|file| {
        fs::metadata(file).is_ok_and(|facts| facts.is_file() && facts.permissions().mode() & 0o111 != 0)
    })
}

/// Has it write a snapshot of a small VM; why it cannot, if it cannot.
fn why_no_snapshots(binary: &Path, guest: &Path) -> Result<Option<String>, HypervisorError> {
    let root = tempfile::Builder::new()
        .prefix("stencil-")
        .tempdir()
        .map_err(HypervisorError::Scratch)?;
    let path = root.path().to_owned();
    let _undone = UndoneOnInterrupt::by(move || {
        processes::end_all_below(&path);
        let _ = fs::remove_dir_all(&path);
    });
    let snapshot = root.path().join("snapshot");
    fs::create_dir(&snapshot).map_err(HypervisorError::Scratch)?;
    let vmm = Vmm::start(binary, root.path().join("vmm"))?;
    vmm.put("vm.create", definition(guest, TRIED_MEMORY))?;
    vmm.put("vm.boot", Value::Null)?;
    vmm.put("vm.pause", Value::Null)?;
    let url = format!("file://{}", snapshot.display());
    let why = match vmm.put("vm.snapshot", json!({"destination_url": url})) {
        Ok(()) => None,
        Err(VmmError::Refused { message, .. }) => Some(format!(
            "this Cloud Hypervisor cannot write snapshots on this host: its KVM is kvm-pvm, which has no state of nested \
             virtualisation, and a released Cloud Hypervisor asks for it; a host with VT-x or AMD-V has it. It said: {}",
            first_lines(&message)
        )),
        Err(error) => return Err(error.into()),
    };
    vmm.finish()?;
    Ok(why)
}

/// What a refusal says, without the backtraces in it: it is a list of texts, outermost first.
fn first_lines(message: &str) -> String {
    let texts: Vec<String> = serde_json::from_str(message).unwrap_or_else(|_| vec![message.to_owned()]);
    let lines: Vec<&str> = texts.iter().filter_map(|text| text.lines().next()).collect();
    lines.join(": ")
}

/// A VM as Stencil defines it on Cloud Hypervisor: all of its memory in one private zone.
pub(crate) fn definition(guest: &Path, memory: u64) -> Value {
    json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": 0, "zones": [{"id": "mem0", "size": memory}]},
        "payload": {"kernel": guest},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_told_without_its_backtraces() {
        assert_eq!(
            first_lines("[\"Error from API\",\"no state: EINVAL\\n\\nStack backtrace:\\n 0: f\"]"),
            "Error from API: no state: EINVAL"
        );
        assert_eq!(first_lines("no list"), "no list");
    }
}
