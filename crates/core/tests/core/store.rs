//! The store on a real disk: make, read, write, scan, count forks, remove.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use stencil_core::{Durability, InstanceId, Metadata, Store, StoreError};

use crate::given::{self, names};

fn mode(path: &Path) -> u32 {
    fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn opening_makes_what_is_missing_for_its_owner_alone() {
    let scratch = tempfile::tempdir().unwrap();
    let store = Store::open(&scratch.path().join("a/b")).unwrap();
    let data = store.data();
    assert_eq!(names(data.path()), ["images", "instances", "lock", "templates"]);
    for dir in [data.path(), &data.images(), &data.instances(), &data.templates()] {
        assert_eq!(mode(dir), 0o700, "{}", dir.display());
    }
    assert_eq!(mode(&data.lock()), 0o600);
}

#[test]
fn paths_are_absolute_and_real_also_through_a_link() {
    let scratch = tempfile::tempdir().unwrap();
    let real = fs::canonicalize(scratch.path()).unwrap().join("real");
    fs::create_dir(&real).unwrap();
    symlink(&real, scratch.path().join("link")).unwrap();
    assert_eq!(
        Store::open(&scratch.path().join("link")).unwrap().data().path(),
        real
    );
}

#[test]
fn a_path_that_is_too_long_for_sockets_is_refused_with_the_numbers_and_nothing_is_made() {
    let scratch = tempfile::tempdir().unwrap();
    let base = fs::canonicalize(scratch.path()).unwrap();
    // instances/.new-<26>/console.sock and the NUL leave 52 of the 108 bytes.
    let of_length = |length: usize| base.join("d".repeat(length - base.as_os_str().len() - 1));
    let error = Store::open(&of_length(53)).unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::PathTooLong {
                length: 53,
                limit: 52,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        error
            .to_string()
            .contains("has 53 bytes, and at most 52 leave room"),
        "{error}"
    );
    assert!(names(&base).is_empty());

    let store = Store::open(&of_length(52)).unwrap();
    let new = store.begin(InstanceId::generate()).unwrap();
    std::os::unix::net::UnixListener::bind(new.dir().console_socket()).unwrap();
}

#[test]
fn a_file_in_place_of_the_data_directory_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("data");
    fs::write(&path, "").unwrap();
    let error = Store::open(&path).unwrap_err();
    assert!(error.to_string().starts_with("cannot create "), "{error}");
}

#[test]
fn an_instance_exists_from_its_commit_on() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let new = store.begin(metadata.id).unwrap();
    assert_eq!(new.id(), &metadata.id);
    fs::write(new.dir().console_log(), "hello").unwrap();
    assert!(matches!(store.read(&metadata.id), Err(StoreError::NotFound { id }) if id == metadata.id));
    assert!(store.scan().unwrap().is_empty());

    for durability in [Durability::Renamed, Durability::Synced] {
        let metadata = given::record("web");
        let dir = store
            .begin(metadata.id)
            .unwrap()
            .commit(&metadata, durability)
            .unwrap();
        assert_eq!(store.read(&metadata.id).unwrap(), metadata);
        assert_eq!(names(dir.path()), ["metadata.json"]);
        assert_eq!((mode(dir.path()), mode(&dir.metadata())), (0o700, 0o600));
    }
    let dir = new.commit(&metadata, Durability::Renamed).unwrap();
    assert_eq!(dir, store.data().instance(&metadata.id));
    assert_eq!(fs::read_to_string(dir.console_log()).unwrap(), "hello");
    assert!(store.leftovers().unwrap().is_empty());
}

#[test]
fn an_instance_that_is_not_committed_leaves_nothing() {
    let (_scratch, store) = given::store();
    let new = store.begin(InstanceId::generate()).unwrap();
    fs::create_dir(new.dir().snapshot().path()).unwrap();
    drop(new);
    assert!(names(&store.data().instances()).is_empty());
}

#[test]
fn the_record_of_another_instance_is_not_committed() {
    let (_scratch, store) = given::store();
    let error = store
        .begin(InstanceId::generate())
        .unwrap()
        .commit(&given::record("web"), Durability::Renamed)
        .unwrap_err();
    assert!(matches!(error, StoreError::WrongId { .. }));
    assert!(names(&store.data().instances()).is_empty());
}

#[test]
fn one_id_is_made_only_once() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let _new = store.begin(metadata.id).unwrap();
    assert!(matches!(
        store.begin(metadata.id),
        Err(StoreError::Io { what: "create", .. })
    ));

    let taken = given::record("web");
    given::instance(&store, &taken);
    let again = Metadata {
        name: "other".parse().unwrap(),
        ..taken.clone()
    };
    assert!(
        store
            .begin(taken.id)
            .unwrap()
            .commit(&again, Durability::Renamed)
            .is_err()
    );
    assert_eq!(store.read(&taken.id).unwrap(), taken);
}

