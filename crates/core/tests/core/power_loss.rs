//! What a power loss takes.

use std::fs;
use std::path::Path;

use stencil_core::{
    InstanceId, MemoryMode, Metadata, Scanned, Store, StoreError, UnreadableCause, sync_records,
};

use crate::disk::Disk;
use crate::given;

/// The kernel writes the journal at times of its own, and what is in it then is more than what was synced.
fn write_the_journal(data: &Path) {
    let bystander = data.join("bystander");
    fs::write(&bystander, "x").unwrap();
    fs::File::open(bystander).unwrap().sync_all().unwrap();
}

fn fork_of(template: &Metadata, name: &str) -> Metadata {
    Metadata {
        fork_of_template: Some(template.id),
        memory_mode: Some(MemoryMode::Cow),
        vmm: given::full().vmm,
        ..given::record(name)
    }
}

fn found(store: &Store, id: &InstanceId) -> Scanned {
    let scanned = store.scan().unwrap();
    scanned.into_iter().find(|found| found.id == *id).unwrap()
}

#[test]
fn a_record_is_lost_in_a_power_loss_until_it_is_synced_behind_its_request() {
    let Some(mut disk) = Disk::new() else { return };
    let store = Store::open(disk.path()).unwrap();
    let metadata = given::record("web");
    given::instance(&store, &metadata);
    write_the_journal(disk.path());

    let before = Store::open(&disk.after_power_loss("before")).unwrap();
    assert!(
        matches!(
            found(&before, &metadata.id).metadata,
            Err(StoreError::Unreadable {
                source: UnreadableCause::Lost,
                ..
            })
        ),
        "the power loss that is made here takes nothing"
    );
    drop(before);

    sync_records(store.data(), &[metadata.id, InstanceId::generate()]).unwrap();
    let after = Store::open(&disk.after_power_loss("after")).unwrap();
    assert_eq!(after.read(&metadata.id).unwrap(), metadata);
}

#[test]
fn a_fork_of_which_a_power_loss_leaves_nothing_is_told_after_it_and_nothing_else_is() {
    let (_scratch, store) = given::store();
    let template = given::record("template");
    given::instance(&store, &template);
    let running = fork_of(&template, "running");
    let with_disk = Metadata {
        spec: given::full().spec,
        ..fork_of(&template, "with-disk")
    };
    let with_disk = Metadata {
        spec: stencil_core::VmSpec {
            image: None,
            disks: with_disk
                .spec
                .disks
                .iter()
                .cloned()
                .map(|disk| stencil_core::DiskSpec {
                    read_only: false,
                    ..disk
                })
                .collect(),
            ..with_disk.spec.clone()
        },
        ..with_disk
    };
    let of_this_boot = {
        let mut fork = fork_of(&template, "of-this-boot");
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        boot.trim_end()
            .clone_into(&mut fork.vmm.as_mut().unwrap().process.boot_id);
        fork
    };
    let stopped = Metadata {
        vmm: None,
        ..fork_of(&template, "stopped")
    };
    let booted = Metadata {
        memory_mode: None,
        ..fork_of(&template, "booted")
    };
    let on_standby = fork_of(&template, "on-standby");
    let no_fork = Metadata {
        fork_of_template: None,
        ..fork_of(&template, "no-fork")
    };
    for kept in [&running, &with_disk, &of_this_boot, &stopped, &booted, &no_fork] {
        given::instance(&store, kept);
    }
    given::standby(&store, &on_standby);
    let scanned = store.scan().unwrap();
    assert_eq!(scanned.len(), 8);
    assert_eq!(store.lost_with_the_host(&scanned), [running.id]);
    assert!(!running.outlives_the_host() && with_disk.outlives_the_host() && no_fork.outlives_the_host());
}

#[test]
fn a_lost_record_is_told_after_another_boot_if_nothing_of_value_is_beside_it() {
    let scratch = tempfile::tempdir().unwrap();
    let (nothing, damaged, snapshot, disk) = (
        given::record("nothing"),
        given::record("damaged"),
        given::record("snapshot"),
        given::record("disk"),
    );
    let lost = |store: &Store| store.lost_with_the_host(&store.scan().unwrap());
    let store = Store::open(scratch.path()).unwrap();
    for metadata in [&nothing, &damaged, &disk] {
        given::instance(&store, metadata);
    }
    given::standby(&store, &snapshot);
    for (metadata, content) in [(&nothing, ""), (&damaged, "{"), (&snapshot, ""), (&disk, "")] {
        fs::write(store.data().instance(&metadata.id).metadata(), content).unwrap();
    }
    fs::write(store.data().instance(&nothing.id).console_log(), "hello").unwrap();
    fs::write(store.data().instance(&disk.id).disk(0), "").unwrap();
    // A directory that remembers no boot has not certainly seen another one.
    assert_eq!(lost(&store), []);
    store.remember_boot().unwrap();
    drop(store);
    let store = Store::open(scratch.path()).unwrap();
    assert!(!store.is_first_of_boot());
    assert_eq!(lost(&store), []);
    drop(store);

    fs::write(scratch.path().join("boot"), "another boot").unwrap();
    let store = Store::open(scratch.path()).unwrap();
    assert!(store.is_first_of_boot());
    assert_eq!(lost(&store), [nothing.id]);
    store.remember_boot().unwrap();
    drop(store);
    assert!(!Store::open(scratch.path()).unwrap().is_first_of_boot());
}
