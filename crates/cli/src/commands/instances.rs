//! Instances: make, list, delete, wait for.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use stencil_api::client::Client;
use stencil_api::reply::{Instance, InstanceList, Waited};
use stencil_api::request::{AddDisk, CreateInstance, ListInstances, WaitFor};
use stencil_api::timeout::Timeout;
use stencil_core::{InstanceId, Readiness, State};

use super::{delete_each, reference};
use crate::args::{Create, Ls, Rm, Wait};
use crate::failure::Failure;
use crate::output::Reader;
use crate::{place, table};

pub(super) async fn create(asked: Create, client: &Client, reader: Reader) -> Result<(), Failure> {
    let request = CreateInstance {
        name: asked.name,
        hypervisor: asked.hypervisor,
        image: asked.image,
        kernel: asked.kernel.map(place::absolute).transpose()?,
        firmware: asked.firmware.map(place::absolute).transpose()?,
        initrd: asked.initrd.map(place::absolute).transpose()?,
        cmdline: asked.cmdline,
        disks: asked
            .disks
            .into_iter()
            .map(|disk| {
                let path = place::absolute(disk.path)?;
                Ok(AddDisk { path, ..disk })
            })
            .collect::<Result<_, Failure>>()?,
        vcpus: asked.vcpus,
        memory: asked.memory,
        readiness: match asked.ready_text {
            Some(text) => Readiness::Console(text),
            None if asked.ready_agent => Readiness::Agent,
            None => Readiness::None,
        },
        labels: asked.labels.into_iter().collect(),
        start: !asked.no_start,
    };
    let instance = client.create(&request).await?;
    if !asked.wait {
        return reader.print(&instance, table::changed);
    }
    let running = WaitFor {
        state: State::Running,
        timeout: Timeout::default(),
    };
    let waited = client.wait(&instance.id.to_string(), running).await?;
    reader.print(&waited.instance, table::changed)?;
    reached(&waited, State::Running)
}

pub(super) async fn list(asked: Ls, client: &Client, reader: Reader) -> Result<(), Failure> {
    let instances = client
        .list(&ListInstances {
            state: asked.state,
            template: asked.template,
        })
        .await?;
    let elsewhere = match reader {
        Reader::Person => names_of_others(&instances, client).await,
        Reader::Program => BTreeMap::new(),
    };
    reader.print(&InstanceList { instances }, |list| {
        table::instances(&list.instances, &elsewhere, Timestamp::now())
    })
}

/// The names of templates that the list itself does not have, as where only some states were asked for.
async fn names_of_others(list: &[Instance], client: &Client) -> BTreeMap<InstanceId, String> {
    let listed: BTreeSet<InstanceId> = list.iter().map(|instance| instance.id).collect();
    let templates: BTreeSet<InstanceId> = list.iter().filter_map(|one| one.fork_of_template).collect();
    let mut names = BTreeMap::new();
    for id in templates.difference(&listed) {
        // One that was just deleted has its id.
        if let Ok(template) = client.get(&id.to_string()).await {
            names.insert(*id, table::name(&template));
        }
    }
    names
}

/// Deletes one after the other, forks before the templates that they would keep from being deleted if they are given
/// in that order.
pub(super) async fn remove(asked: Rm, client: &Client, reader: Reader) -> Result<(), Failure> {
    let delete = async |typed: &str| Ok(client.delete(&reference::exact(client, typed).await?).await?);
    delete_each(&asked.ids, reader, delete).await
}

pub(super) async fn wait(asked: Wait, client: &Client, reader: Reader) -> Result<(), Failure> {
    let waited = client
        .wait(
            &asked.id,
            WaitFor {
                state: asked.state,
                timeout: asked.timeout,
            },
        )
        .await?;
    reader.print(&waited, |waited| table::changed(&waited.instance))?;
    reached(&waited, asked.state)
}

fn reached(waited: &Waited, wanted: State) -> Result<(), Failure> {
    if waited.reached {
        return Ok(());
    }
    Err(Failure::NotReached {
        name: table::name(&waited.instance),
        state: waited.instance.state,
        wanted,
    })
}
