//! What can go wrong with Cloud Hypervisor: each time an error that says what, and no process left.

use std::fs;
use std::path::Path;

use insta::assert_snapshot;
use stencil_core::{InstanceDir, MemoryMode, SnapshotDir, VmGeneration};
use stencil_vmm::{Call, CloudHypervisor, Exit, Hypervisor, VmmError, stray_processes};

use crate::cloud_hypervisor::{World, left_in, spec};
use crate::directory::spawn;

/// The calls of a first life, in their order, up to the one that fails.
async fn first_life(world: &World, dir: &InstanceDir) -> Result<(), VmmError> {
    world.vmm.create(dir, &spec(), &VmGeneration::random()).await?;
    world.vmm.boot(dir).await?;
    world.vmm.pause(dir).await?;
    fs::create_dir(dir.snapshot().path()).unwrap();
    world.vmm.snapshot(dir, &dir.snapshot()).await?;
    world.vmm.resume(dir).await
}

const CALLS_OF_A_FIRST_LIFE: [&str; 6] = [
    "vmm.ping",
    "vm.create",
    "vm.boot",
    "vm.pause",
    "vm.snapshot",
    "vm.resume",
];

/// The error of a life in which a call goes wrong. Afterwards the VMM is stopped, and no process is left.
async fn error_of(call: &str, fault: &str) -> VmmError {
    let world = World::with_fault(call, fault);
    let dir = world.instance("vm");
    let process = world.spawn(&dir).await;
    let life = first_life(&world, &dir);
    let lived = match fault {
        // Told by the process; for others it would be waited for.
        "die" => process.during(life).await,
        _ => life.await,
    };
    world.vmm.stop(&dir, &process).await.unwrap();
    assert!(process.has_exited().is_some());
    assert_eq!(stray_processes(dir.path()).unwrap(), []);
    assert!(!dir.vmm_socket().exists());
    lived.unwrap_err()
}

#[tokio::test]
async fn a_vmm_that_dies_at_any_step_is_told_with_how_it_died() {
    for call in CALLS_OF_A_FIRST_LIFE {
        let error = error_of(call, "die").await;
        assert!(
            matches!(
                error,
                VmmError::Ended {
                    exit: Exit::Signal(9),
                    ..
                }
            ),
            "{call}: {error:?}"
        );
    }
}

#[tokio::test]
async fn a_connection_that_is_dropped_at_any_step_is_no_reply() {
    for call in CALLS_OF_A_FIRST_LIFE {
        let error = error_of(call, "drop").await;
        assert!(
            matches!(&error, VmmError::NoReply { call: failed, .. } if failed.to_string() == call),
            "{call}: {error:?}"
        );
    }
}

#[tokio::test]
async fn an_error_at_any_step_is_told_in_the_vmm_s_words() {
    for call in CALLS_OF_A_FIRST_LIFE {
        assert_eq!(
            error_of(call, "error").await.to_string(),
            format!(
                "{call} was refused with status 500: Error from API: The VM could not do it: it was asked to fail"
            )
        );
    }
}

#[tokio::test]
async fn an_api_that_hangs_is_given_up_at_the_call_s_deadline_and_its_process_ended() {
    let world = World::with_fault("vm.boot", "hang");
    let dir = world.instance("vm");
    let process = world.spawn(&dir).await;
    world
        .vmm
        .create(&dir, &spec(), &VmGeneration::random())
        .await
        .unwrap();
    // From here the clock jumps to the next deadline as soon as nothing else is left to do.
    tokio::time::pause();
    let error = world.vmm.boot(&dir).await.unwrap_err();
    assert!(
        matches!(error, VmmError::Timeout { call: Call::Boot, .. }),
        "{error:?}"
    );
    // Also other calls are not answered now: one thread serves all of them.
    let error = world.vmm.info(&dir).await.unwrap_err();
    assert_snapshot!(error, @"vm.info: no answer from the VMM within 500ms");
    tokio::time::resume();
    assert_eq!(world.vmm.stop(&dir, &process).await.unwrap(), Exit::Signal(15));
    assert_eq!(stray_processes(dir.path()).unwrap(), []);
}

