//! Instances that are never started: made, shown, forked, refused, deleted.

use std::fs;

use futures_util::StreamExt;
use hyper::Method;
use serde_json::json;
use stencil_api::reply::ForkOutcome;
use stencil_api::request::{ForkMany, ForkOne, ListInstances, ReadConsole, WaitFor};
use stencil_api::timeout::Timeout;
use stencil_core::{InstanceId, State};

use crate::world::{World, refusal};

#[tokio::test]
async fn an_instance_is_made_shown_and_deleted() {
    let world = World::new().await;
    let body = json!({ "name": "web", "kernel": world.kernel(), "memory": "64MiB", "vcpus": 2,
        "labels": { "team": "db" }, "readiness": { "console": "ready" }, "start": false });
    let made = world.post("/instances", &body.to_string()).await;
    assert_eq!(made.status, 201);
    assert_eq!(
        (&made.body["name"], &made.body["state"]),
        (&json!("web"), &json!("Stopped"))
    );
    assert_eq!(
        (&made.body["memory"], &made.body["vcpus"]),
        (&json!(64 << 20), &json!(2))
    );
    assert_eq!(made.body["labels"], json!({ "team": "db" }));
    assert_eq!(made.body["readiness"], json!({ "console": "ready" }));
    assert_eq!(made.body.get("pid"), None, "what does not apply is absent");

    let id = made.body["id"].as_str().unwrap();
    for reference in [id, "web", &id[..20]] {
        assert_eq!(
            world.client.get(reference).await.unwrap().id.to_string(),
            id,
            "by {reference}"
        );
    }
    let list = world.get("/instances").await;
    assert_eq!(list.body["instances"][0]["id"], id);

    let deleted = world.ask(Method::DELETE, "/instances/web", None, "").await;
    assert_eq!((deleted.status, deleted.body), (204, json!(null)));
    assert_eq!(
        refusal(world.client.get("web").await),
        (404, "not_found".to_owned())
    );
    assert_eq!(world.instances_on_disk(), 0);
}

#[tokio::test]
async fn a_name_that_is_taken_is_a_conflict() {
    let world = World::new().await;
    let web = world.client.create(&world.stopped("web")).await.unwrap();
    let body = json!({ "name": "web", "kernel": world.kernel(), "start": false }).to_string();
    let reply = world.post("/instances", &body).await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (409, Some("name_conflict"))
    );
    let message = reply.body["message"].as_str().unwrap();
    assert_eq!(
        message,
        format!(
            "the name `web` is taken by instance {}; choose another one",
            web.id
        )
    );
    let asked = ForkOne {
        name: Some("web".parse().unwrap()),
        ..ForkOne::default()
    };
    assert_eq!(
        refusal(world.client.fork("web", &asked).await),
        (409, "name_conflict".to_owned())
    );
    assert_eq!(world.instances_on_disk(), 1);
}

#[tokio::test]
async fn a_prefix_of_several_ids_is_ambiguous_and_names_them() {
    let world = World::new().await;
    let create = async |name: &str| {
        let made = world.client.create(&world.stopped(name)).await.unwrap();
        made.id.to_string()
    };
    // Ids begin with the time, so that those made within a second begin alike.
    let (mut a, mut common, mut number) = (create("vm-0").await, 0, 0);
    let mut b = a.clone();
    while common < InstanceId::SHORTEST_PREFIX {
        number += 1;
        a = b;
        b = create(&format!("vm-{number}")).await;
        common = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    }
    let reply = world.get(&format!("/instances/{}", &a[..common])).await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (409, Some("ambiguous"))
    );
    assert_eq!(reply.body["details"], json!({ "candidates": [a, b] }));
}

#[tokio::test]
async fn a_prefix_is_for_reading_and_changes_nothing() {
    let world = World::new().await;
    let id = world.client.create(&world.stopped("web")).await.unwrap().id;
    let whole = id.to_string();
    for length in [1, 2, 7, 8, 20, 25] {
        let prefix = &whole[..length];
        let path = format!("/instances/{prefix}");
        let found = if length < 8 { 404 } else { 200 };
        assert_eq!(world.get(&path).await.status, found, "{prefix}");
        let refused = (404, "not_found".to_owned());
        assert_eq!(refusal(world.client.delete(prefix).await), refused, "{prefix}");
        assert_eq!(refusal(world.client.start(prefix).await), refused, "{prefix}");
        let fork = ForkOne::default();
        assert_eq!(
            refusal(world.client.fork(prefix, &fork).await),
            refused,
            "{prefix}"
        );
    }
    assert_eq!(world.instances_on_disk(), 1);
    world.client.delete(&whole).await.unwrap();
    assert_eq!(world.instances_on_disk(), 0);
}

