//! Loads the kernel modules that lie in the image.

use std::fs::{self, File};
use std::io;

use rustix::io::Errno;

/// Which modules there are, one path a line; each needs only those before it.
const LIST: &str = "/lib/modules/list";

/// Loads them. One that cannot be loaded is told and left out: another may be enough.
pub(crate) fn load(tell: impl Fn(&str, &io::Error)) {
    let list = fs::read_to_string(LIST).unwrap_or_default();
    for path in list.lines() {
        let loaded = File::open(path).and_then(|module| match rustix::system::finit_module(module, c"", 0) {
            Err(error) if error != Errno::EXIST => Err(error.into()),
            _ => Ok(()),
        });
        if let Err(error) = loaded {
            tell(path, &error);
        }
    }
}
