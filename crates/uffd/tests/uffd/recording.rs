//! What is recorded is what was touched, and what was recorded is what need not be touched again.

use std::sync::Arc;
use std::time::Duration;

use stencil_uffd::{Closed, HotPages, Mark, Notice, Plan, Settings, Window};

use crate::support::{Image, Ram, contents, gpa, planned, serve};

const LONG: Duration = Duration::from_secs(3600);

fn record(pages: usize) -> Settings {
    // Read-around would hide touches: it is not done while recording.
    Settings {
        read_around: 16,
        ..planned(Plan::Record(Window {
            duration: LONG,
            pages,
        }))
    }
}

#[test]
fn order_and_kind_of_first_touches_are_recorded_without_zero_pages() {
    let image = Image::sparse(256, |page| (100..120).contains(&page));
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), record(usize::MAX));
    server.before_resume().unwrap();
    ram.touch(50);
    ram.write(7, 1);
    ram.touch(110);
    ram.write(111, 1);
    ram.touch(51);
    ram.touch(8);
    ram.write(50, 1);
    ram.touch(7);
    let recording = server.take_recording().unwrap();
    assert_eq!(recording.closed, Closed::Taken);
    let touches: Vec<_> = recording
        .touches
        .iter()
        .map(|touch| (touch.gpa, touch.mark))
        .collect();
    let later = if recording.saw_later_writes {
        Mark::Written
    } else {
        Mark::Read
    };
    assert_eq!(
        touches,
        [
            (gpa(50), later),
            (gpa(7), Mark::Written),
            (gpa(51), Mark::Read),
            (gpa(8), Mark::Read)
        ]
    );
    assert!(recording.touches.is_sorted_by_key(|touch| touch.at));
    assert_eq!(recording.hot_pages().generation(), image.generation);
    assert_eq!(server.take_recording(), None);
    // What was write-protected for it can be written as ever, and the image is still behind what was not touched.
    ram.write(51, 2);
    assert_eq!(ram.touch(51), 2);
    (150..170).for_each(|page| assert!(ram.read(page) == contents(page)));
}

#[test]
fn what_was_recorded_and_is_fetched_needs_no_fault() {
    let image = Image::sparse(4096, |page| (1000..1100).contains(&page));
    let order: Vec<usize> = (0..2000).map(|n| n * 1237 % 4096).collect();
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), record(usize::MAX));
    server.before_resume().unwrap();
    order.iter().for_each(|page| _ = ram.touch(*page));
    let hot = server.take_recording().unwrap().hot_pages();
    let recorded = order.iter().filter(|page| !(1000..1100).contains(*page));
    assert_eq!(hot.pages(), recorded.clone().count() as u64);
    server.stop();

    let path = image.path.with_file_name("hot-pages");
    hot.save(&path).unwrap();
    let hot = HotPages::load(&path, image.generation).unwrap();
    let ram = Ram::new(image.pages);
    let plan = Plan::Prefetch {
        hot,
        budget: u64::MAX,
    };
    let (server, _notices) = serve(&ram, Arc::new(image.open()), planned(plan));
    server.before_resume().unwrap();
    recorded.for_each(|page| assert!(ram.read(*page) == contents(*page)));
    assert_eq!(server.counters().demand_faults, 0);
}

#[test]
fn a_recording_closes_by_itself_when_it_has_its_pages() {
    let image = Image::new(64);
    let ram = Ram::new(image.pages);
    let (server, notices) = serve(&ram, Arc::new(image.open()), record(3));
    (10..20).for_each(|page| _ = ram.touch(page));
    let notice = notices.recv().unwrap();
    assert!(matches!(notice, Notice::RecordingClosed(Closed::Pages)));
    let recording = server.take_recording().unwrap();
    assert_eq!(
        recording
            .touches
            .iter()
            .map(|touch| touch.gpa)
            .collect::<Vec<_>>(),
        [10, 11, 12].map(gpa)
    );
}

#[test]
fn a_recording_closes_by_itself_when_its_time_is_over_also_if_nothing_is_touched() {
    let image = Image::new(64);
    let ram = Ram::new(image.pages);
    let window = Window {
        duration: Duration::from_millis(1),
        pages: usize::MAX,
    };
    let (server, notices) = serve(&ram, Arc::new(image.open()), planned(Plan::Record(window)));
    ram.touch(1);
    server.before_resume().unwrap();
    assert!(matches!(
        notices.recv().unwrap(),
        Notice::RecordingClosed(Closed::Time)
    ));
    ram.touch(2);
    let recording = server.take_recording().unwrap();
    assert_eq!(
        recording
            .touches
            .iter()
            .map(|touch| touch.gpa)
            .collect::<Vec<_>>(),
        [gpa(1)]
    );
    assert_eq!(recording.touches[0].at, Duration::ZERO);
}

#[test]
fn several_threads_are_recorded_with_every_page_once() {
    let image = Image::new(2048);
    let ram = Ram::new(image.pages);
    let settings = Settings {
        threads: 3,
        ..record(usize::MAX)
    };
    let (server, _notices) = serve(&ram, Arc::new(image.open()), settings);
    std::thread::scope(|scope| {
        for step in [1, 5, 7] {
            let ram = &ram;
            scope.spawn(move || {
                for n in 0..2048 {
                    let page = n * step % 2048;
                    if page % 3 == 0 {
                        ram.write(page, 1)
                    } else {
                        _ = ram.touch(page);
                    }
                }
            });
        }
    });
    let recording = server.take_recording().unwrap();
    assert_eq!(recording.touches.len(), 2048);
    let hot = recording.hot_pages();
    assert_eq!(hot.pages(), 2048);
    let written: u32 = hot
        .runs()
        .iter()
        .filter(|run| run.mark == Mark::Written)
        .map(|run| run.pages)
        .sum();
    assert_eq!(written, 683);
}