#[tokio::test]
async fn a_list_shows_those_that_were_asked_for() {
    let world = World::new().await;
    world.client.create(&world.stopped("a")).await.unwrap();
    world.client.create(&world.stopped("b")).await.unwrap();
    let listed = async |asked| world.client.list(&asked).await.map(|list| list.len());
    assert_eq!(listed(ListInstances::default()).await.unwrap(), 2);
    assert_eq!(
        listed(ListInstances {
            state: Some(State::Stopped),
            template: None
        })
        .await
        .unwrap(),
        2
    );
    assert_eq!(
        listed(ListInstances {
            state: Some(State::Running),
            template: None
        })
        .await
        .unwrap(),
        0
    );
    assert_eq!(
        listed(ListInstances {
            state: None,
            template: Some("a".to_owned())
        })
        .await
        .unwrap(),
        0
    );
    let nobody = ListInstances {
        state: None,
        template: Some("nobody".to_owned()),
    };
    assert_eq!(refusal(listed(nobody).await), (404, "not_found".to_owned()));
    assert_eq!(
        world.get("/instances?state=stopped").await.status,
        200,
        "upper or lower case"
    );
}

#[tokio::test]
async fn what_a_stopped_instance_cannot_do_is_refused_with_what_would_be_right() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    for operation in [
        "pause",
        "resume",
        "standby",
        "restore",
        "promote-template",
        "demote-template",
    ] {
        let reply = world
            .ask(Method::POST, &format!("/instances/web/{operation}"), None, "")
            .await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (409, Some("invalid_state")),
            "{operation}"
        );
        assert_eq!(
            reply.body["details"],
            json!({ "operation": operation, "state": "Stopped" })
        );
        let message = reply.body["message"].as_str().unwrap();
        assert!(
            message.starts_with(&format!("cannot {operation} in state Stopped: ")),
            "{message}"
        );
    }
    assert_eq!(
        world.client.stop("web").await.unwrap().state,
        State::Stopped,
        "already there"
    );
    let running = ForkOne {
        from_running: true,
        ..ForkOne::default()
    };
    assert_eq!(
        refusal(world.client.fork("web", &running).await),
        (409, "invalid_state".to_owned())
    );
    let paused = ForkOne {
        target_state: Some(State::Paused),
        ..ForkOne::default()
    };
    assert_eq!(
        refusal(world.client.fork("web", &paused).await),
        (400, "invalid_request".to_owned())
    );
    assert_eq!(world.instances_on_disk(), 1);
}

#[tokio::test]
async fn forks_of_a_stopped_instance_are_stopped_and_numbered() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    let one = world.ask(Method::POST, "/instances/web/fork", None, "").await;
    assert_eq!(
        (one.status, &one.body["name"], &one.body["state"]),
        (201, &json!("web-1"), &json!("Stopped"))
    );
    let many = world.post("/instances/web/forks", "{\"count\": 3}").await;
    assert_eq!(many.status, 201);
    let names: Vec<_> = many.body["forks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|fork| &fork["name"])
        .collect();
    assert_eq!(names, ["web-2", "web-3", "web-4"]);
    assert_eq!(many.body["forks"][0]["instance"]["name"], "web-2");

    let asked = ForkMany {
        name_prefix: Some("job".parse().unwrap()),
        ..ForkMany::new(1)
    };
    let list = world.client.forks("web", &asked).await.unwrap();
    assert_eq!(list.forks[0].name.as_str(), "job-1");
    assert!(matches!(&list.forks[0].outcome, ForkOutcome::Instance(job) if job.fork_of_template.is_none()));
}

