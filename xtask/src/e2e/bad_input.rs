//! Bad input: a clear error with its code, nothing created, nothing lost, no process left.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use hyper::Method;
use serde_json::{Value, json};

use super::Scenario;
use super::failure::{Failure, holds, refused, same};
use super::world::World;
use crate::client::Body;
use crate::command::{self, Output};
use crate::{host, server};

pub(super) const SCENARIOS: &[Scenario] = &[
    (
        "a kernel that is missing, not readable or no kernel is refused",
        kernels,
    ),
    ("memory of 0, odd, or more than the host has is refused", memory),
    ("a name that is taken, too long or no name is refused", names),
    (
        "10 MB of JSON, broken JSON and JSON of another form are refused",
        bodies,
    ),
    ("a count of 0 or 100000 forks is refused", counts),
    (
        "a data directory in use by another server is refused",
        data_directory_in_use,
    ),
    ("what the server does not have is told as JSON", no_such_path),
    (
        "wrong numbers of vCPUs, hypervisors and readiness are refused",
        other_fields,
    ),
];

/// How long a server may take to find that it cannot start.
const REFUSAL_LIMIT: Duration = Duration::from_secs(30);

/// That a create request with these fields is refused, and makes nothing.
fn refuses(world: &World, fields: Value) -> Result<String, Failure> {
    let told = fields.to_string();
    let reply = world.try_create(world.request_with("bad", fields))?;
    let error = refused(400, "invalid_request", reply).map_err(|failure| match failure {
        Failure::Unexpected {
            what,
            expected,
            found,
        } => Failure::Unexpected {
            what: format!("{what} with {told:.200}"),
            expected,
            found,
        },
        other => other,
    })?;
    world.is_empty()?;
    Ok(error["message"].as_str().unwrap_or_default().to_owned())
}

fn kernels(world: &mut World) -> Result<(), Failure> {
    let scratch = world.server.scratch().to_owned();
    let file = |name: &str, content: &[u8]| {
        let path = scratch.join(name);
        fs::write(&path, content)
            .map_err(Failure::file(&path))
            .map(|()| path)
    };
    let message = refuses(world, json!({"kernel": "/nonexistent/kernel"}))?;
    holds(
        message.contains("/nonexistent/kernel"),
        "the message",
        "the path that was given",
        &message,
    )?;
    refuses(world, json!({"kernel": scratch}))?;
    refuses(world, json!({"kernel": ""}))?;
    refuses(world, json!({"kernel": "relative/kernel"}))?;
    refuses(world, json!({"kernel": file("empty", b"")?}))?;
    refuses(world, json!({"kernel": file("text", &[b'x'; 8192])?}))?;
    refuses(world, json!({"kernel": "/dev/zero"}))?;
    refuses(world, json!({"initrd": "/nonexistent/initrd"}))?;
    // Root reads every file.
    if !rustix::process::geteuid().is_root() {
        let unreadable = file("unreadable", b"\x7fELF")?;
        fs::set_permissions(&unreadable, Permissions::from_mode(0o000))
            .map_err(Failure::file(&unreadable))?;
        refuses(world, json!({"kernel": unreadable}))?;
    }
    // The beginning of a kernel is no kernel: it looks like one until it is loaded.
    let guest = fs::read(&world.kernel).map_err(Failure::file(&world.kernel))?;
    let cut = file("cut", &guest[..guest.len() / 2])?;
    let bare = file("bare", b"\x7fELF")?;
    for broken in [cut, bare] {
        let reply = world.try_create(world.request_with("bad", json!({"kernel": broken})))?;
        let told = [400, 500].contains(&reply.status) && !reply.code().is_empty();
        holds(
            told,
            "a kernel that is cut off",
            "an error",
            format!("{} {}", reply.status, reply.body),
        )?;
        world.is_empty()?;
    }
    Ok(())
}

fn memory(world: &mut World) -> Result<(), Failure> {
    for memory in [
        json!(0),
        json!("0"),
        json!(1_000_001),
        json!(4096),
        json!(-1),
        json!("lots"),
        json!(""),
        json!(1.5),
        json!(u64::MAX),
        json!("99999999999999999999GiB"),
    ] {
        refuses(world, json!({"memory": memory}))?;
    }
    let message = refuses(world, json!({"memory": (host::memory_bytes() / 4096 + 1) * 4096}))?;
    holds(
        message.contains(&host::memory_bytes().to_string()),
        "the message",
        "what the host has",
        &message,
    )
    .map(drop)
}

