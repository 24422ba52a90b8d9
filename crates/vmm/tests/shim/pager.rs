//! Memory that a pager serves to a fake Cloud Hypervisor: the same program in a third role, with its real code.

use std::fs;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use insta::assert_snapshot;
use stencil_core::{InstanceDir, MemoryGeneration, MemoryMode, SnapshotDir, VmPhase};
use stencil_uffd::{HotPages as List, Mark, PAGE_SIZE};
use stencil_vmm::pager::{self, Ahead, Request};
use stencil_vmm::{Exit, HotPages, Hypervisor, VmmError, VmmProcess};

use crate::cloud_hypervisor::{MEMORY, World, left_in, printed};
use crate::processes::identity_if_there;

/// How many pages the fake's guest has.
const PAGES: u64 = 16384;

#[test]
#[ignore = "it is no test, but what plays the pager"]
fn plays_the_pager() {
    if std::env::var_os("PAGER").is_none() {
        return;
    }
    let arguments: Vec<String> = std::env::args().skip_while(|argument| argument != "--").collect();
    let hot_pages = match &arguments[3..] {
        [] => Ahead::Nothing,
        [record] if record == "--record" => Ahead::Record,
        [hot_pages, list] if hot_pages == "--hot-pages" => Ahead::Fetch(list.into()),
        other => panic!("{other:?}"),
    };
    let request = Request {
        memory_generation: arguments[2].parse().unwrap(),
        hot_pages,
    };
    if let Err(failed) = pager::run(&request) {
        panic!("pager: {}", stencil_core::error_chain(&failed));
    }
}

/// The pagers in an instance's directory.
pub(crate) fn pagers(dir: &InstanceDir) -> Vec<VmmProcess> {
    let home = fs::canonicalize(dir.path()).unwrap();
    let is_pager = |pid: &u32| {
        let proc = PathBuf::from(format!("/proc/{pid}"));
        let cmdline = fs::read(proc.join("cmdline")).unwrap_or_default();
        fs::read_link(proc.join("cwd")).is_ok_and(|cwd| cwd == home)
            && cmdline.windows(17).any(|part| part == b"--memory-generati")
    };
    let entries = fs::read_dir("/proc").unwrap();
    entries
        .filter_map(|entry| entry.unwrap().file_name().to_str()?.parse().ok())
        .filter(is_pager)
        .filter_map(|pid| VmmProcess::attach(&identity_if_there(pid)?).unwrap())
        .collect()
}

/// The only pager in an instance's directory.
pub(crate) fn the_pager(dir: &InstanceDir) -> VmmProcess {
    let mut pagers = pagers(dir);
    assert_eq!(pagers.len(), 1);
    pagers.remove(0)
}

/// A snapshot whose pages with data are 0, with the counter, and those of `pages`, filled with their number.
pub(crate) async fn snapshot_with(world: &World, pages: impl IntoIterator<Item = u64>) -> SnapshotDir {
    let template = world.snapshot().await;
    let memory = File::options()
        .write(true)
        .open(template.memory_ranges())
        .unwrap();
    for page in pages {
        let byte = u8::try_from(page % 251).unwrap();
        memory.write_all_at(&[byte; 4096], page * PAGE_SIZE).unwrap();
    }
    template
}

/// A fork whose memory is served, paused, whose VMM does not outlive the test.
struct Fork {
    dir: InstanceDir,
    process: stencil_vmm::KillGuard,
    pager: VmmProcess,
}

impl Fork {
    async fn new(world: &World, template: &SnapshotDir, hot_pages: HotPages<'_>) -> Self {
        let dir = world.instance("fork");
        let process = world.spawn(&dir).await;
        let restored = world
            .restore_with(&dir, template, MemoryMode::Uffd, hot_pages)
            .await
            .unwrap();
        assert_eq!((restored.memory_mode, restored.reason), (MemoryMode::Uffd, None));
        let pager = the_pager(&dir);
        Self { dir, process, pager }
    }

    /// Ends the VMM, and waits for its pager's end.
    async fn end(&self, world: &World) {
        world.vmm.stop(&self.dir, &self.process).await.unwrap();
        self.pager.exited().await;
        assert!(pagers(&self.dir).is_empty());
        assert_eq!(world.vmm.last_words(&self.dir), None);
    }
}

