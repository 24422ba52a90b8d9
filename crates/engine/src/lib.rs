//! The lifecycle of VM instances: create, start, standby, restore, promote to a template, fork, demote, delete.
//!
//! Every operation has one shape: **observe** (metadata, snapshot, VMM), let [`stencil_core::rules`] **decide**, then
//! **act** through the store and a [`Hypervisor`](stencil_vmm::Hypervisor). Nothing here decides whether an operation is
//! allowed, and nothing about a VM's state is remembered: it is derived each time it is asked for.
//!
//! | module | role |
//! |---|---|
//! | `engine` | the [`Engine`]: what it owns, how it opens a data directory |
//! | `requests`, `instance`, `error` | what goes in, what comes out |
//! | `admission`, `kernel` | checks of a request against the host, before anything is made |
//! | `limits`, `host`, `cpu` | whether the host has what forks need, and is like the one that a snapshot was made on |
//! | `registry`, `names`, `running` | which instances there are, their names and forks, their locks and their running VMMs |
//! | `observe` | gathers the facts that a state is derived from |
//! | `create`, `lifecycle`, `template`, `fork`, `delete` | the operations |
//! | `disks`, `disk_image` | the layers of an instance's disks, and what a disk's base can be |
//! | `images` | what instances are made of, kept by name |
//! | `fork_base`, `prepare`, `begin` | a fork's hops: its source under its lock, up to its first instruction, and from there on |
//! | `pool`, `armed`, `greet`, `pressure` | forks that are prepared before they are asked for, how far they run, and when they give way |
//! | `hot_pages`, `hot_list` | which fork of a template records, and which gets what was recorded |
//! | `bring_up`, `suspend` | the hops they are made of: a VMM brought up, a snapshot written, a process ended |
//! | `power_off` | a guest is asked to power itself off before its VMM is ended |
//! | `agent` | the agent in a guest: who the guest is in this epoch, and commands in it |
//! | `console`, `readiness`, `logs` | the guest's output and input, its word that it is ready, and how much of its output stays |
//! | `changes`, `wait` | waiting without polling |
//! | `write_behind` | records that need not be on disk before the answer are synced behind it |
//! | `reconcile` | reattaches to VMMs and sweeps leftovers when the engine opens |
//!
//! # Locks
//!
//! One lock order, so that nothing can wait in a circle: (1) the turn to arm a fork, one on the whole server; (2) one
//! instance's lock, shared by forks of a template, exclusive for everything else that changes it; (3) a turn to bring a
//! VMM up; (4) the mutexes of the registry, the pools and the promises, held for a look-up only and never across an await.
//! No operation holds the locks of two instances, except that a fork under construction is locked by its creator before
//! anyone else can see it. Reads (get, list, wait, console) take no instance lock.
//!
//! # Crashes
//!
//! An instance is made under a temporary name and renamed into place, with its VMM record inside; a VMM that is to go is
//! first taken out of the record and then stopped. So whenever the server dies, an instance is as it was before the
//! operation or as it is after it, and a VMM that no record names is a leftover that [`Engine::open`] stops.
//!
//! A snapshot and the disks that it goes with are one thing: the snapshot exists when the VMM has closed the disks and they are
//! synced. Up to the end of the VMM a standby that fails leaves the VM. From there on the memory is nowhere else, so the snapshot
//! is *prepared* before, and is finished by the next server if this one dies or cannot put it in place; until then the instance is
//! Unknown, and nothing can be done to it that would lose its memory. A power loss in that moment is a power loss for the guest.
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//! use stencil_engine::{Config, DEFAULT_LOG_LIMIT, Engine, ForkRequest};
//! use stencil_vmm::MicroVm;
//!
//! let microvm = Arc::new(MicroVm::new(MicroVm::find()?));
//! let engine = Engine::open(Config { data: "/var/lib/stencil".into(), hypervisors: vec![microvm], armed: 0, log_limit: DEFAULT_LOG_LIMIT }).await?;
//! engine.promote("warm", Some(4)).await?;
//! let fork = engine.fork("warm", None, ForkRequest::default()).await?;
//! println!("{} is {}", fork.id, fork.state);
//! # Ok(())
//! # }
//! ```

mod admission;
mod agent;
mod armed;
mod begin;
mod bring_up;
mod changes;
mod console;
mod cpu;
mod create;
mod delete;
mod disk_image;
mod disks;
mod engine;
mod error;
mod fork;
mod fork_base;
mod greet;
mod host;
mod hot_list;
mod hot_pages;
mod images;
mod instance;
mod kernel;
mod lifecycle;
mod limits;
mod logs;
mod names;
mod observe;
mod pool;
mod power_off;
mod prepare;
mod pressure;
mod readiness;
mod reconcile;
mod registry;
mod requests;
mod running;
mod suspend;
mod template;
mod wait;
mod write_behind;

pub use agent::{
    Agent, AgentState, Captured, ExecEvent, ExecEvents, ExecInput, ExecOutput, ExecRequest, ExecSession,
    Exited, MAX_CAPTURED, SessionOver,
};
pub use armed::MAX_ARMED;
pub use console::ConsoleStream;
pub use engine::{Config, Engine};
pub use error::EngineError;
pub use fork::{ForkOutcome, MAX_FORKS_PER_CALL, Work};
pub use instance::{Armed, Instance, Timings};
pub use limits::{Resource, Shortage};
pub use logs::DEFAULT_LOG_LIMIT;
pub use requests::{CreateRequest, DiskRequest, Filter, ForksRequest, ImageRequest};
pub use stencil_agent::{
    End, Exec, ExecError, Output, PROGRAM as AGENT_PROGRAM, TtySize, VERSION as AGENT_PROTOCOL,
};
pub use stencil_core::rules::ForkRequest;
pub use wait::WaitOutcome;
