//! Giving back to the host the stack that a call has used and nobody needs any more: a restored VM may live for days.

use std::io;
use std::mem::MaybeUninit;
use std::ptr;

/// Bytes of stack that whoever is asked to give it back uses himself, by far.
const IN_USE: usize = 8192;
const PAGE: usize = 4096;

/// Drops the pages of this thread's stack below what is in use now: they were, in deeper calls that have returned.
pub(crate) fn give_back_stack() -> io::Result<()> {
    let check = |code| match code {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(code)),
    };
    let mut attributes = MaybeUninit::uninit();
    // SAFETY: it initialises the attributes of this thread.
    check(unsafe { libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) })?;
    // SAFETY: they are initialised.
    let mut attributes = unsafe { attributes.assume_init() };
    let (mut lowest, mut size) = (ptr::null_mut(), 0);
    // SAFETY: these are the attributes, and places for what they say; they are destroyed once, and not used after that.
    let read = check(unsafe {
        let read = libc::pthread_attr_getstack(&raw const attributes, &raw mut lowest, &raw mut size);
        libc::pthread_attr_destroy(&raw mut attributes);
        read
    });
    read?;
    let here = (&raw const size).addr();
    let end = here.saturating_sub(IN_USE) / PAGE * PAGE;
    let unused = end.saturating_sub(lowest.addr());
    // SAFETY: the pages belong to this thread's stack, below all that it uses now, with room for this call. Nothing
    // refers to them: what is there was left by calls that have returned.
    if unused > 0 && unsafe { libc::madvise(lowest, unused, libc::MADV_DONTNEED) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::hint::black_box;

    use crate::pagemap;

    const DEEP: usize = 1 << 20;

    /// Fills much stack; says where the first whole page of it was.
    #[inline(never)]
    fn use_stack() -> u64 {
        let mut deep = [0_u8; DEEP];
        black_box(&mut deep).fill(1);
        deep.as_ptr().addr().next_multiple_of(PAGE) as u64
    }

    /// Whether any page from there on is resident.
    fn is_kept(start: u64) -> bool {
        let touched = pagemap::touched(start, (DEEP / 2) as u64).unwrap();
        touched.iter().next().is_some()
    }

    #[test]
    fn stack_that_a_call_has_used_is_given_back_and_can_be_used_again() {
        let local = black_box([7_u8; 4096]);
        for _ in 0..2 {
            let start = use_stack();
            assert!(is_kept(start));
            give_back_stack().unwrap();
            assert!(!is_kept(start));
        }
        assert_eq!(local, black_box([7_u8; 4096]));
    }
}
