//! The backend for QEMU against the one that is installed, with a bare-metal guest: the life of a VM, and forks of it.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use stencil_core::{GuestEnd, InstanceDir, MemoryMode, SnapshotDir, VmGeneration, VmPhase, VmSpec};
use stencil_vmm::{
    Call, Exit, HotPages, Hypervisor, KillGuard, Qemu, Restore, Restored, Start, VmStatus, VmmError,
    VmmProcess, stray_processes,
};
use tempfile::TempDir;
use tokio::io::AsyncWriteExt;

use crate::skipped::skipped;
use crate::tiny_guest;

const MIB: u64 = 1 << 20;
/// A guest under emulation beside other tests; what is waited for takes some 100 ms.
const PATIENCE: Duration = Duration::from_secs(60);

/// The backend with the QEMU in `PATH`, and a place for instances.
struct World {
    root: TempDir,
    vmm: Qemu,
    spec: VmSpec,
}

impl World {
    /// `None` where there is no QEMU: the test is skipped, and says so.
    fn new() -> Option<Self> {
        let Some(binary) = Qemu::find() else {
            skipped("there is no qemu-system-x86_64 in PATH; install Debian's qemu-system-x86");
            return None;
        };
        let root = tempfile::tempdir().unwrap();
        let kernel = tiny_guest::write(root.path());
        Some(Self {
            spec: VmSpec::new("qemu".parse().unwrap(), kernel, 2, 64 * MIB),
            vmm: Qemu::new(binary),
            root,
        })
    }

    /// The directory of a new instance, with a comma as names can have them in a data directory's path.
    fn instance(&self, name: &str) -> InstanceDir {
        let dir = InstanceDir::new(self.root.path().join(format!("{name},1")));
        fs::create_dir(dir.path()).unwrap();
        dir
    }

    /// Starts a VM, which does not outlive the test, up to its first instruction.
    async fn created(&self, name: &str) -> (InstanceDir, KillGuard) {
        let dir = self.instance(name);
        let generation = VmGeneration::random();
        let start = Start::Boot {
            spec: &self.spec,
            generation: &generation,
        };
        let process = self.vmm.spawn(&dir, start).await.unwrap().kill_on_drop();
        let created = self.vmm.create(&dir, &self.spec, &generation);
        process.during(created).await.unwrap();
        (dir, process)
    }

    /// An instance with a guest that has said that it is ready.
    async fn running(&self, name: &str) -> (InstanceDir, KillGuard) {
        let (dir, process) = self.created(name).await;
        self.vmm.boot(&dir).await.unwrap();
        until_printed(&dir, "ready\n").await;
        (dir, process)
    }

    async fn restored(
        &self,
        dir: &InstanceDir,
        snapshot: &SnapshotDir,
        memory_mode: MemoryMode,
    ) -> Result<KillGuard, VmmError> {
        let restore = Restore {
            snapshot,
            memory_mode,
            generation: &VmGeneration::random(),
            memory_generation: &"f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff".parse().unwrap(),
            hot_pages: HotPages::Unused,
        };
        let process = self
            .vmm
            .spawn(dir, Start::Restore(&restore))
            .await?
            .kill_on_drop();
        let restored = process.during(self.vmm.restore(dir, &restore)).await?;
        assert_eq!(restored, Restored::as_asked(memory_mode));
        Ok(process)
    }

    /// Writes a paused VM to its directory, where it is immutable as a template's.
    async fn snapshot(&self, dir: &InstanceDir) -> SnapshotDir {
        let snapshot = dir.snapshot();
        fs::create_dir(snapshot.path()).unwrap();
        self.vmm.snapshot(dir, &snapshot).await.unwrap();
        let mut permissions = fs::metadata(snapshot.memory_ranges()).unwrap().permissions();
        permissions.set_readonly(true);
        fs::set_permissions(snapshot.memory_ranges(), permissions).unwrap();
        snapshot
    }