#[tokio::test]
async fn an_api_that_is_slow_is_given_up_at_the_call_s_deadline_however_much_it_says() {
    let world = World::with_fault("vm.info", "slow");
    let dir = world.instance("vm");
    let process = world.spawn(&dir).await;
    let error = world.vmm.info(&dir).await.unwrap_err();
    assert!(
        matches!(error, VmmError::Timeout { call: Call::Info, .. }),
        "{error:?}"
    );
    world.vmm.stop(&dir, &process).await.unwrap();
    assert_eq!(stray_processes(dir.path()).unwrap(), []);
}

#[tokio::test]
async fn a_host_that_has_no_nested_state_to_snapshot_is_told_in_a_sentence() {
    assert_snapshot!(error_of("vm.snapshot", "nested-state").await, @"Cloud Hypervisor cannot snapshot VMs on this host: it saves the state of nested virtualisation of each vCPU, and this host's KVM has none to give (kvm-pvm has not); standby and forks take another hypervisor here, such as microvm, or a host with VT-x or AMD-V");
}

/// The error of a restore, after which nothing is left of it but the VMM that is stopped then.
async fn restore_error(world: &World, snapshot: &SnapshotDir) -> VmmError {
    let dir = world.instance("fork");
    let process = world.spawn(&dir).await;
    let error = process
        .during(world.restore(&dir, snapshot, MemoryMode::Cow))
        .await
        .unwrap_err();
    world.vmm.stop(&dir, &process).await.unwrap();
    assert_eq!(left_in(&dir), ["console.log", "vmm.log"]);
    fs::remove_dir_all(dir.path()).unwrap();
    error
}

#[tokio::test]
async fn a_restore_that_goes_wrong_leaves_nothing() {
    for (fault, expected) in [
        (
            "die",
            "the VMM ended (killed by signal 9 (SIGKILL)) instead of answering",
        ),
        (
            "drop",
            "vm.restore: the VMM closed the connection without a reply",
        ),
        (
            "error",
            "vm.restore was refused with status 500: Error from API: The VM could not do it: it was asked to fail",
        ),
    ] {
        let world = World::with_fault("vm.restore", fault);
        let snapshot = world.snapshot().await;
        assert_eq!(restore_error(&world, &snapshot).await.to_string(), expected);
    }
}

#[tokio::test]
async fn a_snapshot_that_cannot_be_used_is_refused_and_says_why() {
    let world = World::new();
    let snapshot = world.snapshot().await;
    let config = fs::read_to_string(snapshot.config()).unwrap();
    let reason = async || match restore_error(&world, &snapshot).await {
        VmmError::Snapshot { source, .. } => source.to_string(),
        other => panic!("{other:?}"),
    };

    let with_fs = config.replace(
        "\"cpus\"",
        r#""fs":[{"id":"home","tag":"home","socket":"/run/fs.sock"}],"cpus""#,
    );
    fs::write(snapshot.config(), with_fs).unwrap();
    assert_snapshot!(reason().await, @"its device fs home cannot be brought back: its daemon keeps state of the VM outside of the snapshot; remove it");

    fs::write(snapshot.config(), "no JSON").unwrap();
    assert_snapshot!(reason().await, @"config.json is not what Cloud Hypervisor v51 to v53 writes");

    fs::write(snapshot.config(), config).unwrap();
    fs::File::options()
        .write(true)
        .open(snapshot.memory_ranges())
        .unwrap()
        .set_len(4096)
        .unwrap();
    assert_snapshot!(reason().await, @"memory-ranges has 4096 bytes and the VM's memory 67108864; the snapshot is cut off");

    fs::remove_file(snapshot.memory_ranges()).unwrap();
    let error = restore_error(&world, &snapshot).await;
    assert!(
        matches!(&error, VmmError::SnapshotFile { path, .. } if *path == snapshot.memory_ranges()),
        "{error:?}"
    );
}

