//! Memory that was given back, kept for what needs as much next.
//!
//! A step of training needs the buffers of the step before again. Were they handed back to the system, it would clear
//! each of their pages anew before it hands them out: a sixth of the time of a step. So while somebody holds a [`Keep`],
//! large buffers are kept when they are dropped, and go to the next that has almost their size.

use std::{
    alloc::{self, Layout},
    collections::BTreeMap,
    ptr::NonNull,
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Smaller buffers are the allocator's business: it keeps them itself.
const SMALLEST: usize = 64 << 10;

/// Bytes that are kept at most.
const MOST: usize = 1 << 30;

static SPARE: Mutex<Spare> = Mutex::new(Spare { keepers: 0, bytes: 0, blocks: BTreeMap::new() });

struct Spare {
    keepers: usize,
    bytes: usize,
    /// By alignment and size.
    blocks: BTreeMap<(usize, usize), Vec<Block>>,
}

/// Memory that nobody uses.
struct Block(NonNull<u8>);

// SAFETY: it owns what it points to.
unsafe impl Send for Block {}

fn spare() -> MutexGuard<'static, Spare> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// While there is one, dropped buffers are kept; with the last, they are freed.
#[derive(Debug)]
pub struct Keep(());

impl Keep {
    pub fn new() -> Self {
        spare().keepers += 1;
        Self(())
    }
}

impl Default for Keep {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Keep {
    fn drop(&mut self) {
        let mut spare = spare();
        spare.keepers -= 1;
        if spare.keepers > 0 {
            return;
        }
        spare.clear();
    }
}

impl Spare {
    /// Hands all that is kept back to the system.
    fn clear(&mut self) {
        self.bytes = 0;
        for ((align, size), blocks) in std::mem::take(&mut self.blocks) {
            // It was taken from a layout.
            let Ok(layout) = Layout::from_size_align(size, align) else { continue };
            for Block(start) in blocks {
                // SAFETY: allocated with this layout, and nobody uses it.
                unsafe { alloc::dealloc(start.as_ptr(), layout) };
            }
        }
    }
}

/// Hands all that is kept back to the system, which has no more.
pub(crate) fn release() {
    spare().clear();
}

/// Memory of this layout, or of one of the same alignment and up to a quarter more, and what its layout is. What is in
/// it is anything.
pub(crate) fn take(layout: Layout) -> Option<(NonNull<u8>, Layout)> {
    let (align, size) = (layout.align(), layout.size());
    if size < SMALLEST {
        return None;
    }
    let mut spare = spare();
    let (&key, blocks) = spare.blocks.range_mut((align, size)..=(align, size + size / 4)).next()?;
    let Block(start) = blocks.pop()?;
    if blocks.is_empty() {
        spare.blocks.remove(&key);
    }
    spare.bytes -= key.1;
    Some((start, Layout::from_size_align(key.1, align).ok()?))
}

/// Takes memory over, or says that it is to be freed.
///
/// # Safety
/// It was allocated with this layout, and nobody uses it any more if this is true.
pub(crate) unsafe fn give(start: NonNull<u8>, layout: Layout) -> bool {
    if layout.size() < SMALLEST {
        return false;
    }
    let mut spare = spare();
    if spare.keepers == 0 || layout.size() > MOST {
        return false;
    }
    if spare.bytes + layout.size() > MOST {
        // Sizes that nobody asks for any more: what is needed comes back with the next step.
        spare.clear();
    }
    spare.bytes += layout.size();
    spare.blocks.entry((layout.align(), layout.size())).or_default().push(Block(start));
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_comes_back_while_it_is_kept() {
        // An alignment of its own, since other tests allocate too.
        let layout = |size| Layout::from_size_align(size, 128).unwrap();
        let new = |size| {
            // SAFETY: the layout is not empty.
            NonNull::new(unsafe { alloc::alloc(layout(size)) }).unwrap()
        };
        let keep = Keep::new();
        let (first, second) = (new(100_000), new(200_000));
        // SAFETY: just allocated so, and not used again.
        assert!(unsafe { give(first, layout(100_000)) && give(second, layout(200_000)) });
        assert_eq!(
            take(layout(100_001)),
            None,
            "the one is too small, the other more than a quarter too large"
        );
        assert_eq!(take(layout(160_000)), Some((second, layout(200_000))));
        assert_eq!(take(layout(160_000)), None, "it is taken");
        // SAFETY: as above.
        assert!(unsafe { give(second, layout(200_000)) });
        drop(keep);
        let small = new(1000);
        // SAFETY: as above; where it is not taken over, it is freed.
        unsafe {
            assert!(!give(small, layout(1000)));
            alloc::dealloc(small.as_ptr(), layout(1000));
        }
    }
}