#[test]
fn a_write_replaces_the_record_and_leaves_nothing_else() {
    let (_scratch, store) = given::store();
    let mut metadata = Metadata {
        id: InstanceId::generate(),
        ..given::full()
    };
    metadata.spec.image = None;
    let dir = given::instance(&store, &metadata);
    for (vcpus, durability) in [(3, Durability::Renamed), (4, Durability::Synced)] {
        metadata.spec.vcpus = vcpus;
        store.write(&metadata, durability).unwrap();
        assert_eq!(store.read(&metadata.id).unwrap(), metadata);
        assert_eq!(names(dir.path()), ["metadata.json"]);
        assert_eq!(mode(&dir.metadata()), 0o600);
    }
    let absent = given::record("absent");
    assert!(
        matches!(store.write(&absent, Durability::Renamed), Err(StoreError::NotFound { id }) if id == absent.id)
    );
}

#[test]
fn a_write_that_fails_keeps_the_old_record() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let dir = given::instance(&store, &metadata);
    let mut inexpressible = metadata.clone();
    inexpressible.spec.kernel = Some(OsStr::from_bytes(b"/\xff").into());
    assert!(matches!(
        store.write(&inexpressible, Durability::Renamed),
        Err(StoreError::Unwritable { .. })
    ));
    assert_eq!(store.read(&metadata.id).unwrap(), metadata);
    assert_eq!(names(dir.path()), ["metadata.json"]);
}

#[test]
fn a_scan_is_in_the_order_of_ids_and_shows_what_cannot_be_read() {
    let (_scratch, store) = given::store();
    let records = ["a", "b", "c"].map(given::record);
    for record in records.iter().rev() {
        given::instance(&store, record);
    }
    fs::write(store.data().instance(&records[1].id).metadata(), "{").unwrap();
    fs::create_dir(store.data().instances().join(".hidden")).unwrap();

    let scanned = store.scan().unwrap();
    assert_eq!(
        scanned.iter().map(|scanned| scanned.id).collect::<Vec<_>>(),
        records.each_ref().map(|record| record.id)
    );
    assert_eq!(scanned[0].metadata.as_ref().unwrap(), &records[0]);
    assert!(matches!(scanned[1].metadata, Err(StoreError::Unreadable { id, .. }) if id == records[1].id));
    assert_eq!(scanned[2].metadata.as_ref().unwrap(), &records[2]);
}

#[test]
fn live_forks_are_those_that_the_disk_records() {
    let (_scratch, store) = given::store();
    let template = given::record("template");
    given::instance(&store, &template);
    let fork = |name: &str, of: &Metadata| Metadata {
        fork_of_template: Some(of.id),
        ..given::record(name)
    };
    let (a, b) = (fork("a", &template), fork("b", &template));
    let elsewhere = fork("elsewhere", &a);
    for metadata in [&b, &elsewhere, &a] {
        given::instance(&store, metadata);
    }
    // Being made, and being armed, it is no fork yet.
    let _new = store.begin(InstanceId::generate()).unwrap();

    let names = |forks: Vec<stencil_core::LiveFork>| {
        forks.iter().map(|fork| fork.name.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(names(store.live_forks(&template.id).unwrap()), ["a", "b"]);
    store.remove(&a.id).unwrap();
    assert_eq!(names(store.live_forks(&template.id).unwrap()), ["b"]);
    store.remove(&b.id).unwrap();
    assert!(store.live_forks(&template.id).unwrap().is_empty());
}

#[test]
fn remove_takes_everything_also_what_is_read_only_and_what_a_template_keeps() {
    let (_scratch, store) = given::store();
    let (metadata, other) = (given::record("template"), given::record("other"));
    let (dir, _) = given::standby(&store, &metadata);
    given::instance(&store, &other);
    let hot_pages = store.data().hot_pages(&metadata.id);
    fs::create_dir(hot_pages.parent().unwrap()).unwrap();
    fs::write(&hot_pages, "pages").unwrap();
    fs::set_permissions(&hot_pages, Permissions::from_mode(0o400)).unwrap();
    assert_eq!(mode(&dir.snapshot().memory_ranges()), 0o400);

    store.remove(&metadata.id).unwrap();
    assert_eq!(names(&store.data().instances()), [other.id.to_string()]);
    assert!(names(&store.data().templates()).is_empty());
    assert!(matches!(store.remove(&metadata.id), Err(StoreError::NotFound { id }) if id == metadata.id));
}

#[test]
fn a_process_in_a_new_instance_follows_it_to_its_name() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    let new = store.begin(metadata.id).unwrap();
    let mut child = std::process::Command::new("cat")
        .current_dir(new.dir().path())
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let dir = new.commit(&metadata, Durability::Renamed).unwrap();
    assert_eq!(
        fs::read_link(format!("/proc/{}/cwd", child.id())).unwrap(),
        dir.path()
    );
    drop(child.stdin.take());
    child.wait().unwrap();
}
