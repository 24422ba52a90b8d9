//! Memory that is served page by page, and hot pages: recorded, fetched ahead, or of no use.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{Gpa, HotPages, Mark};

use crate::guest::{SCRATCH, sum};
use crate::vmm::{Vmm, restore_request};

pub(crate) const MIB: u64 = 1 << 20;

/// The generation that the snapshots here are said to have.
const MEMORY: &str = "00112233445566778899aabbccddeeff";

/// The snapshot of a guest that has filled 4096 pages: `+4` touches them all.
pub(crate) fn filled() -> (Vmm, PathBuf) {
    let source = Vmm::booted(64 * MIB);
    source.ask("f4", "filled\n");
    let snapshot = source.snapshot("s");
    (source, snapshot)
}

/// A restore of it that runs, with more to the request.
pub(crate) fn restored(snapshot: &Path, mode: &str, more: &Value) -> Vmm {
    let vmm = Vmm::start();
    vmm.done("vm.restore", &request(snapshot, mode, more));
    vmm.done("vm.resume", &Value::Null);
    vmm
}

pub(crate) fn request(snapshot: &Path, mode: &str, more: &Value) -> Value {
    let mut request = restore_request(snapshot, mode, None);
    request["memory_generation"] = json!(MEMORY);
    for (field, value) in more.as_object().unwrap() {
        request[field] = value.clone();
    }
    request
}

/// A counter of the device `pages`.
pub(crate) fn pages(vmm: &Vmm, counter: &str) -> u64 {
    let counters = vmm.get("vm.counters").body;
    let value = counters["pages"][counter].as_u64();
    value.unwrap_or_else(|| panic!("no {counter} in {counters}"))
}

fn load(list: &Path) -> HotPages {
    HotPages::load(list, MEMORY.parse().unwrap()).unwrap()
}

/// Records what `+4` touches; gives the list's path, in the directory of the VMM.
fn recorded(snapshot: &Path) -> (Vmm, PathBuf) {
    let vmm = Vmm::start();
    let list = vmm.path().join("hot-pages");
    vmm.done(
        "vm.restore",
        &request(snapshot, "Uffd", &json!({"record_hot_pages": list})),
    );
    assert_eq!(pages(&vmm, "recording"), 1);
    vmm.done("vm.resume", &Value::Null);
    vmm.ask("+4", &sum(4));
    vmm.done("vm.pause", &Value::Null);
    assert_eq!(pages(&vmm, "recording"), 0);
    (vmm, list)
}

#[test]
fn a_guest_finds_each_page_as_it_was() {
    let (_source, snapshot) = filled();
    for mode in ["Copy", "Cow", "Uffd"] {
        restored(&snapshot, mode, &json!({})).ask("+4", &sum(4));
    }
    let vmm = restored(&snapshot, "Uffd", &json!({}));
    vmm.ask("+4", &sum(4));
    let faults = pages(&vmm, "demand_faults");
    // Eight pages come with each fault.
    assert!((512..2048).contains(&faults), "{faults}");
    assert!(pages(&vmm, "bytes_read") >= 4096 * 4096);
    assert!(pages(&vmm, "fault_p99_ns") >= pages(&vmm, "fault_p50_ns"));
    // They are told when the VM is down, too.
    let info = vmm.ends_of("o");
    assert_eq!(info["state"], "Shutdown");
    assert!(pages(&vmm, "demand_faults") >= faults);
}

#[test]
fn a_guest_that_touches_nothing_costs_nothing() {
    let (_source, snapshot) = filled();
    let vmm = Vmm::restored(&snapshot, "Uffd", None);
    assert!(
        pages(&vmm, "demand_faults") < 32,
        "{}",
        pages(&vmm, "demand_faults")
    );
    vmm.done("vm.shutdown", &Value::Null);
    assert_eq!(vmm.state(), "Created");
}

