//! A crash at each step: the disk as that step leaves it, and what a server that starts then finds.
//!
//! Each instance must be either before or after the operation, and sweeping must leave nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use stencil_core::{Durability, Metadata, SnapshotFacts, Store, StoreError};

use crate::given::{self, names};

/// What a server does when it starts; tells what it swept, relative to the instances.
fn start_again(store: Store) -> (Store, Vec<PathBuf>) {
    let data = store.data().path().to_owned();
    drop(store);
    let store = Store::open(&data).unwrap();
    let leftovers = store.leftovers().unwrap();
    for leftover in &leftovers {
        store.sweep(leftover).unwrap();
    }
    assert!(store.leftovers().unwrap().is_empty());
    let instances = store.data().instances();
    let swept = leftovers
        .iter()
        .map(|path| path.strip_prefix(&instances).unwrap().to_owned())
        .collect();
    (store, swept)
}

fn new_dir(store: &Store, metadata: &Metadata) -> PathBuf {
    let dir = store.data().instances().join(format!(".new-{}", metadata.id));
    fs::create_dir(&dir).unwrap();
    dir
}

fn half(metadata: &Metadata) -> Vec<u8> {
    let mut bytes = metadata.to_json().unwrap();
    bytes.truncate(bytes.len() / 2);
    bytes
}

#[test]
fn while_an_instance_is_made_it_does_not_exist() {
    let template = given::record("template");
    let fork = Metadata {
        fork_of_template: Some(template.id),
        ..given::record("fork")
    };
    let steps: [fn(&Path, &Metadata); 4] = [
        |_, _| {},
        |dir, fork| fs::write(dir.join(".tmp-0-metadata.json"), half(fork)).unwrap(),
        |dir, fork| fs::write(dir.join("metadata.json"), fork.to_json().unwrap()).unwrap(),
        |dir, _| fs::write(dir.join("console.log"), "hello").unwrap(),
    ];
    for up_to in 0..steps.len() {
        let (_scratch, store) = given::store();
        given::instance(&store, &template);
        let dir = new_dir(&store, &fork);
        steps[..=up_to].iter().for_each(|step| step(&dir, &fork));

        // Also before anything is swept.
        assert!(store.live_forks(&template.id).unwrap().is_empty());
        assert!(matches!(store.read(&fork.id), Err(StoreError::NotFound { .. })));
        let (store, swept) = start_again(store);
        assert_eq!(swept, [PathBuf::from(format!(".new-{}", fork.id))]);
        assert_eq!(names(&store.data().instances()), [template.id.to_string()]);
    }
}

#[test]
fn while_a_snapshot_is_linked_its_source_is_safe() {
    let (_scratch, store) = given::store();
    let source = given::record("template");
    let (dir, manifest) = given::standby(&store, &source);
    let new = new_dir(&store, &given::record("fork"));
    fs::create_dir(new.join("snapshot")).unwrap();
    fs::hard_link(dir.snapshot().memory_ranges(), new.join("snapshot/memory-ranges")).unwrap();
    fs::write(new.join("snapshot/config.json"), "{").unwrap();

    let (store, _) = start_again(store);
    assert_eq!(names(&store.data().instances()), [source.id.to_string()]);
    assert_eq!(store.snapshot(&source.id), SnapshotFacts::Complete(manifest));
    assert_eq!(fs::read(dir.snapshot().memory_ranges()).unwrap(), vec![7; 8192]);
}

#[test]
fn while_a_record_is_written_the_old_one_counts() {
    let (_scratch, store) = given::store();
    let old = given::record("web");
    let dir = given::instance(&store, &old);
    let new = Metadata {
        is_template: true,
        ..old.clone()
    };
    for content in [Vec::new(), half(&new), new.to_json().unwrap()] {
        fs::write(dir.path().join(".tmp-3-metadata.json"), content).unwrap();
        assert_eq!(store.read(&old.id).unwrap(), old);
    }
    let (store, swept) = start_again(store);
    assert_eq!(swept, [PathBuf::from(format!("{}/.tmp-3-metadata.json", old.id))]);
    assert_eq!(names(dir.path()), ["metadata.json"]);
    assert_eq!(store.read(&old.id).unwrap(), old);
}

#[test]
fn what_an_earlier_process_left_does_not_hinder_a_write() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let dir = given::instance(&store, &metadata);
    // Whatever number is next, its file is there, and longer than what is written.
    for number in 0..2000 {
        fs::write(
            dir.path().join(format!(".tmp-{number}-metadata.json")),
            vec![b'x'; 4096],
        )
        .unwrap();
    }
    store.write(&metadata, Durability::Renamed).unwrap();
    assert_eq!(store.read(&metadata.id).unwrap(), metadata);
}

#[test]
fn while_a_snapshot_is_written_there_is_none() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let snapshot = given::instance(&store, &metadata).snapshot();
    let manifest = given::snapshot_files(&snapshot);
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
    fs::set_permissions(
        snapshot.memory_ranges(),
        std::os::unix::fs::PermissionsExt::from_mode(0o400),
    )
    .unwrap();
    fs::write(
        snapshot.path().join(".tmp-1-manifest.json"),
        manifest.to_json().unwrap(),
    )
    .unwrap();

    let (store, swept) = start_again(store);
    assert_eq!(
        swept,
        [PathBuf::from(format!(
            "{}/snapshot/.tmp-1-manifest.json",
            metadata.id
        ))]
    );
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
    // And the way is free for the next one.
    store.discard_snapshot(&metadata.id).unwrap();
    store
        .complete_snapshot(&snapshot, &given::snapshot_files(&snapshot))
        .unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Complete(manifest));
}

