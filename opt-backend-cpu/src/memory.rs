//! Buffers: aligned ones for what kernels stream (weights, caches, packed rows), plain vectors for activations.
//!
//! Activations stay `Vec<f32>`, so that a readback can hand the memory itself to the caller. Every large allocation
//! goes through here, so that running out of memory is an error and not an abort.

use opt_backend::{Error, ErrorKind, Result};
use std::{
    alloc::{self, Layout},
    marker::PhantomData,
    ptr::NonNull,
    slice,
};

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;

/// A fixed-size array of plain numbers that starts at a cache line, or at a huge page if it is larger than one.
pub(crate) struct Aligned<T: Copy> {
    start: NonNull<T>,
    len: usize,
    layout: Layout,
    owns: PhantomData<T>,
}

// SAFETY: it owns its elements, which are plain data.
unsafe impl<T: Copy + Send> Send for Aligned<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Copy + Sync> Sync for Aligned<T> {}

impl<T: Copy> Aligned<T> {
    /// `len` elements of zero bits. `T` must be a number type for which those are a value.
    pub(crate) fn zeroed(len: usize, what: &'static str) -> Result<Self>
    where
        T: crate::simd::Weight,
    {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(what, len))?;
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { CACHE_LINE };
        let layout = Layout::from_size_align(bytes.max(1), align).map_err(|_| out_of_memory(what, bytes))?;
        // SAFETY: the layout is not empty.
        let start =
            NonNull::new(unsafe { alloc::alloc(layout) }).ok_or_else(|| out_of_memory(what, bytes))?;
        if bytes >= HUGE_PAGE {
            advise_huge_pages(start.as_ptr(), bytes);
        }
        // SAFETY: `bytes` were just allocated at `start`.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Ok(Self { start: start.cast(), len, layout, owns: PhantomData })
    }

    pub(crate) fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements, borrowed with self.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub(crate) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised elements, borrowed mutably with self.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Copy> Drop for Aligned<T> {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout.
        unsafe { alloc::dealloc(self.start.as_ptr().cast(), self.layout) }
    }
}

/// Asks for pages of 2 MiB: weights are streamed end to end, and small pages cost a walk every 4 KiB.
#[cfg(all(target_os = "linux", not(miri)))]
fn advise_huge_pages(start: *mut u8, bytes: usize) {
    unsafe extern "C" {
        fn madvise(address: *mut std::ffi::c_void, length: usize, advice: std::ffi::c_int)
        -> std::ffi::c_int;
    }
    const MADV_HUGEPAGE: std::ffi::c_int = 14;
    // SAFETY: the range is our own allocation and starts at a page. It is a hint; failure changes nothing.
    unsafe { madvise(start.cast(), bytes, MADV_HUGEPAGE) };
}

#[cfg(not(all(target_os = "linux", not(miri))))]
fn advise_huge_pages(_: *mut u8, _: usize) {}

pub(crate) fn out_of_memory(what: &'static str, bytes: usize) -> Error {
    Error::new(ErrorKind::OutOfMemory, what, format_args!("no memory for {bytes} bytes"))
}

/// An empty vector with room for `len` elements.
pub(crate) fn reserve<T>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut vec: Vec<T> = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    vec.try_reserve_exact(len).map_err(|_| out_of_memory(what, bytes))?;
    if bytes >= 4 * HUGE_PAGE {
        // Its whole pages: fresh memory this large comes page by page, 25 000 times for the logits of a long prompt.
        let start = vec.as_mut_ptr().cast::<u8>();
        let skip = start.align_offset(HUGE_PAGE);
        advise_huge_pages(start.wrapping_add(skip), (bytes - skip) / HUGE_PAGE * HUGE_PAGE);
    }
    Ok(vec)
}

/// A pointer that tasks of one parallel region write disjoint parts through.
pub(crate) struct Shared<T>(pub(crate) *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: a pointer is only a number; each use says why its accesses are disjoint.
unsafe impl<T: Send> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer `offset` elements on. (A method, so that closures capture the whole and not the raw field.)
    ///
    /// # Safety
    /// The offset lies within the allocation.
    #[inline(always)]
    pub(crate) unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}
