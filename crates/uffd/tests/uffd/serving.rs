//! Pages come as they are in the image, whoever asks and in whatever order.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use stencil_uffd::{HotPages, Mark, PageServer, Plan, Settings, StartError};

use crate::support::{Image, PAGE, Ram, alone, contents, gpa, planned, serve};

/// A number that looks random and is the same in each run (xorshift).
fn next(seed: &mut u64) -> usize {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    usize::try_from(*seed >> 16).unwrap()
}

#[test]
fn every_page_is_as_in_the_image_under_random_access_by_several_threads() {
    for (read_around, threads) in [(1, 1), (8, 1), (16, 3), (64, 2)] {
        let is_hole = |page| matches!(page, 100..164 | 1000 | 1900..2048);
        let image = Image::sparse(2048, is_hole);
        let ram = Ram::new(image.pages);
        let settings = Settings {
            read_around,
            threads,
            plan: Plan::Demand,
        };
        let (server, _notices) = serve(&ram, Arc::new(image.open()), settings);
        std::thread::scope(|scope| {
            for thread in 1..5_u64 {
                let ram = &ram;
                scope.spawn(move || {
                    let mut seed = thread << 40 | 0x9E37_79B9;
                    for _ in 0..3000 {
                        let page = next(&mut seed) % 2048;
                        let expected = if is_hole(page) { [0; PAGE] } else { contents(page) };
                        assert!(ram.read(page) == expected, "page {page}");
                    }
                });
            }
        });
        assert_eq!(server.fatal().map(|fatal| fatal.to_string()), None);
        let counters = server.stop();
        assert_eq!(counters.latency.count(), counters.demand_faults);
        assert!(counters.demand_pages <= 2048 - 64 - 1 - 148);
    }
}

#[test]
fn pages_are_as_in_the_image_while_others_are_written() {
    let image = Image::new(512);
    let ram = Ram::new(image.pages);
    let (_server, _notices) = serve(&ram, Arc::new(image.open()), Settings::default());
    std::thread::scope(|scope| {
        scope.spawn(|| (0..512).step_by(2).for_each(|page| ram.write(page, 0xff)));
        (1..512)
            .step_by(2)
            .for_each(|page| assert!(ram.read(page) == contents(page), "page {page}"));
    });
    for page in (0..512).step_by(2) {
        let mut expected = contents(page);
        expected[0] = 0xff;
        assert!(ram.read(page) == expected, "page {page}");
    }
}

#[test]
fn holes_are_zeros_and_nothing_is_read_for_them() {
    let image = Image::sparse(256, |page| (0..256).contains(&page));
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), Settings::default());
    assert!((0..256).all(|page| ram.read(page) == [0; PAGE]));
    let counters = server.stop();
    assert_eq!(
        (counters.bytes_read, counters.demand_pages, counters.zero_pages),
        (0, 0, 256)
    );
}

#[test]
fn neighbours_come_in_one_fault_and_stop_at_holes() {
    let image = Image::sparse(64, |page| (12..16).contains(&page));
    let ram = Ram::new(image.pages);
    let settings = Settings {
        read_around: 16,
        ..Settings::default()
    };
    let (server, _notices) = serve(&ram, Arc::new(image.open()), settings);
    ram.touch(5);
    assert_eq!(server.counters().bytes_read, 12 * PAGE as u64);
    (0..12).for_each(|page| assert!(ram.read(page) == contents(page)));
    assert_eq!(server.counters().demand_faults, 1);
    ram.touch(14);
    assert_eq!(server.stop().zero_pages, 4);
}

#[test]
fn a_page_that_was_there_before_is_not_overwritten() {
    let image = Image::new(64);
    let ram = Ram::new(image.pages);
    ram.write(7, 0x55);
    let settings = Settings {
        read_around: 64,
        ..Settings::default()
    };
    let (server, _notices) = serve(&ram, Arc::new(image.open()), settings);
    ram.touch(0);
    assert_eq!(ram.read(7)[..2], [0x55, 0]);
    (8..64).for_each(|page| assert!(ram.read(page) == contents(page)));
    let counters = server.stop();
    assert_eq!((counters.demand_faults, counters.already_there), (1, 1));
}

#[test]
fn the_kernel_reads_it_too() {
    let image = Image::new(16);
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), alone());
    assert_eq!(ram.read_by_kernel(3).unwrap(), contents(3));
    assert_eq!(server.counters().demand_faults, 1);
}

#[test]
fn discarded_memory_is_zeros_and_never_again_the_image() {
    let image = Image::new(64);
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), Settings::default());
    ram.write(3, 9);
    ram.discard(2..6);
    ram.discard(40..42);
    for page in 0..64 {
        let expected = if (2..6).contains(&page) || (40..42).contains(&page) {
            [0; PAGE]
        } else {
            contents(page)
        };
        assert!(ram.read(page) == expected, "page {page}");
    }
    assert_eq!(server.stop().discarded_pages, 6);
}

