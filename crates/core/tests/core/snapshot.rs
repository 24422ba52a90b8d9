//! Snapshots on a real disk: complete, broken, linked, discarded.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, symlink};

use serde_json::json;
use stencil_core::{
    Durability, InstanceDir, InstanceId, Metadata, SnapshotDir, SnapshotFacts, SnapshotManifest, Store,
    StoreError,
};
use tempfile::TempDir;

use crate::given::{self, names};

fn on_standby() -> (TempDir, Store, Metadata, InstanceDir, SnapshotManifest) {
    let (scratch, store) = given::store();
    let metadata = given::record("web");
    let (dir, manifest) = given::standby(&store, &metadata);
    (scratch, store, metadata, dir, manifest)
}

fn reason(facts: SnapshotFacts) -> String {
    match facts {
        SnapshotFacts::Broken { reason } => reason,
        other => panic!("not broken: {other:?}"),
    }
}

#[test]
fn a_snapshot_exists_from_its_manifest_on_and_its_memory_is_read_only() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let snapshot = given::instance(&store, &metadata).snapshot();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
    let manifest = given::snapshot_files(&snapshot);
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);

    store.complete_snapshot(&snapshot, &manifest).unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Complete(manifest));
    assert_eq!(
        fs::metadata(snapshot.memory_ranges()).unwrap().mode() & 0o777,
        0o400
    );
    assert_eq!(fs::metadata(snapshot.manifest()).unwrap().mode() & 0o777, 0o600);
    assert_eq!(
        names(snapshot.path()),
        ["config.json", "manifest.json", "memory-ranges", "state.json"]
    );
}

#[test]
fn a_snapshot_that_is_not_all_there_is_not_completed() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let snapshot = given::instance(&store, &metadata).snapshot();
    let manifest = given::snapshot_files(&snapshot);
    fs::write(snapshot.state(), "").unwrap();
    let error = store.complete_snapshot(&snapshot, &manifest).unwrap_err();
    assert!(
        matches!(&error, StoreError::BrokenSnapshot { reason, .. }
        if reason == "state.json has 0 bytes, and its manifest says 12"),
        "{error:?}"
    );
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
}

#[test]
fn a_damaged_snapshot_is_broken_with_its_reason() {
    type Damage = fn(&SnapshotDir);
    let damages: [(Damage, &str); 9] = [
        (
            |dir| fs::remove_file(dir.state()).unwrap(),
            "state.json is missing",
        ),
        (
            |dir| fs::write(dir.config(), "{} ").unwrap(),
            "config.json has 3 bytes, and its manifest says 2",
        ),
        (
            |dir| {
                fs::remove_file(dir.memory_ranges()).unwrap();
                fs::write(dir.memory_ranges(), [0; 4096]).unwrap();
            },
            "memory-ranges has 4096 bytes, and its manifest says 8192",
        ),
        (
            |dir| {
                fs::remove_file(dir.config()).unwrap();
                fs::create_dir(dir.config()).unwrap();
            },
            "config.json is no file",
        ),
        (
            |dir| {
                fs::remove_file(dir.config()).unwrap();
                symlink("state.json", dir.config()).unwrap();
            },
            "config.json is no file",
        ),
        (
            |dir| fs::write(dir.manifest(), "").unwrap(),
            "its manifest cannot be read: it is no valid JSON: EOF while",
        ),
        (
            |dir| fs::write(dir.manifest(), "{\"schema\": 9}").unwrap(),
            "its manifest cannot be read: its schema is 9",
        ),
        (
            |dir| {
                fs::remove_file(dir.manifest()).unwrap();
                fs::create_dir(dir.manifest()).unwrap();
            },
            "its manifest cannot be read: Is a directory",
        ),
        (
            |dir| {
                fs::remove_dir_all(dir.path()).unwrap();
                fs::write(dir.path(), "").unwrap();
            },
            "its manifest cannot be read: Not a directory",
        ),
    ];
    for (inflict, expected) in damages {
        let (_scratch, store, metadata, dir, _) = on_standby();
        inflict(&dir.snapshot());
        let reason = reason(store.snapshot(&metadata.id));
        assert!(reason.starts_with(expected), "{reason}");
        store
            .discard_snapshot(&metadata.id)
            .unwrap_or_else(|error| assert!(expected.contains("irectory"), "{error:?}"));
        store.remove(&metadata.id).unwrap();
    }
}

