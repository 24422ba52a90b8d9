//! What the engine leaves behind when a step fails, a process dies, or requests race: each instance is as it was before
//! the operation or as it is after it, and nothing else is left.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod agent;
mod armed;
mod boot_files;
#[path = "../../../fixtures/disk.rs"]
mod disk;
mod disks;
mod hostile;
mod hot_pages;
mod images;
mod index;
mod owners;
mod power;
mod scripted;
#[path = "../../../fixtures/skipped.rs"]
mod skipped;
mod storage;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use scripted::House;
use stencil_core::rules::Refusal;
use stencil_core::{MemoryMode, Metadata, Readiness, State, StoreError};
use stencil_engine::{CreateRequest, EngineError, Filter, ForkRequest, ForksRequest};

const PATIENCE: Duration = Duration::from_secs(20);

/// What comes of it, which must not take longer than anybody would wait.
async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.unwrap()
}

fn kill(pid: u32) {
    assert!(
        Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status()
            .unwrap()
            .success()
    );
}

fn forks(count: u32) -> ForksRequest {
    ForksRequest {
        count,
        name_prefix: None,
        fork: ForkRequest::default(),
        exec: None,
        delete_after: false,
    }
}

#[tokio::test]
async fn a_snapshot_that_fails_leaves_the_vm_running() {
    let house = House::new().await;
    house.running("web").await;
    house.hypervisor.fail("snapshot");
    assert!(matches!(
        house.engine.standby("web").await,
        Err(EngineError::Vmm { .. })
    ));
    let web = house.engine.get("web").await.unwrap();
    assert_eq!(web.state, State::Running);
    assert_eq!(house.processes().len(), 1);
}

#[tokio::test]
async fn a_restore_that_fails_leaves_the_instance_on_standby() {
    let house = House::new().await;
    house.running("web").await;
    house.engine.standby("web").await.unwrap();
    house.hypervisor.fail("restore");
    assert!(house.engine.restore("web").await.is_err());
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Standby);
    assert_eq!(house.processes(), [] as [u32; 0]);
}

#[tokio::test]
async fn an_instance_that_cannot_be_booted_is_not_made() {
    for step in ["spawn", "create", "boot"] {
        let house = House::new().await;
        house.hypervisor.fail(step);
        assert!(house.engine.create(house.request("web")).await.is_err(), "{step}");
        assert_eq!(house.directories(), [] as [&str; 0], "{step}");
        assert_eq!(house.processes(), [] as [u32; 0], "{step}");
        assert!(
            matches!(house.engine.get("web").await, Err(EngineError::NotFound(_))),
            "{step}"
        );
    }
}

#[tokio::test]
async fn a_fork_whose_vmm_dies_before_its_guest_is_ready_is_not_made() {
    let house = House::new().await;
    let request = CreateRequest {
        readiness: Readiness::Console("ready".to_owned()),
        ..house.request("warm")
    };
    let warm = house.engine.create(request).await.unwrap();
    fs::write(
        house.metadata_path(&warm.id).with_file_name("console.log"),
        "ready",
    )
    .unwrap();
    house.engine.standby("warm").await.unwrap();
    house.engine.promote("warm", None).await.unwrap();
    let before = house.directories();
    let engine = house.engine.clone();
    let fork = tokio::spawn(async move { engine.fork("warm", None, ForkRequest::default()).await });
    // It runs, and its guest says nothing.
    let vmm = async {
        loop {
            if let (Some(vmm), true) = (
                house.processes().first(),
                house.hypervisor.calls().contains(&"resume".to_owned()),
            ) {
                return *vmm;
            }
            tokio::task::yield_now().await;
        }
    };
    kill(tokio::time::timeout(PATIENCE, vmm).await.unwrap());
    let error = tokio::time::timeout(PATIENCE, fork)
        .await
        .unwrap()
        .unwrap()
        .unwrap_err();
    let told = stencil_core::error_chain(&error).to_string();
    assert!(told.contains("has ended"), "{told}");
    assert_eq!(house.directories(), before);
}

#[tokio::test]
async fn a_memory_mode_that_the_hypervisor_does_not_have_is_refused_before_anything_is_made() {
    let house = House::new().await;
    house.template("warm").await;
    let before = (house.directories(), house.hypervisor.calls());
    let request = ForkRequest {
        memory_mode: Some(MemoryMode::Copy),
        ..ForkRequest::default()
    };
    let error = house.engine.fork("warm", None, request).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "memory_mode is copy; scripted takes cow or uffd"
    );
    assert_eq!((house.directories(), house.hypervisor.calls()), before);
}

