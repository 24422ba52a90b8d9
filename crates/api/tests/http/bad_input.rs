//! What is wrong is told, with its code, in a sentence that says what would be right; and nothing comes of it.

use hyper::Method;
use serde_json::json;

use crate::world::World;

/// More than any request may have.
const TEN_MB: usize = 10_000_000;

#[tokio::test]
async fn a_request_that_is_not_as_expected_says_where_and_why() {
    let world = World::new().await;
    let kernel = json!(world.kernel());
    let with = |fields: &str| format!("{{\"kernel\": {kernel}, \"start\": false, {fields}}}");
    for (body, expected) in [
        (String::new(), "the body is empty"),
        (
            "{".to_owned(),
            "the body is not as expected: EOF while parsing an object at line 1 column 1",
        ),
        ("[\"web\"]".to_owned(), "the body is no JSON object"),
        ("nonsense".to_owned(), "the body is no JSON object"),
        ("[".repeat(60_000), "the body is no JSON object"),
        (
            "{}".to_owned(),
            "there is nothing to boot; give image, kernel or firmware",
        ),
        (
            "{\"firmware\": \"/boot/firmware\"}".to_owned(),
            "microvm starts no firmware; give it a kernel",
        ),
        (
            with("\"image\": \"debian\""),
            "an image has its own kernel and initrd; give image, or kernel and perhaps initrd",
        ),
        (
            with("\"name\": \"web\"") + " trailing",
            "the body goes on after its JSON",
        ),
        (
            with("\"nmae\": \"web\""),
            "unknown field `nmae`, expected one of `name`",
        ),
        (
            with("\"name\": \"../x\""),
            "name: the name has '.' at position 1: use a-z, 0-9 and -",
        ),
        (
            with(&format!("\"name\": \"{}\"", "a".repeat(64))),
            "name: the name is 64 characters long: 63 is the most",
        ),
        (with("\"name\": \"\""), "name: the name is empty"),
        (
            with("\"vcpus\": -1"),
            "vcpus: invalid value: integer `-1`, expected u32",
        ),
        (with("\"vcpus\": 0"), "vcpus is 0; microvm takes 1 to"),
        (with("\"memory\": 0"), "memory is 0 bytes; it takes at least"),
        (
            with("\"memory\": 536870913"),
            "memory is 536870913 bytes; it takes a multiple of 4096",
        ),
        (with("\"memory\": \"4096TiB\""), "this host has"),
        (with("\"memory\": \"99999999EiB\""), "is more than any host has"),
        (
            with("\"memory\": \"lots\""),
            "memory: `lots` is no size; give bytes",
        ),
        (
            with("\"memory\": \"512M\""),
            "memory: `512M` can be read in two ways",
        ),
        (with("\"memory\": 1.5"), "memory: invalid type: floating point"),
        (
            with("\"hypervisor\": \"qemu\""),
            "hypervisor `qemu` is not known here; this server has: microvm",
        ),
        (
            with("\"hypervisor\": \"../x\""),
            "hypervisor: the name of a hypervisor is in kebab-case",
        ),
        (
            with("\"readiness\": \"soon\""),
            "readiness: unknown variant `soon`",
        ),
        (
            with("\"readiness\": {\"console\": \"\"}"),
            "readiness.console is 0 bytes long",
        ),
        (
            with("\"labels\": {\"a\": 1}"),
            "labels.a: invalid type: integer `1`, expected a string",
        ),
        (
            with("\"disks\": [{\"path\": \"/images/root.raw\"}]"),
            "the VMs of microvm have no disks; give none, or another hypervisor",
        ),
        (
            with("\"disks\": [{\"path\": \"/images/root.raw\", \"size\": 1}]"),
            "disks[0].size: unknown field `size`",
        ),
        (
            with("\"initrd\": \"/nonexistent/initrd\""),
            "initrd `/nonexistent/initrd` is not there",
        ),
        (
            "{\"kernel\": \"/nonexistent/kernel\"}".to_owned(),
            "kernel `/nonexistent/kernel` is not there",
        ),
        (
            "{\"kernel\": \"guest.elf\"}".to_owned(),
            "is a relative path; it takes an absolute one",
        ),
        (
            "{\"kernel\": \"/etc/passwd\"}".to_owned(),
            "is neither an ELF file nor a bzImage; it takes an x86-64 ELF with a PVH note, or a bzImage",
        ),
        (
            "{\"kernel\": \"/etc\"}".to_owned(),
            "kernel `/etc` is no regular file",
        ),
    ] {
        let reply = world.post("/instances", &body).await;
        let shown = &body[..body.len().min(200)];
        assert_eq!(
            (reply.status, &reply.body["code"]),
            (400, &json!("invalid_request")),
            "{shown}: {reply:?}"
        );
        let message = reply.body["message"].as_str().unwrap();
        assert!(message.contains(expected), "{shown}: {message}");
    }
    assert_eq!(world.instances_on_disk(), 0, "nothing was made");
}

