//! The host's KVM: whether it makes VMs, and how it runs their kernels.

use std::fs;
use std::io;
use std::path::Path;

use kvm_ioctls::Kvm;

/// The only version of the interface since Linux 2.6.22; a program must refuse any other (Linux, Documentation/virt/kvm/api.rst).
const API_VERSION: i32 = 12;

/// How a KVM runs its guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KvmKind {
    /// By the processor's virtualisation.
    Hardware,
    /// By that of a hypervisor around this host.
    Nested,
    /// Without any: kvm-pvm runs a guest's user mode by the processor and emulates each instruction of its kernel mode.
    Pvm,
}

impl KvmKind {
    /// Looks at the modules of the kernel and the flags of the processor below `root`, which is `/` but in tests.
    fn of(root: &Path) -> Self {
        if root.join("sys/module/kvm_pvm").exists() {
            return Self::Pvm;
        }
        let cpus = fs::read_to_string(root.join("proc/cpuinfo")).unwrap_or_default();
        // CPUID leaf 1, ECX bit 31: a hypervisor is below this kernel.
        let in_a_vm = cpus
            .lines()
            .find_map(|line| line.strip_prefix("flags")?.split_once(':'))
            .is_some_and(|(_, flags)| flags.split_ascii_whitespace().any(|flag| flag == "hypervisor"));
        if in_a_vm { Self::Nested } else { Self::Hardware }
    }

    /// Whether Linux guests come up. On kvm-pvm those do not whose kernel was built without support for it, as distributions'
    /// are.
    #[must_use]
    pub const fn runs_linux(self) -> bool {
        !matches!(self, Self::Pvm)
    }

    /// Whether a released Cloud Hypervisor can write snapshots. It asks KVM for the state of nested virtualisation, which
    /// kvm-pvm does not have and answers with EINVAL.
    #[must_use]
    pub const fn saves_nested_state(self) -> bool {
        !matches!(self, Self::Pvm)
    }
}

/// Why there is no KVM to run VMs on.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// There is no `/dev/kvm`.
    #[error(
        "there is no /dev/kvm: this kernel has no KVM, or this is a VM or container that was not given it"
    )]
    Missing,
    /// This user may not open `/dev/kvm`.
    #[error("/dev/kvm may not be opened by this user")]
    Forbidden,
    /// `/dev/kvm` cannot be opened for another reason.
    #[error("/dev/kvm cannot be opened")]
    Unusable(#[source] io::Error),
    /// `/dev/kvm` speaks another language.
    #[error("/dev/kvm speaks version {0} of its interface; this takes {API_VERSION}")]
    Version(i32),
    /// KVM is there and makes no VM.
    #[error("/dev/kvm is there and makes no VM; another hypervisor may be using the processor")]
    NoVm(#[source] io::Error),
}

/// Tries the host's KVM by making a VM, which is gone again when this returns.
///
/// # Errors
/// [`KvmError`], if no VM can be made.
pub fn probe_kvm() -> Result<KvmKind, KvmError> {
    let kvm = Kvm::new().map_err(|error| {
        let error = io::Error::from_raw_os_error(error.errno());
        match error.kind() {
            io::ErrorKind::NotFound => KvmError::Missing,
            io::ErrorKind::PermissionDenied => KvmError::Forbidden,
            _ => KvmError::Unusable(error),
        }
    })?;
    let version = kvm.get_api_version();
    if version != API_VERSION {
        return Err(KvmError::Version(version));
    }
    match kvm.create_vm() {
        Ok(_gone_at_once) => Ok(KvmKind::of(Path::new("/"))),
        Err(error) => Err(KvmError::NoVm(io::Error::from_raw_os_error(error.errno()))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_follows_from_modules_and_flags() {
        let host = |modules: &[&str], flags: &str| {
            let root = tempfile::tempdir().unwrap();
            fs::create_dir(root.path().join("proc")).unwrap();
            fs::write(
                root.path().join("proc/cpuinfo"),
                format!("processor\t: 0\nflags\t\t: fpu {flags}\n"),
            )
            .unwrap();
            for module in modules {
                fs::create_dir_all(root.path().join("sys/module").join(module)).unwrap();
            }
            KvmKind::of(root.path())
        };
        assert_eq!(host(&["kvm", "kvm_intel"], "vmx"), KvmKind::Hardware);
        assert_eq!(host(&["kvm", "kvm_amd"], "svm hypervisor avx"), KvmKind::Nested);
        assert_eq!(host(&["kvm", "kvm_pvm"], "hypervisor"), KvmKind::Pvm);
    }
}
