//! Who records the pages that a template's forks touch first, and who gets them.

use std::fs;
use std::path::Path;

use inotify::{Inotify, WatchMask};
use stencil_core::{InstanceId, MemoryGeneration};
use stencil_engine::{EngineError, ForkRequest, ForksRequest, Instance};
use stencil_uffd::{Gpa, HotPages, Mark};

use crate::scripted::House;

impl House {
    /// As a VMM does when its recording closes: the list is renamed into place.
    pub(crate) fn close_recording(&self, fork: &Instance, list: &[u8]) {
        leave_list(self.metadata_path(&fork.id).parent().unwrap(), list);
    }

    /// Runs `event`, and returns when the record of the instance has been rewritten after it.
    pub(crate) async fn until_rewritten(&self, id: InstanceId, event: impl FnOnce()) {
        let mut inotify = Inotify::init().unwrap();
        let dir = self.metadata_path(&id).parent().unwrap().to_owned();
        inotify.watches().add(dir, WatchMask::MOVED_TO).unwrap();
        event();
        let waited = tokio::task::spawn_blocking(move || {
            let mut buffer = [0; 1024];
            while inotify
                .read_events_blocking(&mut buffer)
                .unwrap()
                .all(|event| event.name != Some("metadata.json".as_ref()))
            {}
        });
        tokio::time::timeout(crate::PATIENCE, waited)
            .await
            .unwrap()
            .unwrap();
    }

    /// A list of the memory that the template has now.
    pub(crate) fn list(&self, id: InstanceId) -> Vec<u8> {
        let manifest = self
            .metadata_path(&id)
            .with_file_name("snapshot")
            .join("manifest.json");
        let manifest: serde_json::Value = serde_json::from_slice(&fs::read(manifest).unwrap()).unwrap();
        let generation: MemoryGeneration = manifest["memory_generation"].as_str().unwrap().parse().unwrap();
        HotPages::from_touches(generation, [(Gpa::new(0), Mark::Read)]).to_bytes()
    }

    /// A template whose first fork has recorded.
    pub(crate) async fn recorded_template(&self) -> (InstanceId, Instance) {
        self.template("warm").await;
        let template = self.engine.get("warm").await.unwrap().id;
        let fork = self.fork().await;
        let list = self.list(template);
        self.until_rewritten(template, || self.close_recording(&fork, &list))
            .await;
        (template, fork)
    }

    async fn fork(&self) -> Instance {
        self.engine
            .fork("warm", None, ForkRequest::default())
            .await
            .unwrap()
    }
}

/// In the directory of an instance.
fn leave_list(dir: &Path, list: &[u8]) {
    fs::write(dir.join("being-written"), list).unwrap();
    fs::rename(dir.join("being-written"), dir.join("hot-pages")).unwrap();
}

fn path_of(instance: &Instance) -> Option<std::path::PathBuf> {
    instance.metadata.as_ref().unwrap().hot_pages_path.clone()
}

#[tokio::test]
async fn the_first_fork_records_and_later_ones_get_what_it_recorded() {
    let house = House::new().await;
    let (template, _) = house.recorded_template().await;
    let path = path_of(&house.engine.get("warm").await.unwrap()).unwrap();
    assert_eq!(
        path,
        house
            .data
            .path()
            .join("templates")
            .join(template.to_string())
            .join("hot-pages")
    );
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "prefetching"]);
}

#[tokio::test]
async fn the_instance_keeps_its_own_memory_mode_while_it_records() {
    let house = House::new().await;
    house.template("warm").await;
    let mode = house.fork().await.metadata.unwrap().memory_mode.unwrap();
    assert_eq!(mode.to_string(), "cow");
}

#[tokio::test]
async fn of_forks_that_begin_together_one_records() {
    let house = House::new().await;
    house.template("warm").await;
    let request = ForksRequest {
        count: 6,
        name_prefix: None,
        fork: ForkRequest::default(),
        exec: None,
        delete_after: false,
    };
    house.engine.forks("warm", request).await.unwrap();
    let mut seen = house.hypervisor.hot_pages();
    seen.sort();
    assert_eq!(seen.iter().filter(|what| *what == "recording").count(), 1);
    assert_eq!(seen.iter().filter(|what| *what == "without hot pages").count(), 5);
}

