//! Buffers of activations, handed out again once they are given back.
//!
//! Each tensor has buffers of its own and none is cut out of a larger one: WebGPU forbids that a dispatch reads one
//! part of a buffer and writes another. All commands go through one queue in the order in which they are recorded, so
//! a buffer may be reused as soon as its last use is recorded, long before the device gets there. Only what the host
//! writes directly overtakes recorded commands; for that the pool knows under which encoder a buffer was last in use.

use crate::{
    fault::lock,
    gpu::{Gpu, Use},
};
use std::{collections::HashMap, sync::Arc};

/// Free bytes that are kept at most, unless the device's memory is capped.
pub(crate) const KEPT: u64 = 256 << 20;

/// A buffer of the device.
pub(crate) struct Raw {
    pub(crate) buffer: wgpu::Buffer,
    /// Never given to another buffer.
    pub(crate) id: u64,
    pub(crate) size: u64,
    /// The encoder that was open when it was given back.
    pub(crate) used: u64,
}

type Class = (Use, u64);

/// Free buffers by use and size.
pub(crate) struct Pool {
    free: HashMap<Class, Vec<Raw>>,
    bytes: u64,
    most: u64,
    /// Buffers that are gone, but that bind groups may still refer to.
    buried: Vec<u64>,
}

impl Pool {
    pub(crate) fn new(memory: Option<u64>) -> Self {
        let most = memory.map_or(KEPT, |memory| KEPT.min(memory / 8));
        Self { free: HashMap::new(), bytes: 0, most, buried: Vec::new() }
    }

    /// The size of the buffer that serves `size` bytes: four sizes to each power of two.
    pub(crate) fn class(size: u64) -> u64 {
        let size = size.max(256);
        let step = (size.next_power_of_two() / 8).max(64);
        size.next_multiple_of(step)
    }

    /// A free buffer that was given back before encoder `before` was opened. The last to come is the first to go, so
    /// that equal steps use equal buffers, for which bind groups are at hand.
    pub(crate) fn take(&mut self, class: Class, before: u64) -> Option<Raw> {
        let free = self.free.get_mut(&class)?;
        let at = free.iter().rposition(|raw| raw.used < before)?;
        let raw = free.remove(at);
        self.bytes -= raw.size;
        Some(raw)
    }

    /// Takes a buffer back; returns those for which there is no room.
    fn give(&mut self, class: Class, raw: Raw) -> Vec<Raw> {
        let mut excess = Vec::new();
        self.bytes += raw.size;
        self.free.entry(class).or_default().push(raw);
        while self.bytes > self.most {
            // The largest go first: small ones are what each step needs.
            let largest = self.free.iter().filter(|(_, free)| !free.is_empty()).map(|(class, _)| *class);
            let Some(class) = largest.max_by_key(|(_, size)| *size) else { break };
            let Some(free) = self.free.get_mut(&class) else { break };
            // The one that has lain longest.
            let raw = free.remove(0);
            self.bytes -= raw.size;
            excess.push(raw);
        }
        excess
    }

    /// Takes all free buffers out.
    pub(crate) fn clear(&mut self) -> Vec<Raw> {
        self.bytes = 0;
        self.free.drain().flat_map(|(_, free)| free).collect()
    }

    /// Notes that a buffer is gone.
    pub(crate) fn bury(&mut self, id: u64) {
        self.buried.push(id);
    }

    /// The buffers that have gone since this was last asked.
    pub(crate) fn take_buried(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.buried)
    }
}

/// A buffer in use. Dropped, it goes back to the pool if it came from there, and is gone otherwise.
pub(crate) struct Buffer {
    /// `None` only while it is dropped.
    raw: Option<Raw>,
    gpu: Arc<Gpu>,
    class: Option<Class>,
    id: u64,
    size: u64,
    handle: wgpu::Buffer,
}

impl Buffer {
    pub(crate) fn new(raw: Raw, gpu: &Arc<Gpu>, class: Option<Class>) -> Self {
        Self {
            id: raw.id,
            size: raw.size,
            handle: raw.buffer.clone(),
            raw: Some(raw),
            gpu: Arc::clone(gpu),
            class,
        }
    }

    pub(crate) fn raw(&self) -> &wgpu::Buffer {
        &self.handle
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn slice(&self, offset: u64, size: u64) -> Slice<'_> {
        Slice { buffer: self, offset, size }
    }

    /// All of it.
    pub(crate) fn whole(&self) -> Slice<'_> {
        self.slice(0, self.size)
    }

    /// Destroys the buffer when dropped, instead of giving it back.
    pub(crate) fn do_not_reuse(&mut self) {
        self.class = None;
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Some(mut raw) = self.raw.take() else { return };
        raw.used = self.gpu.serial.load(std::sync::atomic::Ordering::Acquire);
        let excess = match self.class {
            Some(class) => lock(&self.gpu.pool).give(class, raw),
            None => vec![raw],
        };
        for raw in excess {
            self.gpu.destroy(raw);
        }
    }
}

/// Some bytes of a buffer, as a kernel binds them.
#[derive(Clone, Copy)]
pub(crate) struct Slice<'a> {
    pub(crate) buffer: &'a Buffer,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}

#[cfg(test)]
mod tests {
    use super::Pool;

    #[test]
    fn classes_are_few_and_close() {
        let mut classes = std::collections::BTreeSet::new();
        for size in (1..1 << 20).step_by(7) {
            let class = Pool::class(size);
            assert!(class >= size && (size <= 256 || class <= size + size / 4 + 64), "{size}: {class}");
            assert!(class.is_multiple_of(64) && Pool::class(class) == class, "{size}: {class}");
            classes.insert(class);
        }
        assert!(classes.len() <= 50, "{}", classes.len());
    }
}
