//! The demonstration of userfaultfd(2), with this crate: memory that is filled when it is touched, page by page, each
//! with another letter.
//!
//! `cargo run -p stencil-uffd --example manpage -- 3`

use std::error::Error;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{
    Extent, Gpa, GuestMapping, Notice, PAGE_SIZE, PageServer, PageSource, RangeTable, Settings,
};

/// Memory that comes from nowhere: the first page that is asked for is full of A, the next of B.
#[derive(Debug)]
struct Letters {
    table: RangeTable,
    generation: MemoryGeneration,
    served: AtomicU8,
}

impl PageSource for Letters {
    fn table(&self) -> &RangeTable {
        &self.table
    }

    fn generation(&self) -> MemoryGeneration {
        self.generation
    }

    fn extent(&self, _offset: u64, limit: u64) -> io::Result<Extent> {
        Ok(Extent::Data(limit))
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let letter = b'A' + self.served.fetch_add(1, Ordering::Relaxed) % 20;
        println!(
            "    page fault: {} bytes at {offset:#x} are filled with {}",
            buffer.len(),
            char::from(letter)
        );
        buffer.fill(letter);
        Ok(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let pages: u32 = std::env::args()
        .nth(1)
        .ok_or("usage: manpage <number of pages>")?
        .parse()?;
    let bytes = u64::from(pages) * PAGE_SIZE;
    let size = usize::try_from(bytes)?;

    // Private and anonymous: nothing is there until it is touched.
    let (access, flags) = (
        ProtFlags::READ | ProtFlags::WRITE,
        MapFlags::PRIVATE | MapFlags::NORESERVE,
    );
    // SAFETY: the kernel chooses a free place.
    let start = unsafe { mmap_anonymous(std::ptr::null_mut(), size, access, flags) }?;
    let start = NonNull::new(start.cast::<u8>()).ok_or("mapped at zero")?;
    println!("memory is mapped at {start:p}");

    // SAFETY: the memory is ours, is only read as below, and is unmapped after the server is gone.
    let mapping = unsafe { GuestMapping::new(Gpa::new(0), start, size) }?;
    let letters = Letters {
        table: RangeTable::packed([(Gpa::new(0), bytes)])?,
        generation: MemoryGeneration::random(),
        served: AtomicU8::new(0),
    };
    let settings = Settings {
        read_around: 1,
        ..Settings::default()
    };
    let server = PageServer::start(&[mapping], Arc::new(letters), settings, |notice| {
        if let Notice::Fatal(fatal) = notice {
            eprintln!("{fatal}");
            std::process::abort();
        }
    })?;

    // Not at the beginning of a page, to see that it makes no difference.
    for offset in (0xf..size).step_by(1024) {
        // SAFETY: the address is within the mapping.
        let byte = unsafe { start.as_ptr().add(offset).read_volatile() };
        println!("read {} at {offset:#x}", char::from(byte));
    }

    println!("{} faults", server.counters().demand_faults);
    server.stop();
    // SAFETY: nobody uses it any more.
    unsafe { munmap(start.as_ptr().cast(), size) }?;
    Ok(())
}
