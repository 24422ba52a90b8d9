//! The form of the records in JSON.

use std::error::Error;
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};
use stencil_core::{FormatError, MemoryMode, Metadata, Readiness, SnapshotDir, SnapshotManifest};

use crate::given;

fn text(metadata: &Metadata) -> String {
    String::from_utf8(metadata.to_json().unwrap()).unwrap()
}

#[test]
fn a_full_record() {
    insta::assert_snapshot!(text(&given::full()));
}

#[test]
fn a_minimal_record() {
    insta::assert_snapshot!(text(&given::minimal()));
}

#[test]
fn a_manifest() {
    let scratch = tempfile::tempdir().unwrap();
    let manifest = given::snapshot_files(&SnapshotDir::new(scratch.path()));
    insta::assert_snapshot!(String::from_utf8(manifest.to_json().unwrap()).unwrap());
    assert_eq!(
        SnapshotManifest::from_json(&manifest.to_json().unwrap()).unwrap(),
        manifest
    );
}

#[test]
fn records_survive_writing_and_reading() {
    for metadata in [given::full(), given::minimal()] {
        assert_eq!(
            Metadata::from_json(&metadata.to_json().unwrap()).unwrap(),
            metadata
        );
    }
}

#[test]
fn unknown_fields_survive_at_every_level() {
    let mut json: Value = serde_json::from_slice(&given::full().to_json().unwrap()).unwrap();
    for place in ["", "/spec", "/vmm"] {
        let object = json.pointer_mut(place).unwrap().as_object_mut().unwrap();
        object.insert(
            "added_by_another_version".to_owned(),
            json!({"deep": [{"er": 18_446_744_073_709_551_615_u64}, 0.1]}),
        );
    }
    let read = Metadata::from_json(json.to_string().as_bytes()).unwrap();
    let written: Value = serde_json::from_slice(&read.to_json().unwrap()).unwrap();
    assert_eq!(written, json);
}

#[test]
fn what_is_left_out_has_its_default() {
    let json = json!({
        "schema": 1,
        "id": "01k9z0c8mn0000000000000001",
        "name": "web",
        "created_at": "2025-11-22T14:05:06.789Z",
        "spec": {"hypervisor": "microvm", "kernel": "/boot/guest.elf", "vcpus": 1, "memory_bytes": 512 << 20},
        "generation": "000102030405060708090a0b0c0d0e0f",
    });
    assert_eq!(
        Metadata::from_json(json.to_string().as_bytes()).unwrap(),
        given::minimal()
    );
}

#[test]
fn an_epoch_of_a_record_without_ids_is_one_that_nobody_knows() {
    let mut json: Value = serde_json::from_slice(&given::full().to_json().unwrap()).unwrap();
    json["vmm"].as_object_mut().unwrap().remove("epoch_id").unwrap();
    let read = || {
        let metadata = Metadata::from_json(json.to_string().as_bytes()).unwrap();
        metadata.vmm.unwrap().epoch
    };
    let (first, second) = (read(), read());
    assert_eq!(first.console_offset, 17);
    assert_ne!(first.id, second.id);
}

#[test]
fn readiness_and_memory_mode_have_their_words() {
    let console = Readiness::Console("login:".to_owned());
    assert_eq!(
        serde_json::to_value(&console).unwrap(),
        json!({"console": "login:"})
    );
    assert_eq!(serde_json::to_value(Readiness::None).unwrap(), json!("none"));
    assert_eq!(serde_json::to_value(Readiness::Agent).unwrap(), json!("agent"));
    for (mode, word) in [
        (MemoryMode::Copy, "copy"),
        (MemoryMode::Cow, "cow"),
        (MemoryMode::Uffd, "uffd"),
        (MemoryMode::OnDemand, "ondemand"),
    ] {
        assert_eq!(serde_json::to_value(mode).unwrap(), json!(word));
        assert_eq!(mode.to_string(), word);
        assert_eq!(word.parse(), Ok(mode));
    }
    assert_eq!(MemoryMode::default(), MemoryMode::Cow);
    assert_eq!(
        "fast".parse::<MemoryMode>().unwrap_err().to_string(),
        "a memory mode is \"copy\", \"cow\", \"uffd\" or \"ondemand\""
    );
}

#[test]
fn another_schema_is_refused_with_both_numbers_before_anything_else_is_read() {
    let error = Metadata::from_json(br#"{"schema": 7, "id": {"a form": "of tomorrow"}}"#).unwrap_err();
    assert!(matches!(
        error,
        FormatError::Schema {
            found: 7,
            supported: 1
        }
    ));
    assert_eq!(
        error.to_string(),
        "its schema is 7, and this version of Stencil reads schema 1: use the version that wrote it"
    );
    let error = SnapshotManifest::from_json(br#"{"schema": 0}"#).unwrap_err();
    assert!(matches!(
        error,
        FormatError::Schema {
            found: 0,
            supported: 1
        }
    ));
}

#[test]
fn damaged_content_is_refused_with_its_cause() {
    let whole = given::full().to_json().unwrap();
    for end in [0, 1, whole.len() / 2, whole.len() - 2] {
        let error = Metadata::from_json(&whole[..end]).unwrap_err();
        assert!(matches!(error, FormatError::NotJson(_)), "{end}: {error:?}");
        assert!(
            error.source().unwrap().to_string().starts_with("EOF"),
            "{error:?}"
        );
    }
    assert!(matches!(
        Metadata::from_json(b"\xff\0garbage").unwrap_err(),
        FormatError::NotJson(_)
    ));
    assert!(matches!(
        Metadata::from_json(&[0; 4096]).unwrap_err(),
        FormatError::NotJson(_)
    ));
    for none in ["{}", "[]", "null", r#"{"schema": "1"}"#, r#"{"schema": -1}"#] {
        assert!(
            matches!(
                Metadata::from_json(none.as_bytes()).unwrap_err(),
                FormatError::NoSchema
            ),
            "{none}"
        );
    }
    let error = Metadata::from_json(br#"{"schema": 1, "id": "web"}"#).unwrap_err();
    assert!(matches!(error, FormatError::Shape(_)));
    assert!(
        error
            .source()
            .unwrap()
            .to_string()
            .starts_with("an instance id has 26 characters"),
        "{error:?}"
    );
}

#[test]
fn a_path_that_is_no_utf_8_cannot_be_written() {
    let mut metadata = given::minimal();
    metadata.spec.kernel = Some(std::ffi::OsStr::from_bytes(b"/boot/\xff").into());
    assert!(matches!(
        metadata.to_json().unwrap_err(),
        FormatError::Inexpressible(_)
    ));
}
