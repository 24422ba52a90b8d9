//! What a page costs that is served, or mapped from its file: 4096 pages (16 MiB), as they lie or scattered over 128 MiB,
//! one of each eight, with the page cache warm. Each time is for all of them, from the start of the server to the last
//! touch; the touching thread is this process, where a guest would be.

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::measurement::WallTime;
use criterion::{BenchmarkGroup, Criterion, Throughput};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use stencil_core::MemoryGeneration;
use stencil_uffd::{
    Gpa, GuestMapping, HotPages, Mark, MemoryImage, Notice, PAGE_SIZE, PageServer, Plan, RangeTable,
    Settings, populate,
};

/// Bytes of guest memory.
const MEMORY: usize = 128 << 20;
const PAGE: usize = 4096;
const PAGES: usize = MEMORY / PAGE;
/// Pages that are touched.
const TOUCHED: usize = 4096;

type Failure = Box<dyn Error>;

/// An area of this process, unmapped at the end.
struct Area(NonNull<u8>);

impl Area {
    /// Empty memory, or a private mapping of `file`.
    fn new(file: Option<&File>) -> Result<Self, Failure> {
        let (access, flags) = (
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        );
        let place = std::ptr::null_mut();
        let start = match file {
            // SAFETY: the kernel chooses a free place.
            None => unsafe { mmap_anonymous(place, MEMORY, access, flags) },
            // SAFETY: as above.
            Some(file) => unsafe { mmap(place, MEMORY, access, flags, file, 0) },
        };
        Ok(Self(NonNull::new(start?.cast()).ok_or("mapped at zero")?))
    }

    fn mapping(&self) -> Result<GuestMapping, Failure> {
        // SAFETY: the area is ours alone, is only read through volatile reads, and outlives every server of it.
        Ok(unsafe { GuestMapping::new(Gpa::new(0), self.0, MEMORY) }?)
    }

    /// Reads a word of each page.
    fn touch(&self, pages: &[usize]) {
        for &page in pages {
            // SAFETY: the page is within the area.
            std::hint::black_box(unsafe { self.0.as_ptr().add(page * PAGE).read_volatile() });
        }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: nothing points into it any more. That it stays mapped would only cost address space.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), MEMORY) };
    }
}

/// A memory file of which each page holds something, and one that is a hole as a whole.
struct Files {
    full: tempfile::NamedTempFile,
    hole: tempfile::NamedTempFile,
    generation: MemoryGeneration,
}

impl Files {
    fn new() -> Result<Self, Failure> {
        let (full, hole) = (tempfile::NamedTempFile::new()?, tempfile::NamedTempFile::new()?);
        for page in 0..PAGES {
            let content = [page.to_le_bytes()[0] | 1; PAGE];
            full.as_file().write_all_at(&content, (page * PAGE) as u64)?;
        }
        hole.as_file().set_len(MEMORY as u64)?;
        let generation = MemoryGeneration::random();
        Ok(Self {
            full,
            hole,
            generation,
        })
    }

    fn list(&self, pages: &[usize], mark: Mark) -> HotPages {
        let touches = pages
            .iter()
            .map(|page| (Gpa::new(*page as u64 * PAGE_SIZE), mark));
        HotPages::from_touches(self.generation, touches)
    }

    /// Serves `pages` of a file to somebody who touches them one after the other.
    fn serve(
        &self,
        file: &tempfile::NamedTempFile,
        settings: &Settings,
        pages: &[usize],
    ) -> Result<Duration, Failure> {
        let table = RangeTable::packed([(Gpa::new(0), MEMORY as u64)])?;
        let image = Arc::new(MemoryImage::open(file.path(), table, self.generation)?);
        let area = Area::new(None)?;
        let mapping = area.mapping()?;
        let began = Instant::now();
        let server = PageServer::start(&[mapping], image, settings.clone(), quit)?;
        server.before_resume().map_err(|fatal| fatal.to_string())?;
        area.touch(pages);
        let took = began.elapsed();
        server.stop();
        Ok(took)
    }

    /// Maps the file, populates the pages of `hot`, and touches `pages`.
    fn map(&self, hot: Option<&HotPages>, pages: &[usize]) -> Result<Duration, Failure> {
        let area = Area::new(Some(self.full.as_file()))?;
        let mapping = area.mapping()?;
        let began = Instant::now();
        if let Some(hot) = hot {
            populate(hot, &mapping)?;
        }
        area.touch(pages);
        Ok(began.elapsed())
    }
}

/// A page that is lost here means that the benchmark is broken.
fn quit(notice: Notice) {
    if let Notice::Fatal(fatal) = notice {
        eprintln!("{fatal}");
        std::process::abort();
    }
}

/// Measures `run`, which says what counts of it.
fn measure(
    group: &mut BenchmarkGroup<'_, WallTime>,
    name: &str,
    run: impl Fn() -> Result<Duration, Failure>,
) -> Result<(), Failure> {
    let mut failed = None;
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|times| {
            let total = (0..times).map(|_| run()).sum::<Result<Duration, Failure>>();
            total.unwrap_or_else(|error| {
                failed = Some(error);
                // Criterion takes no time of 0.
                Duration::from_nanos(times.max(1))
            })
        });
    });
    failed.map_or(Ok(()), Err)
}

fn main() -> Result<(), Failure> {
    let mut criterion = Criterion::default().configure_from_args();
    let files = Files::new()?;
    // A fixed order without a pattern: the multiplier has no factor in common with the number of pages.
    let scattered: Vec<usize> = (0..TOUCHED)
        .map(|n| n * 7919 % TOUCHED * (PAGES / TOUCHED))
        .collect();
    let dense: Vec<usize> = (0..TOUCHED).collect();
    let demand = |read_around| Settings {
        read_around,
        ..Settings::default()
    };
    let prefetch = |pages: &[usize]| Settings {
        plan: Plan::Prefetch {
            hot: files.list(pages, Mark::Read),
            budget: u64::MAX,
        },
        ..Settings::default()
    };
    let mut group = criterion.benchmark_group("page_serving");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .throughput(Throughput::Elements(TOUCHED as u64));
    let served = [
        ("demand, one by one", &files.full, demand(1), &scattered),
        ("demand, dense, one by one", &files.full, demand(1), &dense),
        ("demand, dense, 8 pages around", &files.full, demand(8), &dense),
        ("zero pages, one by one", &files.hole, demand(1), &scattered),
        (
            "prefetch, single pages",
            &files.full,
            prefetch(&scattered),
            &scattered,
        ),
        ("prefetch, runs", &files.full, prefetch(&dense), &dense),
    ];
    for (name, file, settings, pages) in served {
        if let Err(failed) = measure(&mut group, name, || files.serve(file, &settings, pages)) {
            return not_served(failed);
        }
    }
    let (read, written) = (
        files.list(&scattered, Mark::Read),
        files.list(&scattered, Mark::Written),
    );
    for (name, hot) in [
        ("cow, touched", None),
        ("cow, populated to be read", Some(&read)),
        ("cow, populated to be written", Some(&written)),
    ] {
        measure(&mut group, name, || files.map(hot, &scattered))?;
    }
    group.finish();
    criterion.final_summary();
    Ok(())
}

/// A host that does not let this user handle page faults is no failure of the benchmark.
fn not_served(failed: Failure) -> Result<(), Failure> {
    match failed.downcast::<stencil_uffd::StartError>() {
        Ok(refused) => {
            eprintln!(
                "page_serving is NOT measured: {}",
                stencil_core::error_chain(&*refused)
            );
            Ok(())
        }
        Err(failed) => Err(failed),
    }
}
