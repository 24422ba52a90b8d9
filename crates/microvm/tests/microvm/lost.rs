//! Memory that can no longer be read: its file was cut while it was in use.

use std::fs::{self, File};
use std::path::Path;

use serde_json::{Value, json};

use crate::guest::SCRATCH;
use crate::served::{MIB, contents, filled, large, pages, request, restored};
use crate::vmm::Vmm;

#[test]
fn a_page_that_cannot_be_read_ends_the_guest_with_its_place_and_no_list() {
    let (_source, snapshot) = filled();
    let vmm = Vmm::start();
    let list = vmm.path().join("hot-pages");
    vmm.done(
        "vm.restore",
        &request(&snapshot, "Uffd", &json!({"record_hot_pages": list})),
    );
    vmm.done("vm.resume", &Value::Null);
    vmm.ask("v", "value ");
    cut(&snapshot);
    lost(&vmm);
    assert!(!list.exists());
    // The VMM is as good as before.
    vmm.done("vm.delete", &Value::Null);
    assert_eq!(vmm.state(), "none");
}

#[test]
fn a_mapped_page_that_cannot_be_read_ends_the_guest_too() {
    let (_source, snapshot) = filled();
    let vmm = restored(&snapshot, "Cow", &json!({}));
    vmm.ask("v", "value ");
    cut(&snapshot);
    let info = vmm.ends_of("+4");
    assert_eq!(info["end"]["kind"], "memory_lost", "{info}");
    assert!(!vmm.console_log().contains("sum"));
}

#[test]
fn a_snapshot_of_a_guest_whose_file_was_cut_is_refused() {
    let (_source, snapshot) = filled();
    for mode in ["Cow", "Uffd"] {
        let vmm = restored(&snapshot, mode, &json!({}));
        vmm.ask("v", "value ");
        vmm.done("vm.pause", &Value::Null);
        let file = snapshot.join("memory-ranges");
        let whole = fs::read(&file).unwrap();
        cut(&snapshot);
        let directory = vmm.new_directory("again");
        let reply = vmm.put(
            "vm.snapshot",
            &json!({"destination_url": crate::vmm::url(&directory)}),
        );
        let why = reply.body[4].as_str().unwrap();
        assert!(why.ends_with("it was cut"), "{why}");
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        fs::write(&file, whole).unwrap();
    }
}

/// Cuts the memory file in the middle of the pages that `+4` touches.
fn cut(snapshot: &Path) {
    let file = File::options()
        .write(true)
        .open(snapshot.join("memory-ranges"))
        .unwrap();
    file.set_len(SCRATCH + 8 * MIB).unwrap();
}

/// Lets the guest touch all that it filled, which a [`cut`] file does not have, and checks how it ends.
fn lost(vmm: &Vmm) {
    let info = vmm.ends_of("+4");
    assert_eq!(info["state"], "Shutdown");
    assert_eq!(info["end"]["kind"], "memory_lost", "{info}");
    let reason = info["end"]["reason"].as_str().unwrap();
    let gpa = reason
        .strip_prefix("the guest's memory is lost: the page at gpa 0x")
        .and_then(|rest| rest.split_once(' '))
        .and_then(|(digits, _)| u64::from_str_radix(digits, 16).ok())
        .unwrap_or_else(|| panic!("{reason}"));
    assert!((SCRATCH + 8 * MIB..SCRATCH + 16 * MIB).contains(&gpa), "{reason}");
    // There is one range, so both are the same.
    assert!(
        reason.contains(&format!("at byte {gpa} of the image")),
        "{reason}"
    );
    assert!(reason.contains("it was cut"), "{reason}");
    assert!(
        vmm.log().contains("the guest failed: the guest's memory is lost"),
        "{}",
        vmm.log()
    );
    assert!(!vmm.console_log().contains("sum"), "{}", vmm.console_log());
}

#[test]
fn a_guest_that_waits_ends_when_its_memory_is_lost() {
    let (_source, snapshot, list) = large();
    let file = snapshot.join("memory-ranges");
    let whole = contents(&snapshot);
    for resume in [false, true] {
        // All hot pages may have come before the file is cut; not each time.
        loop {
            let vmm = Vmm::start();
            let more = json!({"hot_pages": list, "resume": resume});
            vmm.done("vm.restore", &request(&snapshot, "Uffd", &more));
            cut(&snapshot);
            while vmm.state() != "Shutdown" && pages(&vmm, "prefetched") < 32768 {}
            fs::write(&file, &whole).unwrap();
            if vmm.state() == "Shutdown" {
                let end = &vmm.get("vm.info").body["end"];
                assert_eq!(end["kind"], "memory_lost", "{end}");
                break;
            }
        }
    }
}