fn gpas(list: &List) -> Vec<(u64, u32, Mark)> {
    let runs = list.runs().iter();
    runs.map(|run| (run.gpa.get() / PAGE_SIZE, run.pages, run.mark))
        .collect()
}

#[tokio::test]
async fn a_vm_whose_memory_is_served_goes_on_from_the_snapshot_and_then_needs_no_pager() {
    let world = World::new();
    fs::write(world.file("touches"), "7 9000 16383 8").unwrap();
    let template = snapshot_with(&world, [7, 9000, 16383]).await;
    let before = fs::read(template.memory_ranges()).unwrap();
    let fork = Fork::new(&world, &template, HotPages::Unused).await;
    assert_eq!(world.vmm.info(&fork.dir).await.unwrap().phase, VmPhase::Paused);
    world.vmm.resume(&fork.dir).await.unwrap();
    assert_eq!(
        printed(&fork.dir),
        "resumed 2 in served memory 7=7 9000=215 16383=68 8=0\n"
    );
    // The walk behind the guest comes to its end, and what is there then is all that there ever is.
    fork.pager.exited().await;
    let pages = world.vmm.page_counters(&fork.dir).await.unwrap();
    assert_eq!(
        (pages["copied_pages"], pages["bytes_read"]),
        (4, 4 * PAGE_SIZE),
        "{pages:?}"
    );
    assert!(
        pages["walk_requests"] + pages["demand_faults"] >= PAGES,
        "{pages:?}"
    );
    world.vmm.pause(&fork.dir).await.unwrap();
    world.vmm.resume(&fork.dir).await.unwrap();
    assert_eq!(
        printed(&fork.dir).lines().last(),
        Some("resumed 3 in served memory 7=7 9000=215 16383=68 8=0")
    );
    assert!(fs::read(template.memory_ranges()).unwrap() == before);
    assert_eq!(
        left_in(&fork.dir),
        ["console.log", "console.tty", "pages", "vmm.log", "vmm.sock"]
    );
    fork.end(&world).await;
}

#[tokio::test]
async fn the_messages_of_a_migration() {
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    let template = world.snapshot().await;
    let fork = Fork::new(&world, &template, HotPages::Unused).await;
    let log = fs::read_to_string(fork.dir.vmm_log()).unwrap();
    let messages = log.split_once("vm.receive-migration").unwrap().1;
    assert_snapshot!(messages);
    fork.end(&world).await;
}

#[tokio::test]
async fn what_the_guest_touches_is_recorded_in_its_order_and_nothing_of_the_walk() {
    let world = World::new();
    // Of pages that the walk has long passed, of one without data, and of one that is written.
    fs::write(world.file("touches"), "900 8000 12w 8001 13 16000").unwrap();
    let template = snapshot_with(&world, [12, 13, 900, 8000, 8001]).await;
    let fork = Fork::new(&world, &template, HotPages::Record).await;
    assert_eq!(world.vmm.page_counters(&fork.dir).await.unwrap()["recording"], 1);
    world.vmm.resume(&fork.dir).await.unwrap();
    assert!(!fork.dir.recorded_hot_pages().exists());
    fork.end(&world).await;
    let generation: MemoryGeneration = MEMORY.parse().unwrap();
    let list = List::load(&fork.dir.recorded_hot_pages(), generation).unwrap();
    let read = Mark::Read;
    assert_eq!(
        gpas(&list),
        [
            (0, 1, read),
            (900, 1, read),
            (8000, 1, read),
            (12, 1, Mark::Written),
            (8001, 1, read),
            (13, 1, read)
        ]
    );
    let pages = world.vmm.page_counters(&fork.dir).await.unwrap();
    assert_eq!((pages["recording"], pages["recorded"]), (0, 6));
}

#[tokio::test]
async fn a_recording_without_a_guest_leaves_no_list() {
    let world = World::new();
    let template = world.snapshot().await;
    let fork = Fork::new(&world, &template, HotPages::Record).await;
    fork.end(&world).await;
    assert!(!fork.dir.recorded_hot_pages().exists());
    assert_eq!(world.vmm.page_counters(&fork.dir).await.unwrap()["recording"], 0);
}

/// Saves a list of these pages.
fn save(path: &Path, generation: &str, pages: &[u64]) {
    let touches = pages
        .iter()
        .map(|page| (stencil_uffd::Gpa::new(page * PAGE_SIZE), Mark::Read));
    List::from_touches(generation.parse().unwrap(), touches)
        .save(path)
        .unwrap();
}

