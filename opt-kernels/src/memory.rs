//! Buffers: aligned ones for what kernels stream (weights, caches, packed rows), vectors for activations.
//!
//! Activations are in vectors, so that a readback can hand the memory itself to the caller. Every large allocation
//! goes through here, so that running out of memory is an error and not an abort. For tests, [`Guards`] surround what
//! kernels write through pointers by zones that tell of writes outside.

use crate::{Machine, spare};
use opt_backend::{Error, ErrorKind, Result};
use std::{
    alloc::{self, Layout},
    marker::PhantomData,
    mem::ManuallyDrop,
    ops::Deref,
    ptr::NonNull,
    slice,
    sync::{Arc, Mutex, PoisonError},
};

const CACHE_LINE: usize = 64;
const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a guard zone: more than the widest tile's row, so that a tile one column or row off hits it.
const ZONE: usize = 512;
/// What a zone is filled with, and as yet unwritten elements: a NaN as f32, f16 and bf16.
const PATTERN: u8 = 0xff;

/// Guard zones around the buffers of one backend: none, or `ZONE` bytes before and after each, looked at when the
/// buffer is given back.
#[derive(Debug, Clone, Default)]
pub struct Guards(Option<Arc<Mutex<Vec<String>>>>);

impl Guards {
    pub fn new(on: bool) -> Self {
        Self(on.then(Arc::default))
    }

    /// Bytes before and after a buffer.
    fn zone(&self) -> usize {
        if self.0.is_some() { ZONE } else { 0 }
    }