#[tokio::test]
async fn an_instance_whose_hypervisor_is_not_offered_any_more_can_be_deleted_and_its_vmm_goes() {
    let house = House::new().await;
    house.running("web").await;
    let house = house.restart_without_hypervisor().await;
    let web = house.engine.get("web").await.unwrap();
    assert_eq!(web.state, State::Unknown);
    assert_eq!(house.processes().len(), 1);
    house.engine.delete("web").await.unwrap();
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn a_fork_whose_memory_was_copied_instead_of_mapped_says_so_and_why() {
    let house = House::new().await;
    house.template("warm").await;
    house.hypervisor.map_nothing();
    // The first records hot pages, and is served its pages for that.
    house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    let fork = house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    let told = |metadata: Metadata| (metadata.memory_mode, metadata.memory_mode_reason);
    let copied = (Some(MemoryMode::Copy), Some("it maps nothing".to_owned()));
    assert_eq!(told(fork.metadata.unwrap()), copied);
    // It is on record, and still right when the fork wakes from its own snapshot.
    let fork = fork.id.to_string();
    house.engine.standby(&fork).await.unwrap();
    house.engine.restore(&fork).await.unwrap();
    let house = house.restart().await;
    let seen = house.engine.get(&fork).await.unwrap();
    assert_eq!(told(seen.metadata.unwrap()), copied);
    // Booted anew, nothing was restored.
    house.engine.stop(&fork).await.unwrap();
    house.engine.start(&fork).await.unwrap();
    let seen = house.engine.get(&fork).await.unwrap();
    assert_eq!(told(seen.metadata.unwrap()), (None, None));
}

#[tokio::test]
async fn exactly_one_of_kernel_and_firmware_is_booted() {
    let house = House::new().await;
    let booted = |name: &str| house.request(name).kernel;
    let created = async |change: &dyn Fn(&mut CreateRequest)| {
        let mut request = house.request("web");
        change(&mut request);
        house.engine.create(request).await
    };
    let why = async |change: &dyn Fn(&mut CreateRequest)| created(change).await.unwrap_err().to_string();
    assert_eq!(
        why(&|request| request.firmware = booted("other")).await,
        "kernel and firmware are both given; it takes one of them"
    );
    assert_eq!(
        why(&|request| request.kernel = None).await,
        "there is nothing to boot; give image, kernel or firmware"
    );
    let firmware = |path: &str| {
        let path = Some(PathBuf::from(path));
        move |request: &mut CreateRequest| {
            request.kernel = None;
            request.firmware = path.clone();
        }
    };
    assert_eq!(
        why(&firmware("firmware")).await,
        "firmware `firmware` is a relative path; it takes an absolute one, as the server sees it"
    );
    assert_eq!(
        why(&firmware("/nonexistent/firmware")).await,
        "firmware `/nonexistent/firmware` is not there; it takes a file that the server can read"
    );
    let with_cmdline = |request: &mut CreateRequest| {
        request.firmware = request.kernel.take();
        request.cmdline = Some("quiet".to_owned());
    };
    assert_eq!(
        why(&with_cmdline).await,
        "initrd and cmdline are a kernel's; firmware finds by itself what it boots"
    );
    assert_eq!(house.directories(), [] as [&str; 0]);
    let web = created(&|request| request.firmware = request.kernel.take())
        .await
        .unwrap();
    assert_eq!(web.metadata.unwrap().spec.firmware, booted("other"));
    // A fork boots the same.
    house.engine.stop("web").await.unwrap();
    let fork = house
        .engine
        .fork("web", None, ForkRequest::default())
        .await
        .unwrap();
    assert_eq!(fork.metadata.unwrap().spec.firmware, booted("other"));
}

#[tokio::test]
async fn console_input_is_refused_where_the_hypervisor_gives_guests_none() {
    let house = House::new().await;
    house.running("web").await;
    let error = house.engine.console_write("web", b"ping\n").await.unwrap_err();
    assert!(matches!(error, EngineError::Invalid(_)), "{error:?}");
    assert!(
        error
            .to_string()
            .ends_with("runs on scripted, whose guests get no console input; reach them by another way"),
        "{error}"
    );
}

#[tokio::test]
async fn a_fork_whose_guest_cannot_learn_that_it_is_one_does_not_run() {
    let house = House::new().await;
    house.template("warm").await;
    house.hypervisor.tell_no_identity();
    let before = house.directories();
    let refused = house.engine.fork("warm", None, ForkRequest::default()).await;
    assert!(
        matches!(&refused, Err(EngineError::Invalid(why)) if why.contains("it takes a source with readiness.console")),
        "{refused:?}"
    );
    assert_eq!(house.directories(), before);
    let paused = ForkRequest {
        target_state: Some(State::Paused),
        ..ForkRequest::default()
    };
    let fork = house.engine.fork("warm", None, paused).await.unwrap();
    assert_eq!(fork.state, State::Paused);
}

#[tokio::test]
async fn a_fork_that_fails_leaves_nothing_and_frees_its_name() {
    for step in ["spawn", "restore", "resume"] {
        let house = House::new().await;
        house.template("warm").await;
        let before = house.directories();
        house.hypervisor.fail(step);
        let name = Some("job".parse().unwrap());
        assert!(
            house
                .engine
                .fork("warm", name.clone(), ForkRequest::default())
                .await
                .is_err(),
            "{step}"
        );
        assert_eq!(house.directories(), before, "{step}");
        assert_eq!(house.processes(), [] as [u32; 0], "{step}");
        house.hypervisor.fail("nothing");
        assert!(
            house
                .engine
                .fork("warm", name, ForkRequest::default())
                .await
                .is_ok(),
            "{step}"
        );
    }
}

#[tokio::test]
async fn a_running_source_goes_on_even_if_its_fork_fails() {
    let house = House::new().await;
    house.running("web").await;
    let request = ForkRequest {
        from_running: true,
        ..ForkRequest::default()
    };
    let taken = Some("web".parse().unwrap());
    assert!(matches!(
        house.engine.fork("web", taken, request).await,
        Err(EngineError::NameConflict { .. })
    ));
    assert_eq!(
        house
            .hypervisor
            .calls()
            .iter()
            .filter(|call| *call == "pause")
            .count(),
        0,
        "not even paused"
    );
    let fork = house.engine.fork("web", None, request).await.unwrap();
    assert_eq!(fork.name.unwrap().as_str(), "web-1");
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
    assert_eq!(house.processes().len(), 2);
}

#[tokio::test]
async fn forks_whose_work_ended_with_their_server_are_deleted_by_the_next() {
    let house = House::new().await;
    house.template("warm").await;
    let made = house.engine.forks("warm", forks(2)).await.unwrap();
    let path = house.metadata_path(&made[0].result.as_ref().unwrap().id);
    let house = house
        .restart_after(|| {
            let record = fs::read_to_string(&path).unwrap();
            let marked = record.replacen('{', r#"{"delete_after": true,"#, 1);
            fs::write(&path, marked).unwrap();
        })
        .await;
    let listed = house.engine.list(Filter::default()).await.unwrap();
    let names: Vec<_> = listed
        .iter()
        .map(|instance| instance.name.clone().unwrap().to_string())
        .collect();
    assert_eq!(names, ["warm", "warm-2"]);
    assert_eq!(house.processes().len(), 1);
    assert_eq!(house.directories().len(), 2);
}

#[tokio::test]
async fn forks_that_worked_stay_and_each_is_told() {
    let house = House::new().await;
    house.template("warm").await;
    let outcomes = house.engine.forks("warm", forks(5)).await.unwrap();
    let names: Vec<_> = outcomes.iter().map(|outcome| outcome.name.to_string()).collect();
    assert_eq!(names, ["warm-1", "warm-2", "warm-3", "warm-4", "warm-5"]);
    assert!(
        outcomes
            .iter()
            .all(|outcome| outcome.result.as_ref().unwrap().state == State::Running)
    );
    let listed = house
        .engine
        .list(Filter {
            state: Some(State::Running),
            template: Some("warm".to_owned()),
        })
        .await
        .unwrap();
    assert_eq!(listed.len(), 5);
    // Names that are taken are left out.
    let again = house.engine.forks("warm", forks(1)).await.unwrap();
    assert_eq!(again[0].name.to_string(), "warm-6");
}

#[tokio::test]
async fn counts_beyond_the_limit_are_refused_with_the_limit() {
    let house = House::new().await;
    house.template("warm").await;
    for count in [0, 100_000] {
        let refused = house.engine.forks("warm", forks(count)).await.unwrap_err();
        assert!(refused.to_string().contains("1 to 1024"), "{refused}");
    }
}

#[tokio::test]
async fn demote_and_delete_name_the_live_forks() {
    let house = House::new().await;
    house.template("warm").await;
    let fork = house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    for refused in [
        house.engine.demote("warm").await.unwrap_err(),
        house.engine.delete("warm").await.unwrap_err(),
    ] {
        let EngineError::Refused(Refusal::TemplateInUse { forks, .. }) = refused else {
            panic!("{refused}")
        };
        assert_eq!(forks.iter().map(|fork| fork.id).collect::<Vec<_>>(), [fork.id]);
    }
    house.engine.delete("warm-1").await.unwrap();
    house.engine.demote("warm").await.unwrap();
    house.engine.delete("warm").await.unwrap();
    assert_eq!(house.directories(), [] as [&str; 0]);
}

#[tokio::test]
async fn unreadable_metadata_of_a_fork_keep_the_template() {
    let house = House::new().await;
    house.template("warm").await;
    let fork = house
        .engine
        .fork("warm", None, ForkRequest::default())
        .await
        .unwrap();
    let path = house.metadata_path(&fork.id);
    let good = fs::read(&path).unwrap();
    fs::write(&path, b"{\"schema\": 1, \"id\"").unwrap();
    assert!(matches!(
        house.engine.demote("warm").await,
        Err(EngineError::Store(StoreError::Uncounted { .. }))
    ));
    assert!(house.engine.delete("warm").await.is_err());
    let shown = house.engine.get("warm-1").await.unwrap();
    assert_eq!(shown.state, State::Unknown);
    assert!(shown.state_error.unwrap().contains("cannot be read"));
    fs::write(&path, good).unwrap();
    assert_eq!(house.engine.get("warm-1").await.unwrap().state, State::Running);
    assert_eq!(house.engine.get("warm").await.unwrap().forks.unwrap().len(), 1);
}

#[tokio::test]
async fn an_instance_whose_metadata_cannot_be_read_can_be_deleted_with_its_vmm() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id;
    fs::write(house.metadata_path(&id), b"garbage").unwrap();
    house.engine.delete("web").await.unwrap();
    assert_eq!(house.directories(), [] as [&str; 0]);
    assert_eq!(house.processes(), [] as [u32; 0]);
}

#[tokio::test]
async fn a_vmm_that_is_killed_shows_why_and_the_instance_can_be_started_again() {
    let house = House::new().await;
    house.running("web").await;
    kill(house.processes()[0]);
    let waited = house.engine.wait("web", State::Stopped, PATIENCE).await.unwrap();
    assert!(waited.reached, "{waited:?}");
    assert!(waited.instance.state_error.unwrap().contains("its VMM ended"));
    let started = house.engine.start("web").await.unwrap();
    assert_eq!((started.state, started.state_error), (State::Running, None));
}

#[tokio::test]
async fn a_guest_that_goes_down_without_a_word_is_seen_by_who_waits_for_it() {
    let house = House::new().await;
    house.running("web").await;
    let asked = house.hypervisor.asked.notified();
    let goes_down = async {
        // Who waits has seen it up.
        asked.await;
        house.hypervisor.guests_go_down();
    };
    let wait = house.engine.wait("web", State::Shutdown, PATIENCE);
    let (waited, ()) = tokio::join!(wait, goes_down);
    assert!(waited.unwrap().reached);
}

#[tokio::test]
async fn a_server_that_starts_again_finds_its_vms() {
    let house = House::new().await;
    house.running("web").await;
    house.template("warm").await;
    let pids = house.processes();
    let house = house.restart().await;
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Running);
    assert_eq!(house.engine.get("warm").await.unwrap().state, State::Template);
    assert_eq!(house.processes(), pids);
    kill(pids[0]);
    assert!(
        house
            .engine
            .wait("web", State::Stopped, PATIENCE)
            .await
            .unwrap()
            .reached,
        "its end is noticed too"
    );
}

