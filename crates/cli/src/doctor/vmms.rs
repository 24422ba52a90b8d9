//! The VMMs: which binaries there are, which versions, and what they can do on this host.

use std::path::{Path, PathBuf};

use stencil_core::error_chain;
use stencil_vmm::{Accelerator, CloudHypervisor, Hypervisor, KvmKind, MicroVm, Qemu};

use super::Finding;
use crate::args::Vmms;

/// A VMM as it was found.
struct Vmm {
    finding: Finding,
    /// Whether its binary can be used.
    answers: bool,
    /// Whether VMs run on it here.
    runs_vms: bool,
}

impl Vmm {
    fn not_there(finding: Finding) -> Self {
        Self {
            finding,
            answers: false,
            runs_vms: false,
        }
    }
}

/// Looks at each, and whether VMs can run on one of them; `kvm` is the host's, if it runs VMs.
pub(super) async fn look(asked: Vmms, kvm: Option<KvmKind>) -> (Vec<Finding>, bool) {
    let microvm = match asked.microvm.map_or_else(MicroVm::find, Ok) {
        Ok(path) => microvm(&path, kvm).await,
        Err(error) => Vmm::not_there(Finding::missing(
            "microvm",
            error_chain(&error),
            "a server does not start without it: cargo build --release -p stencil-microvm, or stencil serve --microvm PATH",
        )),
    };
    let cloud_hypervisor = match asked.cloud_hypervisor.or_else(CloudHypervisor::find) {
        Some(path) => cloud_hypervisor(&path, kvm).await,
        None => Vmm::not_there(Finding::missing(
            "cloud-hypervisor",
            "not in PATH; instances cannot ask for it",
            "if you want it: put the released binary, v51 to v53, in PATH, or name it with stencil serve --cloud-hypervisor PATH",
        )),
    };
    let qemu = match asked.qemu.or_else(Qemu::find) {
        Some(path) => qemu(path).await,
        None => Vmm::not_there(Finding::missing(
            "qemu",
            "not in PATH; instances cannot ask for it",
            "for Linux guests on any host: install qemu-system-x86 (Debian), 7.2 or later, or name one with stencil serve --qemu PATH",
        )),
    };
    // No server starts without a microVM: the others run nothing then.
    let can_run = microvm.runs_vms || microvm.answers && (cloud_hypervisor.runs_vms || qemu.runs_vms);
    let findings = vec![microvm.finding, cloud_hypervisor.finding, qemu.finding];
    (findings, can_run)
}

async fn microvm(path: &Path, kvm: Option<KvmKind>) -> Vmm {
    const ABOUT: &str = "microvm";
    match MicroVm::new(path.to_owned()).version().await {
        Ok(version) => Vmm {
            finding: Finding::good(ABOUT, format!("{version}, {}", path.display())),
            answers: true,
            runs_vms: kvm.is_some(),
        },
        Err(error) => Vmm::not_there(Finding::missing(
            ABOUT,
            error_chain(&error),
            "name another one with stencil serve --microvm PATH",
        )),
    }
}

async fn cloud_hypervisor(path: &Path, kvm: Option<KvmKind>) -> Vmm {
    const ABOUT: &str = "cloud-hypervisor";
    let version = match CloudHypervisor::new(path.to_owned()).version().await {
        Ok(version) => version,
        Err(error) => {
            return Vmm::not_there(Finding::missing(
                ABOUT,
                error_chain(&error),
                "install a release from v51 to v53, or name one with stencil serve --cloud-hypervisor PATH",
            ));
        }
    };
    let fact = format!("{version}, {}", path.display());
    let finding = if kvm.is_none_or(KvmKind::saves_nested_state) {
        Finding::good(ABOUT, fact)
    } else {
        Finding::limited(
            ABOUT,
            fact,
            "on kvm-pvm a released Cloud Hypervisor boots VMs and cannot snapshot them: standby fails, so there are no \
             templates and no forks; use the microvm, or a host with VT-x or AMD-V",
        )
    };
    Vmm {
        finding,
        answers: true,
        runs_vms: kvm.is_some(),
    }
}

async fn qemu(path: PathBuf) -> Vmm {
    const ABOUT: &str = "qemu";
    let qemu = Qemu::new(path.clone());
    let version = match qemu.version().await {
        Ok(version) => version,
        Err(error) => {
            return Vmm::not_there(Finding::missing(
                ABOUT,
                error_chain(&error),
                "install qemu-system-x86 (Debian), 7.2 or later, or name one with stencil serve --qemu PATH",
            ));
        }
    };
    let fact = format!("{version}, {}", path.display());
    let finding = match qemu.host_accelerator() {
        Accelerator::Kvm => Finding::good(ABOUT, format!("{fact}; guests run under KVM")),
        Accelerator::Tcg => Finding::limited(
            ABOUT,
            format!("{fact}; guests are emulated (TCG)"),
            "Linux guests run, some ten times slower than under a KVM that runs Linux: a host with VT-x or AMD-V has that",
        ),
    };
    Vmm {
        finding,
        answers: true,
        runs_vms: true,
    }
}
