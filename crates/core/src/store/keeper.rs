//! An image stays while instances of it are made: who removes it and who commits them keep out of each other's way.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard};

use crate::image::ImageName;
use crate::layout::DataDir;
use crate::store::error::StoreError;
use crate::store::is_missing;

/// Keeps an image while instances of it are committed.
///
/// An image's users are looked for without a lock, for that takes as long as there are many instances. Then the image goes under the
/// lock, unless instances of it were committed since the look began: it is looked again.
#[derive(Debug, Default)]
pub(super) struct Keeper {
    /// Shared while an instance with an image is committed, exclusive while an image goes.
    lock: RwLock<()>,
    /// How many instances of each image were committed, or tried to be.
    commits: Mutex<HashMap<ImageName, u64>>,
}

/// An image that is kept while an instance of it is committed.
pub(super) struct Kept<'a> {
    keeper: &'a Keeper,
    image: &'a ImageName,
    _guard: RwLockReadGuard<'a, ()>,
}

impl Keeper {
    /// As long as the guard lives, the image is not removed.
    ///
    /// # Errors
    /// [`StoreError::NoImage`] if it was.
    pub(super) fn keep<'a>(&'a self, data: &DataDir, image: &'a ImageName) -> Result<Kept<'a>, StoreError> {
        // Nothing panics while it holds this lock, here and below.
        let guard = self.lock.read().unwrap_or_else(PoisonError::into_inner);
        if is_missing(&data.image(image).record()) {
            return Err(StoreError::NoImage { name: image.clone() });
        }
        Ok(Kept {
            keeper: self,
            image,
            _guard: guard,
        })
    }

    fn commits_of(&self, image: &ImageName) -> u64 {
        let commits = self.commits.lock().unwrap_or_else(PoisonError::into_inner);
        commits.get(image).copied().unwrap_or(0)
    }

    /// Lets `go` do what makes an image go when it `has_no_users`: neither when that was seen, nor since.
    pub(super) fn when_unused(
        &self,
        image: &ImageName,
        mut has_no_users: impl FnMut() -> Result<(), StoreError>,
        go: impl FnOnce() -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        loop {
            let before = self.commits_of(image);
            has_no_users()?;
            let _alone = self.lock.write().unwrap_or_else(PoisonError::into_inner);
            if self.commits_of(image) == before {
                return go();
            }
        }
    }
}

impl Drop for Kept<'_> {
    /// Counts the commit while the lock is held, and when the instance is there: who began to look before may not have seen it.
    fn drop(&mut self) {
        let mut commits = self.keeper.commits.lock().unwrap_or_else(PoisonError::into_inner);
        *commits.entry(self.image.clone()).or_default() += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::fs;
    use std::sync::{Arc, mpsc};
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn debian() -> (tempfile::TempDir, DataDir, ImageName) {
        let scratch = tempfile::tempdir().unwrap();
        let data = DataDir::new(scratch.path());
        let name: ImageName = "debian".parse().unwrap();
        fs::create_dir_all(data.image(&name).path()).unwrap();
        fs::write(data.image(&name).record(), "{}").unwrap();
        (scratch, data, name)
    }

    /// Somebody makes an instance of the image, and need not wait for whoever is here.
    fn make_one(keeper: &Arc<Keeper>, data: &DataDir, image: &ImageName) {
        let (done, made) = mpsc::channel();
        let (keeper, data, image) = (Arc::clone(keeper), data.clone(), image.clone());
        thread::spawn(move || {
            drop(keeper.keep(&data, &image).unwrap());
            done.send(()).unwrap();
        });
        made.recv_timeout(Duration::from_secs(20)).unwrap();
    }

    #[test]
    fn an_instance_is_made_while_its_image_s_users_are_looked_for_and_keeps_the_image() {
        let (_scratch, data, image) = debian();
        let keeper = Arc::new(Keeper::default());
        let (looks, is_gone) = (Cell::new(0), Cell::new(false));
        let look = || {
            looks.set(looks.get() + 1);
            // The instance is made too late for the first look to see it.
            if looks.get() == 2 {
                return Err(StoreError::ImageInUse {
                    name: image.clone(),
                    users: Vec::new(),
                });
            }
            make_one(&keeper, &data, &image);
            Ok(())
        };
        let go = || {
            is_gone.set(true);
            Ok(())
        };
        let refused = keeper.when_unused(&image, look, go).unwrap_err();
        assert!(matches!(refused, StoreError::ImageInUse { .. }), "{refused:?}");
        assert_eq!((looks.get(), is_gone.get()), (2, false));
    }

    #[test]
    fn instances_of_other_images_keep_no_image() {
        let (_scratch, data, image) = debian();
        let keeper = Arc::new(Keeper::default());
        let (other, looks) = ("other".parse().unwrap(), Cell::new(0));
        let look = || {
            looks.set(looks.get() + 1);
            make_one(&keeper, &data, &image);
            Ok(())
        };
        keeper.when_unused(&other, look, || Ok(())).unwrap();
        assert_eq!(looks.get(), 1);
    }
}
