//! Bringing back the memory of a snapshot: read, mapped or served.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use stencil_core::error_chain;
use stencil_core::generation::{GenerationError, MemoryGeneration};
use stencil_uffd::{
    Fatal, Gpa, HotPages, ImageError, LoadError, MappingError, MemoryImage, PopulateError, RangeError,
    RangeTable, StartError, populate,
};
use stencil_vmm_api::{MemoryRestoreMode, RestoreRequest};

use crate::events::Events;
use crate::memory::{GuestRam, MemoryError, MemoryRange};
use crate::page_figures::PageFigures;
use crate::page_service::{Ahead, PageService};
use crate::pagemap;

/// The memory cannot be brought back, or not in that way.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RestoredMemoryError {
    #[error("memory_restore_mode is OnDemand; right is Copy, Cow or Uffd")]
    OnDemand,
    #[error("prefault is of no use with Uffd; right are Copy and Cow with prefault, or Uffd with hot_pages")]
    Prefault,
    #[error("record_hot_pages needs memory_restore_mode Uffd: only there touches are seen")]
    RecordMode,
    #[error(
        "record_hot_pages and hot_pages are both there; a page that is there before it is touched is not recorded"
    )]
    RecordAndFetch,
    #[error("{0} needs memory_generation, to know of which memory the list is")]
    NoGeneration(&'static str),
    #[error("memory_generation is wrong")]
    Generation(#[from] GenerationError),
    #[error("{0:?} cannot be read")]
    Read(PathBuf, #[source] io::Error),
    #[error("{path:?} has {found} bytes; its ranges have {expected}")]
    Size {
        path: PathBuf,
        found: u64,
        expected: u64,
    },
    #[error("guest memory cannot be had")]
    Memory(#[from] MemoryError),
    #[error("the ranges of guest memory cannot be served")]
    Ranges(#[from] RangeError),
    #[error("guest memory cannot be served")]
    Mapping(#[from] MappingError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("guest memory cannot be served")]
    Serve(#[from] StartError),
    #[error("the hot pages cannot be made resident")]
    Populate(#[source] PopulateError),
    #[error("the guest's memory is lost")]
    Lost(#[from] Arc<Fatal>),
}

/// A list of hot pages is not used.
#[derive(Debug, thiserror::Error)]
enum Unusable {
    #[error("it is no regular file")]
    NoFile,
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Populate(#[from] PopulateError),
}

/// What a request asks of the memory, checked.
pub(crate) struct MemoryPlan {
    how: How,
    prefault: bool,
    /// There where a list of hot pages is asked for.
    generation: Option<MemoryGeneration>,
}

enum How {
    Copy,
    Cow { hot: Option<PathBuf> },
    Uffd { pages: First },
}

/// What is done about the pages that are touched first.
enum First {
    Unknown,
    Hot(PathBuf),
    Record(PathBuf),
}

impl MemoryPlan {
    pub(crate) fn of(request: &RestoreRequest) -> Result<Self, RestoredMemoryError> {
        use RestoredMemoryError as Wrong;
        let hot = request.hot_pages.as_ref().map(PathBuf::from);
        let record = request.record_hot_pages.as_ref().map(PathBuf::from);
        if request.memory_generation.is_none() {
            if hot.is_some() {
                return Err(Wrong::NoGeneration("hot_pages"));
            }
            if record.is_some() {
                return Err(Wrong::NoGeneration("record_hot_pages"));
            }
        }
        let generation = request.memory_generation.as_deref().map(str::parse).transpose()?;
        if record.is_some() && request.memory_restore_mode != MemoryRestoreMode::Uffd {
            return Err(Wrong::RecordMode);
        }
        let how = match request.memory_restore_mode {
            MemoryRestoreMode::OnDemand => return Err(Wrong::OnDemand),
            // All pages are there in any case.
            MemoryRestoreMode::Copy => How::Copy,
            MemoryRestoreMode::Cow => How::Cow { hot },
            MemoryRestoreMode::Uffd if request.prefault => return Err(Wrong::Prefault),
            MemoryRestoreMode::Uffd => {
                let pages = match (hot, record) {
                    (None, None) => First::Unknown,
                    (Some(path), None) => First::Hot(path),
                    (None, Some(path)) => First::Record(path),
                    (Some(_), Some(_)) => return Err(Wrong::RecordAndFetch),
                };
                How::Uffd { pages }
            }
        };
        Ok(Self {
            how,
            prefault: request.prefault,
            generation,
        })
    }

    /// Brings back the memory of the file at `path`, in which the ranges lie one after the other. A page of it may
    /// still be missing, and come when it is touched.
    pub(crate) fn restore(
        self,
        path: &Path,
        ranges: &[MemoryRange],
        figures: &Arc<PageFigures>,
        events: &Events,
    ) -> Result<GuestRam, RestoredMemoryError> {
        let file = open(path, ranges)?;
        // One that no list has.
        let generation = || self.generation.unwrap_or_else(MemoryGeneration::random);
        let ram = match self.how {
            How::Copy => {
                let ram = GuestRam::anonymous(ranges)?;
                copy(&file, &ram).map_err(|error| RestoredMemoryError::Read(path.to_owned(), error))?;
                ram
            }
            How::Cow { hot } => {
                let ram = GuestRam::private_of(file, ranges)?;
                if let Some(list) = hot {
                    populate_hot(&ram, &list, generation(), figures)?;
                }
                ram
            }
            How::Uffd { pages } => {
                let ahead = match pages {
                    First::Unknown => Ahead::Nothing,
                    First::Record(path) => Ahead::Record(path),
                    First::Hot(list) => match load(&list, generation()) {
                        Ok(hot) => Ahead::Fetch(hot),
                        Err(unusable) => {
                            ignore(&list, &unusable, figures);
                            Ahead::Nothing
                        }
                    },
                };
                let table = ranges.iter().map(|range| (Gpa::new(range.gpa), range.length));
                let image = MemoryImage::open(path, RangeTable::packed(table)?, generation())?;
                let mut ram = GuestRam::served(file, ranges)?;
                let (image, figures) = (Arc::new(image), Arc::clone(figures));
                let mappings = ram.mappings()?;
                ram.pages = Some(PageService::start(
                    &mappings,
                    image,
                    ahead,
                    figures,
                    events.clone(),
                )?);
                ram
            }
        };
        if self.prefault {
            ram.populate()?;
        }
        Ok(ram)
    }
}

/// Read-only: a private mapping can still be written, and the file cannot.
fn open(path: &Path, ranges: &[MemoryRange]) -> Result<File, RestoredMemoryError> {
    let unreadable = |error| RestoredMemoryError::Read(path.to_owned(), error);
    let file = File::open(path).map_err(unreadable)?;
    let found = file.metadata().map_err(unreadable)?.len();
    let expected = ranges.iter().map(|range| range.length).sum();
    if found != expected {
        return Err(RestoredMemoryError::Size {
            path: path.to_owned(),
            found,
            expected,
        });
    }
    Ok(file)
}

/// Reads the file's data into new memory, which is zero where the file has holes.
fn copy(file: &File, ram: &GuestRam) -> io::Result<()> {
    let mut offset = 0;
    for mapped in ram.ranges() {
        // SAFETY: the VM is not made yet; nobody else knows this memory.
        let bytes = unsafe { mapped.bytes_mut() };
        for extent in pagemap::file_data(file, &(offset..offset + mapped.range.length))?.iter() {
            let invalid = |_| io::Error::from(io::ErrorKind::InvalidData);
            let start = usize::try_from(extent.start).map_err(invalid)?;
            let end = usize::try_from(extent.end).map_err(invalid)?;
            file.read_exact_at(&mut bytes[start..end], offset + extent.start)?;
        }
        offset += mapped.range.length;
    }
    Ok(())
}

/// Makes the pages of the list resident. A page that cannot be read is the end; anything else only makes it slower.
fn populate_hot(
    ram: &GuestRam,
    list: &Path,
    generation: MemoryGeneration,
    figures: &PageFigures,
) -> Result<(), RestoredMemoryError> {
    let mappings = ram.mappings()?;
    let populated = load(list, generation).and_then(|hot| {
        let mut all = stencil_uffd::Populated::default();
        for mapping in &mappings {
            let more = populate(&hot, mapping)?;
            all.read += more.read;
            all.written += more.written;
        }
        Ok(all)
    });
    match populated {
        Ok(pages) => figures.populated(pages),
        Err(Unusable::Populate(error @ PopulateError::Unreadable { .. })) => {
            return Err(RestoredMemoryError::Populate(error));
        }
        Err(unusable) => ignore(list, &unusable, figures),
    }
    Ok(())
}

fn load(list: &Path, generation: MemoryGeneration) -> Result<HotPages, Unusable> {
    // A pipe would not be opened until somebody writes to it.
    if !fs::metadata(list).map_err(LoadError::Read)?.is_file() {
        return Err(Unusable::NoFile);
    }
    Ok(HotPages::load(list, generation)?)
}

fn ignore(list: &Path, unusable: &Unusable, figures: &PageFigures) {
    tracing::warn!(list = %list.display(), "no hot pages: {}", error_chain(unusable));
    figures.ignore_prefetch();
}
