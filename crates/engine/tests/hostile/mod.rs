//! What the engine does in a hostile place: a disk that takes no more, files that are none, many who wait at once.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use stencil_core::State;
use stencil_engine::{EngineError, ForkRequest};

use crate::scripted::House;

impl House {
    /// From now on no record of this instance can be written, as on a full disk: the names of the temporary files, which
    /// count up in this process, are taken by directories.
    async fn fill(&self, name: &str) {
        let id = self.engine.get(name).await.unwrap().id;
        let dir = self.metadata_path(&id).parent().unwrap().to_owned();
        for number in 0..1000 {
            fs::create_dir(dir.join(format!(".tmp-{number}-metadata.json"))).unwrap();
        }
    }
}

fn pipe(path: PathBuf) -> PathBuf {
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

#[tokio::test]
async fn a_vmm_that_cannot_be_recorded_does_not_stay() {
    let house = House::new().await;
    let mut request = house.request("web");
    request.start = false;
    house.engine.create(request).await.unwrap();
    house.running("db").await;
    house.engine.standby("db").await.unwrap();
    house.fill("web").await;
    house.fill("db").await;
    assert!(matches!(
        house.engine.start("web").await,
        Err(EngineError::Store(_))
    ));
    assert!(matches!(
        house.engine.restore("db").await,
        Err(EngineError::Store(_))
    ));
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Stopped);
    assert_eq!(house.engine.get("db").await.unwrap().state, State::Standby);
}

#[tokio::test]
async fn an_instance_can_be_deleted_where_no_record_can_be_written() {
    let house = House::new().await;
    house.running("web").await;
    house.fill("web").await;
    house.engine.delete("web").await.unwrap();
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_fork_that_began_on_standby_wakes_as_the_machine_that_it_is() {
    let house = House::new().await;
    house.template("warm").await;
    let on_standby = ForkRequest {
        target_state: Some(State::Standby),
        ..ForkRequest::default()
    };
    let fork = house.engine.fork("warm", None, on_standby).await.unwrap();
    house.engine.restore(&fork.id.to_string()).await.unwrap();
    let of = |metadata: Option<stencil_core::Metadata>| metadata.unwrap().generation;
    assert_eq!(house.hypervisor.restored(), [of(fork.metadata)]);
    let warm = house.engine.get("warm").await.unwrap();
    assert_ne!(house.hypervisor.restored(), [of(warm.metadata)]);
}

#[tokio::test]
async fn a_snapshot_is_of_the_version_that_wrote_it_not_of_the_one_installed_meanwhile() {
    let house = House::new().await;
    house.running("web").await;
    house.hypervisor.update("2.0.0");
    house.engine.standby("web").await.unwrap();
    assert!(matches!(
        house.engine.restore("web").await,
        Err(EngineError::OtherVersion { made_by, here, .. }) if made_by == "1.0.0" && here == "2.0.0"
    ));
}

#[tokio::test]
async fn a_snapshot_of_another_cpu_is_refused_before_a_vmm_is_started() {
    let house = House::new().await;
    house.template("warm").await;
    house.running("web").await;
    house.engine.standby("web").await.unwrap();
    for name in ["warm", "web"] {
        let id = house.engine.get(name).await.unwrap().id;
        let path = house.metadata_path(&id).with_file_name("snapshot/manifest.json");
        let mut manifest: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        // No CPU has all features.
        manifest["host_cpu"]["features"][1] = u32::MAX.into();
        fs::write(&path, manifest.to_string()).unwrap();
    }
    let spawned = || {
        house
            .hypervisor
            .calls()
            .iter()
            .filter(|call| *call == "spawn")
            .count()
    };
    let before = spawned();
    let restored = house.engine.restore("web").await;
    assert!(
        matches!(restored, Err(EngineError::OtherCpu { .. })),
        "{restored:?}"
    );
    let forked = house.engine.fork("warm", None, ForkRequest::default()).await;
    assert!(matches!(forked, Err(EngineError::OtherCpu { .. })), "{forked:?}");
    assert_eq!(spawned(), before);
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Standby);
    assert_eq!(house.directories().len(), 2, "nothing is left of the fork");
}

#[tokio::test]
async fn a_pipe_is_no_kernel_and_nobody_waits_for_it() {
    let house = House::new().await;
    let mut request = house.request("web");
    request.kernel = Some(pipe(house.data.path().join("pipe")));
    assert!(matches!(
        house.engine.create(request).await,
        Err(EngineError::Invalid(_))
    ));
}

#[tokio::test]
async fn metadata_that_are_no_file_are_unreadable_and_nobody_waits_for_them() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id;
    let path = house.metadata_path(&id);
    fs::remove_file(&path).unwrap();
    pipe(path.clone());
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Unknown);
    fs::remove_file(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    let web = house.engine.get("web").await.unwrap();
    assert!(web.state_error.unwrap().contains("no regular file"));
}

#[tokio::test]
async fn more_can_wait_than_the_kernel_has_inotify_instances_for_a_user() {
    let house = House::new().await;
    house.running("web").await;
    let wait = |_| {
        let engine = house.engine.clone();
        tokio::spawn(async move {
            engine
                .wait("web", State::Paused, Duration::from_secs(60))
                .await
                .unwrap()
                .reached
        })
    };
    let limit: usize = fs::read_to_string("/proc/sys/fs/inotify/max_user_instances")
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    let waiting: Vec<_> = (0..limit.min(2000) + 10).map(wait).collect();
    // All have looked once, and wait, before there is something to see.
    tokio::task::yield_now().await;
    house.engine.pause("web").await.unwrap();
    for waiter in waiting {
        assert!(waiter.await.unwrap());
    }
}
