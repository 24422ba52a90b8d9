//! How a server begins and ends: one for each data directory and socket, open to its owner only, nothing left behind.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;
use stencil_api::client::ClientError;
use stencil_api::server::{ServeError, Server, SocketError};
use stencil_core::{State, StoreError};
use stencil_engine::EngineError;

use crate::world::{World, open};

#[tokio::test]
async fn it_says_that_it_is_well_and_which_version_it_is() {
    let world = World::new().await;
    assert_eq!(world.client.health().await.unwrap().status, "ok");
    assert_eq!(
        world.get("/version").await.body,
        json!({ "version": env!("CARGO_PKG_VERSION") })
    );
}

#[tokio::test]
async fn it_says_on_what_it_runs_instances_and_what_that_can_do() {
    let world = World::new().await;
    let microvm = json!({
        "name": "microvm", "memory_modes": ["copy", "cow", "uffd"], "max_vcpus": 16, "firmware": false,
        "console_input": true, "tells_identity": true, "max_disk_layers": 0, "agent": false, "outlives_guest": true,
    });
    assert_eq!(
        world.get("/hypervisors").await.body,
        json!({"hypervisors": [microvm]})
    );
    let told = world.client.hypervisors().await.unwrap();
    assert_eq!(told.hypervisors[0].name.as_str(), "microvm");
}

#[tokio::test]
async fn only_the_owner_can_open_its_socket() {
    let world = World::new().await;
    let mode = world.socket().metadata().unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[tokio::test]
async fn a_data_directory_in_use_is_refused_and_the_first_server_goes_on() {
    let world = World::new().await;
    let second = open(&world.data()).await.unwrap_err();
    assert!(
        matches!(second, EngineError::Store(StoreError::InUse { pid: Some(pid), .. }) if pid == std::process::id())
    );
    world.client.health().await.unwrap();
}

#[tokio::test]
async fn a_socket_in_use_is_refused_and_the_first_server_goes_on() {
    let world = World::new().await;
    let other = tempfile::tempdir().unwrap();
    let engine = open(&other.path().join("data")).await.unwrap();
    let second = Server::bind(engine, &world.socket(), None).await;
    assert!(matches!(
        second,
        Err(ServeError::Socket(SocketError::InUse { .. }))
    ));
    world.client.health().await.unwrap();
}

#[tokio::test]
async fn when_it_ends_its_socket_is_gone_and_its_instances_are_there_for_the_next() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    let (client, socket) = (world.client.clone(), world.socket());
    let dir = world.stop().await;
    assert!(!socket.exists());
    assert!(matches!(client.health().await, Err(ClientError::NoServer { .. })));
    let world = World::on(dir).await;
    assert_eq!(world.client.get("web").await.unwrap().state, State::Stopped);
}
