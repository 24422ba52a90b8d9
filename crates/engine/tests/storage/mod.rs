//! A data directory that cannot be written, or must not become full: what cannot be recorded is not begun.

use std::error::Error;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use bytes::Bytes;
use futures_util::TryStreamExt;
use stencil_core::{Readiness, State};
use stencil_engine::{CreateRequest, EngineError, ForkRequest, Instance};

use crate::disk::Disk;
use crate::scripted::House;
use crate::within;

/// What the file system said.
fn cause(error: &EngineError) -> Option<ErrorKind> {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(io) = error.downcast_ref::<io::Error>() {
            return Some(io.kind());
        }
        next = error.source();
    }
    None
}

fn refused_by_disk(done: Result<Instance, EngineError>, kind: ErrorKind) {
    let error = done.unwrap_err();
    assert_eq!(cause(&error), Some(kind), "{error:?}");
}

#[tokio::test]
async fn what_cannot_be_recorded_is_not_begun() {
    let Some(disk) = Disk::new() else { return };
    let house = House::on(&disk).await;
    house.template("warm").await;
    house.running("web").await;
    house.running("asleep").await;
    house.engine.standby("asleep").await.unwrap();
    let running = house.processes();
    let before = house.directories();
    let asked = house.hypervisor.calls().len();
    disk.fail();

    let engine = &house.engine;
    let read_only = ErrorKind::ReadOnlyFilesystem;
    for name in ["warm", "web", "asleep"] {
        assert_eq!(cause(&engine.delete(name).await.unwrap_err()), Some(read_only));
    }
    refused_by_disk(engine.stop("web").await, read_only);
    refused_by_disk(engine.standby("web").await, read_only);
    refused_by_disk(engine.restore("asleep").await, read_only);
    refused_by_disk(engine.promote("asleep", None).await, read_only);
    refused_by_disk(engine.demote("warm").await, read_only);
    refused_by_disk(engine.fork("warm", None, ForkRequest::default()).await, read_only);
    let from_running = ForkRequest {
        from_running: true,
        ..ForkRequest::default()
    };
    refused_by_disk(engine.fork("web", None, from_running).await, read_only);
    assert_eq!(house.processes(), running);
    assert_eq!(house.directories(), before);
    // No VMM was asked for anything.
    let calls = house.hypervisor.calls();
    let asked_for: Vec<&String> = calls[asked..].iter().filter(|call| *call != "status").collect();
    assert_eq!(asked_for, [] as [&str; 0]);
    // What is not recorded goes on.
    assert_eq!(engine.pause("web").await.unwrap().state, State::Paused);
    assert_eq!(engine.resume("web").await.unwrap().state, State::Running);
}

#[tokio::test]
async fn a_full_disk_refuses_what_needs_room_keeps_all_and_lets_instances_be_deleted() {
    let Some(disk) = Disk::new() else { return };
    let house = House::on(&disk).await;
    house.template("warm").await;
    house.running("web").await;
    house.running("other").await;
    let running = house.processes();
    let before = house.directories();
    let request = house.request("new");
    let filler = disk.fill();

    let engine = &house.engine;
    let full = ErrorKind::StorageFull;
    refused_by_disk(engine.create(request).await, full);
    refused_by_disk(engine.fork("warm", None, ForkRequest::default()).await, full);
    refused_by_disk(engine.demote("warm").await, full);
    assert_eq!(house.directories(), before);
    assert_eq!(house.processes(), running);
    assert_eq!(engine.get("warm").await.unwrap().state, State::Template);
    engine.delete("other").await.unwrap();
    assert_eq!(house.processes().len(), running.len() - 1);
    fs::remove_file(filler).unwrap();
    engine.fork("warm", None, ForkRequest::default()).await.unwrap();
}

#[tokio::test]
async fn a_guest_that_prints_without_end_fills_no_disk_and_its_word_still_counts() {
    const PRINTED: usize = 40 << 20;
    let house = House::new().await;
    let request = CreateRequest {
        readiness: Readiness::Console("ready\n".to_owned()),
        ..house.request("loud")
    };
    let id = house.engine.create(request).await.unwrap().id;
    let path = house.metadata_path(&id).with_file_name("console.log");
    let mut printed = b"ready\n".to_vec();
    while printed.len() < PRINTED {
        printed.extend_from_slice(b"and again, and again, and again\n");
    }
    fs::write(&path, &printed).unwrap();
    let held = || fs::metadata(&path).unwrap().blocks() * 512;
    let kept = async {
        while held() > 24 << 20 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(kept).await;
    // Nobody had looked for it before it was gone.
    assert_eq!(house.engine.get("loud").await.unwrap().state, State::Running);
    let told: Vec<Bytes> = house
        .engine
        .console("loud", None, false)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    let told = told.concat();
    assert!(
        told.len() >= 16 << 20 && printed.ends_with(&told),
        "{} bytes",
        told.len()
    );
    let tail: Vec<Bytes> = house
        .engine
        .console("loud", Some(1), false)
        .await
        .unwrap()
        .try_collect()
        .await
        .unwrap();
    assert_eq!(tail.concat(), b"and again, and again, and again\n");
}