    /// What was found since the last call, one line a zone.
    pub fn take(&self) -> Vec<String> {
        let Some(faults) = &self.0 else { return Vec::new() };
        std::mem::take(&mut faults.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks at the zones around the `bytes` from `start` on.
    ///
    /// # Safety
    /// If there are zones, they are there and can be read.
    unsafe fn look(&self, start: *const u8, bytes: usize, what: &str) {
        let Some(faults) = &self.0 else { return };
        let zones =
            [("before the start", start.wrapping_sub(ZONE)), ("past the end", start.wrapping_add(bytes))];
        for (side, zone) in zones {
            // SAFETY: the caller's promise.
            let zone = unsafe { slice::from_raw_parts(zone, ZONE) };
            let mut changed = zone.iter().enumerate().filter(|&(_, &byte)| byte != PATTERN).map(|(i, _)| i);
            if let Some(first) = changed.next() {
                let place = if side == "past the end" {
                    format!("{first} bytes {side}")
                } else {
                    format!("{} bytes {side}", ZONE - changed.next_back().unwrap_or(first))
                };
                let fault = format!("{what}: a buffer of {bytes} bytes was written to {place}");
                faults.lock().unwrap_or_else(PoisonError::into_inner).push(fault);
            }
        }
    }
}

/// Activations: a vector, with guard zones if there are to be any.
pub struct Buffer {
    /// The elements, between `zone / 4` elements of either zone; empty until they are written.
    data: Vec<f32>,
    len: usize,
    what: &'static str,
    guards: Guards,
}

impl Buffer {
    /// Room for `len` elements, none of them written.
    pub fn reserve(guards: &Guards, what: &'static str, len: usize) -> Result<Self> {
        let zone = guards.zone();
        let room = len.checked_add(zone / 2).ok_or_else(|| out_of_memory(what, usize::MAX))?;
        let kept = Layout::array::<f32>(room).ok().and_then(spare::take);
        let mut data: Vec<f32> = match kept {
            // SAFETY: memory as a vector of this capacity has it: sizes kept of this alignment are those of vectors.
            Some((start, layout)) => unsafe {
                Vec::from_raw_parts(start.cast().as_ptr(), 0, layout.size() / size_of::<f32>())
            },
            None => reserve(what, room)?,
        };
        if zone > 0 {
            // SAFETY: there is this much room.
            unsafe { data.as_mut_ptr().cast::<u8>().write_bytes(PATTERN, room * size_of::<f32>()) };
        }
        Ok(Self { data, len, what, guards: guards.clone() })
    }

    /// What is in `data`.
    pub fn holding(guards: &Guards, what: &'static str, data: Vec<f32>) -> Result<Self> {
        if guards.zone() == 0 {
            return Ok(Self { len: data.len(), data, what, guards: guards.clone() });
        }
        let mut buffer = Self::reserve(guards, what, data.len())?;
        // SAFETY: there is room for as many, and they are written then.
        unsafe {
            buffer.target().at(0).copy_from_nonoverlapping(data.as_ptr(), data.len());
            buffer.written();
        }
        Ok(buffer)
    }

    /// Elements before the first of ours.
    fn zone(&self) -> usize {
        self.guards.zone() / size_of::<f32>()
    }

    /// Where the elements are or will be.
    pub fn target(&mut self) -> Shared<f32> {
        Shared(self.data.as_mut_ptr().wrapping_add(self.zone()))
    }

    /// Says that the elements are written.
    ///
    /// # Safety
    /// They are.
    pub unsafe fn written(&mut self) {
        let room = self.len + 2 * self.zone();
        // SAFETY: room was reserved for all, the zones are written, and so are the elements, the caller promises.
        unsafe { self.data.set_len(room) };
    }

    /// The elements, by the memory itself.
    pub fn into_vec(mut self) -> Vec<f32> {
        if self.zone() > 0 { self.to_vec() } else { std::mem::take(&mut self.data) }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        let zone = self.zone();
        self.data.get(zone..self.data.len() - zone.min(self.data.len())).unwrap_or_default()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.zone() > 0 {
            let start = self.target().0;
            // SAFETY: the zones were written when the room was reserved.
            unsafe { self.guards.look(start.cast(), self.len * size_of::<f32>(), self.what) };
        }
        let mut data = ManuallyDrop::new(std::mem::take(&mut self.data));
        let layout = Layout::array::<f32>(data.capacity());
        // SAFETY: a vector of numbers, which owns memory of this layout if it has any (as all large enough to be kept
        // have), and is not used again.
        let kept = layout.is_ok_and(|layout| unsafe {
            NonNull::new(data.as_mut_ptr().cast()).is_some_and(|start| spare::give(start, layout))
        });
        if !kept {
            drop(ManuallyDrop::into_inner(data));
        }
    }
}

/// Number types of which all bits zero is a value.
pub trait Number: Copy {}

impl Number for f32 {}
impl Number for half::f16 {}
impl Number for half::bf16 {}
impl Number for u8 {}

/// A fixed-size array of plain numbers that starts at a cache line, or at a huge page if it is larger than one.
pub struct Aligned<T: Copy> {
    start: NonNull<T>,
    len: usize,
    layout: Layout,
    what: &'static str,
    guards: Guards,
    owns: PhantomData<T>,
}

// SAFETY: it owns its elements, which are plain data.
unsafe impl<T: Copy + Send> Send for Aligned<T> {}
// SAFETY: as above; shared access only reads.
unsafe impl<T: Copy + Sync> Sync for Aligned<T> {}

impl<T: Copy> Aligned<T> {
    /// `len` elements of zero bits.
    pub fn zeroed(guards: &Guards, len: usize, what: &'static str) -> Result<Self>
    where
        T: Number,
    {
        let array = Self::unwritten(guards, len, what)?;
        // SAFETY: there is room for `len` elements, for which zero bits are a value.
        unsafe { array.start.write_bytes(0, len) };
        Ok(array)
    }

    /// `count` chunks of `size` elements of zero bits, each then handed to `fill` with its number.
    ///
    /// Each chunk is first touched by the thread that fills it: the system's clearing of pages, most of the time that
    /// loading takes, is shared out too.
    pub fn filled(
        machine: Machine<'_>,
        [count, size]: [usize; 2],
        what: &'static str,
        fill: &(dyn Fn(usize, &mut [T]) + Sync),
    ) -> Result<Self>
    where
        T: Number + Send,
    {
        let len = count.checked_mul(size).ok_or_else(|| out_of_memory(what, usize::MAX))?;
        let array = Self::unwritten(machine.guards, len, what)?;
        let start = Shared(array.start.as_ptr());
        machine.pool.run(if size == 0 { 0 } else { count }, &|chunk| {
            // SAFETY: a chunk of the array, which belongs to this task alone and is written before it is borrowed.
            let elements = unsafe {
                let first = start.at(chunk * size);
                first.write_bytes(0, size);
                slice::from_raw_parts_mut(first, size)
            };
            fill(chunk, elements);
        })?;
        Ok(array)
    }

    /// Room for `len` elements, which the caller writes before any is read.
    fn unwritten(guards: &Guards, len: usize, what: &'static str) -> Result<Self> {
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| out_of_memory(what, len))?;
        let align = if bytes >= HUGE_PAGE { HUGE_PAGE } else { CACHE_LINE };
        let zone = guards.zone();
        let room = bytes.max(1).checked_add(2 * zone).ok_or_else(|| out_of_memory(what, bytes))?;
        let layout = Layout::from_size_align(room, align).map_err(|_| out_of_memory(what, bytes))?;
        let (start, layout) = match spare::take(layout) {
            Some(kept) => kept,
            None => {
                // SAFETY: the layout is not empty.
                let allocate = || NonNull::new(unsafe { alloc::alloc(layout) });
                let again = || {
                    spare::release();
                    allocate()
                };
                let start = allocate().or_else(again).ok_or_else(|| out_of_memory(what, bytes))?;
                if bytes >= HUGE_PAGE {
                    advise_huge_pages(start.as_ptr(), bytes);
                }
                (start, layout)
            }
        };
        // SAFETY: `room` bytes were just allocated at `start`: a zone, `bytes`, and a zone.
        let start = unsafe {
            if zone > 0 {
                start.as_ptr().write_bytes(PATTERN, room);
            }
            start.add(zone)
        };
        Ok(Self { start: start.cast(), len, layout, what, guards: guards.clone(), owns: PhantomData })
    }

    pub fn as_slice(&self) -> &[T] {
        // SAFETY: `len` initialised elements, borrowed with self.
        unsafe { slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }

    pub fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised elements, borrowed mutably with self.
        unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl<T: Copy> Drop for Aligned<T> {
    fn drop(&mut self) {
        let start = self.start.as_ptr().cast::<u8>();
        // SAFETY: allocated with this layout, and so much before the first element.
        unsafe {
            self.guards.look(start, self.len * size_of::<T>(), self.what);
            let start = self.start.cast::<u8>().sub(self.guards.zone());
            if !spare::give(start, self.layout) {
                alloc::dealloc(start.as_ptr(), self.layout);
            }
        }
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

pub fn out_of_memory(what: &'static str, bytes: usize) -> Error {
    Error::new(ErrorKind::OutOfMemory, what, format_args!("no memory for {bytes} bytes"))
}

/// An empty vector with room for `len` elements.
pub fn reserve<T>(what: &'static str, len: usize) -> Result<Vec<T>> {
    let mut vec: Vec<T> = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    if vec.try_reserve_exact(len).is_err() {
        spare::release();
        vec.try_reserve_exact(len).map_err(|_| out_of_memory(what, bytes))?;
    }
    if bytes >= 4 * HUGE_PAGE {
        // Its whole pages: fresh memory this large comes page by page, 25 000 times for the logits of a long prompt.
        let start = vec.as_mut_ptr().cast::<u8>();
        let skip = start.align_offset(HUGE_PAGE);
        advise_huge_pages(start.wrapping_add(skip), (bytes - skip) / HUGE_PAGE * HUGE_PAGE);
    }
    Ok(vec)
}

/// A pointer that tasks of one parallel region write disjoint parts through.
pub struct Shared<T>(pub *mut T);

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
    pub unsafe fn at(self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn only_fault(guards: &Guards) -> String {
        let [fault] = <[String; 1]>::try_from(guards.take()).unwrap();
        fault
    }

    /// Writes the elements from `from` to `to`, counted from the first.
    fn scribble<T: Copy>(target: Shared<T>, from: isize, to: isize, value: T) {
        for i in from..to {
            // SAFETY: these tests stay within the zones.
            unsafe { *target.0.offset(i) = value };
        }
    }

    #[test]
    fn writes_around_a_buffer_are_noticed() {
        let guards = Guards::new(true);
        for (from, to, expected) in [
            (0, 10, None),
            (0, 11, Some("linear: a buffer of 40 bytes was written to 0 bytes past the end")),
            (50, 51, Some("linear: a buffer of 40 bytes was written to 160 bytes past the end")),
            (137, 138, Some("linear: a buffer of 40 bytes was written to 508 bytes past the end")),
            (-1, 10, Some("linear: a buffer of 40 bytes was written to 1 bytes before the start")),
            (-128, -127, Some("linear: a buffer of 40 bytes was written to 509 bytes before the start")),
        ] {
            let mut buffer = Buffer::reserve(&guards, "linear", 10).unwrap();
            scribble(buffer.target(), from, to, 1.5);
            assert_eq!(guards.take(), [""; 0], "nothing is given back yet");
            drop(buffer);
            assert_eq!(guards.take(), Vec::from_iter(expected), "{from}..{to}");
            assert_eq!(guards.take(), [""; 0], "a fault is told once");
        }
    }

    #[test]
    fn writes_around_an_aligned_array_are_noticed() {
        let guards = Guards::new(true);
        for (from, to) in [(0, 9), (-1, 8), (12, 13), (-128, -127)] {
            let mut array = Aligned::<f32>::zeroed(&guards, 8, "weave").unwrap();
            assert_eq!(array.as_slice(), [0.0; 8]);
            assert!(array.as_slice().as_ptr().addr().is_multiple_of(CACHE_LINE));
            scribble(Shared(array.as_mut_slice().as_mut_ptr()), from, to, 2.5);
            drop(array);
            assert!(only_fault(&guards).starts_with("weave: a buffer of 32 bytes"), "{from}..{to}");
        }
        drop(Aligned::<f32>::zeroed(&guards, 8, "weave").unwrap());
        assert_eq!(guards.take(), [""; 0]);
    }

    #[test]
    fn what_is_written_is_read_with_and_without_zones() {
        for guards in [Guards::default(), Guards::new(true)] {
            let mut buffer = Buffer::reserve(&guards, "linear", 3).unwrap();
            assert!(buffer.is_empty());
            scribble(buffer.target(), 0, 3, 4.0);
            // SAFETY: all three are.
            unsafe { buffer.written() };
            assert_eq!(*buffer, [4.0; 3]);
            assert_eq!(buffer.into_vec(), [4.0; 3]);
            // A readback looks at the zones, too.
            let mut buffer = Buffer::reserve(&guards, "linear", 3).unwrap();
            if guards.zone() > 0 {
                scribble(buffer.target(), 0, 4, 4.0);
                // SAFETY: all three are, and one more.
                unsafe { buffer.written() };
                assert_eq!(buffer.into_vec(), [4.0; 3]);
                only_fault(&guards);
            }
        }
    }
}
