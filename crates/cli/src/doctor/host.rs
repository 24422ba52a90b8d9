//! The kernel's part: KVM, userfaultfd, limits.

use std::fs;

use rustix::process::{Resource, getrlimit};
use stencil_core::error_chain;
use stencil_uffd::check_permission;
use stencil_vmm::{KvmError, KvmKind, probe_kvm};

use super::Finding;

/// With fewer open files than this a server has room for fewer VMs than small hosts run.
const FEW_OPEN_FILES: u64 = 4096;

/// The host's KVM, if VMs run on it.
pub(super) fn kvm() -> (Option<KvmKind>, Finding) {
    let kind = probe_kvm();
    let finding = of_kvm(&kind);
    (kind.ok(), finding)
}

fn of_kvm(kind: &Result<KvmKind, KvmError>) -> Finding {
    const ABOUT: &str = "KVM";
    match kind {
        Ok(KvmKind::Hardware) => Finding::good(ABOUT, "VMs run, by the processor's virtualisation"),
        Ok(KvmKind::Nested) => Finding::good(
            ABOUT,
            "VMs run, by nested virtualisation: this host is itself a VM",
        ),
        Ok(KvmKind::Pvm) => Finding::limited(
            ABOUT,
            "VMs run; this is kvm-pvm, which has no virtualisation of the processor and emulates each instruction of a \
             guest's kernel",
            "kernels of Linux distributions do not come up on it; a host with VT-x or AMD-V, or nested virtualisation, runs them",
        ),
        Err(error) => {
            let advice = match error {
                KvmError::Forbidden => {
                    "become root, or join its group: sudo usermod -aG kvm $USER, then log in again"
                }
                KvmError::Missing => {
                    "on a cloud VM choose one with nested virtualisation; in a container pass --device /dev/kvm"
                }
                KvmError::Unusable(_) | KvmError::Version(_) | KvmError::NoVm(_) => {
                    "see what the kernel's log says of kvm: dmesg | grep -i kvm"
                }
            };
            Finding::missing(ABOUT, error_chain(error), advice)
        }
    }
}

pub(super) fn userfaultfd() -> Finding {
    const ABOUT: &str = "userfaultfd";
    match check_permission() {
        Ok(()) => Finding::good(
            ABOUT,
            "permitted: the memory mode uffd works, and hot pages are recorded",
        ),
        Err(error) => Finding::limited(
            ABOUT,
            error_chain(&error),
            "forks are made all the same, in cow and copy; they begin without hot pages",
        ),
    }
}

pub(super) fn open_files() -> Finding {
    // A server raises its soft limit to the hard one.
    of_open_files(getrlimit(Resource::Nofile).maximum)
}

fn of_open_files(most: Option<u64>) -> Finding {
    const ABOUT: &str = "open files";
    match most {
        None => Finding::good(ABOUT, "no limit"),
        Some(most) if most >= FEW_OPEN_FILES => {
            Finding::good(ABOUT, format!("up to {most}; a VM takes one or two"))
        }
        Some(most) => Finding::limited(
            ABOUT,
            format!("up to {most}; a VM takes one or two"),
            "for more VMs raise the hard limit: LimitNOFILE= of a systemd unit, or /etc/security/limits.conf",
        ),
    }
}

/// Only where the kernel promises no more memory than it has; forks are promised their template's again and again.
pub(super) fn overcommit() -> Option<Finding> {
    let mode = fs::read_to_string("/proc/sys/vm/overcommit_memory").unwrap_or_default();
    (mode.trim() == "2").then(|| {
        Finding::limited(
            "memory",
            "vm.overcommit_memory is 2: each fork counts for all of its template's memory, also for what it shares",
            "for many forks: sysctl vm.overcommit_memory=0",
        )
    })
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::super::Mark;
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_to_do() {
        let forbidden = of_kvm(&Err(KvmError::Forbidden));
        assert_eq!(forbidden.mark, Mark::Missing);
        assert!(
            forbidden.advice.is_some_and(|advice| advice.contains("usermod")),
            "the group"
        );
        let broken = of_kvm(&Err(KvmError::NoVm(io::Error::from_raw_os_error(16))));
        assert!(
            broken.fact.contains("busy"),
            "the kernel's words: {}",
            broken.fact
        );
    }

    #[test]
    fn few_open_files_limit() {
        assert_eq!(of_open_files(Some(1024)).mark, Mark::Limited);
        assert_eq!(of_open_files(Some(1 << 20)).mark, Mark::Good);
        assert_eq!(of_open_files(None).mark, Mark::Good);
    }
}
