//! Lists of hot pages: they survive their file, nothing else passes for one, and they can be combined.

use std::collections::BTreeMap;

use proptest::prelude::*;
use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{Gpa, HotPages, LoadError, Mark, PAGE_SIZE};

const MEMORY: MemoryGeneration = MemoryGeneration::from_bytes([7; 16]);

fn list(touches: &[(u64, bool)]) -> HotPages {
    let touch = |&(page, written): &(u64, bool)| {
        (
            Gpa::new(page * PAGE_SIZE),
            if written { Mark::Written } else { Mark::Read },
        )
    };
    HotPages::from_touches(MEMORY, touches.iter().map(touch))
}

/// The pages of a list in their order.
fn pages(list: &HotPages) -> Vec<(u64, Mark)> {
    let pages = |run: &stencil_uffd::HotRun| {
        let (first, mark) = (run.gpa.get() / PAGE_SIZE, run.mark);
        (0..u64::from(run.pages)).map(move |page| (first + page, mark))
    };
    list.runs().iter().flat_map(pages).collect()
}

fn set(list: &HotPages) -> BTreeMap<u64, Mark> {
    pages(list).into_iter().collect()
}

/// Few pages, so that lists meet; often neighbours, so that there are runs.
fn any_list() -> impl Strategy<Value = HotPages> {
    prop::collection::vec((0..12_u64, 1..9_u64, any::<bool>()), 0..12).prop_map(|runs| {
        let touches = |(first, count, written): (u64, u64, bool)| {
            (first * 4..first * 4 + count).map(move |page| (page, written))
        };
        list(&runs.into_iter().flat_map(touches).collect::<Vec<_>>())
    })
}

proptest! {
    #[test]
    fn a_list_survives_its_bytes(hot in any_list()) {
        prop_assert_eq!(HotPages::from_bytes(&hot.to_bytes(), MEMORY).unwrap(), hot);
    }

    #[test]
    fn nothing_passes_for_a_list(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        prop_assert!(HotPages::from_bytes(&bytes, MEMORY).is_err());
    }

    #[test]
    fn a_list_is_the_model_of_first_touch(touches in prop::collection::vec((0..20_u64, any::<bool>()), 0..60)) {
        let mut model: Vec<(u64, Mark)> = Vec::new();
        for &(page, written) in &touches {
            let mark = if written { Mark::Written } else { Mark::Read };
            match model.iter_mut().find(|(known, _)| *known == page) {
                Some((_, known)) => *known = mark.max(*known),
                None => model.push((page, mark)),
            }
        }
        let hot = list(&touches);
        prop_assert_eq!(hot.pages(), model.len() as u64);
        prop_assert_eq!(pages(&hot), model);
    }

    #[test]
    fn union_and_intersection_are_those_of_sets(a in any_list(), b in any_list()) {
        let (union, both) = (a.union(&b).unwrap(), a.intersection(&b).unwrap());
        let (left, right) = (set(&a), set(&b));
        let mut expected = left.clone();
        for (page, mark) in &right {
            expected.entry(*page).and_modify(|known| *known = (*mark).max(*known)).or_insert(*mark);
        }
        prop_assert_eq!(set(&union), expected);
        let meet = |(page, mark): (&u64, &Mark)| right.get(page).map(|other| (*page, *mark.min(other)));
        prop_assert_eq!(set(&both), left.iter().filter_map(meet).collect::<BTreeMap<_, _>>());
        prop_assert_eq!(union.pages() + both.pages(), a.pages() + b.pages());
    }

    #[test]
    fn union_and_intersection_keep_the_order_of_the_first(a in any_list(), b in any_list()) {
        let order = |list: &HotPages| pages(list).into_iter().map(|(page, _)| page).collect::<Vec<_>>();
        let (first, second) = (order(&a), order(&b));
        let more = second.iter().filter(|page| !first.contains(page));
        prop_assert_eq!(order(&a.union(&b).unwrap()), first.iter().chain(more).copied().collect::<Vec<_>>());
        let both = first.iter().filter(|page| second.contains(page));
        prop_assert_eq!(order(&a.intersection(&b).unwrap()), both.copied().collect::<Vec<_>>());
    }

    #[test]
    fn the_laws_of_a_lattice_hold(a in any_list(), b in any_list(), c in any_list()) {
        let or = |x: &HotPages, y: &HotPages| x.union(y).unwrap();
        let and = |x: &HotPages, y: &HotPages| x.intersection(y).unwrap();
        prop_assert_eq!(pages(&or(&a, &a)), pages(&a));
        prop_assert_eq!(pages(&and(&a, &a)), pages(&a));
        prop_assert_eq!(set(&or(&a, &b)), set(&or(&b, &a)));
        prop_assert_eq!(set(&and(&a, &b)), set(&and(&b, &a)));
        prop_assert_eq!(pages(&or(&or(&a, &b), &c)), pages(&or(&a, &or(&b, &c))));
        prop_assert_eq!(pages(&and(&and(&a, &b), &c)), pages(&and(&a, &and(&b, &c))));
        prop_assert_eq!(pages(&or(&a, &and(&a, &b))), pages(&a));
        prop_assert_eq!(pages(&and(&a, &or(&a, &b))), pages(&a));
        prop_assert_eq!(set(&and(&a, &or(&b, &c))), set(&or(&and(&a, &b), &and(&a, &c))));
    }

    #[test]
    fn a_split_loses_nothing(a in any_list(), at in 0..120_u64) {
        let (first, rest) = a.split_at(at);
        prop_assert_eq!(first.pages(), at.min(a.pages()));
        prop_assert_eq!([pages(&first), pages(&rest)].concat(), pages(&a));
    }
}

