//! The memory file: refused if it is too short, its holes known.

use stencil_core::generation::MemoryGeneration;
use stencil_uffd::{Extent, ImageError, MemoryImage, PageSource as _};

use crate::support::{Image, PAGE, gpa};

const BYTES: u64 = PAGE as u64;

#[test]
fn a_file_that_is_shorter_than_its_table_is_refused_with_the_numbers() {
    let image = Image::new(4);
    image.cut(3 * PAGE + 1);
    let refused = MemoryImage::open(&image.path, image.table(), image.generation).unwrap_err();
    let ImageError::TooShort { length, needed, .. } = refused else {
        panic!("{refused}")
    };
    assert_eq!((length, needed), (12289, 16384));
}

#[test]
fn a_file_that_is_not_there_is_an_error_that_names_it() {
    let image = Image::new(1);
    let path = image.path.with_file_name("absent");
    let refused = MemoryImage::open(&path, image.table(), MemoryGeneration::random()).unwrap_err();
    assert!(refused.to_string().contains("absent"));
}

#[test]
fn holes_are_known_without_reading() {
    let image = Image::sparse(64, |page| matches!(page, 0..8 | 16 | 40..64));
    let opened = image.open();
    let extent = |page: u64, pages: u64| opened.extent(page * BYTES, pages * BYTES).unwrap();
    // Twice: asked of the file system, and remembered.
    for _ in 0..2 {
        assert_eq!(extent(0, 64), Extent::Zeros(8 * BYTES));
        assert_eq!(extent(3, 2), Extent::Zeros(2 * BYTES));
        assert_eq!(extent(8, 64), Extent::Data(8 * BYTES));
        assert_eq!(extent(12, 64), Extent::Data(4 * BYTES));
        assert_eq!(extent(16, 64), Extent::Zeros(BYTES));
        assert_eq!(extent(17, 5), Extent::Data(5 * BYTES));
        assert_eq!(extent(39, 25), Extent::Data(BYTES));
        assert_eq!(extent(50, 14), Extent::Zeros(14 * BYTES));
    }
}

#[test]
fn a_gpa_and_its_place_in_the_file_are_found_from_each_other() {
    let opened = Image::new(4).open();
    assert_eq!(opened.offset_of(gpa(3)), Some(3 * BYTES));
    assert_eq!(opened.gpa_of(3 * BYTES), Some(gpa(3)));
    assert_eq!((opened.offset_of(gpa(4)), opened.gpa_of(4 * BYTES)), (None, None));
}
