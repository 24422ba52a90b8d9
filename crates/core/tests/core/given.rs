//! What the tests begin with: records with every field set, and instances on a real disk.

use std::fs;
use std::path::Path;

use jiff::Timestamp;
use serde_json::{Map, Value, json};
use stencil_core::{
    DiskFormat, DiskSpec, Durability, Epoch, EpochKind, HostCpu, HypervisorName, InstanceDir, InstanceId,
    MemoryMode, Metadata, ProcessIdentity, Readiness, SnapshotDir, SnapshotManifest, Store, VmGeneration,
    VmSpec, VmmRecord,
};
use tempfile::TempDir;

pub(crate) const HYPERVISOR: HypervisorName = HypervisorName::from_static("microvm");

pub(crate) fn time() -> Timestamp {
    "2025-11-22T14:05:06.789Z".parse().unwrap()
}

fn unknown(name: &str) -> Map<String, Value> {
    Map::from_iter([(
        name.to_owned(),
        json!({"nested": [1, 2.5, null, "é"], "big": u64::MAX}),
    )])
}

/// The least that a record can be.
pub(crate) fn minimal() -> Metadata {
    Metadata::new(
        "01k9z0c8mn0000000000000001".parse().unwrap(),
        "web".parse().unwrap(),
        VmSpec::new(HYPERVISOR, "/boot/guest.elf".into(), 1, 512 << 20),
        "000102030405060708090a0b0c0d0e0f".parse().unwrap(),
        time(),
    )
}

/// Every field set, also unknown ones at every level. A literal without `..`: a new field has to be added here.
pub(crate) fn full() -> Metadata {
    Metadata {
        schema: Metadata::SCHEMA,
        id: "01k9z0c8mn0000000000000002".parse().unwrap(),
        name: "template-1".parse().unwrap(),
        created_at: time(),
        spec: VmSpec {
            hypervisor: HYPERVISOR,
            image: Some("debian".parse().unwrap()),
            kernel: Some("/boot/vmlinux".into()),
            firmware: Some("/boot/firmware".into()),
            initrd: Some("/boot/initrd".into()),
            cmdline: "console=ttyS0".to_owned(),
            disks: vec![DiskSpec {
                path: "/images/debian.qcow2".into(),
                format: DiskFormat::Qcow2,
                bytes: Some(1 << 20),
                read_only: true,
            }],
            vcpus: 2,
            memory_bytes: 512 << 20,
            readiness: Readiness::Console("ready epoch=".to_owned()),
            labels: [("team".to_owned(), "blue".to_owned())].into(),
            other: unknown("spec_field_of_tomorrow"),
        },
        generation: "f0e0d0c0b0a090807060504030201000".parse().unwrap(),
        is_template: true,
        hot_pages_path: Some("/data/templates/01k9z0c8mn0000000000000002/hot-pages".into()),
        armed: Some(2),
        fork_of_template: Some("01k9z0c8mn0000000000000000".parse().unwrap()),
        delete_after: true,
        memory_mode: Some(MemoryMode::Copy),
        memory_mode_reason: Some("it could not be mapped".to_owned()),
        vmm: Some(VmmRecord {
            process: ProcessIdentity {
                pid: 4242,
                start_time: 123_456_789,
                boot_id: "6f1c1f0e-1b1a-4c58-9d0a-2f6a3f1d7c11".to_owned(),
            },
            version: "0.1.0".to_owned(),
            started_at: time(),
            epoch: Epoch {
                id: "101112131415161718191a1b1c1d1e1f".parse().unwrap(),
                began: EpochKind::Restore,
                console_offset: 17,
            },
            other: unknown("vmm_field_of_tomorrow"),
        }),
        other: unknown("field_of_tomorrow"),
    }
}

/// An open store in a directory of its own.
pub(crate) fn store() -> (TempDir, Store) {
    let scratch = tempfile::tempdir().unwrap();
    let store = Store::open(scratch.path()).unwrap();
    (scratch, store)
}

/// A new instance's record, not yet on disk.
pub(crate) fn record(name: &str) -> Metadata {
    Metadata {
        id: InstanceId::generate(),
        name: name.parse().unwrap(),
        generation: VmGeneration::random(),
        ..minimal()
    }
}

/// An instance on disk.
pub(crate) fn instance(store: &Store, metadata: &Metadata) -> InstanceDir {
    store
        .begin(metadata.id)
        .unwrap()
        .commit(metadata, Durability::Renamed)
        .unwrap()
}

/// The files of a snapshot in `dir`, as a VMM writes them, and the manifest that describes them.
pub(crate) fn snapshot_files(dir: &SnapshotDir) -> SnapshotManifest {
    fs::create_dir_all(dir.path()).unwrap();
    fs::write(dir.config(), "{}").unwrap();
    fs::write(dir.state(), "{\"vcpus\":[]}").unwrap();
    fs::write(dir.memory_ranges(), vec![7; 8192]).unwrap();
    SnapshotManifest {
        schema: SnapshotManifest::SCHEMA,
        created_at: time(),
        hypervisor: HYPERVISOR,
        hypervisor_version: "0.1.0".to_owned(),
        host_cpu: Some(Box::new(HostCpu {
            vendor: "GenuineIntel".to_owned(),
            model: "A CPU @ 3.00GHz".to_owned(),
            features: vec![1, 2],
        })),
        memory_generation: "00112233445566778899aabbccddeeff".parse().unwrap(),
        memory_bytes: 8192,
        frozen: Some(true),
        files: [("config.json", 2), ("state.json", 12), ("memory-ranges", 8192)]
            .map(|(name, size)| (name.to_owned(), size))
            .into(),
        other: Map::new(),
    }
}

/// An instance on disk with a complete snapshot.
pub(crate) fn standby(store: &Store, metadata: &Metadata) -> (InstanceDir, SnapshotManifest) {
    let dir = instance(store, metadata);
    let manifest = snapshot_files(&dir.snapshot());
    store.complete_snapshot(&dir.snapshot(), &manifest).unwrap();
    (dir, manifest)
}

/// The names in a directory, sorted.
pub(crate) fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}
