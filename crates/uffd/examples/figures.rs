//! What serving pages costs on this host. Figures of one run on a busy machine: trust ratios.
//!
//! `cargo run --release -p stencil-uffd --example figures`

use std::error::Error;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{
    Gpa, GuestMapping, HotPages, Mark, MemoryImage, Notice, PAGE_SIZE, PageServer, Plan, RangeTable,
    Settings, Window, populate,
};

/// Bytes of guest memory.
const MEMORY: usize = 512 << 20;
/// Pages that are touched: 64 MiB, one of each eight.
const TOUCHED: usize = (64 << 20) / PAGE;
const PAGE: usize = 4096;

/// An area of this process, unmapped at the end.
struct Area(NonNull<u8>);

impl Area {
    fn anonymous() -> Result<Self, Box<dyn Error>> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses a free place.
        let area = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                MEMORY,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
            )
        }?;
        Ok(Self(NonNull::new(area.cast()).ok_or("mapped at zero")?))
    }

    fn of(file: &File) -> Result<Self, Box<dyn Error>> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: as above.
        let area = unsafe {
            mmap(
                std::ptr::null_mut(),
                MEMORY,
                ProtFlags::READ | ProtFlags::WRITE,
                flags,
                file,
                0,
            )
        }?;
        Ok(Self(NonNull::new(area.cast()).ok_or("mapped at zero")?))
    }

    fn mapping(&self) -> Result<GuestMapping, Box<dyn Error>> {
        // SAFETY: the area is ours alone, is only read through volatile reads, and outlives every server below.
        Ok(unsafe { GuestMapping::new(Gpa::new(0), self.0, MEMORY) }?)
    }

    /// Reads a word of each page, and returns the time for all.
    fn touch(&self, pages: &[usize]) -> Duration {
        let began = Instant::now();
        for &page in pages {
            // SAFETY: the page is within the area.
            std::hint::black_box(unsafe { self.0.as_ptr().add(page * PAGE).read_volatile() });
        }
        began.elapsed()
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // SAFETY: nothing points into it any more.
        let _ = unsafe { munmap(self.0.as_ptr().cast(), MEMORY) };
    }
}

fn quit(notice: Notice) {
    if let Notice::Fatal(fatal) = notice {
        eprintln!("{fatal}");
        std::process::abort();
    }
}

fn line(name: &str, time: Duration, pages: usize) {
    let each = time.as_nanos() / pages as u128;
    println!(
        "{name:<58} {:>9.2} ms {each:>7} ns a page",
        time.as_secs_f64() * 1e3
    );
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args()
        .nth(1)
        .unwrap_or_else(|| "target/figures.memory".to_owned());
    let path = std::path::Path::new(&path);
    let file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)?;
    file.set_len(MEMORY as u64)?;
    for page in 0..MEMORY / PAGE {
        file.write_all_at(&[page.to_le_bytes()[0] | 1; PAGE], (page * PAGE) as u64)?;
    }
    file.sync_all()?;
    let generation = MemoryGeneration::random();
    let table = || RangeTable::packed([(Gpa::new(0), MEMORY as u64)]);
    let image = || MemoryImage::open(path, table()?, generation).map_err(Box::<dyn Error>::from);

    // A fixed order without a pattern: the multiplier has no factor in common with the number of pages.
    let pages: Vec<usize> = (0..TOUCHED)
        .map(|n| n * 7919 % TOUCHED * (MEMORY / PAGE / TOUCHED))
        .collect();
    let dense: Vec<usize> = (0..TOUCHED).collect();
    let list = |pages: &[usize]| {
        let touches = pages
            .iter()
            .map(|page| (Gpa::new(*page as u64 * PAGE_SIZE), Mark::Read));
        HotPages::from_touches(generation, touches)
    };
    let demand = |read_around| Settings {
        read_around,
        ..Settings::default()
    };
    let prefetch = |pages: &[usize], budget| Settings {
        plan: Plan::Prefetch {
            hot: list(pages),
            budget,
        },
        ..Settings::default()
    };
    let window = Window {
        duration: Duration::from_secs(60),
        pages: usize::MAX,
    };
    let record = Settings {
        plan: Plan::Record(window),
        ..Settings::default()
    };

    println!(
        "64 MiB of 512 MiB touched; scattered: one page of each eight, in no order; dense: the first 64 MiB"
    );
    for cold in [false, true] {
        println!(
            "\npage cache {}",
            if cold { "dropped before each line" } else { "warm" }
        );
        for (name, settings, order) in [
            ("demand, scattered, no read-around", demand(1), &pages),
            ("demand, scattered, read-around 8", demand(8), &pages),
            ("demand, scattered, recording", record.clone(), &pages),
            (
                "prefetch, scattered, all before resume",
                prefetch(&pages, u64::MAX),
                &pages,
            ),
            (
                "prefetch, scattered, 8 MiB before resume",
                prefetch(&pages, 8 << 20),
                &pages,
            ),
            ("demand, dense, no read-around", demand(1), &dense),
            ("demand, dense, read-around 8", demand(8), &dense),
            ("demand, dense, read-around 64", demand(64), &dense),
            (
                "prefetch, dense, all before resume",
                prefetch(&dense, u64::MAX),
                &dense,
            ),
        ] {
            if cold {
                fadvise(&file, 0, None, Advice::DontNeed)?;
            }
            let area = Area::anonymous()?;
            let planned = matches!(settings.plan, Plan::Prefetch { .. });
            let began = Instant::now();
            let server = PageServer::start(&[area.mapping()?], Arc::new(image()?), settings, quit)?;
            server.before_resume().map_err(|fatal| fatal.to_string())?;
            let before = began.elapsed();
            let touched = area.touch(order);
            let counters = server.counters();
            line(name, before + touched, TOUCHED);
            if planned {
                line("    before resume", before, TOUCHED);
                line("    touching", touched, TOUCHED);
            }
            let latency = |share| counters.latency.quantile(share).unwrap_or_default();
            println!(
                "    {} faults ({:?} p50, {:?} p99), {} pages by demand, {} ahead, {} late",
                counters.demand_faults,
                latency(0.5),
                latency(0.99),
                counters.demand_pages,
                counters.prefetch_hits,
                counters.prefetch_late,
            );
        }
        for (name, hot) in [
            ("cow, scattered", None),
            ("cow, scattered, hot pages populated", Some(list(&pages))),
        ] {
            if cold {
                fadvise(&file, 0, None, Advice::DontNeed)?;
            }
            let area = Area::of(&file)?;
            let began = Instant::now();
            if let Some(hot) = hot {
                populate(&hot, &area.mapping()?)?;
                line("    populating", began.elapsed(), TOUCHED);
            }
            let touched = area.touch(&pages);
            line(name, began.elapsed(), TOUCHED);
            line("    touching", touched, TOUCHED);
        }
    }
    let hot = list(&pages);
    let list_path = path.with_extension("hot");
    hot.save(&list_path)?;
    let began = Instant::now();
    let loaded = HotPages::load(&list_path, generation)?;
    println!(
        "\nloading a list of {} runs: {:?}",
        loaded.runs().len(),
        began.elapsed()
    );
    std::fs::remove_file(list_path)?;
    std::fs::remove_file(path)?;
    Ok(())
}
