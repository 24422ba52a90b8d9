//! What cannot be read could be a fork: an error with its path and cause, never zero forks.

use std::error::Error;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::thread::{CapabilitySet, capabilities, set_capabilities};
use stencil_core::{FormatError, StoreError, UnreadableCause};

use crate::given;

/// Its name, what it does to a record's file, and what the cause then says.
type Damage = (&'static str, fn(&Path), &'static str);

/// Every way in which a record can be unreadable.
fn damages() -> Vec<Damage> {
    fn rewrite(path: &Path, change: impl FnOnce(String) -> String) {
        fs::write(path, change(fs::read_to_string(path).unwrap())).unwrap();
    }
    vec![
        (
            "empty",
            |path| fs::write(path, "").unwrap(),
            "it is empty, as after a power loss",
        ),
        (
            "zeros",
            |path| fs::write(path, [0; 512]).unwrap(),
            "it is empty, as after a power loss",
        ),
        (
            "truncated",
            |path| rewrite(path, |text| text[..text.len() / 2].to_owned()),
            "it is no valid JSON",
        ),
        (
            "garbage",
            |path| fs::write(path, b"\0\xff\x01").unwrap(),
            "it is no valid JSON",
        ),
        (
            "another schema",
            |path| rewrite(path, |text| text.replace("\"schema\": 1", "\"schema\": 2")),
            "its schema is 2",
        ),
        (
            "no schema",
            |path| fs::write(path, "{}").unwrap(),
            "it has no \"schema\" number",
        ),
        (
            "a wrong form",
            |path| fs::write(path, "{\"schema\":1}").unwrap(),
            "it does not have the form",
        ),
        (
            "a directory",
            |path| {
                fs::remove_file(path).unwrap();
                fs::create_dir(path).unwrap();
            },
            "Is a directory",
        ),
        ("missing", |path| fs::remove_file(path).unwrap(), "No such file"),
        (
            "of another instance",
            |path| fs::write(path, given::minimal().to_json().unwrap()).unwrap(),
            "it is that of instance 01k9z0c8mn0000000000000001",
        ),
        (
            "without an end",
            |path| {
                fs::remove_file(path).unwrap();
                std::os::unix::fs::symlink("/dev/zero", path).unwrap();
            },
            "it is no regular file",
        ),
        (
            "a file in place of the instance",
            |path| {
                fs::remove_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path.parent().unwrap(), "").unwrap();
            },
            "Not a directory",
        ),
    ]
}

#[test]
fn an_unreadable_record_is_an_error_with_its_path_and_cause_and_never_zero_forks() {
    for (damage, inflict, cause) in damages() {
        let (_scratch, store) = given::store();
        let (template, bystander) = (given::record("template"), given::record("bystander"));
        given::instance(&store, &template);
        let path = given::instance(&store, &bystander).metadata();
        inflict(&path);

        let error = store.read(&bystander.id).unwrap_err();
        let StoreError::Unreadable { id, path: at, .. } = &error else {
            panic!("{damage}: {error:?}")
        };
        assert_eq!((id, at), (&bystander.id, &path), "{damage}");
        let said = error.source().unwrap().to_string();
        assert!(said.contains(cause), "{damage}: {said}");
        assert!(
            !error.to_string().contains(&said),
            "{damage}: a message repeats its source"
        );
        let uncounted = store.live_forks(&template.id).unwrap_err();
        assert!(
            matches!(&uncounted, StoreError::Uncounted { unreadable, strangers }
                if *unreadable == [bystander.id] && strangers.is_empty()),
            "{damage}: {uncounted:?}"
        );
        // For the deletion of what is damaged itself, that suffices which can be read.
        assert_eq!(store.known_forks(&bystander.id).unwrap(), [], "{damage}");
        assert!(
            store
                .scan()
                .unwrap()
                .iter()
                .any(|scanned| scanned.id == bystander.id && scanned.metadata.is_err())
        );
        assert_eq!(store.read(&template.id).unwrap(), template, "{damage}");

        // Delete is the way out.
        store.remove(&bystander.id).unwrap();
        assert_eq!(store.live_forks(&template.id).unwrap(), []);
        assert!(store.leftovers().unwrap().is_empty());
    }
}

