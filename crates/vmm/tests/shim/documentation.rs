//! The table of what each hypervisor can do, in the documentation.

use std::fs;
use std::path::Path;

use stencil_vmm::{CloudHypervisor, Hypervisor, PagerCommand};

#[test]
fn the_documentation_has_the_capabilities_of_the_code() {
    let microvm = stencil_vmm::MicroVm::new("stencil-microvm".into());
    let pager = PagerCommand {
        program: "stencil".into(),
        arguments: vec!["pager".into()],
    };
    let cloud_hypervisor = CloudHypervisor::new("cloud-hypervisor".into()).with_pager(pager);
    let qemu = stencil_vmm::Qemu::new("qemu-system-x86_64".into());
    let backends: [&dyn Hypervisor; 3] = [&microvm, &cloud_hypervisor, &qemu];
    let row = |label: &str, cell: &dyn Fn(&dyn Hypervisor) -> String| {
        let cells: Vec<String> = backends.iter().map(|backend| cell(*backend)).collect();
        format!("| {label} | {} |\n", cells.join(" | "))
    };
    let yes_or_no = |yes| if yes { "yes" } else { "no" }.to_owned();
    let table = [
        row("", &|backend| format!("`{}`", backend.name())),
        "|---|---|---|---|\n".to_owned(),
        row("memory modes", &|backend| {
            let modes = backend.capabilities().memory_modes;
            let modes: Vec<String> = modes.iter().map(|mode| format!("`{mode}`")).collect();
            modes.join(", ")
        }),
        row("most vCPUs", &|backend| {
            backend.capabilities().max_vcpus.to_string()
        }),
        row("starts firmware", &|backend| {
            yes_or_no(backend.capabilities().firmware)
        }),
        row("console takes input", &|backend| {
            yes_or_no(backend.capabilities().console_input)
        }),
        row("a fork's guest is told who it is", &|backend| {
            yes_or_no(backend.capabilities().tells_identity)
        }),
        row(
            "disks, and how many files each may consist of",
            &|backend| match backend.capabilities().max_disk_layers {
                0 => "no".to_owned(),
                layers => layers.to_string(),
            },
        ),
        row("reaches an agent in the guest", &|backend| {
            yes_or_no(backend.capabilities().agent)
        }),
        row("an instance whose guest has powered off is", &|backend| {
            if backend.capabilities().outlives_guest {
                "Shutdown"
            } else {
                "Stopped"
            }
            .to_owned()
        }),
    ]
    .concat();
    for document in ["README.md", "docs/hypervisors.md"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(document);
        let text = fs::read_to_string(path).unwrap();
        assert!(
            text.contains(&table),
            "{document} does not have this table:\n{table}"
        );
    }
}