#[tokio::test]
async fn a_recorder_that_goes_leaves_the_recording_to_the_next_fork() {
    let house = House::new().await;
    house.template("warm").await;
    let first = house.fork().await;
    house.engine.delete(&first.id.to_string()).await.unwrap();
    // The claim is given back by a task of its own, which has nothing else to do.
    while house
        .hypervisor
        .hot_pages()
        .iter()
        .filter(|what| *what == "recording")
        .count()
        < 2
    {
        let fork = house.fork().await;
        house.engine.delete(&fork.id.to_string()).await.unwrap();
        assert!(house.hypervisor.hot_pages().len() < 100, "no later fork records");
    }
}

#[tokio::test]
async fn a_recording_that_the_host_refuses_costs_no_fork_and_is_not_tried_again() {
    let house = House::new().await;
    house.template("warm").await;
    house.hypervisor.fail("record");
    house.fork().await;
    house.fork().await;
    assert_eq!(
        house.hypervisor.hot_pages(),
        ["recording", "without hot pages", "without hot pages"]
    );
    assert_eq!(house.processes().len(), 2, "nor leaves a VMM");
}

#[tokio::test]
async fn a_damaged_list_is_recorded_anew() {
    let house = House::new().await;
    let (template, _) = house.recorded_template().await;
    let path = path_of(&house.engine.get("warm").await.unwrap()).unwrap();
    let list = house.list(template);
    fs::write(&path, &list[..list.len() - 1]).unwrap();
    let fork = house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "recording"]);
    house
        .until_rewritten(template, || house.close_recording(&fork, &list))
        .await;
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages()[2], "prefetching");
}

#[tokio::test]
async fn a_list_of_another_memory_is_not_used() {
    let house = House::new().await;
    house.template("warm").await;
    let fork = house.fork().await;
    let id = house.engine.get("warm").await.unwrap().id;
    let foreign = HotPages::from_touches(MemoryGeneration::random(), [(Gpa::new(0), Mark::Read)]).to_bytes();
    house
        .until_rewritten(id, || house.close_recording(&fork, &foreign))
        .await;
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "recording"]);
}

#[tokio::test]
async fn demote_forgets_the_list_and_its_file() {
    let house = House::new().await;
    let (_, fork) = house.recorded_template().await;
    let path = path_of(&house.engine.get("warm").await.unwrap()).unwrap();
    house.engine.delete(&fork.id.to_string()).await.unwrap();
    let demoted = house.engine.demote("warm").await.unwrap();
    assert_eq!(path_of(&demoted), None);
    assert!(!path.exists());
}

#[tokio::test]
async fn recording_anew_is_for_templates_and_leaves_it_to_the_next_fork() {
    let house = House::new().await;
    house.recorded_template().await;
    assert_eq!(
        path_of(&house.engine.record_hot_pages("warm").await.unwrap()),
        None
    );
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "recording"]);
    let refused = house.engine.record_hot_pages("warm-1").await.unwrap_err();
    assert!(matches!(refused, EngineError::Refused(_)), "{refused}");
}

#[tokio::test]
async fn a_recording_that_is_open_while_the_server_restarts_is_taken_when_it_closes() {
    let house = House::new().await;
    house.template("warm").await;
    let template = house.engine.get("warm").await.unwrap().id;
    let recorder = house.fork().await;
    let house = house.restart().await;
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "without hot pages"]);
    let list = house.list(template);
    house
        .until_rewritten(template, || house.close_recording(&recorder, &list))
        .await;
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages().last().unwrap(), "prefetching");
}

#[tokio::test]
async fn a_recording_that_closed_while_no_server_was_there_is_taken() {
    let house = House::new().await;
    house.template("warm").await;
    let template = house.engine.get("warm").await.unwrap().id;
    let recorder = house.fork().await;
    let (list, metadata) = (house.list(template), house.metadata_path(&template));
    let dir = house.metadata_path(&recorder.id).parent().unwrap().to_owned();
    let house = house.restart_after(|| leave_list(&dir, &list)).await;
    let taken = async {
        while !fs::read_to_string(&metadata).unwrap().contains("hot_pages_path") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(crate::PATIENCE, taken).await.unwrap();
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "prefetching"]);
}

#[tokio::test]
async fn what_was_recorded_is_used_after_a_restart_of_the_server() {
    let house = House::new().await;
    house.recorded_template().await;
    // Refused, once what took the recording has let go of the template and the data directory.
    assert!(house.engine.promote("warm", None).await.is_err());
    let house = house.restart().await;
    house.fork().await;
    assert_eq!(house.hypervisor.hot_pages(), ["recording", "prefetching"]);
}