#[test]
fn a_manifest_that_lists_too_little_or_leads_elsewhere_is_broken() {
    for (name, size, expected) in [
        ("memory-ranges", None, "its manifest does not list memory-ranges"),
        (
            "../metadata.json",
            Some(1),
            "its manifest lists \"../metadata.json\", which cannot be a file of it",
        ),
        (
            "/etc/passwd",
            Some(1),
            "its manifest lists \"/etc/passwd\", which cannot be a file of it",
        ),
        (
            "state.json/",
            Some(12),
            "its manifest lists \"state.json/\", which cannot be a file of it",
        ),
        (
            "",
            Some(1),
            "its manifest lists \"\", which cannot be a file of it",
        ),
        (
            "manifest.json",
            Some(1),
            "its manifest lists \"manifest.json\", which cannot be a file of it",
        ),
    ] {
        let (_scratch, store, metadata, dir, mut manifest) = on_standby();
        match size {
            Some(size) => manifest.files.insert(name.to_owned(), size),
            None => manifest.files.remove(name),
        };
        fs::write(dir.snapshot().manifest(), manifest.to_json().unwrap()).unwrap();
        assert_eq!(reason(store.snapshot(&metadata.id)), expected);
        let new = store.begin(InstanceId::generate()).unwrap();
        assert!(matches!(
            new.link_snapshot(&dir.snapshot(), &manifest),
            Err(StoreError::BrokenSnapshot { .. })
        ));
        assert!(!new.dir().snapshot().path().exists());
    }
}

#[test]
fn a_linked_snapshot_shares_the_memory_and_nothing_else() {
    let (_scratch, store, _, dir, mut manifest) = on_standby();
    let from = dir.snapshot();
    manifest.other.insert("of_tomorrow".to_owned(), json!(1));
    let fork = given::record("fork");
    let new = store.begin(fork.id).unwrap();
    let own = new.link_snapshot(&from, &manifest).unwrap();
    let to = new.commit(&fork, Durability::Synced).unwrap().snapshot();

    assert_eq!(
        own,
        SnapshotManifest {
            other: serde_json::Map::new(),
            ..manifest
        }
    );
    assert_eq!(store.snapshot(&fork.id), SnapshotFacts::Complete(own));
    let inode = |path: std::path::PathBuf| fs::metadata(path).unwrap().ino();
    assert_eq!(inode(to.memory_ranges()), inode(from.memory_ranges()));
    for (a, b) in [
        (from.config(), to.config()),
        (from.state(), to.state()),
        (from.manifest(), to.manifest()),
    ] {
        assert_ne!(inode(a), inode(b));
    }
    assert_eq!(fs::read(to.state()).unwrap(), fs::read(from.state()).unwrap());
}

#[test]
fn what_is_linked_outlives_its_source() {
    let (_scratch, store, source, dir, manifest) = on_standby();
    let fork = given::record("fork");
    let new = store.begin(fork.id).unwrap();
    let own = new.link_snapshot(&dir.snapshot(), &manifest).unwrap();
    let to = new.commit(&fork, Durability::Renamed).unwrap().snapshot();
    store.remove(&source.id).unwrap();
    assert_eq!(store.snapshot(&fork.id), SnapshotFacts::Complete(own));
    assert_eq!(fs::read(to.memory_ranges()).unwrap(), vec![7; 8192]);
}

#[test]
fn discard_leaves_no_snapshot_and_can_be_asked_again() {
    let (_scratch, store, metadata, dir, _) = on_standby();
    let linked = store.begin(InstanceId::generate()).unwrap();
    let SnapshotFacts::Complete(manifest) = store.snapshot(&metadata.id) else {
        panic!("not complete")
    };
    linked.link_snapshot(&dir.snapshot(), &manifest).unwrap();

    store.discard_snapshot(&metadata.id).unwrap();
    store.discard_snapshot(&metadata.id).unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
    assert_eq!(names(dir.path()), ["metadata.json"]);
    assert_eq!(
        fs::read(linked.dir().snapshot().memory_ranges()).unwrap(),
        vec![7; 8192]
    );
}

#[test]
fn memory_cannot_be_written_in_place() {
    if rustix::process::geteuid().is_root() {
        return; // Root writes what it likes; the mode is asserted above.
    }
    let (_scratch, _store, _, dir, _) = on_standby();
    let error = fs::OpenOptions::new()
        .write(true)
        .open(dir.snapshot().memory_ranges())
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::PermissionDenied);
}
