//! Guest memory read and written by system calls. Where a page cannot be had, they answer EFAULT; a plain access would
//! be a SIGSEGV or a SIGBUS, and the end of the VMM.

use std::io;

use libc::{c_void, iovec};

/// Fills `buffer` with what is at `from` in this process.
pub(crate) fn read(from: *const u8, buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < buffer.len() {
        let rest = &mut buffer[done..];
        let local = span(rest.as_mut_ptr(), rest.len());
        let remote = span(from.wrapping_add(done).cast_mut(), rest.len());
        // SAFETY: what is written is `rest`; what is read is no matter of safety, as the kernel checks it.
        let moved =
            unsafe { libc::process_vm_readv(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        done += moved_bytes(moved)?;
    }
    Ok(())
}

/// Writes `bytes` to `to` in this process.
///
/// # Safety
///
/// So much at `to` is guest memory, to which no reference is held.
pub(crate) unsafe fn write(to: *mut u8, bytes: &[u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        let rest = &bytes[done..];
        let local = span(rest.as_ptr().cast_mut(), rest.len());
        let remote = span(to.wrapping_add(done), rest.len());
        // SAFETY: `rest` is only read; the caller promises that the other may be written.
        let moved =
            unsafe { libc::process_vm_writev(libc::getpid(), &raw const local, 1, &raw const remote, 1, 0) };
        done += moved_bytes(moved)?;
    }
    Ok(())
}

fn span(start: *mut u8, length: usize) -> iovec {
    iovec {
        iov_base: start.cast::<c_void>(),
        iov_len: length,
    }
}

/// An interrupted call has moved less than all.
fn moved_bytes(result: isize) -> io::Result<usize> {
    match usize::try_from(result) {
        Ok(0) => Err(io::ErrorKind::WriteZero.into()),
        Ok(moved) => Ok(moved),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_cannot_be_had_is_an_error_and_no_signal() {
        let region: vm_memory::MmapRegion = vm_memory::MmapRegion::new(2 * 4096).unwrap();
        let start = region.as_ptr();
        // SAFETY: the page is of the mapping, to which there is no reference.
        let locked = unsafe { libc::mprotect(start.wrapping_add(4096).cast(), 4096, libc::PROT_NONE) };
        assert_eq!(locked, 0);
        let write_at = |place: usize, bytes: &[u8]| {
            // SAFETY: the mapping is this test's alone.
            unsafe { write(start.wrapping_add(place), bytes) }
        };
        write_at(4090, b"abcdef").unwrap();
        let mut buffer = [0; 6];
        read(start.wrapping_add(4090), &mut buffer).unwrap();
        assert_eq!(&buffer, b"abcdef");
        let refused = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        assert_eq!(
            refused(read(start.wrapping_add(4091), &mut buffer)),
            Some(libc::EFAULT)
        );
        assert_eq!(refused(write_at(4096, b"a")), Some(libc::EFAULT));
    }
}
