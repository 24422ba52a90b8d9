//! What Cloud Hypervisor takes by itself for a fork: its process, its restore and its resume, without Stencil.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::{Value, json};

use super::BenchError;
use crate::bench::rows::milliseconds;
use crate::vmm::Vmm;

/// Restores of one snapshot, in a directory of their own.
#[derive(Debug)]
pub(super) struct Bare {
    binary: PathBuf,
    root: PathBuf,
    /// As the VMM wrote it, and rewritten so that its memory is mapped.
    snapshot: PathBuf,
    mapped: PathBuf,
}

/// How long each step took, in milliseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Restored {
    /// Until the API answers.
    pub(super) spawn: f64,
    pub(super) restore: f64,
    pub(super) resume: f64,
}

impl Restored {
    pub(super) fn total(&self) -> f64 {
        self.spawn + self.restore + self.resume
    }
}

impl Bare {
    /// The memory modes that a released VMM has by itself, or by a snapshot that is rewritten.
    pub(super) const MODES: [&'static str; 3] = ["copy", "ondemand", super::COW];

    pub(super) fn new(binary: &Path, snapshot: &Path, scratch: &Path) -> Result<Self, BenchError> {
        let root = scratch.join("bare");
        let mapped = root.join("mapped");
        fs::create_dir_all(&mapped).map_err(failed("make", &mapped))?;
        rewrite(snapshot, &mapped)?;
        Ok(Self {
            binary: binary.to_owned(),
            snapshot: snapshot.to_owned(),
            mapped,
            root,
        })
    }

    pub(super) fn restore(&self, mode: &str) -> Result<Restored, BenchError> {
        let from = if mode == super::COW {
            &self.mapped
        } else {
            &self.snapshot
        };
        let restore_mode = if mode == "ondemand" { "OnDemand" } else { "Copy" };
        let request = json!({
            "source_url": format!("file://{}", from.display()), "memory_restore_mode": restore_mode,
        });
        let began = Instant::now();
        let vmm = Vmm::start(&self.binary, self.root.join("vmm"))?;
        let spawned = Instant::now();
        vmm.put("vm.restore", request)?;
        let restored = Instant::now();
        vmm.put("vm.resume", Value::Null)?;
        let resumed = Instant::now();
        vmm.finish()?;
        Ok(Restored {
            spawn: milliseconds(spawned - began),
            restore: milliseconds(restored - spawned),
            resume: milliseconds(resumed - restored),
        })
    }

    /// What it says of its version.
    pub(super) fn version(&self) -> Result<String, BenchError> {
        let vmm = Vmm::start(&self.binary, self.root.join("vmm"))?;
        let told = vmm.get("vmm.ping")?;
        vmm.finish()?;
        Ok(told["build_version"].as_str().unwrap_or("unknown").to_owned())
    }
}

/// Rewrites the snapshot of a guest whose memory is one range in one zone: the zone is the memory file, mapped, and nothing of
/// it is read.
fn rewrite(snapshot: &Path, to: &Path) -> Result<(), BenchError> {
    let memory = snapshot.join("memory-ranges");
    let mut config = read(&snapshot.join("config.json"))?;
    config["memory"]["zones"][0]["file"] = json!(memory);
    write(&to.join("config.json"), &config.to_string())?;
    let mut state = read(&snapshot.join("state.json"))?;
    let manager = &mut state["snapshots"]["memory-manager"]["snapshot_data"]["state"];
    let mut ranges: Value = serde_json::from_str(manager.as_str().unwrap_or_default()).unwrap_or_default();
    ranges["memory_ranges"]["data"] = json!([]);
    *manager = json!(ranges.to_string());
    write(&to.join("state.json"), &state.to_string())
}

fn read(path: &Path) -> Result<Value, BenchError> {
    let text = fs::read_to_string(path).map_err(failed("read", path))?;
    serde_json::from_str(&text)
        .map_err(std::io::Error::from)
        .map_err(failed("read", path))
}

fn write(path: &Path, text: &str) -> Result<(), BenchError> {
    fs::write(path, text).map_err(failed("write", path))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BenchError {
    let path = path.to_owned();
    move |source| BenchError::Io { what, path, source }
}
