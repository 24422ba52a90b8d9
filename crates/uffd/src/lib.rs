//! A snapshot's memory as something that is served page by page.

mod address;
mod counters;
mod hot_pages;
mod image;
mod mapping;
mod memory;
mod page_set;
mod populate;
mod prefetch;
mod ranges;
mod record;
mod server;
mod source;
mod userfault;

pub use address::{Gpa, PAGE_SIZE};
pub use counters::{Counters, Histogram};
pub use hot_pages::{DifferentMemory, HotPages, HotRun, LoadError, Mark, SaveError};
pub use image::{ImageError, MemoryImage};
pub use mapping::{GuestMapping, MappingError};
pub use populate::{PopulateError, Populated, populate};
pub use ranges::{MemoryRange, RangeError, RangeTable};
pub use record::{Closed, Recording, Touch, Window};
pub use server::{Fatal, Notice, PageServer, Plan, Settings, StartError};
pub use source::{Extent, PageSource};
pub use userfault::UserfaultError;
