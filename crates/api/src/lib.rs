//! Stencil over HTTP: the server in front of an [`Engine`](stencil_engine::Engine), and the client that talks to it.
//!
//! The default way in is a Unix socket that only its owner can open; TCP is there for who asks for it, and takes a token. Requests and
//! replies are JSON. Whatever fails is answered as [`ErrorBody`]: a word for programs, a sentence for people, details.
//!
//! | module | role |
//! |---|---|
//! | `routes` | the table of routes |
//! | `handlers` | what each route does with the engine |
//! | [`request`], [`reply`] | what goes over the wire, for the server and the client alike |
//! | [`exec`] | the same of commands in a guest, and what is said on their WebSocket |
//! | [`memory_size`], [`timeout`] | sizes and times as people write them |
//! | `body` | reads requests: bounded, strict, and polite to those who send too much |
//! | `error` | the one place where an engine's error becomes a status, a code and a message |
//! | `log` | one line for each request, after its reply |
//! | `guard`, `tokens` | who may ask |
//! | [`server`], `socket`, `connections`, `closing` | listeners and their end |
//! | [`client`] | one method for each route |
//!
//! Nothing here decides what an instance may do: a request is checked for its form, given to the engine, and what
//! comes out is written down.
//!
//! ```no_run
//! use stencil_api::client::Client;
//! use stencil_api::request::{CreateInstance, ForkMany, PromoteTemplate};
//!
//! # async fn example() -> Result<(), stencil_api::client::ClientError> {
//! let stencil = Client::new("/var/lib/stencil/stencil.sock");
//! let web = stencil.create(&CreateInstance::new("/boot/guest.elf")).await?;
//! let id = web.id.to_string();
//! stencil.standby(&id).await?;
//! stencil.promote(&id, &PromoteTemplate { armed: Some(8) }).await?;
//! for fork in stencil.forks(&id, &ForkMany::new(8)).await?.forks {
//!     println!("{}", fork.name);
//! }
//! # Ok(())
//! # }
//! ```

mod body;
pub mod client;
mod closing;
mod connections;
mod error;
pub mod exec;
mod guard;
mod handlers;
mod log;
pub mod memory_size;
pub mod reply;
pub mod request;
mod routes;
pub mod server;
mod socket;
pub mod timeout;
mod tokens;

pub use error::ErrorBody;