#[tokio::test]
async fn waiting_says_whether_the_state_was_reached() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    let timeout: Timeout = "20ms".parse().unwrap();
    let waited = world
        .client
        .wait(
            "web",
            WaitFor {
                state: State::Stopped,
                timeout,
            },
        )
        .await
        .unwrap();
    assert!(waited.reached);
    let waited = world
        .client
        .wait(
            "web",
            WaitFor {
                state: State::Running,
                timeout,
            },
        )
        .await
        .unwrap();
    assert_eq!((waited.reached, waited.instance.state), (false, State::Stopped));
    assert_eq!(
        world
            .get("/instances/web/wait?state=stopped&timeout=1")
            .await
            .body["reached"],
        true
    );
    let nobody = world
        .client
        .wait(
            "nobody",
            WaitFor {
                state: State::Running,
                timeout,
            },
        )
        .await;
    assert_eq!(refusal(nobody), (404, "not_found".to_owned()));
}

#[tokio::test]
async fn the_console_of_an_instance_that_is_down_tells_what_it_printed_and_takes_nothing() {
    let world = World::new().await;
    let web = world.client.create(&world.stopped("web")).await.unwrap();
    let read = async |asked| {
        let chunks = world.client.console("web", asked).await.unwrap();
        let chunks: Vec<_> = chunks.map(Result::unwrap).collect().await;
        String::from_utf8(chunks.concat()).unwrap()
    };
    assert_eq!(read(ReadConsole::default()).await, "");
    let log = world
        .data()
        .join("instances")
        .join(web.id.to_string())
        .join("console.log");
    fs::write(log, "one\ntwo\nthree\n").unwrap();
    assert_eq!(read(ReadConsole::default()).await, "one\ntwo\nthree\n");
    assert_eq!(
        read(ReadConsole {
            tail: Some(2),
            follow: false
        })
        .await,
        "two\nthree\n"
    );
    assert_eq!(
        read(ReadConsole {
            tail: Some(1),
            follow: true
        })
        .await,
        "three\n",
        "ends, for its VM is down"
    );
    assert_eq!(
        refusal(world.client.console_write("web", "ping\n").await),
        (409, "invalid_state".to_owned())
    );
}

#[tokio::test]
async fn input_for_a_console_may_have_a_mebibyte() {
    let world = World::new().await;
    world.client.create(&world.stopped("web")).await.unwrap();
    let most = vec![b'x'; 1 << 20];
    assert_eq!(
        refusal(world.client.console_write("web", most.clone()).await).0,
        409,
        "refused for another reason"
    );
    let reply = world
        .ask(
            Method::POST,
            "/instances/web/console",
            None,
            [most, vec![b'x']].concat(),
        )
        .await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (400, Some("invalid_request"))
    );
    assert!(
        reply.body["message"]
            .as_str()
            .unwrap()
            .contains("at most 1048576 bytes"),
        "{reply:?}"
    );
}

#[tokio::test]
async fn an_instance_that_cannot_be_started_is_not_made_and_no_path_is_told() {
    let world = World::new().await;
    let body = json!({ "name": "web", "kernel": world.kernel() }).to_string();
    let reply = world.post("/instances", &body).await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (500, Some("internal"))
    );
    let message = reply.body["message"].as_str().unwrap();
    assert!(
        message.starts_with("the VMM of instance ") && !message.contains('/'),
        "{message}"
    );
    assert_eq!(world.instances_on_disk(), 0);
    world
        .client
        .create(&world.stopped("web"))
        .await
        .expect("the name is free again");
}

#[tokio::test]
async fn unreadable_metadata_are_told_without_a_path_and_can_be_deleted() {
    let world = World::new().await;
    let web = world.client.create(&world.stopped("web")).await.unwrap();
    let metadata = world
        .data()
        .join("instances")
        .join(web.id.to_string())
        .join("metadata.json");
    fs::write(metadata, "{").unwrap();
    let shown = world.client.get("web").await.unwrap();
    assert_eq!((shown.state, shown.vcpus), (State::Unknown, None));
    assert!(shown.state_error.is_some());
    let reply = world.ask(Method::POST, "/instances/web/start", None, "").await;
    assert_eq!(
        (reply.status, reply.body["code"].as_str()),
        (409, Some("unreadable_metadata")),
        "{reply:?}"
    );
    let message = reply.body["message"].as_str().unwrap();
    assert!(
        message.contains(&web.id.to_string()) && !message.contains('/'),
        "{message}"
    );
    assert_eq!(reply.body["details"]["instances"], json!([web.id.to_string()]));
    world.client.delete(&web.id.to_string()).await.unwrap();
}
