//! How a guest ends, and what is told of it.

use serde_json::Value;

use crate::vmm::Vmm;

const MEMORY: u64 = 64 << 20;

#[test]
fn a_triple_fault_is_told_with_the_registers() {
    let vmm = Vmm::booted(MEMORY);
    let info = vmm.ends_of("t");
    assert_eq!(
        (&info["state"], &info["end"]["kind"]),
        (&"Shutdown".into(), &"triple_fault".into())
    );
    let reason = info["end"]["reason"].as_str().unwrap();
    assert!(reason.starts_with("triple fault on vCPU 0: rip=0x10"), "{reason}");
    for register in ["rsp=0x1ff000", "cr3=0x200000", "efer="] {
        assert!(reason.contains(register), "{reason}");
    }
    assert!(
        vmm.log().contains("the guest failed: triple fault"),
        "{}",
        vmm.log()
    );
}

#[test]
fn power_off_and_reset_are_no_failures() {
    for (input, kind, reason) in [
        (
            "o",
            "power_off",
            "the guest powered off: 0x34 was written to port 0x600",
        ),
        (
            "r",
            "reset",
            "the guest asked for a reset: 0xfe was written to port 0x64",
        ),
    ] {
        let info = Vmm::booted(MEMORY).ends_of(input);
        assert_eq!(info["state"], "Shutdown");
        assert_eq!(
            (&info["end"]["kind"], &info["end"]["reason"]),
            (&kind.into(), &reason.into())
        );
    }
}

#[test]
fn a_guest_that_ended_can_boot_again_but_not_pause_or_resume() {
    let vmm = Vmm::booted(MEMORY);
    vmm.ends_of("o");
    let refused = vmm.put("vm.pause", &Value::Null).body;
    assert_eq!(
        refused[4],
        "Invalid transition: InvalidStateTransition(Shutdown, Paused)"
    );
    let refused = vmm.put("vm.resume", &Value::Null).body;
    assert_eq!(
        refused[4],
        "Invalid transition: InvalidStateTransition(Shutdown, Running)"
    );
    std::fs::remove_file(vmm.path().join("console.log")).unwrap();
    vmm.done("vm.boot", &Value::Null);
    vmm.wait_for("ready\n");
    assert_eq!(vmm.get("vm.info").body["end"], Value::Null);
}

#[test]
fn the_end_of_a_second_run_is_not_taken_for_the_first() {
    let vmm = Vmm::booted(MEMORY);
    for _ in 0..3 {
        vmm.ends_of("t");
        vmm.done("vm.shutdown", &Value::Null);
        assert_eq!(vmm.state(), "Created");
        std::fs::remove_file(vmm.path().join("console.log")).unwrap();
        vmm.done("vm.boot", &Value::Null);
        vmm.wait_for("ready\n");
        assert_eq!(vmm.state(), "Running");
    }
}