    /// The snapshot of an instance whose guest has counted to 2, and that has ended.
    async fn template(&self) -> SnapshotDir {
        let (dir, process) = self.running("template").await;
        self.say(&dir, &process, "cc", "12").await;
        self.vmm.pause(&dir).await.unwrap();
        let snapshot = self.snapshot(&dir).await;
        self.vmm.stop(&dir, &process).await.unwrap();
        snapshot
    }

    /// Gives the guest something to read, and waits for what it prints.
    async fn say(&self, dir: &InstanceDir, process: &VmmProcess, input: &str, answer: &str) {
        let expected = printed(dir) + answer;
        let said = self.vmm.console_input(dir, process, input.as_bytes());
        said.await.unwrap();
        until_printed(dir, &expected).await;
    }

    async fn phase(&self, dir: &InstanceDir) -> VmPhase {
        self.status(dir).await.phase
    }

    async fn status(&self, dir: &InstanceDir) -> VmStatus {
        let told = async {
            loop {
                match self.vmm.info(dir).await {
                    // A host that runs other tests may take longer than a server would wait.
                    Err(VmmError::Timeout { .. }) => {}
                    told => return told,
                }
            }
        };
        tokio::time::timeout(PATIENCE, told).await.unwrap().unwrap()
    }
}

fn printed(dir: &InstanceDir) -> String {
    fs::read_to_string(dir.console_log()).unwrap_or_default()
}

async fn until_printed(dir: &InstanceDir, expected: &str) {
    until(&format!("{expected:?} is printed"), async || {
        printed(dir) == expected
    })
    .await;
}

async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !is_so().await {
            tokio::task::yield_now().await;
        }
    });
    waited.await.unwrap_or_else(|_| panic!("never: {what}"));
}

fn counter(memory: &Path) -> u8 {
    let mut counter = [0];
    let memory = fs::File::open(memory).unwrap();
    memory.read_exact_at(&mut counter, tiny_guest::COUNTER).unwrap();
    counter[0]
}

#[tokio::test]
async fn a_vm_lives_from_create_to_its_end() {
    let Some(world) = World::new() else { return };
    let (dir, process) = world.created("vm").await;
    assert_eq!(world.phase(&dir).await, VmPhase::Created);
    assert_eq!(printed(&dir), "", "nothing has run");

    world.vmm.boot(&dir).await.unwrap();
    until_printed(&dir, "ready\n").await;
    assert_eq!(world.phase(&dir).await, VmPhase::Running);
    assert_eq!(world.vmm.accelerator(&dir), Some(world.vmm.host_accelerator()));
    world.vmm.pause(&dir).await.unwrap();
    assert_eq!(world.phase(&dir).await, VmPhase::Paused);
    world.vmm.resume(&dir).await.unwrap();
    assert!(world.vmm.press_power_button(&dir).await.unwrap());
    // This guest does not listen to it.
    world.say(&dir, &process, "c", "1").await;

    assert_eq!(world.vmm.stop(&dir, &process).await.unwrap(), Exit::Code(0));
    for socket in [dir.vmm_socket(), dir.console_terminal(), dir.agent_socket()] {
        assert!(!socket.exists(), "{}", socket.display());
    }
    assert_eq!(stray_processes(world.root.path()).unwrap(), []);
}