#[test]
fn what_one_fork_touched_is_there_before_the_next_one_runs() {
    let (_source, snapshot) = filled();
    let (recorder, list) = recorded(&snapshot);
    let hot = load(&list).pages();
    assert_eq!(pages(&recorder, "recorded"), hot);
    assert!(hot >= 4096, "{hot}");

    let plain = restored(&snapshot, "Uffd", &json!({}));
    plain.ask("+4", &sum(4));
    let fork = restored(&snapshot, "Uffd", &json!({"hot_pages": list}));
    fork.ask("+4", &sum(4));
    assert_eq!(pages(&fork, "prefetch_ignored"), 0);
    assert!(pages(&fork, "prefetched") + pages(&fork, "prefetch_late") >= hot);
    let (with, without) = (pages(&fork, "demand_faults"), pages(&plain, "demand_faults"));
    assert!(with * 50 < without, "{with} faults instead of {without}");

    let mapped = restored(&snapshot, "Cow", &json!({"hot_pages": list}));
    assert_eq!(pages(&mapped, "prefetched"), hot);
    assert!(pages(&mapped, "prefetched_written") >= 512);
    mapped.ask("+4", &sum(4));
    // Where all is copied, all is there.
    restored(&snapshot, "Copy", &json!({"hot_pages": list})).ask("+4", &sum(4));
}

#[test]
fn a_recording_closes_by_itself_and_belongs_to_its_memory() {
    let (_source, snapshot) = filled();
    let vmm = Vmm::start();
    let list = vmm.path().join("hot-pages");
    vmm.done(
        "vm.restore",
        &request(&snapshot, "Uffd", &json!({"record_hot_pages": list})),
    );
    vmm.done("vm.resume", &Value::Null);
    vmm.ask("+4", &sum(4));
    vmm.wait_for_file(&list);
    assert_eq!(vmm.state(), "Running");
    assert!(load(&list).pages() >= 4096);
    assert!(HotPages::load(&list, MemoryGeneration::random()).is_err());
    // Pausing it, and its end, do not write it once more.
    fs::remove_file(&list).unwrap();
    vmm.done("vm.pause", &Value::Null);
    vmm.done("vm.shutdown", &Value::Null);
    assert!(!list.exists());
}

#[test]
fn a_recording_is_kept_however_the_guest_stops_unless_it_fails() {
    let (_source, snapshot) = filled();
    for (how, is_kept) in [
        ("vm.pause", true),
        ("vm.shutdown", true),
        ("vm.delete", true),
        ("o", true),
        ("t", false),
    ] {
        let vmm = Vmm::start();
        let list = vmm.path().join("hot-pages");
        vmm.done(
            "vm.restore",
            &request(&snapshot, "Uffd", &json!({"record_hot_pages": list})),
        );
        vmm.done("vm.resume", &Value::Null);
        vmm.ask("v", "value ");
        if how.starts_with("vm.") {
            vmm.done(how, &Value::Null);
        } else {
            vmm.ends_of(how);
        }
        assert_eq!(list.exists(), is_kept, "{how}");
    }
    // What a guest touches that never ran is of no use.
    let vmm = Vmm::start();
    let list = vmm.path().join("hot-pages");
    vmm.done(
        "vm.restore",
        &request(&snapshot, "Uffd", &json!({"record_hot_pages": list})),
    );
    vmm.done("vm.shutdown", &Value::Null);
    assert!(!list.exists());
}

#[test]
fn a_list_of_no_use_is_ignored_and_that_is_said() {
    let (_source, snapshot) = filled();
    let (recorder, list) = recorded(&snapshot);
    let good = fs::read(&list).unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path = recorder.path().join(name);
        fs::write(&path, bytes).unwrap();
        path
    };
    let mut flipped = good.clone();
    flipped[100] ^= 1;
    let lists = [
        (
            write("cut", &good[..good.len() - 1]),
            MEMORY,
            "bytes, and its header asks for",
        ),
        (write("flipped", &flipped), MEMORY, "is corrupt"),
        (
            write("foreign", b"something else"),
            MEMORY,
            "is no list of hot pages",
        ),
        (list, "ffeeddccbbaa99887766554433221100", "is stale"),
        (recorder.path().join("missing"), MEMORY, "cannot be read"),
        (recorder.path().to_owned(), MEMORY, "no regular file"),
    ];
    for (list, generation, why) in lists {
        for mode in ["Cow", "Uffd"] {
            let more = json!({"hot_pages": list, "memory_generation": generation});
            let vmm = restored(&snapshot, mode, &more);
            vmm.ask("+4", &sum(4));
            assert_eq!(
                (pages(&vmm, "prefetch_ignored"), pages(&vmm, "prefetched")),
                (1, 0)
            );
            assert!(vmm.log().contains(why), "{why}: {}", vmm.log());
        }
    }
}