fn sample() -> HotPages {
    list(&[
        (9, false),
        (10, false),
        (3, true),
        (4, true),
        (700, false),
        (5, true),
    ])
}

#[test]
fn every_flipped_bit_is_found() {
    let bytes = sample().to_bytes();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1 << bit;
            assert!(
                HotPages::from_bytes(&wrong, MEMORY).is_err(),
                "byte {at}, bit {bit}"
            );
        }
        let mut wrong = bytes.clone();
        wrong[at] = !wrong[at];
        assert!(HotPages::from_bytes(&wrong, MEMORY).is_err(), "byte {at}");
    }
}

#[test]
fn every_length_but_its_own_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hot-pages");
    let mut bytes = sample().to_bytes();
    for length in 0..bytes.len() {
        std::fs::write(&path, &bytes[..length]).unwrap();
        let refused = HotPages::load(&path, MEMORY).unwrap_err();
        assert!(
            matches!(refused, LoadError::Length { .. } | LoadError::Foreign),
            "{length}: {refused}"
        );
    }
    bytes.push(0);
    std::fs::write(&path, &bytes).unwrap();
    assert!(matches!(
        HotPages::load(&path, MEMORY),
        Err(LoadError::Length { .. })
    ));
}

#[test]
fn each_kind_of_wrong_file_has_its_own_error() {
    let bytes = sample().to_bytes();
    let load = |bytes: &[u8]| HotPages::from_bytes(bytes, MEMORY).unwrap_err().to_string();
    assert_eq!(load(b"#!/bin/sh"), "the file is no list of hot pages");
    let mut newer = bytes.clone();
    newer[8] = 2;
    assert_eq!(
        load(&newer),
        "the list of hot pages has format 2, and only 1 is known"
    );
    let mut damaged = bytes.clone();
    damaged[70] ^= 1;
    assert!(load(&damaged).starts_with("the list of hot pages is corrupt"));
    let other = MemoryGeneration::from_bytes([8; 16]);
    let stale = HotPages::from_bytes(&bytes, other).unwrap_err();
    assert!(matches!(stale, LoadError::Stale { found, expected } if found == MEMORY && expected == other));
    let absent = HotPages::load(std::path::Path::new("/nonexistent/hot-pages"), MEMORY);
    assert!(matches!(absent, Err(LoadError::Read(_))));
}

/// `bytes` with a change, and the checksum that goes with it: what a bug or malice could write.
fn forged(change: impl FnOnce(&mut Vec<u8>)) -> LoadError {
    let mut bytes = sample().to_bytes();
    change(&mut bytes);
    bytes[48..52].fill(0);
    let checksum = crc32fast::hash(&bytes);
    bytes[48..52].copy_from_slice(&checksum.to_le_bytes());
    HotPages::from_bytes(&bytes, MEMORY).unwrap_err()
}

#[test]
fn a_list_that_cannot_be_is_refused_even_with_a_right_checksum() {
    let run = |number: usize| 64 + 16 * number;
    let put = |at: usize, value: u64, size: usize| {
        move |bytes: &mut Vec<u8>| bytes[at..at + size].copy_from_slice(&value.to_le_bytes()[..size])
    };
    assert!(matches!(
        forged(put(12, 65536, 4)),
        LoadError::PageSize { found: 65536 }
    ));
    assert!(matches!(
        forged(put(40, 99, 8)),
        LoadError::Pages {
            found: 6,
            expected: 99
        }
    ));
    for (at, value, size) in [
        (run(0), 1, 8),
        (run(0), u64::MAX << 12, 8),
        (run(0), (1 << 52) - 4096, 8),
        (run(0) + 8, 0, 4),
        (run(1) + 12, 2, 4),
    ] {
        assert!(
            matches!(forged(put(at, value, size)), LoadError::Run { .. }),
            "{at} {value}"
        );
    }
    let twice = |bytes: &mut Vec<u8>| bytes.copy_within(run(0)..run(0) + 8, run(2));
    let refused = forged(twice);
    assert!(
        matches!(refused, LoadError::Twice { gpa } if gpa == Gpa::new(9 * PAGE_SIZE)),
        "{refused}"
    );
}

#[test]
fn a_header_that_promises_too_much_gets_no_memory() {
    // The error comes before anything is read or reserved.
    for runs in [u64::MAX, 1 << 60, (1 << 22) + 1] {
        let refused = forged(|bytes| bytes[32..40].copy_from_slice(&runs.to_le_bytes()));
        assert!(matches!(refused, LoadError::TooLong { runs: found } if found == runs));
    }
    let refused = forged(|bytes| bytes[32..40].copy_from_slice(&(1_u64 << 22).to_le_bytes()));
    assert!(matches!(refused, LoadError::Length { needed, .. } if needed == 64 + (16 << 22)));
}

#[test]
fn a_list_is_replaced_as_a_whole_and_nothing_is_left_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("hot-pages");
    for hot in [list(&[]), sample()] {
        hot.save(&path).unwrap();
        assert_eq!(HotPages::load(&path, MEMORY).unwrap(), hot);
    }
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    assert!(sample().save(&directory.path().join("absent/hot-pages")).is_err());
}

#[test]
fn lists_of_different_memories_are_not_combined() {
    let other = HotPages::from_touches(MemoryGeneration::random(), []);
    assert!(sample().union(&other).is_err() && sample().intersection(&other).is_err());
}