#[tokio::test]
async fn calls_that_do_not_fit_the_vm_s_state_are_refused_in_the_vmm_s_words() {
    let world = World::new();
    let dir = world.instance("vm");
    let _process = world.spawn(&dir).await;
    let mut told = String::new();
    let mut tell = |refused: Result<(), VmmError>| told += &format!("{}\n", refused.unwrap_err());
    tell(world.vmm.boot(&dir).await);
    world
        .vmm
        .create(&dir, &spec(), &VmGeneration::random())
        .await
        .unwrap();
    tell(world.vmm.create(&dir, &spec(), &VmGeneration::random()).await);
    tell(world.vmm.pause(&dir).await);
    world.vmm.boot(&dir).await.unwrap();
    tell(world.vmm.resume(&dir).await);
    tell(world.vmm.snapshot(&dir, &dir.snapshot()).await);
    world.vmm.pause(&dir).await.unwrap();
    tell(world.vmm.pause(&dir).await);
    fs::create_dir(dir.snapshot().path()).unwrap();
    world.vmm.snapshot(&dir, &dir.snapshot()).await.unwrap();
    tell(world.vmm.snapshot(&dir, &dir.snapshot()).await);
    let restored = world.restore(&dir, &dir.snapshot(), MemoryMode::Cow).await;
    tell(restored.map(drop));
    assert_snapshot!(told);
}

#[tokio::test]
async fn versions_from_51_to_53_are_taken_and_no_others() {
    for version in ["51.0", "51.2", "52.0", "53.0", "53.0-7-g0a1b2c3-dirty"] {
        let world = World::with(&format!("cloud-hypervisor v{version}\n"), "");
        assert_eq!(world.vmm.version().await.unwrap(), version);
    }
    for version in ["50.0", "54.0", "5.3"] {
        let world = World::with(&format!("cloud-hypervisor v{version}\n"), "");
        let error = world.vmm.version().await.unwrap_err();
        let expected = format!(
            "{} is version {version}; this takes version 51 to 53",
            world.file("cloud-hypervisor").display()
        );
        assert_eq!(error.to_string(), expected);
    }
    let error = World::with("usage: cloud\n", "").vmm.version().await.unwrap_err();
    assert!(matches!(error, VmmError::Version { .. }), "{error:?}");
}

#[tokio::test]
async fn a_binary_that_was_replaced_since_the_server_asked_it_is_not_used() {
    // The fake says v53.0 when it runs.
    let world = World::with("cloud-hypervisor v52.0\n", "");
    let dir = world.instance("vm");
    let _process = world.spawn(&dir).await;
    let error = world
        .vmm
        .create(&dir, &spec(), &VmGeneration::random())
        .await
        .unwrap_err();
    let expected = "was version 52.0 and is version 53.0 now; start the server anew to use it";
    assert!(error.to_string().ends_with(expected), "{error}");
}

#[tokio::test]
async fn a_binary_that_is_not_there_or_cannot_be_executed_is_named_and_leaves_no_socket() {
    let world = World::new();
    fs::write(world.file("text"), "no program").unwrap();
    for binary in [Path::new("/nonexistent/cloud-hypervisor"), &world.file("text")] {
        let vmm = CloudHypervisor::new(binary.to_owned());
        let is_named =
            |error: &VmmError| matches!(error, VmmError::Spawn { binary: named, .. } if named == binary);
        let error = vmm.version().await.unwrap_err();
        assert!(is_named(&error), "{error:?}");
        let dir = InstanceDir::new(world.file(""));
        let error = spawn(&vmm, &dir).await.unwrap_err();
        assert!(is_named(&error), "{error:?}");
        assert!(!dir.vmm_socket().exists());
    }
}

#[tokio::test]
async fn a_socket_s_path_that_is_too_long_is_refused_with_the_numbers() {
    let world = World::new();
    let dir = InstanceDir::new(world.file(&"d".repeat(107)));
    fs::create_dir(dir.path()).unwrap();
    let error = spawn(&world.vmm, &dir).await.unwrap_err();
    let length = dir.vmm_socket().to_str().unwrap().len();
    assert_eq!(
        error.to_string(),
        format!(
            "the path of the socket {} has {length} bytes and at most 107 fit; choose a shorter data directory",
            dir.vmm_socket().display()
        )
    );
    assert!(left_in(&dir).is_empty());
}