#[test]
fn requests_that_ask_for_what_cannot_be_are_refused() {
    let (_source, snapshot) = filled();
    let vmm = Vmm::start();
    for (mode, more, why) in [
        (
            "Cow",
            json!({"record_hot_pages": "/tmp/list"}),
            "record_hot_pages needs memory_restore_mode Uffd",
        ),
        (
            "Uffd",
            json!({"record_hot_pages": "/l", "hot_pages": "/m"}),
            "record_hot_pages and hot_pages are both there",
        ),
        (
            "Uffd",
            json!({"hot_pages": "/l", "memory_generation": null}),
            "hot_pages needs memory_generation",
        ),
        (
            "Uffd",
            json!({"memory_generation": "short"}),
            "memory_generation is wrong",
        ),
        (
            "Uffd",
            json!({"prefault": true}),
            "prefault is of no use with Uffd",
        ),
    ] {
        let reply = vmm.put("vm.restore", &request(&snapshot, mode, &more));
        assert_eq!(reply.status, 500);
        assert!(reply.body[3].as_str().unwrap().contains(why), "{}", reply.body);
        assert_eq!(vmm.state(), "none");
    }
}

#[test]
fn pausing_while_pages_come_loses_none() {
    let (_source, snapshot) = filled();
    let (_recorder, list) = recorded(&snapshot);
    for more in [json!({}), json!({"hot_pages": list})] {
        let vmm = Vmm::start();
        vmm.done("vm.restore", &request(&snapshot, "Uffd", &more));
        vmm.done("vm.resume", &Value::Null);
        let _console = vmm.send("+4");
        for _ in 0..20 {
            vmm.done("vm.pause", &Value::Null);
            vmm.done("vm.resume", &Value::Null);
        }
        vmm.wait_for(&sum(4));
    }
}

/// The snapshot of a guest that has filled 128 MiB, and a list of them: more than is there before the guest runs.
pub(crate) fn large() -> (Vmm, PathBuf, PathBuf) {
    let source = Vmm::booted(256 * MIB);
    source.ask("f7", "filled\n");
    let snapshot = source.snapshot("s");
    let list = source.path().join("hot-pages");
    let touches = (0..32768).map(|page| (Gpa::new(SCRATCH + page * 4096), Mark::Read));
    let hot = HotPages::from_touches(MEMORY.parse().unwrap(), touches);
    hot.save(&list).unwrap();
    (source, snapshot, list)
}

#[test]
fn a_guest_is_saved_whole_while_its_hot_pages_still_come() {
    let (_source, snapshot, list) = large();
    let vmm = restored(&snapshot, "Uffd", &json!({"hot_pages": list}));
    let second = vmm.snapshot("s");
    assert!(pages(&vmm, "prefetched") >= 16384);
    let (before, after) = (contents(&snapshot), contents(&second));
    // Where the guest keeps its code, its stack and what it is told, it may differ.
    let scratch = usize::try_from(SCRATCH).unwrap();
    assert!(before[scratch..] == after[scratch..]);
    restored(&second, "Cow", &json!({})).ask("+7", &sum(7));
}

pub(crate) fn contents(snapshot: &Path) -> Vec<u8> {
    fs::read(snapshot.join("memory-ranges")).unwrap()
}

#[test]
fn a_second_template_of_the_same_guest_has_pages_of_its_own() {
    let (source, first) = filled();
    let (_recorder, list) = recorded(&first);
    source.done("vm.resume", &Value::Null);
    source.ask("sZ", "kept\n");
    let second = source.snapshot("second");
    let more = json!({"hot_pages": list, "memory_generation": "0f0e0d0c0b0a09080706050403020100"});
    let vmm = restored(&second, "Uffd", &more);
    vmm.ask("v", "value Z\n");
    assert_eq!(pages(&vmm, "prefetch_ignored"), 1);
}

#[test]
fn a_vmm_that_is_killed_while_pages_come_leaves_the_file_as_it_was() {
    let (_source, snapshot) = filled();
    let (_recorder, list) = recorded(&snapshot);
    let before = contents(&snapshot);
    let vmm = restored(&snapshot, "Uffd", &json!({"hot_pages": list}));
    let mut console = vmm.send("+4");
    drop(vmm);
    // Its console ends with it; what comes before does not matter.
    let _ = console.read_to_end(&mut Vec::new());
    assert!(contents(&snapshot) == before);
    let file = File::open(snapshot.join("memory-ranges")).unwrap();
    let mut page = [0; 8];
    file.read_exact_at(&mut page, SCRATCH).unwrap();
    assert_eq!(u64::from_le_bytes(page), 1);
}