#[test]
fn a_snapshot_that_was_prepared_is_finished_after_a_crash_and_not_after_a_power_loss() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let snapshot = given::instance(&store, &metadata).snapshot();
    let manifest = given::snapshot_files(&snapshot);
    store.prepare_snapshot(&snapshot, &manifest).unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Prepared);
    let (store, swept) = start_again(store);
    assert!(swept.is_empty(), "{swept:?}");
    assert!(store.is_snapshot_prepared(&metadata.id));

    // The next boot has another id.
    let prepared = names(snapshot.path())
        .into_iter()
        .find(|name| name.starts_with("manifest.prepared-"))
        .unwrap();
    let (here, elsewhere) = (
        snapshot.path().join(&prepared),
        snapshot.path().join("manifest.prepared-0"),
    );
    fs::rename(&here, &elsewhere).unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
    assert!(store.finish_snapshot(&metadata.id).is_err());
    fs::rename(&elsewhere, &here).unwrap();

    store.finish_snapshot(&metadata.id).unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Complete(manifest));
    assert!(!store.is_snapshot_prepared(&metadata.id));
}

#[test]
fn what_was_prepared_goes_with_a_vm_that_runs_on_and_with_what_is_discarded() {
    let steps: [fn(&Store, &Metadata); 2] = [
        |store, metadata| store.spend_snapshot(&metadata.id, Durability::Synced).unwrap(),
        |store, metadata| store.discard_snapshot(&metadata.id).unwrap(),
    ];
    for step in steps {
        let (_scratch, store) = given::store();
        let metadata = given::record("web");
        let snapshot = given::instance(&store, &metadata).snapshot();
        let manifest = given::snapshot_files(&snapshot);
        store.prepare_snapshot(&snapshot, &manifest).unwrap();
        step(&store, &metadata);
        store.regain_snapshot(&metadata.id).unwrap();
        assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
    }
}

#[test]
fn a_snapshot_that_was_set_aside_does_not_come_back_to_a_vm_that_ran_since() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    given::standby(&store, &metadata);
    // The server dies when the VM has begun to run, and a later one lets it go on from a pause, which is refused.
    store.spend_snapshot(&metadata.id, Durability::Synced).unwrap();
    let (store, _) = start_again(store);
    store.spend_snapshot(&metadata.id, Durability::Synced).unwrap();
    store.regain_snapshot(&metadata.id).unwrap();
    assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
}

#[test]
fn while_a_snapshot_is_discarded_there_is_none() {
    for gone in [
        &["manifest.json"][..],
        &["manifest.json", "config.json"],
        &["manifest.json", "memory-ranges", "state.json"],
    ] {
        let (_scratch, store) = given::store();
        let metadata = given::record("web");
        let (dir, _) = given::standby(&store, &metadata);
        gone.iter()
            .for_each(|name| fs::remove_file(dir.snapshot().path().join(name)).unwrap());

        let (store, swept) = start_again(store);
        assert!(swept.is_empty());
        assert_eq!(store.snapshot(&metadata.id), SnapshotFacts::Absent);
        assert_eq!(store.read(&metadata.id).unwrap(), metadata);
        store.discard_snapshot(&metadata.id).unwrap();
        assert_eq!(names(dir.path()), ["metadata.json"]);
    }
}

#[test]
fn while_an_instance_is_removed_it_does_not_exist() {
    let steps: [fn(&Store, &Metadata, &Path); 4] = [
        |_, _, _| {},
        |store, metadata, _| {
            fs::remove_dir_all(store.data().hot_pages(&metadata.id).parent().unwrap()).unwrap()
        },
        |_, _, deleted| fs::remove_file(deleted.join("snapshot/memory-ranges")).unwrap(),
        |_, _, deleted| fs::remove_file(deleted.join("metadata.json")).unwrap(),
    ];
    for up_to in 0..steps.len() {
        let (_scratch, store) = given::store();
        let template = given::record("template");
        let fork = Metadata {
            fork_of_template: Some(template.id),
            ..given::record("fork")
        };
        given::instance(&store, &template);
        let (dir, _) = given::standby(&store, &fork);
        let hot_pages = store.data().hot_pages(&fork.id);
        fs::create_dir(hot_pages.parent().unwrap()).unwrap();
        fs::write(&hot_pages, "pages").unwrap();
        let deleted = store.data().instances().join(format!(".del-{}", fork.id));
        fs::rename(dir.path(), &deleted).unwrap();
        steps[..=up_to]
            .iter()
            .for_each(|step| step(&store, &fork, &deleted));

        assert!(store.live_forks(&template.id).unwrap().is_empty());
        assert!(matches!(store.read(&fork.id), Err(StoreError::NotFound { .. })));
        let (store, swept) = start_again(store);
        assert_eq!(swept, [PathBuf::from(format!(".del-{}", fork.id))]);
        assert_eq!(names(&store.data().instances()), [template.id.to_string()]);
        assert!(names(&store.data().templates()).is_empty());
    }
}

#[test]
fn only_what_is_left_over_is_swept() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let dir = given::instance(&store, &metadata);
    let nested = dir.path().join(".new-01k9z0c8mn0000000000000001");
    let outside = store.data().templates().join(".del-01k9z0c8mn0000000000000001");
    for path in [
        dir.path(),
        &dir.metadata(),
        &store.data().instances(),
        &store.data().lock(),
        &nested,
        &outside,
    ] {
        let error = store.sweep(path).unwrap_err();
        assert!(
            matches!(&error, StoreError::NotALeftover { path: refused } if refused == path),
            "{error:?}"
        );
    }
    assert_eq!(store.read(&metadata.id).unwrap(), metadata);
}
