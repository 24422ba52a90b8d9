//! The core of Stencil: the states of an instance and how it moves between them, what is recorded about it, and the
//! data directory in which that is kept. It is synchronous, and knows no VMM.
//!
//! | module | role |
//! |---|---|
//! | [`state`] | the states and the one table of edges |
//! | [`observe`] | facts in, state out |
//! | [`rules`] | an operation and a state in, a decision or a typed refusal out |
//! | [`metadata`], [`manifest`] | what is recorded of an instance and of its snapshot |
//! | [`image`] | the files that instances are made of, and what is recorded of them |
//! | [`id`], [`name`], [`generation`], [`hypervisor`] | checked types for what is otherwise a string |
//! | [`layout`] | where everything lies below the data directory |
//! | [`store`] | reads and writes it, so that a crash leaves each instance before or after the operation |
//! | `versioned`, `error_chain` | the JSON files' schema numbers; an error with its causes in one line |
//!
//! Only [`store`] touches the file system; the rest is a function of its arguments.
//!
//! ```
//! use stencil_core::{
//!     Decision, Durability, InstanceId, Metadata, Operation, State, Store, VmGeneration, VmSpec, VmmFacts, observe, rules,
//! };
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let scratch = tempfile::tempdir()?;
//! let store = Store::open(scratch.path())?;
//!
//! // Record a new instance.
//! let spec = VmSpec::new("microvm".parse()?, "/boot/guest.elf".into(), 1, 512 << 20);
//! let id = InstanceId::generate();
//! let metadata = Metadata::new(id, "web".parse()?, spec, VmGeneration::random(), jiff::Timestamp::now());
//! store.begin(id)?.commit(&metadata, Durability::Synced)?;
//!
//! // Observe: its state is derived, never stored.
//! let observed = observe::derive(&store.read(&id)?, &store.snapshot(&id), &VmmFacts::None);
//! assert_eq!(observed.state, State::Stopped);
//!
//! // Decide: a rule says what may be done, or why not and what would be right.
//! assert_eq!(rules::decide(Operation::Start, observed.state, &[])?, Decision::Act);
//! assert_eq!(
//!     rules::decide(Operation::Promote, observed.state, &[]).unwrap_err().to_string(),
//!     "cannot promote-template in state Stopped: start it (start), then put it on standby (standby) first",
//! );
//! # Ok(())
//! # }
//! ```

pub mod cpu;
mod error_chain;
pub mod generation;
pub mod hypervisor;
pub mod id;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod metadata;
pub mod name;
pub mod observe;
pub mod rules;
pub mod state;
pub mod store;
mod versioned;

pub use cpu::HostCpu;
pub use error_chain::error_chain;
pub use generation::{EpochId, GenerationError, MemoryGeneration, VmGeneration};
pub use hypervisor::{HypervisorName, HypervisorNameError};
pub use id::{InstanceId, InstanceIdError};
pub use image::{Image, ImageDisk, ImageFile, ImageName, ImageUser};
pub use layout::{DataDir, ImageDir, InstanceDir, SnapshotDir};
pub use manifest::SnapshotManifest;
pub use metadata::{
    DiskFormat, DiskSpec, Epoch, EpochKind, MemoryMode, Metadata, ProcessIdentity, Readiness, VmSpec,
    VmmRecord,
};
pub use name::{InstanceName, NameError};
pub use observe::{GuestEnd, Observed, SnapshotFacts, VmPhase, VmmFacts};
pub use rules::{Decision, ForkFrom, ForkPlan, ForkRequest, LiveFork, Operation, Refusal};
pub use state::State;
pub use store::{
    Durability, NewImage, NewInstance, Scanned, ScannedImage, Store, StoreError, UnreadableCause,
    sync_records,
};
pub use versioned::FormatError;