#[tokio::test]
async fn forks_go_on_from_the_snapshot_in_each_memory_mode_and_leave_it_as_it_is() {
    let Some(world) = World::new() else { return };
    let template = world.template().await;
    let before = fs::read(template.memory_ranges()).unwrap();
    let allocated = fs::metadata(template.memory_ranges()).unwrap().blocks() * 512;
    assert!(
        allocated < 8 * MIB,
        "{allocated} bytes for a guest that wrote next to nothing"
    );

    for mode in [MemoryMode::Copy, MemoryMode::Cow] {
        let dir = world.instance(&mode.to_string());
        let process = world.restored(&dir, &template, mode).await.unwrap();
        assert_eq!(world.phase(&dir).await, VmPhase::Paused);
        assert_eq!(printed(&dir), "", "{mode}: it waits");
        world.vmm.resume(&dir).await.unwrap();
        world.say(&dir, &process, "c", "3").await;

        // What it wrote is its own, and is in its snapshot, from which others go on.
        world.vmm.pause(&dir).await.unwrap();
        let own = world.snapshot(&dir).await;
        assert_eq!(
            (counter(&own.memory_ranges()), counter(&template.memory_ranges())),
            (3, 2)
        );
        world.vmm.resume(&dir).await.unwrap();
        world.say(&dir, &process, "c", "4").await;
        let other_mode = match mode {
            MemoryMode::Cow => MemoryMode::Copy,
            _ => MemoryMode::Cow,
        };
        let grandchild = world.instance(&format!("of-{mode}"));
        let process = world.restored(&grandchild, &own, other_mode).await.unwrap();
        world.vmm.resume(&grandchild).await.unwrap();
        world.say(&grandchild, &process, "c", "4").await;
    }
    assert!(
        fs::read(template.memory_ranges()).unwrap() == before,
        "the template's memory was written"
    );
}

#[tokio::test]
async fn a_vm_that_was_woken_is_written_whole_after_its_snapshot_is_gone() {
    let Some(world) = World::new() else { return };
    let template = world.template().await;
    let dir = world.instance("woken");
    let process = world.restored(&dir, &template, MemoryMode::Cow).await.unwrap();
    fs::remove_dir_all(template.path()).unwrap();
    world.vmm.resume(&dir).await.unwrap();
    world.say(&dir, &process, "c", "3").await;
    world.vmm.pause(&dir).await.unwrap();
    let snapshot = world.snapshot(&dir).await;
    world.vmm.stop(&dir, &process).await.unwrap();

    let again = world.instance("again");
    let process = world.restored(&again, &snapshot, MemoryMode::Cow).await.unwrap();
    world.vmm.resume(&again).await.unwrap();
    world.say(&again, &process, "c", "4").await;
}

#[tokio::test]
async fn a_guest_that_is_down_leaves_the_vmm_up_which_says_why() {
    let Some(world) = World::new() else { return };
    for (input, failed, reason) in [
        ("o", false, "the guest powered off"),
        ("r", false, "the guest asked for a reset"),
        ("p", true, "the guest's kernel panicked"),
    ] {
        let (dir, process) = world.running(&format!("ends-by-{input}")).await;
        world.say(&dir, &process, input, "").await;
        until("it is down", async || {
            world.phase(&dir).await == VmPhase::Shutdown
        })
        .await;
        let end = world.status(&dir).await.end;
        let reason = reason.to_owned();
        assert_eq!(end, Some(GuestEnd { failed, reason }));
        assert_eq!(process.has_exited(), None);
        let refused = world.vmm.resume(&dir).await.unwrap_err();
        assert!(matches!(refused, VmmError::Refused { .. }), "{refused}");
    }
}

#[tokio::test]
async fn calls_that_do_not_fit_the_vm_s_state_are_refused_in_a_sentence() {
    let Some(world) = World::new() else { return };
    let (dir, _process) = world.created("vm").await;
    let told = |refused: Result<(), VmmError>| {
        let refused = refused.unwrap_err();
        assert!(refused.was_refused(), "{refused:?}");
        refused.to_string()
    };
    fs::create_dir(dir.snapshot().path()).unwrap();
    let sentences = [
        told(world.vmm.pause(&dir).await),
        told(world.vmm.resume(&dir).await),
        told(world.vmm.snapshot(&dir, &dir.snapshot()).await),
    ];
    insta::assert_snapshot!(sentences.join("\n"));
    assert_eq!(fs::read_dir(dir.snapshot().path()).unwrap().count(), 0);
}

