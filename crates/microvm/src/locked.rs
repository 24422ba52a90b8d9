//! Locking without poison: a lock's data is good even where a thread that held it has panicked, because each critical
//! section here leaves its data whole at every step.

use std::sync::{Mutex, MutexGuard, PoisonError};

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
