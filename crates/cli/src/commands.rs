//! The commands of a client: each is one call to the server, or a few.

mod console;
mod cp;
mod exec;
mod forks;
mod images;
mod instances;
mod reference;

use std::env;

use serde::Serialize;
use stencil_api::client::{Client, ClientError};
use stencil_api::reply::{Instance, Version};
use stencil_api::request::{ChangeInstance, PromoteTemplate};

use crate::args::{ClientCommand, ServerPlace};
use crate::failure::Failure;
use crate::output::{Reader, printable};
use crate::{place, table};

pub(crate) fn run(command: ClientCommand, server: ServerPlace, json: bool) -> Result<(), Failure> {
    let client = match server {
        // Others see the command line of a process, and not its environment.
        ServerPlace { url: Some(url), .. } => {
            Client::over_tcp(&url, env::var("STENCIL_TOKEN").ok().as_deref())?
        }
        ServerPlace { socket, .. } => Client::new(socket.map_or_else(place::default_socket, Ok)?),
    };
    let reader = Reader::of(json);
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?
        .block_on(call(command, &client, reader))
}

async fn call(mut command: ClientCommand, client: &Client, reader: Reader) -> Result<(), Failure> {
    if let Some(typed) = command.changes() {
        *typed = reference::exact(client, typed).await?;
    }
    let changed = |instance: Instance| reader.print(&instance, table::changed);
    match command {
        ClientCommand::Create(asked) => instances::create(asked, client, reader).await,
        ClientCommand::Ls(asked) => instances::list(asked, client, reader).await,
        ClientCommand::Show(asked) => reader.print(&client.get(&asked.id).await?, table::instance),
        ClientCommand::Rm(asked) => instances::remove(asked, client, reader).await,
        ClientCommand::Wait(asked) => instances::wait(asked, client, reader).await,
        ClientCommand::Start(asked) => changed(client.start(&asked.id).await?),
        ClientCommand::Stop(asked) => changed(client.stop(&asked.id).await?),
        ClientCommand::Pause(asked) => changed(client.pause(&asked.id).await?),
        ClientCommand::Resume(asked) => changed(client.resume(&asked.id).await?),
        ClientCommand::Standby(asked) => changed(client.standby(&asked.id).await?),
        ClientCommand::Restore(asked) => changed(client.restore(&asked.id).await?),
        ClientCommand::Promote(asked) => {
            let promote = PromoteTemplate { armed: asked.armed };
            changed(client.promote(&asked.id, &promote).await?)
        }
        ClientCommand::Demote(asked) => changed(client.demote(&asked.id).await?),
        ClientCommand::RecordHotPages(asked) => changed(client.record_hot_pages(&asked.id).await?),
        ClientCommand::Arm(asked) => {
            let change = ChangeInstance { armed: asked.count };
            changed(client.change(&asked.id, &change).await?)
        }
        ClientCommand::Fork(asked) => forks::fork(asked, client, reader).await,
        ClientCommand::Exec(asked) => exec::exec(asked, client, reader).await,
        ClientCommand::Cp(asked) => cp::cp(asked, client).await,
        ClientCommand::Console(asked) => console::console(asked, client).await,
        ClientCommand::Image(asked) => images::run(asked, client, reader).await,
        ClientCommand::Version => version(client, reader).await,
    }
}

/// Deletes one after the other, and goes on after one that is refused.
async fn delete_each(
    names: &[String],
    reader: Reader,
    delete: impl AsyncFn(&str) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut failed = Vec::new();
    for name in names {
        match delete(name).await {
            Ok(()) => {
                if let Reader::Person = reader {
                    crate::output::write(format!("{name} is deleted\n").as_bytes())?;
                }
            }
            Err(failure) => failed.push((name, failure)),
        }
    }
    let count = failed.len();
    match (failed.pop(), names.len()) {
        (None, _) => Ok(()),
        (Some((_, only)), 1) => Err(only),
        (Some(last), all) => {
            failed.push(last);
            for (name, failure) in &failed {
                eprintln!("error: {name}: {}", printable(&failure.sentence()));
            }
            Err(Failure::SomeFailed { failed: count, all })
        }
    }
}

/// The versions of this program and of the server, if there is one.
#[derive(Serialize)]
struct Versions {
    version: &'static str,
    server: Option<Version>,
}

async fn version(client: &Client, reader: Reader) -> Result<(), Failure> {
    let server = match client.version().await {
        Ok(version) => Some(version),
        Err(ClientError::NoServer { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    reader.print(
        &Versions {
            version: env!("CARGO_PKG_VERSION"),
            server,
        },
        |versions| {
            let server = match &versions.server {
                Some(server) => server.version.clone(),
                None => format!("none listens at {}", client.address()),
            };
            format!("stencil {}\nserver  {server}", versions.version)
        },
    )
}
