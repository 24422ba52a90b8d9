//! Instances that a crash or a power loss left: each can be deleted by its id alone, and what is of no use is swept.

use std::fs;

use stencil_core::rules::Refusal;
use stencil_core::{State, StoreError};
use stencil_engine::{EngineError, ForkRequest, ForksRequest};

use crate::scripted::House;

/// Forks of `warm`.
async fn forks(house: &House, count: u32) -> Vec<String> {
    let request = ForksRequest {
        count,
        name_prefix: None,
        fork: ForkRequest::default(),
        exec: None,
        delete_after: false,
    };
    let forked = house.engine.forks("warm", request).await.unwrap();
    forked
        .into_iter()
        .map(|outcome| outcome.result.unwrap().id.to_string())
        .collect()
}

#[tokio::test]
async fn instances_whose_records_are_lost_do_not_keep_each_other_and_then_the_template_goes() {
    let house = House::new().await;
    house.template("warm").await;
    let lost = forks(&house, 3).await;
    for id in &lost {
        fs::write(house.metadata_path(id), "").unwrap();
    }
    let house = house.restart_after(|| ()).await;
    for refused in [
        house.engine.demote("warm").await.map(drop),
        house.engine.delete("warm").await,
    ] {
        let Err(EngineError::Store(StoreError::Uncounted { unreadable, .. })) = refused else {
            panic!("{refused:?}")
        };
        let named: Vec<String> = unreadable.iter().map(ToString::to_string).collect();
        assert_eq!(named, lost);
    }
    for id in &lost {
        house.engine.delete(id).await.unwrap();
    }
    assert_eq!(house.processes(), [] as [u32; 0]);
    house.engine.demote("warm").await.unwrap();
    house.engine.delete("warm").await.unwrap();
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_template_whose_record_is_lost_stays_as_long_as_a_record_that_can_be_read_names_it() {
    let house = House::new().await;
    house.template("warm").await;
    let template = house.engine.get("warm").await.unwrap().id.to_string();
    let forks = forks(&house, 2).await;
    fs::write(house.metadata_path(&template), "").unwrap();
    fs::write(house.metadata_path(&forks[0]), "").unwrap();
    let refused = house.engine.delete(&template).await;
    assert!(
        matches!(&refused, Err(EngineError::Refused(Refusal::TemplateInUse { forks: named, .. }))
            if named.len() == 1 && named[0].id.to_string() == forks[1]),
        "{refused:?}"
    );
    house.engine.delete(&forks[1]).await.unwrap();
    house.engine.delete(&template).await.unwrap();
}

#[tokio::test]
async fn a_template_that_was_made_none_by_hand_keeps_its_forks() {
    let house = House::new().await;
    house.template("warm").await;
    let id = house.engine.get("warm").await.unwrap().id.to_string();
    house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    let record = house.metadata_path(&id);
    let content = fs::read_to_string(&record).unwrap();
    fs::write(
        &record,
        content.replace("\"is_template\": true", "\"is_template\": false"),
    )
    .unwrap();
    assert_eq!(house.engine.get("warm").await.unwrap().state, State::Standby);
    let refused = house.engine.delete("warm").await;
    assert!(
        matches!(refused, Err(EngineError::Refused(Refusal::TemplateInUse { .. }))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn forks_that_ran_when_the_host_went_down_are_swept_at_its_next_boot() {
    let house = House::new().await;
    house.template("warm").await;
    house.running("web").await;
    let forks = forks(&house, 3).await;
    let web = house.engine.get("web").await.unwrap().id.to_string();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let boot = boot.trim_end();
    // All that is in memory goes with the host, and of what was not synced the content.
    for pid in house.processes() {
        crate::kill(pid);
    }
    let data = house.data.path().to_owned();
    for id in [&forks[0], &web] {
        let record = house.metadata_path(id);
        let content = fs::read_to_string(&record).unwrap();
        assert!(content.contains(boot));
        fs::write(&record, content.replace(boot, "another boot")).unwrap();
    }
    fs::write(house.metadata_path(&forks[1]), "").unwrap();
    let house = house
        .restart_after(|| fs::write(data.join("boot"), "another boot").unwrap())
        .await;
    for (id, left) in [
        (&forks[0], false),
        (&forks[1], false),
        (&forks[2], true),
        (&web, true),
    ] {
        assert_eq!(house.engine.get(id).await.is_ok(), left, "{id}");
    }
    // One that was made to run by itself can be started again.
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Stopped);
    house.engine.start("web").await.unwrap();
    house.engine.delete(&forks[2]).await.unwrap();
    house.engine.demote("warm").await.unwrap();
}

#[tokio::test]
async fn an_instance_that_is_being_booted_for_the_first_time_goes_with_its_server() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id;
    let record = house.metadata_path(&id);
    // What a server that dies now would leave.
    let amid = house.hypervisor.record_at_boot.lock().unwrap().clone();
    let house = house.restart().await;
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
    let house = house.restart_after(|| fs::write(&record, amid).unwrap()).await;
    assert!(house.engine.get("web").await.is_err());
    assert_eq!(house.directories(), [] as [&str; 0]);
    assert_eq!(house.processes(), [] as [u32; 0]);
}

#[tokio::test]
async fn a_server_that_dies_amid_a_deletion_leaves_it_to_the_next() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id.to_string();
    let instances = house.data.path().join("instances");
    let house = house
        .restart_after(|| fs::rename(instances.join(&id), instances.join(format!(".del-{id}"))).unwrap())
        .await;
    assert!(house.engine.get("web").await.is_err());
    assert_eq!(house.directories(), [] as [&str; 0]);
    assert_eq!(house.processes(), [] as [u32; 0]);
}
