//! The snapshots that are restored: of a guest that has filled its memory, and has its next work waiting for it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::BenchError;
use crate::build::BuiltVmm;
use crate::vmm::Vmm;

pub(super) const MIB: u64 = 1 << 20;

/// The memory of the guest whose work is measured.
pub(super) const MEMORY: u64 = 512 * MIB;
/// The working area begins at 16 MiB (fixtures/guest/README.md).
const AREA: u64 = MEMORY - 16 * MIB;

/// The work, 64 MiB of 4 KiB pages: four sweeps over the whole area, each with 124 KiB between one page and the next,
/// more than the kernel maps around a fault (64 KiB), and no page twice.
const STARTS: [u64; 4] = [0, 16, 8, 24];
const TOUCHES: u64 = 4096;
const STRIDE: u64 = 31;
/// Pages that the work touches.
pub(super) const TOUCHED: u64 = TOUCHES * STARTS.len() as u64;

const _: () = assert!(TOUCHES * STRIDE * 4096 == AREA, "the sweeps cover the area");

/// What the guest prints at the end of each sweep.
pub(super) const SWEPT: &str = "ok touched=";
pub(super) const SWEEPS: usize = STARTS.len();

/// Boots a guest with `memory` bytes, and waits until it is ready.
pub(super) fn boot(built: &BuiltVmm, directory: PathBuf, memory: u64) -> Result<Vmm, BenchError> {
    let vmm = Vmm::start(&built.microvm, directory)?;
    let definition = json!({
        "cpus": {"boot_vcpus": 1, "max_vcpus": 1},
        "memory": {"size": memory},
        "payload": {"kernel": built.guest},
        "serial": {"mode": "Socket", "file": "console.log", "socket": "console.sock"},
        "console": {"mode": "Off"},
        "generation": "000102030405060708090a0b0c0d0e0f",
    });
    vmm.put("vm.create", definition)?;
    vmm.put("vm.boot", Value::Null)?;
    vmm.wait_for("ready epoch=boot", 1)?;
    Ok(vmm)
}

/// Writes a snapshot of a paused VM to a new directory.
pub(super) fn snapshot(vmm: &Vmm, directory: &Path) -> Result<(), BenchError> {
    fs::create_dir(directory).map_err(|source| BenchError::Io {
        what: "make",
        path: directory.to_owned(),
        source,
    })?;
    let url = format!("file://{}", directory.display());
    Ok(vmm.put("vm.snapshot", json!({"destination_url": url}))?)
}

/// Makes the snapshot whose restores are measured: no page of the area is a hole, and the guest does its work as soon as
/// it runs, without waiting for anybody.
pub(super) fn filled(built: &BuiltVmm, root: &Path) -> Result<PathBuf, BenchError> {
    let vmm = boot(built, root.join("source"), MEMORY)?;
    vmm.send(&format!("write 0 {} 42\n", AREA / 4096))?;
    vmm.wait_for("ok written=", 1)?;
    vmm.put("vm.pause", Value::Null)?;
    let work: String = STARTS
        .iter()
        .map(|start| format!("touch {start} {TOUCHES} {STRIDE}\n"))
        .collect();
    vmm.send(&work)?;
    let directory = root.join("snapshot");
    snapshot(&vmm, &directory)?;
    vmm.finish()?;
    Ok(directory)
}

/// Makes a snapshot of a guest that has done nothing, so that nearly all of its memory is a hole.
pub(super) fn empty(built: &BuiltVmm, root: &Path, memory: u64) -> Result<PathBuf, BenchError> {
    let name = format!("{}-mib", memory / MIB);
    let vmm = boot(built, root.join(format!("source-{name}")), memory)?;
    vmm.put("vm.pause", Value::Null)?;
    let directory = root.join(name);
    snapshot(&vmm, &directory)?;
    vmm.finish()?;
    Ok(directory)
}
