//! Templates, on a snapshot that nobody restores: promote, fork on standby, and what live forks keep from happening.

use std::fs;

use hyper::Method;
use serde_json::json;
use stencil_api::request::{ForkMany, ForkOne, ListInstances, PromoteTemplate};
use stencil_core::{
    Durability, InstanceId, MemoryGeneration, Metadata, SnapshotManifest, State, Store, VmGeneration, VmSpec,
};
use tempfile::TempDir;

use crate::world::{World, refusal};

/// A directory in whose data an instance `warm` is on standby.
fn with_warm_on_standby() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("data")).unwrap();
    let id = InstanceId::generate();
    let spec = VmSpec::new(
        "microvm".parse().unwrap(),
        dir.path().join("guest.elf"),
        1,
        64 << 20,
    );
    let now = jiff::Timestamp::now();
    let new = store.begin(id).unwrap();
    let snapshot = new.dir().snapshot();
    fs::create_dir(snapshot.path()).unwrap();
    let files = [snapshot.config(), snapshot.state(), snapshot.memory_ranges()];
    for file in &files {
        fs::write(file, "{}").unwrap();
    }
    let manifest = SnapshotManifest {
        schema: SnapshotManifest::SCHEMA,
        created_at: now,
        hypervisor: spec.hypervisor.clone(),
        hypervisor_version: "0.1.0".to_owned(),
        host_cpu: None,
        memory_generation: MemoryGeneration::random(),
        memory_bytes: spec.memory_bytes,
        frozen: None,
        files: files
            .iter()
            .map(|file| (file.file_name().unwrap().to_str().unwrap().to_owned(), 2))
            .collect(),
        other: serde_json::Map::new(),
    };
    store.complete_snapshot(&snapshot, &manifest).unwrap();
    let metadata = Metadata::new(id, "warm".parse().unwrap(), spec, VmGeneration::random(), now);
    new.commit(&metadata, Durability::Synced).unwrap();
    dir
}

fn on_standby() -> ForkOne {
    ForkOne {
        target_state: Some(State::Standby),
        ..ForkOne::default()
    }
}

#[tokio::test]
async fn a_template_with_live_forks_cannot_be_deleted_demoted_or_stopped_and_they_are_named() {
    let world = World::on(with_warm_on_standby()).await;
    assert_eq!(
        world
            .client
            .promote("warm", &PromoteTemplate::default())
            .await
            .unwrap()
            .state,
        State::Template
    );
    let fork = world.client.fork("warm", &on_standby()).await.unwrap();
    let template = world.client.get("warm").await.unwrap();
    assert_eq!(
        (fork.state, fork.fork_of_template),
        (State::Standby, Some(template.id))
    );
    assert_eq!(template.forks.unwrap().ids, [fork.id]);
    let listed = ListInstances {
        state: None,
        template: Some("warm".to_owned()),
    };
    assert_eq!(world.client.list(&listed).await.unwrap().len(), 1);

    for (method, path) in [
        (Method::DELETE, "/instances/warm"),
        (Method::POST, "/instances/warm/demote-template"),
        (Method::POST, "/instances/warm/stop"),
    ] {
        let reply = world.ask(method, path, None, "").await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (409, Some("template_in_use")),
            "{path}"
        );
        let forks = json!([{ "id": fork.id.to_string(), "name": "warm-1" }]);
        assert_eq!(reply.body["details"], json!({ "forks": forks }), "{path}");
    }
    world.client.delete("warm-1").await.unwrap();
    assert_eq!(world.client.demote("warm").await.unwrap().state, State::Standby);
    world.client.delete("warm").await.unwrap();
    assert_eq!(world.instances_on_disk(), 0);
}

#[tokio::test]
async fn a_template_cannot_wake() {
    let world = World::on(with_warm_on_standby()).await;
    world
        .client
        .promote("warm", &PromoteTemplate::default())
        .await
        .unwrap();
    assert_eq!(
        refusal(world.client.restore("warm").await),
        (409, "invalid_state".to_owned())
    );
    assert_eq!(
        refusal(world.client.start("warm").await),
        (409, "invalid_state".to_owned())
    );
    assert_eq!(
        refusal(world.client.promote("warm", &PromoteTemplate::default()).await),
        (409, "invalid_state".to_owned())
    );
}