#[tokio::test]
async fn an_agent_s_port_is_connected_and_connected_again() {
    let Some(world) = World::new() else { return };
    let (dir, process) = world.running("vm").await;
    for _ in 0..2 {
        let mut stream = world.vmm.connect_agent(&dir).await.unwrap();
        stream.write_all(b"hello").await.unwrap();
    }
    world.vmm.stop(&dir, &process).await.unwrap();
    let gone = world.vmm.connect_agent(&dir).await.unwrap_err();
    assert!(matches!(gone, VmmError::Agent { .. }), "{gone:?}");
}

#[tokio::test]
async fn more_input_than_the_serial_port_holds_arrives_whole_and_as_it_is() {
    let Some(world) = World::new() else { return };
    let (dir, process) = world.running("vm").await;
    let text = "0123456789abdefg\t\n\r".repeat(200);
    world.say(&dir, &process, &text, &text).await;
}

#[tokio::test]
async fn other_memory_modes_are_refused_before_anything_is_started() {
    let Some(world) = World::new() else { return };
    let template = world.template().await;
    for mode in [MemoryMode::Uffd, MemoryMode::OnDemand] {
        let dir = world.instance(&mode.to_string());
        let refused = world.restored(&dir, &template, mode).await.unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!("qemu has no memory mode {mode}; ask for another one")
        );
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}

#[tokio::test]
async fn what_is_no_kernel_ends_it_and_its_log_says_why() {
    let Some(mut world) = World::new() else { return };
    let kernel = world.root.path().join("text");
    fs::write(&kernel, "no kernel\n".repeat(1000)).unwrap();
    world.spec.kernel = Some(kernel);
    let dir = world.instance("vm");
    let generation = VmGeneration::random();
    let start = Start::Boot {
        spec: &world.spec,
        generation: &generation,
    };
    let process = world.vmm.spawn(&dir, start).await.unwrap();
    let created = world.vmm.create(&dir, &world.spec, &generation);
    let error = process.during(created).await.unwrap_err();
    assert!(
        matches!(
            error,
            VmmError::Ended {
                exit: Exit::Code(1),
                ..
            }
        ),
        "{error:?}"
    );
    let log = fs::read_to_string(dir.vmm_log()).unwrap();
    assert!(log.contains("invalid kernel header"), "{log}");
}

#[tokio::test]
async fn a_damaged_snapshot_ends_the_vmm_and_leaves_no_process() {
    let Some(world) = World::new() else { return };
    let template = world.template().await;
    let state = fs::read(template.state()).unwrap();
    let cut = &state[..state.len() / 2];
    let mut flipped = state.clone();
    flipped[0] ^= 1;
    for (name, damaged) in [("cut", cut), ("flipped", &flipped), ("empty", &[])] {
        fs::write(template.state(), damaged).unwrap();
        let dir = world.instance(name);
        let error = world
            .restored(&dir, &template, MemoryMode::Cow)
            .await
            .unwrap_err();
        assert!(
            matches!(
                error,
                VmmError::Ended {
                    exit: Exit::Code(1),
                    ..
                }
            ),
            "{name}: {error:?}"
        );
        assert!(!fs::read_to_string(dir.vmm_log()).unwrap().is_empty());
    }
    fs::write(template.state(), state).unwrap();
    fs::write(template.config(), "{\"vcpus\": 2}").unwrap();
    let dir = world.instance("config");
    let error = world
        .restored(&dir, &template, MemoryMode::Cow)
        .await
        .unwrap_err();
    assert!(matches!(error, VmmError::Machine { .. }), "{error:?}");
    assert_eq!(stray_processes(world.root.path()).unwrap(), []);
}

#[tokio::test]
async fn a_vmm_that_is_killed_fails_the_call_at_once_and_tells_how_it_died() {
    let Some(world) = World::new() else { return };
    let (dir, process) = world.running("vm").await;
    process.terminate().await.unwrap();
    let error = process.during(world.vmm.pause(&dir)).await.unwrap_err();
    assert!(
        matches!(error, VmmError::Ended { .. }) && error.to_string().contains("ended"),
        "{error:?}"
    );
    assert!(matches!(
        world.vmm.info(&dir).await.unwrap_err(),
        VmmError::Connect { call: Call::Info, .. }
    ));
}