fn names(world: &mut World) -> Result<(), Failure> {
    let long = "a".repeat(64);
    for name in [
        "../x", "", "-a", "a-", "A", "a b", "a/b", "a.b", "ä", "a\0", &long,
    ] {
        refuses(world, json!({"name": name}))?;
    }
    let vm = world.create(world.request_with(&"a".repeat(63), json!({"start": false})))?;
    let again = world.try_create(world.request(&vm.name))?;
    refused(409, "name_conflict", again)?;
    same("instances", 1, world.list()?.len())?;
    let template = world.template("warm")?;
    refused(409, "name_conflict", template.try_fork(json!({"name": vm.name}))?)?;
    for name in ["../x", "", &long] {
        refused(400, "invalid_request", template.try_fork(json!({"name": name}))?)?;
        refused(
            400,
            "invalid_request",
            template.try_forks(json!({"count": 2, "name_prefix": name}))?,
        )?;
    }
    // Names that would be too long with their number.
    let prefix = "a".repeat(63);
    refused(
        400,
        "invalid_request",
        template.try_forks(json!({"count": 2, "name_prefix": prefix}))?,
    )?;
    same("instances", 2, world.list()?.len())?;
    // A reference is no path either.
    for reference in ["..%2F..%2Fetc", "%2e%2e", "a%00"] {
        let reply = world.client.get(&format!("/instances/{reference}"))?;
        holds(
            [400, 404].contains(&reply.status),
            &reply.call,
            "400 or 404",
            &reply.body,
        )?;
    }
    Ok(())
}

fn bodies(world: &mut World) -> Result<(), Failure> {
    let large = json!({"name": "x".repeat(10 << 20)});
    for path in ["/instances", "/instances/nobody/fork", "/instances/nobody/forks"] {
        let reply = world.client.post(path, large.clone())?;
        let told = [400, 413].contains(&reply.status) && !reply.code().is_empty();
        holds(
            told,
            format!("{path} with 10 MB"),
            "400 or 413 with a code",
            format!("{} {}", reply.status, reply.body),
        )?;
    }
    for body in [
        "",
        "{",
        "[]",
        "null",
        "\"x\"",
        "{\"kernel\": 7}",
        "{}",
        "{\"kernel\":\"/k\",\"labels\":[]}",
        "\u{1}\u{2}",
    ] {
        let reply = world
            .client
            .call(Method::POST, "/instances", Body::Text(body.to_owned()))?;
        refused(400, "invalid_request", reply)?;
    }
    let deep = "[".repeat(100_000);
    refused(
        400,
        "invalid_request",
        world.client.call(Method::POST, "/instances", Body::Text(deep))?,
    )?;
    refuses(world, json!({"memroy": "1GiB"}))?;
    world.is_empty()
}

fn counts(world: &mut World) -> Result<(), Failure> {
    let template = world.template("warm")?;
    for count in [
        json!(0),
        json!(100_000),
        json!(-1),
        json!(1.5),
        json!("8"),
        json!(null),
        json!(u64::MAX),
    ] {
        refused(
            400,
            "invalid_request",
            template.try_forks(json!({"count": count}))?,
        )?;
    }
    refused(400, "invalid_request", template.try_forks(json!({}))?)?;
    refused(
        400,
        "invalid_request",
        template.try_forks(json!({"count": 2, "memory_mode": "magic"}))?,
    )?;
    refused(
        400,
        "invalid_request",
        template.try_fork(json!({"target_state": "Asleep"}))?,
    )?;
    same("instances", 1, world.list()?.len())
}

fn data_directory_in_use(world: &mut World) -> Result<(), Failure> {
    let vm = world.running("kept")?;
    let mut second = server::serve(&world.stencil, &world.server.data());
    let failed = |error: command::CommandError| Failure::Unexpected {
        what: "a second server".to_owned(),
        expected: "to be run".to_owned(),
        found: crate::report::chain(&error),
    };
    let finished = command::run(&mut second, REFUSAL_LIMIT, Output::Kept).map_err(failed)?;
    let code = finished.status.and_then(|status| status.code());
    same("the exit code of a second server", Some(1), code)?;
    let says = finished.output.contains("in use") || finished.output.contains("another server");
    holds(
        says,
        "what it says",
        "that the data directory is in use",
        &finished.output,
    )?;
    vm.answers()?;
    world.server.kill9()?;
    // The lock went with the process; a socket that it left is in nobody's way.
    world.server.start_again()?;
    vm.answers()
}

fn no_such_path(world: &mut World) -> Result<(), Failure> {
    refused(404, "not_found", world.client.get("/nothing")?)?;
    let reply = world.client.call(Method::PATCH, "/instances", Body::Nothing)?;
    same("PATCH /instances", 405, reply.status)?;
    holds(!reply.code().is_empty(), "its error", "a code", &reply.body)
}

fn other_fields(world: &mut World) -> Result<(), Failure> {
    for fields in [
        json!({"vcpus": 0}),
        json!({"vcpus": 100_000}),
        json!({"vcpus": -1}),
        json!({"hypervisor": "vmware"}),
        json!({"hypervisor": "../x"}),
        json!({"readiness": "soon"}),
        json!({"readiness": {"console": ""}}),
        json!({"readiness": {"console": "x".repeat(10_000)}}),
        json!({"labels": {"a": 1}}),
        json!({"start": "yes"}),
    ] {
        refuses(world, fields)?;
    }
    Ok(())
}
