//! What the client sends, and how it reads what Cloud Hypervisor v53 answered.

use std::path::{Path, PathBuf};

use insta::assert_snapshot;
use stencil_core::{GuestEnd, InstanceDir, MemoryMode, SnapshotDir, VmPhase, VmSpec};
use stencil_vmm::{Client, HotPages, Hypervisor, MicroVm, Restore, VmStatus};

use crate::directory::{Scratch, backend};
use crate::replayer::{Replayer, Reply};

/// Makes a call that is answered with the recorded reply; returns the request and what the call gave.
async fn exchange<T>(reply: Reply, call: impl AsyncFnOnce(MicroVm, InstanceDir) -> T) -> (String, T) {
    let scratch = Scratch::new();
    let replayer = Replayer::start(&scratch.dir, vec![reply]);
    let outcome = call(backend("sleeps"), scratch.dir.clone()).await;
    let requests = replayer.requests().await;
    assert_eq!(requests.len(), 1);
    (requests[0].to_string(), outcome)
}

fn spec() -> VmSpec {
    let mut spec = VmSpec::new("microvm".parse().unwrap(), "/boot/guest.elf".into(), 2, 512 << 20);
    spec.cmdline = "console=ttyS0 quiet".to_owned();
    spec
}

#[tokio::test]
async fn ping_asks_for_the_version() {
    let (request, ping) = exchange(Reply::Recorded("ping"), async |_, dir| {
        Client::new(&dir).unwrap().ping().await.unwrap()
    })
    .await;
    assert_eq!(ping.version, "53.0.0");
    assert_snapshot!(request);
}

#[tokio::test]
async fn create_describes_the_machine() {
    let generation = "000102030405060708090a0b0c0d0e0f".parse().unwrap();
    let (request, created) = exchange(Reply::Recorded("create"), async |vmm, dir| {
        vmm.create(&dir, &spec(), &generation).await
    })
    .await;
    created.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn create_names_the_initial_ramdisk_where_there_is_one() {
    let generation = "000102030405060708090a0b0c0d0e0f".parse().unwrap();
    let spec = VmSpec {
        initrd: Some(PathBuf::from("/boot/initrd.img")),
        ..spec()
    };
    let (request, created) = exchange(Reply::Recorded("create"), async |vmm, dir| {
        vmm.create(&dir, &spec, &generation).await
    })
    .await;
    created.unwrap();
    assert!(request.contains(r#""initramfs":"/boot/initrd.img""#), "{request}");
}

#[tokio::test]
async fn boot_has_no_body() {
    let (request, booted) = exchange(Reply::Recorded("boot"), async |vmm, dir| vmm.boot(&dir).await).await;
    booted.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn pause_has_no_body() {
    let (request, paused) = exchange(Reply::Recorded("pause"), async |vmm, dir| vmm.pause(&dir).await).await;
    paused.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn resume_has_no_body() {
    let (request, resumed) =
        exchange(Reply::Recorded("resume"), async |vmm, dir| vmm.resume(&dir).await).await;
    resumed.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn snapshot_names_its_directory_by_an_absolute_url() {
    let destination = SnapshotDir::new("/data/instances/source/snap shot");
    let (request, written) = exchange(Reply::Recorded("snapshot"), async |vmm, dir| {
        vmm.snapshot(&dir, &destination).await
    })
    .await;
    written.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn restore_says_how_and_as_which_machine() {
    let snapshot = SnapshotDir::new("/data/instances/source/snapshot");
    let generation = "000102030405060708090a0b0c0d0e0f".parse().unwrap();
    let memory_generation = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff".parse().unwrap();
    let restore = Restore {
        snapshot: &snapshot,
        memory_mode: MemoryMode::Cow,
        generation: &generation,
        memory_generation: &memory_generation,
        hot_pages: HotPages::Prefetch(Path::new("/data/templates/source/hot-pages")),
    };
    let (request, restored) = exchange(Reply::Recorded("restore"), async |vmm, dir| {
        vmm.restore(&dir, &restore).await
    })
    .await;
    restored.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn the_power_button_is_pressed_without_a_body() {
    let done = Reply::text("HTTP/1.1 204 No Content\r\n\r\n");
    let (request, pressed) = exchange(done, async |_, dir| {
        Client::new(&dir).unwrap().press_power_button().await
    })
    .await;
    pressed.unwrap();
    assert!(
        request.starts_with("PUT /api/v1/vm.power-button HTTP/1.1\n"),
        "{request}"
    );
}

#[tokio::test]
async fn shutdown_is_asked_of_the_vmm() {
    let (request, asked) = exchange(Reply::Recorded("vmm-shutdown"), async |_, dir| {
        Client::new(&dir).unwrap().shutdown().await
    })
    .await;
    asked.unwrap();
    assert_snapshot!(request);
}

#[tokio::test]
async fn info_asks_for_the_state() {
    let (request, status) = exchange(Reply::Recorded("info-running"), async |vmm, dir| {
        vmm.info(&dir).await.unwrap()
    })
    .await;
    assert_eq!(
        status,
        VmStatus {
            phase: VmPhase::Running,
            end: None
        }
    );
    assert_snapshot!(request);
}

#[tokio::test]
async fn info_tells_each_phase() {
    for (reply, phase) in [
        ("info-no-vm", VmPhase::Undefined),
        ("info-created", VmPhase::Created),
        ("info-running", VmPhase::Running),
        ("info-paused", VmPhase::Paused),
    ] {
        let (_, status) = exchange(Reply::Recorded(reply), async |vmm, dir| {
            vmm.info(&dir).await.unwrap()
        })
        .await;
        assert_eq!(status, VmStatus { phase, end: None }, "{reply}");
    }
}

#[tokio::test]
async fn info_tells_why_a_guest_is_down() {
    for (kind, failed) in [("power_off", false), ("triple_fault", true)] {
        let body = format!(
            r#"{{"config":{{}},"state":"Shutdown","end":{{"kind":"{kind}","reason":"the guest's own"}}}}"#
        );
        let reply = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        let (_, status) = exchange(Reply::text(&reply), async |vmm, dir| {
            vmm.info(&dir).await.unwrap()
        })
        .await;
        let end = Some(GuestEnd {
            failed,
            reason: "the guest's own".to_owned(),
        });
        assert_eq!(
            status,
            VmStatus {
                phase: VmPhase::Shutdown,
                end
            }
        );
    }
}

#[tokio::test]
async fn each_call_is_a_connection_of_its_own() {
    let scratch = Scratch::new();
    // The replayer takes one request of each connection and checks that no other follows on it.
    let replies = ["pause", "resume", "info-running"].map(Reply::Recorded).into();
    let replayer = Replayer::start(&scratch.dir, replies);
    let vmm = backend("sleeps");
    vmm.pause(&scratch.dir).await.unwrap();
    vmm.resume(&scratch.dir).await.unwrap();
    vmm.info(&scratch.dir).await.unwrap();
    assert_eq!(replayer.requests().await.len(), 3);
}
