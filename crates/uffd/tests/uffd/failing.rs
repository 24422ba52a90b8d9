//! A page that cannot be read ends the guest: nobody hangs, and nobody reads zeros in its place.

use std::io;
use std::os::unix::process::ExitStatusExt as _;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex};

use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{
    Extent, Fatal, Gpa, HotPages, Mark, MemoryImage, Notice, PageSource, Plan, RangeTable, Settings,
};

use crate::support::{Damaged, Image, PAGE, Ram, again, alone, contents, gpa, planned, serve};

fn fatal(notices: &Receiver<Notice>) -> Arc<Fatal> {
    match notices.recv().unwrap() {
        Notice::Fatal(fatal) => fatal,
        other => panic!("{other:?}"),
    }
}

fn place(fatal: &Fatal) -> (Gpa, u64, String) {
    match fatal {
        Fatal::Unreadable {
            gpa,
            file_offset,
            source,
        } => (*gpa, *file_offset, source.to_string()),
        other => panic!("{other:?}"),
    }
}

fn damaged(image: &Image, page: usize) -> Arc<Damaged> {
    Arc::new(Damaged {
        image: image.open(),
        page,
        panics: false,
    })
}

#[test]
fn a_page_that_cannot_be_read_is_named_and_who_waits_for_it_is_stopped() {
    for threads in [1, 3] {
        let image = Image::new(64);
        let ram = Ram::new(image.pages);
        let settings = Settings {
            threads,
            ..Settings::default()
        };
        let (server, notices) = serve(&ram, damaged(&image, 21), settings);
        // A neighbour of it is served all the same.
        assert_eq!(ram.read_by_kernel(20).unwrap(), contents(20));
        let waiting = ram.read_by_kernel(21).unwrap_err();
        assert_eq!(waiting.raw_os_error(), Some(libc::EFAULT));
        let fatal = fatal(&notices);
        assert_eq!(
            place(&fatal),
            (gpa(21), 21 * PAGE as u64, "this page is damaged".to_owned())
        );
        assert_eq!(
            fatal.to_string(),
            "the page at gpa 0x115000 cannot be read, at byte 86016 of the image"
        );
        // All of memory is taken away, also what was there.
        assert_eq!(
            ram.read_by_kernel(20).unwrap_err().raw_os_error(),
            Some(libc::EFAULT)
        );
        assert!(server.fatal().is_some() && server.before_resume().is_err());
    }
}

#[test]
fn a_file_that_is_cut_while_it_is_served_ends_the_guest() {
    // At a page, and within one: what a mapping of the file would have filled with zeros.
    for cut in [32 * PAGE, 32 * PAGE + 100] {
        let image = Image::new(64);
        let ram = Ram::new(image.pages);
        let (_server, notices) = serve(&ram, Arc::new(image.open()), alone());
        assert_eq!(ram.read_by_kernel(40).unwrap(), contents(40));
        image.cut(cut);
        assert_eq!(ram.read_by_kernel(31).unwrap(), contents(31));
        assert_eq!(
            ram.read_by_kernel(32).unwrap_err().raw_os_error(),
            Some(libc::EFAULT)
        );
        let (at, offset, why) = place(&fatal(&notices));
        assert_eq!((at, offset), (gpa(32), 32 * PAGE as u64));
        assert_eq!(
            why,
            format!("the file has {cut} bytes, and its ranges need 262144: it was cut")
        );
    }
}

#[test]
fn a_cut_file_is_not_taken_for_a_hole() {
    let image = Image::new(64);
    let ram = Ram::new(image.pages);
    let (_server, notices) = serve(&ram, Arc::new(image.open()), alone());
    image.cut(8 * PAGE);
    assert_eq!(
        ram.read_by_kernel(50).unwrap_err().raw_os_error(),
        Some(libc::EFAULT)
    );
    assert_eq!(place(&fatal(&notices)).0, gpa(50));
}

