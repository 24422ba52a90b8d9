//! What is shown from an index is what is on disk, and where it cannot be known that is said; what is decided is read.

use std::fs;

use stencil_core::State;
use stencil_engine::{EngineError, Filter, ForkRequest, Instance};

use crate::scripted::House;

impl House {
    async fn forks_of(&self, template: &str) -> Vec<Instance> {
        let filter = Filter {
            template: Some(template.to_owned()),
            ..Filter::default()
        };
        self.engine.list(filter).await.unwrap()
    }

    async fn fork_of(&self, source: &str) -> Instance {
        let request = ForkRequest::default();
        self.engine.fork(source, None, request).await.unwrap()
    }
}

fn ids(forks: &[Instance]) -> Vec<String> {
    forks.iter().map(|fork| fork.id.to_string()).collect()
}

#[tokio::test]
async fn the_forks_that_are_shown_are_those_on_disk_also_after_a_restart() {
    let mut house = House::new().await;
    house.template("warm").await;
    house.template("other").await;
    let mut forks = vec![house.fork_of("warm").await, house.fork_of("warm").await];
    house.fork_of("other").await;
    for _ in 0..2 {
        let shown = house.engine.get("warm").await.unwrap().forks.unwrap();
        let shown: Vec<String> = shown.iter().map(|fork| fork.id.to_string()).collect();
        assert_eq!(shown, ids(&forks));
        assert_eq!(ids(&house.forks_of("warm").await), ids(&forks));
        house = house.restart().await;
    }
    house.engine.delete("warm-1").await.unwrap();
    forks.remove(0);
    assert_eq!(ids(&house.forks_of("warm").await), ids(&forks));
    house.engine.delete("warm-2").await.unwrap();
    assert_eq!(house.engine.get("warm").await.unwrap().forks, Some(Vec::new()));
}

#[tokio::test]
async fn a_record_that_cannot_be_read_at_the_start_may_be_anybody_s_fork_until_it_is_mended() {
    let house = House::new().await;
    house.template("warm").await;
    let fork = house.fork_of("warm").await;
    let path = house.metadata_path(&fork.id);
    let good = fs::read(&path).unwrap();
    fs::write(&path, b"garbage").unwrap();
    let house = house.restart().await;
    let warm = house.engine.get("warm").await.unwrap();
    assert_eq!((warm.state, warm.forks), (State::Template, None));
    assert!(warm.state_error.unwrap().contains("its forks cannot be counted"));
    fs::write(&path, good).unwrap();
    assert_eq!(house.engine.get("warm").await.unwrap().forks.unwrap().len(), 1);
    assert_eq!(ids(&house.forks_of("warm").await), ids(&[fork]));
    assert!(matches!(
        house.engine.demote("warm").await,
        Err(EngineError::Refused(_))
    ));
}

#[tokio::test]
async fn forks_are_not_counted_while_something_among_the_instances_is_none() {
    let house = House::new().await;
    house.template("warm").await;
    let stranger = house.data.path().join("instances").join("stranger");
    fs::create_dir(&stranger).unwrap();
    let house = house.restart().await;
    let warm = house.engine.get("warm").await.unwrap();
    assert!(warm.state_error.unwrap().contains("its forks cannot be counted"));
    fs::remove_dir(&stranger).unwrap();
    assert_eq!(house.engine.get("warm").await.unwrap().forks, Some(Vec::new()));
}

#[tokio::test]
async fn a_fork_that_the_index_does_not_know_is_found_before_its_template_goes() {
    let house = House::new().await;
    house.template("warm").await;
    let fork = house.fork_of("warm").await;
    house.template("other").await;
    // The record changes behind the server's back: the index knows nothing of it, and is not what decides.
    let path = house.metadata_path(&fork.id);
    let [warm, other] = [
        house.engine.get("warm").await.unwrap().id.to_string(),
        house.engine.get("other").await.unwrap().id.to_string(),
    ];
    let changed = fs::read_to_string(&path).unwrap().replace(&warm, &other);
    fs::write(&path, changed).unwrap();
    assert!(matches!(
        house.engine.delete("other").await,
        Err(EngineError::Refused(_))
    ));
}

#[tokio::test]
async fn a_vmm_that_could_not_be_ended_is_found_by_the_next_delete() {
    let house = House::new().await;
    house.running("web").await;
    house.hypervisor.fail("stop");
    house.engine.delete("web").await.unwrap_err();
    assert_eq!(house.processes().len(), 1);
    house.hypervisor.fail("nothing");
    house.engine.delete("web").await.unwrap();
    assert_eq!(house.processes(), [] as [u32; 0]);
    assert_eq!(house.directories(), [] as [&str; 0]);
}
