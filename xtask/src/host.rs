//! What the host is: its processor, memory and kernel, and whether and how it runs VMs.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, opcode};
use serde_json::{Value, json};

const KVM: &str = "/dev/kvm";
/// What is said of a host that has none that makes VMs.
const NO_KVM: &str = "none";
/// The group of KVM's ioctls, `KVMIO` (Linux, include/uapi/linux/kvm.h).
const KVMIO: u8 = 0xae;
const KVM_GET_API_VERSION: u8 = 0x00;
const KVM_CREATE_VM: u8 = 0x01;
/// The only version of the API there has been since Linux 2.6.22; a program must refuse any other.
const API_VERSION: i32 = 12;

/// Why KVM runs no VM on this host, and what would help.
#[derive(Debug, thiserror::Error)]
pub(crate) enum HostError {
    #[error(
        "this host has no {KVM}: its kernel has no KVM, or it is a VM or container that was not given it; all but QEMU need a host with KVM (on a cloud VM, one with nested virtualisation)"
    )]
    NoKvm,
    #[error(
        "{KVM} may not be opened by this user; become root, or join its group: sudo usermod -aG kvm $USER, then log in again"
    )]
    Forbidden,
    #[error("{KVM} is there and cannot be opened")]
    Unusable(#[source] std::io::Error),
    #[error(
        "{KVM} is there and cannot make a VM: {what} failed; another hypervisor may be using the processor, or the device is not KVM's"
    )]
    Broken {
        what: &'static str,
        #[source]
        source: rustix::io::Errno,
    },
    #[error("{KVM} speaks version {0} of its API; this needs {API_VERSION}")]
    Version(i32),
}

/// Facts of this host, for the reader of a result.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    pub(crate) cpu: String,
    pub(crate) cores: usize,
    pub(crate) memory_bytes: u64,
    pub(crate) kernel: String,
    /// Which kind it is; `none` where it makes no VMs.
    pub(crate) kvm: &'static str,
}

impl Host {
    /// Tries KVM by making a VM, and gathers the facts.
    pub(crate) fn look() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = cpuinfo.lines().find(|line| line.starts_with(name))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        };
        let nested = field("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor"));
        Self {
            cpu: field("model name").unwrap_or_else(|| "unknown CPU".to_owned()),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_bytes(),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
            kvm: if try_kvm().is_ok() {
                kvm_kind(nested)
            } else {
                NO_KVM
            },
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({
            "cpu": self.cpu, "cores": self.cores, "memory_bytes": self.memory_bytes, "kernel": self.kernel, "kvm": self.kvm,
        })
    }
}

/// All of the host's memory, in bytes.
pub(crate) fn memory_bytes() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram as u64).saturating_mul(u64::from(info.mem_unit))
}

/// Whether guests run ring 0 by the processor, and not by emulation.
pub(crate) fn has_hardware_kvm() -> bool {
    !has_module("kvm_pvm")
}

fn has_module(name: &str) -> bool {
    Path::new("/sys/module").join(name).exists()
}

fn kvm_kind(nested: bool) -> &'static str {
    match (
        has_module("kvm_pvm"),
        has_module("kvm_intel"),
        has_module("kvm_amd"),
        nested,
    ) {
        (true, ..) => "kvm-pvm (guests' ring 0 is emulated)",
        (_, true, _, false) => "VT-x",
        (_, true, _, true) => "VT-x, nested",
        (_, _, true, false) => "AMD-V",
        (_, _, true, true) => "AMD-V, nested",
        _ => "KVM of an unknown kind",
    }
}

/// Tries KVM by making a VM, which is gone again when this returns.
pub(crate) fn try_kvm() -> Result<(), HostError> {
    let kvm = OpenOptions::new()
        .read(true)
        .write(true)
        .open(KVM)
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => HostError::NoKvm,
            ErrorKind::PermissionDenied => HostError::Forbidden,
            _ => HostError::Unusable(error),
        })?;
    let version = kvm_call::<KVM_GET_API_VERSION>(&kvm).map_err(|source| HostError::Broken {
        what: "KVM_GET_API_VERSION",
        source,
    })?;
    if version != API_VERSION {
        return Err(HostError::Version(version));
    }
    let vm = kvm_call::<KVM_CREATE_VM>(&kvm).map_err(|source| HostError::Broken {
        what: "KVM_CREATE_VM",
        source,
    })?;
    // SAFETY: KVM_CREATE_VM succeeded, so its value is a new file descriptor that nobody else owns.
    drop(unsafe { OwnedFd::from_raw_fd(vm) });
    Ok(())
}

/// Makes a call of KVM's that takes no argument (0 as the machine type of KVM_CREATE_VM) and answers with a number.
fn kvm_call<const NUMBER: u8>(kvm: impl AsFd) -> rustix::io::Result<i32> {
    // SAFETY: the file is /dev/kvm, and both numbers are used with the argument that they take: none, or 0.
    unsafe { rustix::ioctl::ioctl(kvm, KvmCall::<NUMBER>) }
}

struct KvmCall<const NUMBER: u8>;

// SAFETY: the calls take 0 for an argument, so there is no memory that they could read or write.
unsafe impl<const NUMBER: u8> Ioctl for KvmCall<NUMBER> {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::none(KVMIO, NUMBER)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        std::ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut rustix::ffi::c_void) -> rustix::io::Result<i32> {
        Ok(output)
    }
}