#[test]
fn another_schema_is_told_by_its_type() {
    let (_scratch, store) = given::store();
    let metadata = given::record("web");
    fs::write(given::instance(&store, &metadata).metadata(), "{\"schema\": 3}").unwrap();
    let error = store.read(&metadata.id).unwrap_err();
    let schema = |cause: &UnreadableCause| {
        matches!(
            cause,
            UnreadableCause::Format(FormatError::Schema {
                found: 3,
                supported: 1
            })
        )
    };
    assert!(
        matches!(&error, StoreError::Unreadable { source, .. } if schema(source)),
        "{error:?}"
    );
}

#[test]
fn all_that_could_be_a_fork_and_cannot_be_read_is_named_at_once() {
    let (_scratch, store) = given::store();
    let [template, one, other] = ["template", "one", "other"].map(given::record);
    given::instance(&store, &template);
    for damaged in [&one, &other] {
        fs::write(given::instance(&store, damaged).metadata(), "").unwrap();
    }
    let stray = store.data().instances().join("lost+found");
    fs::create_dir(&stray).unwrap();
    let said = store.live_forks(&template.id).unwrap_err().to_string();
    for named in [
        one.id.to_string(),
        other.id.to_string(),
        stray.display().to_string(),
    ] {
        assert!(said.contains(&named), "{said}");
    }
}

#[test]
fn a_name_that_is_no_id_could_be_a_fork() {
    let (_scratch, store) = given::store();
    let template = given::record("template");
    given::instance(&store, &template);
    for name in [
        "lost+found",
        &template.id.to_string().to_uppercase(),
        "01k9z0c8mn",
    ] {
        let stray = store.data().instances().join(name);
        fs::create_dir(&stray).unwrap();
        let error = store.live_forks(&template.id).unwrap_err();
        assert!(
            matches!(&error, StoreError::Uncounted { unreadable, strangers }
                if unreadable.is_empty() && *strangers == [stray.clone()]),
            "{error:?}"
        );
        assert_eq!(store.scan().unwrap().len(), 1);
        fs::remove_dir(&stray).unwrap();
    }
}

#[test]
fn the_forks_of_a_template_whose_own_record_is_damaged_are_still_found() {
    let (_scratch, store) = given::store();
    let template = given::record("template");
    let fork = stencil_core::Metadata {
        fork_of_template: Some(template.id),
        ..given::record("fork")
    };
    fs::write(given::instance(&store, &template).metadata(), "{").unwrap();
    assert!(store.live_forks(&template.id).unwrap().is_empty());
    given::instance(&store, &fork);
    assert_eq!(store.live_forks(&template.id).unwrap()[0].id, fork.id);
}

#[test]
fn an_instance_whose_directory_may_not_be_read_keeps_no_server_from_starting() {
    let (_scratch, store) = given::store();
    let (locked, bystander) = (given::record("locked"), given::record("bystander"));
    let dir = given::instance(&store, &locked).path().to_owned();
    let leftover = given::instance(&store, &bystander)
        .path()
        .join(".tmp-0-metadata.json");
    fs::write(&leftover, "").unwrap();
    fs::set_permissions(&dir, Permissions::from_mode(0o000)).unwrap();
    // Root may read everything, by these capabilities; without them this thread is like any other user.
    let before = capabilities(None).unwrap();
    let mut like_others = before;
    like_others
        .effective
        .remove(CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH);
    set_capabilities(None, like_others).unwrap();

    assert!(matches!(
        store.read(&locked.id),
        Err(StoreError::Unreadable { .. })
    ));
    assert_eq!(store.leftovers().unwrap(), [leftover]);

    set_capabilities(None, before).unwrap();
    fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
}
