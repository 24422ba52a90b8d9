//! Every reply that was recorded from Cloud Hypervisor v53.0, where it is not about its own devices.

use serde_json::{Value, json};

use crate::guest;
use crate::vmm::{Reply, Vmm, definition, url};

fn refusal(status: u16, lines: &[&str]) -> Reply {
    Reply {
        status,
        body: json!(lines),
    }
}

const DONE: Reply = Reply {
    status: 204,
    body: Value::Null,
};

#[test]
fn replies_are_those_of_cloud_hypervisor() {
    let vmm = Vmm::start();
    let put = |call: &str| vmm.put(call, &Value::Null);

    let ping = vmm.get("vmm.ping");
    assert_eq!(
        (ping.status, ping.body["pid"].as_u64()),
        (200, Some(vmm.pid().into()))
    );
    let not_created = refusal(
        404,
        &[
            "Error from API",
            "The VM info is not available",
            "VM is not created",
        ],
    );
    assert_eq!(vmm.get("vm.info"), not_created);
    let missing = refusal(
        404,
        &["Error from API", "The VM could not boot", "VM config is missing"],
    );
    assert_eq!(put("vm.boot"), missing);
    assert_eq!(vmm.put("vm.create", &json!({"nonsense": 1})), DONE);
    assert_eq!(vmm.get("vm.info").body["memory_actual_size"], 512 << 20);
    assert_eq!(put("vm.delete"), DONE);
    assert_eq!(vmm.get("vm.nothing"), refusal(404, &["Not Found"]));

    let kernel = guest::write_elf(vmm.path());
    let definition = definition(&kernel, 64 << 20, 1);
    assert_eq!(vmm.put("vm.create", &definition), DONE);
    let twice = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be created",
            "VM is already created",
        ],
    );
    assert_eq!(vmm.put("vm.create", &definition), twice);
    let info = vmm.get("vm.info");
    assert_eq!((info.status, &info.body["state"]), (200, &json!("Created")));
    let not_running = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be paused",
            "VM is not running",
        ],
    );
    assert_eq!(put("vm.pause"), not_running);
    assert_eq!(put("vm.boot"), DONE);
    assert_eq!(vmm.state(), "Running");

    let directory = vmm.new_directory("snapshot");
    let snapshot = |path: &std::path::Path| vmm.put("vm.snapshot", &json!({"destination_url": url(path)}));
    let running = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be snapshotted",
            "Cannot snapshot VM",
            "Failed to snapshot migratable component",
            "Trying to snapshot while VM is running",
        ],
    );
    assert_eq!(snapshot(&directory), running);
    assert_eq!(put("vm.pause"), DONE);
    let paused = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be paused",
            "Cannot pause VM",
            "Failed to pause migratable component",
            "Invalid transition: InvalidStateTransition(Paused, Paused)",
        ],
    );
    assert_eq!(put("vm.pause"), paused);
    assert_eq!(vmm.state(), "Paused");
    let nowhere = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be snapshotted",
            "Cannot send VM snapshot",
            "Failed to send migratable component snapshot",
            "Destination is not a directory: \"/var/lib/vm/nonexistent\"",
        ],
    );
    assert_eq!(snapshot("/var/lib/vm/nonexistent".as_ref()), nowhere);
    assert_eq!(snapshot(&directory), DONE);
    assert_eq!(put("vm.resume"), DONE);
    let running = refusal(
        500,
        &[
            "Error from API",
            "The VM could not resume",
            "Cannot resume VM",
            "Failed to resume migratable component",
            "Invalid transition: InvalidStateTransition(Running, Running)",
        ],
    );
    assert_eq!(put("vm.resume"), running);
    assert_eq!(vmm.get("vm.counters").status, 200);
    assert_eq!(put("vm.shutdown"), DONE);
    assert_eq!(vmm.state(), "Created");
    assert_eq!(put("vm.delete"), DONE);
    assert_eq!(vmm.get("vm.info"), not_created);

    let restore = |path: &std::path::Path| vmm.put("vm.restore", &json!({"source_url": url(path)}));
    let missing = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be restored",
            "Cannot restore VM",
            "Failed to send migratable component snapshot",
            "Destination is not a directory: \"/var/lib/vm/missing\"",
        ],
    );
    assert_eq!(restore("/var/lib/vm/missing".as_ref()), missing);
    assert_eq!(restore(&directory), DONE);
    assert_eq!(vmm.state(), "Paused");
    assert_eq!(put("vm.resume"), DONE);
    let already = refusal(
        500,
        &[
            "Error from API",
            "The VM could not be restored",
            "VM is already created",
        ],
    );
    assert_eq!(restore(&directory), already);
    assert_eq!(
        put("vmm.shutdown"),
        Reply {
            status: 200,
            body: Value::Null
        }
    );
    assert!(vmm.wait().0.success());
}

#[test]
fn a_body_that_is_not_understood_is_a_bad_request() {
    let vmm = Vmm::start();
    for body in ["", "{", "[]", r#"{"memory": {"size": "much"}}"#] {
        let reply = vmm.request_text("PUT", "vm.create", body);
        assert_eq!(reply.status, 400, "{body}: {reply:?}");
        assert!(
            reply.body[1]
                .as_str()
                .unwrap()
                .starts_with("The request body is not understood"),
            "{reply:?}"
        );
    }
    assert_eq!(vmm.state(), "none");
}

#[test]
fn a_definition_that_is_wrong_creates_nothing() {
    let vmm = Vmm::start();
    let reply = vmm.put("vm.create", &json!({"memory": {"size": 0}}));
    let why = "memory.size is 0 bytes; right is a multiple of 4096 and at least 1048576";
    assert_eq!(
        reply,
        refusal(
            500,
            &[
                "Error from API",
                "The VM could not be created",
                "The VM config is not valid",
                why
            ]
        )
    );
    assert_eq!(vmm.state(), "none");
}
