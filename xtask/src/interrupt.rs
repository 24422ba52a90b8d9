//! What is undone when the task is interrupted (Ctrl-C, SIGTERM): a VMM outlives its server by design, and nothing
//! else would end it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

type Undo = Box<dyn FnOnce() + Send>;

static UNDOS: Mutex<BTreeMap<u64, Undo>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0);

/// The exit code of a shell's convention for a program that SIGINT ended.
const INTERRUPTED: i32 = 130;

/// Something that is undone on an interrupt, as long as this lives.
#[derive(Debug)]
pub(crate) struct UndoneOnInterrupt(u64);

impl UndoneOnInterrupt {
    pub(crate) fn by(undo: impl FnOnce() + Send + 'static) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        undos().insert(number, Box::new(undo));
        Self(number)
    }
}

impl Drop for UndoneOnInterrupt {
    fn drop(&mut self) {
        undos().remove(&self.0);
    }
}

fn undos() -> MutexGuard<'static, BTreeMap<u64, Undo>> {
    UNDOS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Begins to listen for interrupts, on a thread of its own.
pub(crate) fn listen() -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let (mut interrupts, mut terminations) = {
        let _context = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupts.recv() => {}
                _ = terminations.recv() => {}
            }
        });
        // Held until the end: nothing new is begun while things are undone.
        let mut undos = undos();
        // The latest first: what was begun inside of something goes before it.
        while let Some((_, undo)) = undos.pop_last() {
            undo();
        }
        leave();
    });
    Ok(())
}

#[expect(
    clippy::exit,
    reason = "an interrupt ends the program whatever the main thread is waiting for"
)]
fn leave() -> ! {
    std::process::exit(INTERRUPTED)
}
