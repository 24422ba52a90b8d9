//! `stencil image`: what instances are made of.

use jiff::Timestamp;
use stencil_api::client::Client;
use stencil_api::reply::ImageList;
use stencil_api::request;

use super::delete_each;
use crate::args::{AddImage, ImageCommand};
use crate::failure::Failure;
use crate::output::Reader;
use crate::{place, table};

pub(super) async fn run(asked: ImageCommand, client: &Client, reader: Reader) -> Result<(), Failure> {
    match asked {
        ImageCommand::Add(asked) => add(asked, client, reader).await,
        ImageCommand::Ls => {
            let images = client.images().await?;
            reader.print(&ImageList { images }, |list| {
                table::images(&list.images, Timestamp::now())
            })
        }
        ImageCommand::Show { name } => reader.print(&client.image(&name).await?, table::image),
        ImageCommand::Rm { names } => {
            delete_each(&names, reader, async |name| Ok(client.remove_image(name).await?)).await
        }
    }
}

async fn add(asked: AddImage, client: &Client, reader: Reader) -> Result<(), Failure> {
    let request = request::AddImage {
        name: asked.name,
        kernel: place::absolute(asked.kernel)?,
        initrd: asked.initrd.map(place::absolute).transpose()?,
        disks: asked
            .disks
            .into_iter()
            .map(place::absolute)
            .collect::<Result<_, _>>()?,
        cmdline: asked.cmdline,
    };
    reader.print(&client.add_image(&request).await?, table::image)
}
