//! A scratch directory for an instance, and the programs that play a VMM in it.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use stencil_core::{InstanceDir, VmGeneration, VmSpec};
use stencil_vmm::{Hypervisor, MicroVm, Start, VmmError, VmmProcess};
use tempfile::TempDir;

/// An instance's directory that is removed at the end of the test.
pub(crate) struct Scratch {
    root: TempDir,
    pub(crate) dir: InstanceDir,
}

impl Scratch {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = InstanceDir::new(root.path());
        Self { root, dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.root.path()
    }

    /// What the VMM wrote.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.dir.vmm_log()).unwrap()
    }

    /// Makes the pipe through which a fixture tells.
    pub(crate) fn make_pipe(&self) {
        let made = std::process::Command::new("mkfifo")
            .arg(self.path().join("told"))
            .status()
            .unwrap();
        assert!(made.success());
    }

    /// Waits until a fixture has told.
    pub(crate) fn wait_until_told(&self) -> String {
        let mut told = String::new();
        File::open(self.path().join("told"))
            .unwrap()
            .read_to_string(&mut told)
            .unwrap();
        told
    }
}

/// The backend with one of the programs in `fixtures/vmms` as its VMM.
pub(crate) fn backend(vmm: &str) -> MicroVm {
    MicroVm::new(fixture("vmms").join(vmm))
}

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

/// Starts a VMM that is told by a later call what it is for.
pub(crate) async fn spawn(vmm: &impl Hypervisor, dir: &InstanceDir) -> Result<VmmProcess, VmmError> {
    let spec = VmSpec::new(vmm.name(), "/boot/guest.elf".into(), 1, 64 << 20);
    let generation = VmGeneration::random();
    let start = Start::Boot {
        spec: &spec,
        generation: &generation,
    };
    vmm.spawn(dir, start).await
}