#[test]
fn a_hot_page_that_cannot_be_read_keeps_the_guest_from_resuming() {
    let image = Image::new(64);
    let ram = Ram::new(image.pages);
    let hot = HotPages::from_touches(image.generation, (0..64).map(|page| (gpa(page), Mark::Read)));
    let settings = planned(Plan::Prefetch {
        hot,
        budget: u64::MAX,
    });
    let (server, notices) = serve(&ram, damaged(&image, 33), settings);
    let refused = server.before_resume().unwrap_err();
    assert_eq!(place(&refused).0, gpa(33));
    assert_eq!(place(&fatal(&notices)).0, gpa(33));
}

#[test]
fn a_source_that_panics_ends_the_guest() {
    let image = Image::new(8);
    let ram = Ram::new(image.pages);
    let source = Damaged {
        image: image.open(),
        page: 2,
        panics: true,
    };
    let (_server, notices) = serve(&ram, Arc::new(source), alone());
    assert_eq!(
        ram.read_by_kernel(2).unwrap_err().raw_os_error(),
        Some(libc::EFAULT)
    );
    assert_eq!(
        fatal(&notices).to_string(),
        "the page server panicked: this source panics"
    );
}

#[test]
fn memory_that_is_not_complete_cannot_be_read_after_its_server() {
    let image = Image::new(16);
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), alone());
    assert_eq!(ram.read_by_kernel(3).unwrap(), contents(3));
    server.stop();
    for page in [3, 4] {
        assert_eq!(
            ram.read_by_kernel(page).unwrap_err().raw_os_error(),
            Some(libc::EFAULT)
        );
    }
}

/// A source that is asked, and answers when it is let.
#[derive(Debug)]
struct Slow {
    image: MemoryImage,
    asked: Mutex<Sender<()>>,
    open: Mutex<bool>,
    opened: Condvar,
}

impl PageSource for Slow {
    fn table(&self) -> &RangeTable {
        self.image.table()
    }

    fn generation(&self) -> MemoryGeneration {
        self.image.generation()
    }

    fn extent(&self, offset: u64, limit: u64) -> io::Result<Extent> {
        self.image.extent(offset, limit)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.asked.lock().unwrap().send(()).unwrap();
        drop(
            self.opened
                .wait_while(self.open.lock().unwrap(), |open| !*open)
                .unwrap(),
        );
        self.image.read(offset, buffer)
    }
}

#[test]
fn who_waits_when_the_server_stops_is_served_or_stopped() {
    let image = Image::new(16);
    let ram = Ram::new(image.pages);
    let (sender, asked) = channel();
    let (asked_by, open, opened) = (Mutex::new(sender), Mutex::new(false), Condvar::new());
    let slow = Arc::new(Slow {
        image: image.open(),
        asked: asked_by,
        open,
        opened,
    });
    let source: Arc<Slow> = Arc::clone(&slow);
    let (server, _notices) = serve(&ram, source, alone());
    std::thread::scope(|scope| {
        let ram = &ram;
        let readers = [1, 2, 3].map(|page| (page, scope.spawn(move || ram.read_by_kernel(page))));
        asked.recv().unwrap();
        let stop = scope.spawn(move || server.stop());
        *slow.open.lock().unwrap() = true;
        slow.opened.notify_all();
        stop.join().unwrap();
        for (page, reader) in readers {
            match reader.join().unwrap() {
                Ok(bytes) => assert_eq!(bytes, contents(page)),
                Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EFAULT)),
            }
        }
    });
}

#[test]
#[ignore = "dies; run by the test below"]
fn touches_a_page_that_cannot_be_read() {
    let image = Image::new(8);
    let ram = Ram::new(image.pages);
    let (_server, _notices) = serve(&ram, damaged(&image, 2), alone());
    println!("a byte of it is {}", ram.touch(2));
}

#[test]
fn a_thread_that_touches_a_page_that_cannot_be_read_gets_sigsegv() {
    // It dies without a word to its files: they lie where this test removes them.
    let scratch = tempfile::tempdir().unwrap();
    let output = again("failing::touches_a_page_that_cannot_be_read", |command| {
        command.env("TMPDIR", scratch.path());
    });
    assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
    assert!(!String::from_utf8_lossy(&output.stdout).contains("a byte of it is"));
}