#[test]
fn memory_is_discarded_while_it_is_touched_and_fetched() {
    for threads in [1, 3] {
        let image = Image::new(1024);
        let ram = Ram::new(image.pages);
        let hot = HotPages::from_touches(image.generation, (0..1024).map(|page| (gpa(page), Mark::Read)));
        let settings = Settings {
            threads,
            ..planned(Plan::Prefetch { hot, budget: 0 })
        };
        let (server, _notices) = serve(&ram, Arc::new(image.open()), settings);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut seed = 7;
                for _ in 0..2000 {
                    let page = next(&mut seed) % 1024;
                    ram.discard(page..(page + 4).min(1024));
                }
                done.store(true, Ordering::SeqCst);
            });
            let mut seed = 3;
            while !done.load(Ordering::SeqCst) {
                let page = next(&mut seed) % 1024;
                let found = ram.touch(page);
                assert!(found == 0 || found == contents(page)[0], "page {page}");
            }
        });
        ram.discard(0..1024);
        assert!((0..1024).all(|page| ram.read(page) == [0; PAGE]));
        assert_eq!(server.fatal().map(|fatal| fatal.to_string()), None);
    }
}

#[test]
fn memory_can_be_unmapped_while_it_is_served() {
    let image = Image::new(256);
    let ram = Ram::new(image.pages);
    let settings = Settings {
        read_around: 32,
        ..Settings::default()
    };
    let (server, _notices) = serve(&ram, Arc::new(image.open()), settings);
    ram.unmap(64..128);
    for page in (0..64).chain(128..256) {
        assert!(ram.read(page) == contents(page), "page {page}");
    }
    assert_eq!(server.fatal().map(|fatal| fatal.to_string()), None);
    server.stop();
    assert!(ram.read_by_kernel(64).is_err());
}

#[test]
fn hot_pages_are_there_before_the_guest_resumes() {
    let image = Image::sparse(2000, |page| (1500..1600).contains(&page));
    let order: Vec<usize> = (0..1500).rev().step_by(3).chain(1700..1800).collect();
    let hot = HotPages::from_touches(
        image.generation,
        order.iter().map(|page| (gpa(*page), Mark::Read)),
    );
    let ram = Ram::new(image.pages);
    let plan = Plan::Prefetch {
        hot,
        budget: u64::MAX,
    };
    let (server, _notices) = serve(&ram, Arc::new(image.open()), planned(plan));
    server.before_resume().unwrap();
    order
        .iter()
        .for_each(|page| assert!(ram.read(*page) == contents(*page)));
    let counters = server.stop();
    assert_eq!(
        (
            counters.demand_faults,
            counters.prefetch_hits,
            counters.prefetch_waste
        ),
        (0, 600, 0)
    );
    assert_eq!(counters.bytes_read, 600 * PAGE as u64);
}

#[test]
fn what_is_over_the_budget_follows_behind_the_guest() {
    let image = Image::new(4096);
    let hot = HotPages::from_touches(
        image.generation,
        (0..4096).rev().map(|page| (gpa(page), Mark::Read)),
    );
    let ram = Ram::new(image.pages);
    let budget = 1000 * PAGE as u64;
    let (server, _notices) = serve(
        &ram,
        Arc::new(image.open()),
        planned(Plan::Prefetch { hot, budget }),
    );
    server.before_resume().unwrap();
    let before = server.counters();
    assert!(before.prefetch_hits >= 1000 && before.demand_faults == 0);
    // The guest goes the other way, and meets the prefetch.
    (0..4096).for_each(|page| assert!(ram.read(page) == contents(page), "page {page}"));
    let after = server.stop();
    assert_eq!(after.demand_pages + after.prefetch_hits, 4096);
}

#[test]
fn a_list_of_another_memory_is_refused() {
    let (image, other) = (Image::new(4), Image::new(4));
    let ram = Ram::new(image.pages);
    let hot = HotPages::from_touches(other.generation, [(gpa(0), Mark::Read)]);
    let settings = planned(Plan::Prefetch { hot, budget: 0 });
    let refused = PageServer::start(&[ram.mapping()], Arc::new(image.open()), settings, |_| ());
    assert!(matches!(refused, Err(StartError::OtherMemory { found, .. }) if found == other.generation));
}

#[test]
fn memory_that_the_image_does_not_have_is_refused() {
    let image = Image::new(4);
    let ram = Ram::new(5);
    let refused = PageServer::start(&[ram.mapping()], Arc::new(image.open()), alone(), |_| ());
    assert!(matches!(refused, Err(StartError::NotInImage { .. })));
}

#[test]
fn complete_memory_outlives_its_server() {
    let image = Image::sparse(128, |page| (32..64).contains(&page));
    let ram = Ram::new(image.pages);
    let (server, _notices) = serve(&ram, Arc::new(image.open()), Settings::default());
    (0..128).for_each(|page| _ = ram.touch(page));
    server.stop();
    assert!(ram.read(5) == contents(5));
    ram.write(40, 1);
    assert_eq!(ram.touch(40), 1);
}
