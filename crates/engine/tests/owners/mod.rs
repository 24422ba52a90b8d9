//! Whose a VMM is: it is ended only when a record that can be read, or the lack of any instance, says that it is nobody's.

mod lost;

use std::fs;
use std::path::Path;
use std::process::Command;

use stencil_core::State;
use stencil_engine::{Config, Engine};

use crate::scripted::House;

/// Damages a record as crashes, people and other versions do; an empty file is what a power cut leaves.
const DAMAGES: [&str; 3] = ["", "{ this is no metadata", r#"{"schema": 99}"#];

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp").arg("-a").args([from, to]).status().unwrap();
    assert!(copied.success());
}

#[tokio::test]
async fn a_vmm_whose_record_cannot_be_read_outlives_the_start_of_a_server_and_is_found_again() {
    let mut house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id.to_string();
    let record = house.metadata_path(&id);
    let good = fs::read(&record).unwrap();
    let processes = house.processes();
    assert_eq!(processes.len(), 1);
    for damage in DAMAGES {
        house = house.restart_after(|| fs::write(&record, damage).unwrap()).await;
        assert_eq!(house.processes(), processes, "after {damage:?}");
        let shown = house.engine.get(&id).await.unwrap();
        assert_eq!(shown.state, State::Unknown);
        assert!(shown.state_error.unwrap().contains("its metadata cannot be read"));
        // As soon as it can be read the instance is there again, with its VM and its name.
        fs::write(&record, &good).unwrap();
        assert_eq!(house.engine.get(&id).await.unwrap().state, State::Running);
        assert_eq!(house.engine.get("web").await.unwrap().id.to_string(), id);
        house.engine.pause("web").await.unwrap();
        house.engine.resume("web").await.unwrap();
    }
    house.engine.stop("web").await.unwrap();
    assert_eq!(house.processes(), [] as [u32; 0]);
}

#[tokio::test]
async fn deleting_an_instance_whose_record_cannot_be_read_ends_its_vmm() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id.to_string();
    let record = house.metadata_path(&id);
    let house = house.restart_after(|| fs::write(&record, "").unwrap()).await;
    assert_eq!(house.processes().len(), 1);
    house.engine.delete(&id).await.unwrap();
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn an_instance_that_can_be_read_again_does_not_take_a_name_that_another_one_has_got() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id.to_string();
    let record = house.metadata_path(&id);
    let good = fs::read(&record).unwrap();
    let house = house.restart_after(|| fs::write(&record, "").unwrap()).await;
    house.running("web").await;
    let other = house.engine.get("web").await.unwrap().id.to_string();
    fs::write(&record, good).unwrap();
    let shown = house.engine.get(&id).await.unwrap();
    assert_eq!(shown.state, State::Unknown);
    let why = shown.state_error.unwrap();
    assert!(
        why.contains("the name `web` is taken by instance ") && why.contains(&other),
        "{why}"
    );
    assert_eq!(house.processes().len(), 2);
    house.engine.delete(&other).await.unwrap();
    assert_eq!(house.engine.get(&id).await.unwrap().state, State::Running);
}

#[tokio::test]
async fn a_server_on_a_copy_of_a_data_directory_leaves_the_vms_of_the_original_alone() {
    let house = House::new().await;
    house.running("keep").await;
    let processes = house.processes();
    let scratch = tempfile::tempdir().unwrap();
    let data = scratch.path().join("copy");
    copy(house.data.path(), &data);
    let of_copy = Engine::open(Config {
        data,
        hypervisors: vec![house.hypervisor.clone()],
        armed: 0,
        log_limit: stencil_engine::DEFAULT_LOG_LIMIT,
    })
    .await
    .unwrap();
    // The copy has no VM. It can be started, as after a power loss, or deleted.
    let shown = of_copy.get("keep").await.unwrap();
    assert_eq!(shown.state, State::Stopped);
    let why = shown.state_error.unwrap();
    assert!(why.contains("that this one is a copy of"), "{why}");
    of_copy.delete("keep").await.unwrap();
    assert!(of_copy.get("keep").await.is_err());
    assert_eq!(house.processes(), processes);
    assert_eq!(house.engine.get("keep").await.unwrap().state, State::Running);
}