#[tokio::test]
async fn ten_megabytes_of_json_are_refused_with_the_limit_also_to_who_sends_all_of_it_first() {
    let world = World::new().await;
    let body = format!("{{\"name\": \"{}\"}}", "a".repeat(TEN_MB));
    let reply = world.post("/instances", &body).await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (400, Some("invalid_request"))
    );
    assert_eq!(
        reply.body["message"],
        "the body is too large; a JSON body takes at most 65536 bytes (64 KiB)"
    );

    let head = format!(
        "POST /instances HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {}\r\n",
        body.len()
    );
    let reply = world.say(format!("{head}\r\n{body}").as_bytes()).await;
    assert!(
        reply.starts_with("HTTP/1.1 400 ") && reply.contains("64 KiB"),
        "{reply}"
    );
}

#[tokio::test]
async fn a_body_whose_length_is_not_announced_has_the_same_limit() {
    let world = World::new().await;
    let chunk = format!("10000\r\n{}\r\n", "a".repeat(0x10000));
    let request = format!(
        "POST /instances HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n{}0\r\n\r\n",
        chunk.repeat(20)
    );
    let reply = world.say(request.as_bytes()).await;
    assert!(
        reply.starts_with("HTTP/1.1 400 ") && reply.contains("64 KiB"),
        "{reply}"
    );
}

#[tokio::test]
async fn who_asks_before_sending_too_much_does_not_have_to_send_it() {
    let world = World::new().await;
    let request =
        "POST /instances HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: 10000000\r\n\r\n";
    let reply = world.say(request.as_bytes()).await;
    assert!(
        reply.starts_with("HTTP/1.1 400 ") && reply.contains("64 KiB"),
        "{reply}"
    );
}

#[tokio::test]
async fn json_must_be_called_json() {
    let world = World::new().await;
    let body = json!({ "kernel": world.kernel(), "start": false }).to_string();
    for (given, expected) in [
        (
            None,
            "the content-type is absent; a JSON body takes application/json",
        ),
        (
            Some("application/x-www-form-urlencoded"),
            "the content-type is application/x-www-form-urlencoded",
        ),
    ] {
        let reply = world.ask(Method::POST, "/instances", given, body.clone()).await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (400, Some("invalid_request"))
        );
        assert!(
            reply.body["message"].as_str().unwrap().contains(expected),
            "{reply:?}"
        );
    }
    let reply = world
        .ask(
            Method::POST,
            "/instances",
            Some("Application/JSON; charset=utf-8"),
            body,
        )
        .await;
    assert_eq!(reply.status, 201);
}

#[tokio::test]
async fn routes_and_methods_that_are_not_there_are_told() {
    let world = World::new().await;
    for path in [
        "/",
        "/instance",
        "/instances/",
        "/instances/web/explode",
        "/instances/a/b/c",
    ] {
        let reply = world.get(path).await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (404, Some("not_found")),
            "{path}"
        );
        assert_eq!(reply.body["message"], format!("there is no route {path}"));
        assert_eq!(reply.body["details"], json!({}));
    }
    for (method, path, allow) in [
        (Method::GET, "/instances/web/start", "POST"),
        (Method::PUT, "/instances", "GET,HEAD,POST"),
        (Method::POST, "/instances/web", "GET,HEAD,PATCH,DELETE"),
    ] {
        let reply = world.ask(method, path, None, "").await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (405, Some("method_not_allowed")),
            "{path}"
        );
        assert_eq!(reply.allow.as_deref(), Some(allow), "{path}");
    }
}

