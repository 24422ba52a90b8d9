//! A VMM that came and went leaves no descriptor open. Alone in its program, because it counts all of them.

#![expect(
    clippy::unwrap_used,
    reason = "what fails here fails the test, also in what tests share"
)]

use std::fs;
use std::path::Path;

use stencil_core::{InstanceDir, VmGeneration, VmSpec};
use stencil_vmm::{Hypervisor, MicroVm, Start, VmmProcess};

fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn a_vmm_that_came_and_went_leaves_no_descriptor() {
    let vmms = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/vmms");
    let spec = VmSpec::new("microvm".parse().unwrap(), "/boot/guest.elf".into(), 1, 64 << 20);
    let generation = VmGeneration::random();
    let start = Start::Boot {
        spec: &spec,
        generation: &generation,
    };
    let before = open_descriptors();
    for name in ["sleeps", "fails", "no-such-vmm"] {
        let scratch = tempfile::tempdir().unwrap();
        let dir = InstanceDir::new(scratch.path());
        let vmm = MicroVm::new(vmms.join(name));
        let Ok(process) = vmm.spawn(&dir, start).await else {
            assert_eq!(name, "no-such-vmm");
            continue;
        };
        let again = VmmProcess::attach(process.identity()).unwrap();
        vmm.stop(&dir, &process).await.unwrap();
        vmm.info(&dir).await.unwrap_err();
        if let Some(again) = again {
            again.exited().await;
        }
        // Its reaper has a handle of its own, which it drops when it has run.
        drop(process);
        tokio::task::yield_now().await;
    }
    assert_eq!(open_descriptors(), before);
}