#[tokio::test]
async fn hot_pages_are_there_before_the_guest_and_cost_it_no_fault() {
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    fs::write(world.file("touches"), "5 9001 9000 3").unwrap();
    let template = snapshot_with(&world, [3, 5, 6, 9000, 9001]).await;
    let list = world.file("hot-pages");
    save(&list, MEMORY, &[0, 9000, 9001, 5]);
    let fork = Fork::new(&world, &template, HotPages::Prefetch(&list)).await;
    let pages = world.vmm.page_counters(&fork.dir).await.unwrap();
    assert_eq!((pages["prefetched"], pages["demand_faults"]), (4, 0), "{pages:?}");
    world.vmm.resume(&fork.dir).await.unwrap();
    assert_eq!(
        printed(&fork.dir),
        "resumed 2 in served memory 5=5 9001=216 9000=215 3=3\n"
    );
    fork.end(&world).await;
    // Page 3 is not in the list. The fake counts it as the lowest that nobody asked for, or not; it came by one fault or two.
    let pages = world.vmm.page_counters(&fork.dir).await.unwrap();
    assert_eq!(
        (pages["demand_faults"], pages["walk_requests"]),
        (1, 0),
        "{pages:?}"
    );
}

#[tokio::test]
async fn a_list_of_another_memory_is_ignored() {
    let world = World::new();
    let template = world.snapshot().await;
    let list = world.file("hot-pages");
    save(&list, "00000000000000000000000000000001", &[0]);
    let fork = Fork::new(&world, &template, HotPages::Prefetch(&list)).await;
    let pages = world.vmm.page_counters(&fork.dir).await.unwrap();
    assert_eq!(
        (pages["prefetched"], pages["prefetch_ignored"]),
        (0, 1),
        "{pages:?}"
    );
    fork.end(&world).await;
}

#[tokio::test]
async fn memory_that_cannot_be_served_is_copied_and_is_not_recorded() {
    let world = World::new();
    let template = world.snapshot().await;
    let config = fs::read_to_string(template.config()).unwrap();
    let with_balloon = config.replace("\"cpus\"", "\"balloon\":{\"size\":0},\"cpus\"");
    fs::write(template.config(), with_balloon).unwrap();
    let dir = world.instance("fork");
    let _process = world.spawn(&dir).await;
    let recorded = world
        .restore_with(&dir, &template, MemoryMode::Uffd, HotPages::Record)
        .await;
    let error = recorded.unwrap_err();
    assert_snapshot!(error, @"the VM's memory cannot be served: the VM has a balloon");
    assert!(matches!(error, VmmError::NotServed { .. }));
    let restored = world.restore(&dir, &template, MemoryMode::Uffd).await.unwrap();
    assert_eq!(restored.memory_mode, MemoryMode::Copy);
    assert_snapshot!(restored.reason.unwrap(), @"the memory could not be served: the VM has a balloon");
    assert!(pagers(&dir).is_empty());
}

#[tokio::test]
async fn a_pager_has_a_session_of_its_own_and_ends_with_its_vmm() {
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    let template = world.snapshot().await;
    let fork = Fork::new(&world, &template, HotPages::Unused).await;
    let pid = fork.pager.identity().pid;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let session = stat.rsplit(')').next().unwrap().split(' ').nth(4);
    assert_eq!(session, Some(pid.to_string().as_str()));
    // Killed, so that it can say nothing.
    let vmm = fork.process.identity().pid;
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(vmm.cast_signed()).unwrap(),
        rustix::process::Signal::KILL,
    )
    .unwrap();
    assert_eq!(fork.process.exited().await, Exit::Signal(9));
    fork.pager.exited().await;
    assert_eq!(world.vmm.last_words(&fork.dir), None, "it did not fail");
}

#[tokio::test]
async fn a_vm_that_is_stopped_leaves_no_pager() {
    let world = World::with("cloud-hypervisor v53.0\n", "walk off\n");
    let template = world.snapshot().await;
    let fork = Fork::new(&world, &template, HotPages::Unused).await;
    world.vmm.stop(&fork.dir, &fork.process).await.unwrap();
    assert!(fork.pager.has_exited().is_some(), "its pager is there");
    assert!(pagers(&fork.dir).is_empty());
}
