//! Images over HTTP: added, shown, used by instances, removed; and what is refused.

use hyper::Method;
use serde_json::json;
use stencil_api::request::{AddImage, CreateInstance};

use crate::world::{World, refusal};

impl World {
    /// A request for the image `debian`, whose only file is the kernel.
    fn image(&self) -> AddImage {
        AddImage {
            name: "debian".parse().unwrap(),
            kernel: self.kernel(),
            initrd: None,
            disks: Vec::new(),
            cmdline: "quiet".to_owned(),
        }
    }
}

#[tokio::test]
async fn an_image_is_added_listed_shown_and_removed() {
    let world = World::new().await;
    let disk = world.kernel().with_file_name("disk.raw");
    std::fs::write(&disk, [0xbb; 1024]).unwrap();
    let body = json!({
        "name": "debian", "kernel": world.kernel(), "initrd": world.kernel(), "disks": [disk], "cmdline": "quiet",
    });
    let added = world.post("/images", &body.to_string()).await;
    assert_eq!(added.status, 201, "{added:?}");
    let size = std::fs::metadata(world.kernel()).unwrap().len();
    assert_eq!(added.body["kernel"]["bytes"], size);
    assert_eq!(added.body["kernel"], added.body["initrd"]);
    assert_eq!(added.body["disks"][0]["format"], "raw");
    assert_eq!(added.body["disks"][0]["bytes"], 1024);
    assert_eq!(added.body["disks"][0]["sha256"].as_str().unwrap().len(), 64);
    assert_eq!(added.body["cmdline"], "quiet");
    let shown = world.get("/images/debian").await;
    assert_eq!((shown.status, &shown.body), (200, &added.body));
    assert_eq!(world.get("/images").await.body, json!({ "images": [added.body] }));

    assert_eq!(
        refusal(world.client.add_image(&world.image()).await),
        (409, "name_conflict".to_owned())
    );
    world.client.remove_image("debian").await.unwrap();
    assert!(world.client.images().await.unwrap().is_empty());
    for missing in ["debian", "../instances", "Debian"] {
        assert_eq!(
            refusal(world.client.remove_image(missing).await),
            (404, "not_found".to_owned()),
            "{missing}"
        );
        assert_eq!(
            refusal(world.client.image(missing).await),
            (404, "not_found".to_owned()),
            "{missing}"
        );
    }
}

#[tokio::test]
async fn an_image_that_is_used_is_not_removed_and_its_instances_are_named() {
    let world = World::new().await;
    world.client.add_image(&world.image()).await.unwrap();
    let asked = CreateInstance {
        image: Some("debian".parse().unwrap()),
        kernel: None,
        ..world.stopped("web")
    };
    let web = world.client.create(&asked).await.unwrap();
    assert_eq!(web.image.unwrap().as_str(), "debian");
    world.client.fork("web", &Default::default()).await.unwrap();
    let refused = world.ask(Method::DELETE, "/images/debian", None, "").await;
    assert_eq!(
        (refused.status, refused.body["code"].as_str()),
        (409, Some("image_in_use"))
    );
    let instances = refused.body["details"]["instances"].as_array().unwrap();
    let names: Vec<_> = instances.iter().map(|instance| &instance["name"]).collect();
    assert_eq!(names, ["web", "web-1"]);
    assert_eq!(instances[0]["id"], web.id.to_string());

    let unknown = CreateInstance {
        image: Some("alpine".parse().unwrap()),
        kernel: None,
        ..world.stopped("late")
    };
    assert_eq!(
        refusal(world.client.create(&unknown).await),
        (404, "not_found".to_owned())
    );
    assert_eq!(world.instances_on_disk(), 2);
}

#[tokio::test]
async fn an_image_that_is_asked_for_in_a_wrong_way_is_refused_and_not_added() {
    let world = World::new().await;
    let text = world.kernel().with_file_name("text");
    std::fs::write(&text, "no disk").unwrap();
    for (body, expected) in [
        (json!({ "name": "debian" }), "missing field `kernel`"),
        (
            json!({ "name": "../x", "kernel": world.kernel() }),
            "name: the name has '.' at position 1",
        ),
        (
            json!({ "name": "debian", "kernel": "/nonexistent/kernel" }),
            "kernel `/nonexistent/kernel` is not there",
        ),
        (
            json!({ "name": "debian", "kernel": "/etc/passwd" }),
            "is neither an ELF file nor a bzImage",
        ),
        (
            json!({ "name": "debian", "kernel": world.kernel(), "initrd": "initrd" }),
            "initrd `initrd` is a relative path",
        ),
        (
            json!({ "name": "debian", "kernel": world.kernel(), "rootfs": "/" }),
            "unknown field `rootfs`",
        ),
        (
            json!({ "name": "debian", "kernel": world.kernel(), "disks": [text] }),
            "/text` is no disk image",
        ),
    ] {
        let reply = world.post("/images", &body.to_string()).await;
        assert_eq!(
            (reply.status, reply.body["code"].as_str()),
            (400, Some("invalid_request")),
            "{body}"
        );
        let message = reply.body["message"].as_str().unwrap();
        assert!(message.contains(expected), "{body}: {message}");
    }
    assert!(world.client.images().await.unwrap().is_empty());
}
