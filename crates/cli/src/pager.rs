//! `stencil pager`: serves the memory of one VM that runs on Cloud Hypervisor. The server starts it; people do not.

use std::env;
use std::io;

use stencil_vmm::PagerCommand;
use stencil_vmm::pager::{self, Ahead, Request};

use crate::args::Pager;
use crate::failure::Failure;

/// How this program is started as a pager.
pub(crate) fn command() -> io::Result<PagerCommand> {
    Ok(PagerCommand {
        program: env::current_exe()?,
        arguments: vec!["pager".into()],
    })
}

pub(crate) fn run(asked: Pager) -> Result<(), Failure> {
    let hot_pages = match (asked.hot_pages, asked.record) {
        (Some(list), _) => Ahead::Fetch(list),
        (None, true) => Ahead::Record,
        (None, false) => Ahead::Nothing,
    };
    let request = Request {
        memory_generation: asked.memory_generation,
        hot_pages,
    };
    Ok(pager::run(&request)?)
}
