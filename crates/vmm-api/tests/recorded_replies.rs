//! The types read what a real Cloud Hypervisor v53.0 answered, with the many fields that Stencil does not use.

use stencil_vmm_api::{ErrorBody, PingReply, VmInfo, VmState};

const INFO: &str = r#"{"config":{"cpus":{"boot_vcpus":1,"max_vcpus":1,"kvm_hyperv":false},"memory":{"size":0,"mergeable":false,"zones":[{"id":"mem0","size":134217728,"shared":false,"thp":true}],"thp":true},"payload":{"kernel":"guest.elf","cmdline":"console=ttyS0"},"rng":{"pci_segment":0,"src":"/dev/urandom"},"serial":{"file":"serial.log","mode":"File"},"console":{"mode":"Off","pci_segment":0},"pvpanic":false},"state":"Running","memory_actual_size":134217728,"device_tree":{"__serial":{"id":"__serial"}}}"#;

#[test]
fn info_of_a_running_vm_is_read() {
    let info: VmInfo = serde_json::from_str(INFO).unwrap();
    assert_eq!(info.state, VmState::Running);
    assert_eq!(info.config.memory.total_bytes(), 128 << 20);
    assert_eq!(
        info.config.payload.as_ref().unwrap().kernel.as_deref(),
        Some("guest.elf")
    );
    assert!(info.end.is_none());
}

#[test]
fn fields_of_the_config_that_stencil_does_not_use_survive() {
    let info: VmInfo = serde_json::from_str(INFO).unwrap();
    let again = serde_json::to_value(&info.config).unwrap();
    assert_eq!(again["rng"]["src"], "/dev/urandom");
    assert_eq!(again["pvpanic"], false);
}

#[test]
fn ping_is_read() {
    let reply = r#"{"build_version":"v53.0","version":"53.0.0","pid":17002,"features":["io_uring","kvm"]}"#;
    let ping: PingReply = serde_json::from_str(reply).unwrap();
    assert_eq!((ping.version.as_str(), ping.pid), ("53.0.0", 17002));
}

#[test]
fn an_error_lists_its_causes_outermost_first() {
    let body: ErrorBody =
        serde_json::from_str(r#"["Error from API","The VM could not boot","VM config is missing"]"#).unwrap();
    assert_eq!(
        body.to_string(),
        "Error from API: The VM could not boot: VM config is missing"
    );
}