#[tokio::test]
async fn how_many_forks_are_armed_is_said_at_promotion_and_can_be_changed() {
    let world = World::on(with_warm_on_standby()).await;
    let patch =
        |body: &'static str| world.ask(Method::PATCH, "/instances/warm", Some("application/json"), body);
    let reply = patch(r#"{"armed": 1}"#).await;
    assert_eq!(
        (reply.status, &reply.body["code"]),
        (409, &json!("invalid_state"))
    );
    let reply = world
        .post("/instances/warm/promote-template", r#"{"armed": 1025}"#)
        .await;
    assert_eq!(
        (reply.status, &reply.body["message"]),
        (
            400,
            &json!("armed is 1025; a template keeps 0 to 1024 forks prepared")
        )
    );
    let reply = world
        .post("/instances/warm/promote-template", r#"{"armed": 0}"#)
        .await;
    let none = json!({ "target": 0, "ready": 0 });
    assert_eq!((reply.status, &reply.body["armed"]), (200, &none));
    for (body, expected) in [
        ("", "the body is empty"),
        ("{}", "missing field `armed`"),
        (r#"{"armed": -1}"#, "invalid value: integer `-1`, expected u32"),
        (r#"{"armed": 1025}"#, "a template keeps 0 to 1024 forks prepared"),
        (r#"{"name": "cold"}"#, "unknown field `name`, expected `armed`"),
    ] {
        let reply = patch(body).await;
        assert_eq!(
            (reply.status, &reply.body["code"]),
            (400, &json!("invalid_request"))
        );
        let message = reply.body["message"].as_str().unwrap();
        assert!(message.contains(expected), "{body}: {message}");
    }
    // The server's default, which is none here.
    let reply = patch(r#"{"armed": null}"#).await;
    assert_eq!((reply.status, &reply.body["armed"]), (200, &none));
}

#[tokio::test]
async fn where_one_metadata_cannot_be_read_forks_are_not_counted_as_none() {
    let world = World::on(with_warm_on_standby()).await;
    world
        .client
        .promote("warm", &PromoteTemplate::default())
        .await
        .unwrap();
    let fork = world.client.fork("warm", &on_standby()).await.unwrap();
    let metadata = world
        .data()
        .join("instances")
        .join(fork.id.to_string())
        .join("metadata.json");
    let kept = fs::read(&metadata).unwrap();
    fs::write(&metadata, "").unwrap();
    for refused in [
        world.client.delete("warm").await,
        world.client.demote("warm").await.map(drop),
    ] {
        assert_eq!(refusal(refused), (409, "unreadable_metadata".to_owned()));
    }
    fs::write(&metadata, kept).unwrap();
    assert_eq!(
        refusal(world.client.delete("warm").await),
        (409, "template_in_use".to_owned()),
        "nothing was lost"
    );
}

#[tokio::test]
async fn forks_that_all_fail_are_answered_with_the_error_and_leave_nothing() {
    let world = World::on(with_warm_on_standby()).await;
    // There is no VMM to wake them with.
    assert_eq!(
        refusal(world.client.forks("warm", &ForkMany::new(3)).await),
        (500, "internal".to_owned())
    );
    assert_eq!(world.instances_on_disk(), 1);
}

#[tokio::test]
async fn a_truncated_snapshot_makes_an_unknown_state_that_says_why() {
    let dir = with_warm_on_standby();
    let instances = dir.path().join("data/instances");
    let id = fs::read_dir(&instances)
        .unwrap()
        .next()
        .unwrap()
        .unwrap()
        .file_name();
    fs::remove_file(instances.join(id).join("snapshot/state.json")).unwrap();
    let world = World::on(dir).await;
    let warm = world.client.get("warm").await.unwrap();
    assert_eq!(warm.state, State::Unknown);
    assert!(warm.state_error.unwrap().contains("state.json"));
    assert_eq!(
        refusal(world.client.restore("warm").await),
        (409, "invalid_state".to_owned())
    );
    assert_eq!(
        refusal(world.client.fork("warm", &ForkOne::default()).await),
        (409, "invalid_state".to_owned())
    );
    world.client.delete("warm").await.unwrap();
}