#[tokio::test]
async fn a_query_with_a_typo_is_refused() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    for (method, path, expected) in [
        (Method::GET, "/instances?stat=Running", "unknown field `stat`"),
        (
            Method::GET,
            "/instances?state=Asleep",
            "a state is one of Stopped, Created",
        ),
        (Method::GET, "/instances/web?verbose=1", "unknown field `verbose`"),
        (Method::GET, "/health?x=1", "unknown field `x`"),
        (Method::GET, "/instances/web/wait", "missing field `state`"),
        (
            Method::GET,
            "/instances/web/wait?state=Running&timeout=soon",
            "`soon` is no time; give seconds",
        ),
        (
            Method::GET,
            "/instances/web/wait?state=Running&timeout=11m",
            "at most 10 minutes",
        ),
        (
            Method::GET,
            "/instances/web/console?tail=-1",
            "tail: invalid digit",
        ),
        (Method::GET, "/instances/web/console?follow=maybe", "follow: "),
        (
            Method::POST,
            "/instances/web/fork?count=3",
            "unknown field `count`",
        ),
        (Method::POST, "/instances/web/start?now=1", "unknown field `now`"),
        (Method::DELETE, "/instances/web?force=1", "unknown field `force`"),
    ] {
        let reply = world.ask(method, path, None, "").await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (400, Some("invalid_request")),
            "{path}: {reply:?}"
        );
        assert!(
            reply.body["message"].as_str().unwrap().contains(expected),
            "{path}: {reply:?}"
        );
    }
    assert_eq!(
        world.client.list(&Default::default()).await.unwrap().len(),
        1,
        "nothing was made or deleted"
    );
}

#[tokio::test]
async fn a_body_where_none_is_taken_is_refused() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    let reply = world.post("/instances/web/stop", "{\"force\": true}").await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (400, Some("invalid_request"))
    );
    assert_eq!(reply.body["message"], "POST /instances/web/stop takes no body");
    assert_eq!(
        world.post("/instances/web/stop", " {} ").await.status,
        200,
        "who always sends one may"
    );
}

#[tokio::test]
async fn a_count_of_nothing_or_too_much_makes_nothing() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    for (body, expected) in [
        ("{\"count\": 0}", "count is 0; one call makes 1 to 1024 forks"),
        (
            "{\"count\": 100000}",
            "count is 100000; one call makes 1 to 1024 forks",
        ),
        ("{\"count\": -1}", "count: invalid value: integer `-1`"),
        ("{\"count\": \"3\"}", "count: invalid type: string \"3\""),
        ("{}", "missing field `count`"),
        ("", "the body is empty"),
        (
            "{\"count\": 1, \"name_prefix\": \"A\"}",
            "name_prefix: the name has 'A' at position 1",
        ),
        (
            "{\"count\": 1, \"target_state\": \"Asleep\"}",
            "target_state: a state is one of Stopped",
        ),
        (
            "{\"count\": 1, \"memory_mode\": \"magic\"}",
            "memory_mode: unknown variant `magic`",
        ),
        ("{\"count\": 1, \"name\": \"x\"}", "unknown field `name`"),
    ] {
        let reply = world.post("/instances/web/forks", body).await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (400, Some("invalid_request")),
            "{body}: {reply:?}"
        );
        assert!(
            reply.body["message"].as_str().unwrap().contains(expected),
            "{body}: {reply:?}"
        );
    }
    assert_eq!(world.instances_on_disk(), 1);
}

#[tokio::test]
async fn what_is_no_http_is_answered_and_the_server_goes_on() {
    let world = World::new().await;
    let reply = world.say(b"hello\r\n\r\n").await;
    assert!(reply.starts_with("HTTP/1.1 400 "), "{reply}");
    assert_eq!(world.get("/health").await.body, json!({ "status": "ok" }));
}

#[tokio::test]
async fn an_id_that_looks_like_a_path_is_an_instance_that_is_not_there() {
    let world = World::new().await;
    for path in [
        "/instances/..",
        "/instances/..%2F..%2Fetc%2Fpasswd",
        "/instances/%00",
        "/instances/%20/console",
    ] {
        let reply = world.get(path).await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (404, Some("not_found")),
            "{path}: {reply:?}"
        );
    }
    let reply = world.get("/instances/%ff").await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (400, Some("invalid_request")),
        "not UTF-8: {reply:?}"
    );
}