#[tokio::test]
async fn what_an_interrupted_operation_left_is_swept_at_the_next_start() {
    let house = House::new().await;
    house.running("web").await;
    let id = house.engine.get("web").await.unwrap().id;
    // As after a crash between taking the VMM out of the record and ending it.
    let path = house.metadata_path(&id);
    let mut metadata: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    metadata.as_object_mut().unwrap().remove("vmm");
    fs::write(&path, metadata.to_string()).unwrap();
    fs::create_dir(
        house
            .data
            .path()
            .join("instances/.new-01j00000000000000000000000"),
    )
    .unwrap();
    let house = house.restart().await;
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(house.directories(), [id.to_string()]);
    assert_eq!(house.engine.get("web").await.unwrap().state, State::Stopped);
}

#[tokio::test]
async fn an_operation_goes_on_when_its_client_hangs_up() {
    let house = House::new().await;
    house.template("warm").await;
    // Polled once, so that it has begun, and dropped.
    let fork = house
        .engine
        .fork("warm", Some("job".parse().unwrap()), ForkRequest::default());
    tokio::select! {
        biased;
        _ = fork => {}
        () = std::future::ready(()) => {}
    }
    // The deletion of the template waits for the fork that is being made, and is refused because of it.
    tokio::task::yield_now().await;
    let refused = house.engine.demote("warm").await;
    assert!(
        matches!(refused, Err(EngineError::Refused(Refusal::TemplateInUse { .. }))),
        "{refused:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_template_never_goes_while_forks_of_it_are_made() {
    let house = House::new().await;
    for round in 0..8 {
        house.template("warm").await;
        let engine = house.engine.clone();
        let forking = tokio::spawn(async move { engine.forks("warm", forks(4)).await });
        let demoted = house.engine.demote("warm").await;
        let forked = forking.await.unwrap();
        let made: Vec<_> = forked
            .into_iter()
            .flatten()
            .filter_map(|fork| fork.result.ok())
            .collect();
        let of_template = made
            .iter()
            .filter(|f| f.metadata.as_ref().unwrap().fork_of_template.is_some())
            .count();
        assert_eq!(demoted.is_err(), of_template > 0, "round {round}");
        for fork in made {
            house.engine.delete(&fork.id.to_string()).await.unwrap();
        }
        house.engine.delete("warm").await.unwrap();
        assert_eq!(house.directories(), [] as [&str; 0]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_that_ask_for_one_name_one_gets_it() {
    let house = House::new().await;
    let (one, two) = tokio::join!(
        house.engine.create(house.request("web")),
        house.engine.create(house.request("web"))
    );
    let refused = one.err().or(two.err()).unwrap();
    assert!(matches!(refused, EngineError::NameConflict { .. }), "{refused}");
    assert_eq!(house.directories().len(), 1);
    assert_eq!(house.processes().len(), 1);
}

#[tokio::test]
async fn a_snapshot_of_another_version_is_refused_with_both() {
    let house = House::new().await;
    house.running("web").await;
    house.engine.standby("web").await.unwrap();
    let id = house.engine.get("web").await.unwrap().id;
    let path = house
        .data
        .path()
        .join("instances")
        .join(id.to_string())
        .join("snapshot/manifest.json");
    let manifest = fs::read_to_string(&path).unwrap().replace("1.0.0", "0.9.0");
    fs::write(&path, manifest).unwrap();
    let refused = house.engine.restore("web").await.unwrap_err().to_string();
    assert!(
        refused.contains("0.9.0") && refused.contains("1.0.0"),
        "{refused}"
    );
}

#[tokio::test]
async fn a_truncated_snapshot_makes_the_state_unknown_and_nothing_but_delete_is_allowed() {
    let house = House::new().await;
    house.template("warm").await;
    let id = house.engine.get("warm").await.unwrap().id;
    let memory = house
        .data
        .path()
        .join("instances")
        .join(id.to_string())
        .join("snapshot/memory-ranges");
    fs::remove_file(&memory).unwrap();
    fs::write(&memory, vec![0; 4096]).unwrap();
    let shown = house.engine.get("warm").await.unwrap();
    assert_eq!(shown.state, State::Unknown);
    let error = shown.state_error.unwrap();
    assert!(error.contains("4096") && error.contains("8192"), "{error}");
    assert!(
        house
            .engine
            .fork("warm", None, ForkRequest::default())
            .await
            .is_err()
    );
    assert!(house.engine.demote("warm").await.is_err());
    house.engine.delete("warm").await.unwrap();
}
