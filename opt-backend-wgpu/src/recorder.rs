//! The open encoder: dispatches are recorded one after another into one compute pass and handed to the queue when
//! something is read, when there are many, or when their arguments fill their buffer.
//!
//! Uniforms and small inputs (ids, page tables) of all recorded dispatches lie in one buffer. They are collected on
//! the host and written once, right before the submission; a dispatch finds its own through a dynamic offset.

use crate::{
    gpu::{Gpu, Use},
    kernels::{Kernel, Kernels, UNIFORM_BYTES, Variant},
    pool::{Pool, Raw, Slice},
};
use opt_backend::{Error, ErrorKind, Result};
use std::{
    collections::HashMap,
    hash::{BuildHasherDefault, Hasher},
    sync::{Arc, atomic::Ordering},
};

/// Bytes of arguments to begin with.
const ARGUMENTS: usize = 1 << 18;
/// Bind groups that are kept; all go when there are more.
const GROUPS_KEPT: usize = 4096;
/// Most storage buffers that a kernel binds.
const BINDINGS_MOST: usize = 8;

/// Bits of a buffer's id in the first word of a [`GroupKey`]; the layout has the rest.
const ID_BITS: u32 = 48;

/// Layout and id of the arguments buffer, then id and place of each buffer.
type GroupKey = [u64; 1 + 2 * BINDINGS_MOST];

/// Multiplies and rotates: bind groups are looked up once a dispatch, and their keys are ids that nobody chooses.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            self.write_u64(u64::from_le_bytes(padded));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

/// What is recorded and not yet submitted, and what makes recording cheap.
pub(crate) struct Recorder {
    // Before the encoder it belongs to, since it is dropped first.
    pass: Option<wgpu::ComputePass<'static>>,
    encoder: Option<wgpu::CommandEncoder>,
    /// The kernel that the pass has set.
    current: Option<u64>,
    arguments: Vec<u8>,
    buffer: Option<Raw>,
    dispatches: u32,
    submit_every: u32,
    kernels: Kernels,
    groups: HashMap<GroupKey, wgpu::BindGroup, BuildHasherDefault<Mix>>,
}

impl Recorder {
    pub(crate) fn new(submit_every: u32) -> Self {
        Self {
            pass: None,
            encoder: None,
            current: None,
            arguments: Vec::new(),
            buffer: None,
            dispatches: 0,
            submit_every: submit_every.max(1),
            kernels: Kernels::default(),
            groups: HashMap::default(),
        }
    }

    /// Submits what is recorded if the next op would not fit, so that no submission falls between an op's data and
    /// its dispatches.
    pub(crate) fn make_room(
        &mut self,
        gpu: &Gpu,
        op: &'static str,
        words: usize,
        dispatches: usize,
    ) -> Result<()> {
        let slot = self.alignment(gpu) + UNIFORM_BYTES as usize;
        let needed = 4 * words + (dispatches + 1) * slot;
        let capacity = self.buffer.as_ref().map_or(0, |raw| raw.size as usize);
        if self.dispatches >= self.submit_every || self.arguments.len() + needed > capacity {
            self.submit(gpu, op)?;
        }
        if needed > capacity {
            let most = gpu.max_binding();
            let size = (needed.next_power_of_two().max(ARGUMENTS) as u64).min(most);
            if needed as u64 > size {
                return Err(gpu.out_of_memory(
                    op,
                    format_args!("expected at most {most} bytes of arguments, found {needed}"),
                ));
            }
            let raw = gpu.create(op, size, Use::Arguments)?;
            if let Some(old) = self.buffer.replace(raw) {
                gpu.destroy(old);
            }
        }
        self.forget(&mut crate::fault::lock(&gpu.pool));
        Ok(())
    }

    /// Drops the bind groups of buffers that are gone, and with them their memory.
    pub(crate) fn forget(&mut self, pool: &mut Pool) {
        let buried = pool.take_buried();
        if buried.len() > 64 {
            // Many went at once: a model was dropped.
            self.groups.clear();
        } else if !buried.is_empty() {
            self.groups.retain(|key, _| {
                let arguments = key[0] & ((1 << ID_BITS) - 1);
                let mut others = key[1..].iter().step_by(2);
                !buried.contains(&arguments) && others.all(|id| !buried.contains(id))
            });
        }
        if self.groups.len() > GROUPS_KEPT {
            self.groups.clear();
        }
    }

    fn alignment(&self, gpu: &Gpu) -> usize {
        gpu.limits.min_uniform_buffer_offset_alignment.max(4) as usize
    }

    /// Puts words where kernels can read them; returns the word at which they begin.
    pub(crate) fn data(&mut self, words: &[u32]) -> u32 {
        let at = self.arguments.len() / 4;
        self.arguments.extend_from_slice(bytemuck::cast_slice(words));
        at as u32
    }

    /// Records a dispatch of `groups` workgroups over the storage buffers of `variant`, in the order of its bindings;
    /// `None` is the data that [`Recorder::data`] collected.
    pub(crate) fn dispatch(
        &mut self,
        gpu: &Gpu,
        op: &'static str,
        variant: Variant,
        uniforms: &[u32],
        buffers: &[Option<Slice<'_>>],
        groups: u64,
    ) -> Result<()> {
        if groups == 0 {
            return Ok(());
        }
        let kernel = match self.kernels.ready(variant) {
            Some(kernel) => kernel,
            None => {
                let kernels = &mut self.kernels;
                gpu.scoped(|| kernels.compile(&gpu.device, gpu.extras, variant))
                    .map_err(|error| gpu.fault.describe(&error).1)
                    .and_then(|compiled| compiled)
                    .map_err(|message| Error::new(ErrorKind::Device, op, message))?;
                let missing = || Error::new(ErrorKind::Device, op, "a kernel was not kept");
                kernels.ready(variant).ok_or_else(missing)?
            }
        };
        debug_assert_eq!(variant.bindings().len(), buffers.len());

        let most = u64::from(gpu.limits.max_compute_workgroups_per_dimension);
        let (x, y) = if groups <= most { (groups, 1) } else { (most, groups.div_ceil(most)) };
        if y > most {
            return Err(
                gpu.out_of_memory(op, format_args!("{groups} workgroups are more than a dispatch can have"))
            );
        }
        let offset = self.arguments.len().next_multiple_of(self.alignment(gpu));
        self.arguments.resize(offset, 0);
        self.arguments.extend_from_slice(bytemuck::cast_slice(uniforms));
        self.arguments.resize(offset + UNIFORM_BYTES as usize, 0);

        let group = self.group(gpu, &kernel, buffers)?;
        let encoder =
            self.encoder.get_or_insert_with(|| gpu.device.create_command_encoder(&Default::default()));
        let pass = self.pass.get_or_insert_with(|| {
            self.current = None;
            encoder.begin_compute_pass(&Default::default()).forget_lifetime()
        });
        if self.current != Some(kernel.id) {
            pass.set_pipeline(&kernel.pipeline);
            self.current = Some(kernel.id);
        }
        pass.set_bind_group(0, &group, &[offset as u32]);
        pass.dispatch_workgroups(x as u32, y as u32, 1);
        self.dispatches += 1;
        gpu.counters.dispatch(1);
        Ok(())
    }

    fn group(
        &mut self,
        gpu: &Gpu,
        kernel: &Arc<Kernel>,
        buffers: &[Option<Slice<'_>>],
    ) -> Result<wgpu::BindGroup> {
        let Some(arguments) = &self.buffer else {
            return Err(Error::new(ErrorKind::Device, "dispatch", "no room was made for arguments"));
        };
        let mut key: GroupKey = [0; 1 + 2 * BINDINGS_MOST];
        key[0] = kernel.layout_id << ID_BITS | arguments.id;
        for (place, slice) in key[1..].chunks_exact_mut(2).zip(buffers) {
            if let Some(slice) = slice {
                place[0] = slice.buffer.id();
                place[1] = (slice.offset / 4) << 32 | (slice.size / 4);
            } else {
                place[0] = arguments.id;
            }
        }
        if let Some(group) = self.groups.get(&key) {
            return Ok(group.clone());
        }
        let uniforms = wgpu::BufferBinding {
            buffer: &arguments.buffer,
            offset: 0,
            size: wgpu::BufferSize::new(UNIFORM_BYTES),
        };
        let mut entries =
            vec![wgpu::BindGroupEntry { binding: 0, resource: wgpu::BindingResource::Buffer(uniforms) }];
        for (i, slice) in buffers.iter().enumerate() {
            let binding = match slice {
                Some(slice) => wgpu::BufferBinding {
                    buffer: slice.buffer.raw(),
                    offset: slice.offset,
                    size: wgpu::BufferSize::new(slice.size),
                },
                None => arguments.buffer.as_entire_buffer_binding(),
            };
            let resource = wgpu::BindingResource::Buffer(binding);
            entries.push(wgpu::BindGroupEntry { binding: i as u32 + 1, resource });
        }
        let group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &kernel.layout,
            entries: &entries,
        });
        self.groups.insert(key, group.clone());
        Ok(group)
    }

    /// Records a copy between two buffers.
    pub(crate) fn copy(&mut self, gpu: &Gpu, from: Slice<'_>, to: Slice<'_>) {
        if from.size == 0 {
            return;
        }
        self.pass = None;
        let encoder =
            self.encoder.get_or_insert_with(|| gpu.device.create_command_encoder(&Default::default()));
        encoder.copy_buffer_to_buffer(from.buffer.raw(), from.offset, to.buffer.raw(), to.offset, from.size);
    }

    /// Hands what is recorded to the queue.
    pub(crate) fn submit(&mut self, gpu: &Gpu, op: &'static str) -> Result<Option<wgpu::SubmissionIndex>> {
        self.pass = None;
        self.dispatches = 0;
        let arguments = std::mem::take(&mut self.arguments);
        let Some(encoder) = self.encoder.take() else {
            return Ok(None);
        };
        if let (Some(raw), false) = (&self.buffer, arguments.is_empty()) {
            gpu.queue.write_buffer(&raw.buffer, 0, &arguments);
        }
        let index = gpu.queue.submit([encoder.finish()]);
        gpu.counters.submission();
        gpu.serial.fetch_add(1, Ordering::AcqRel);
        // Its memory serves the next submission.
        self.arguments = arguments;
        self.arguments.clear();
        gpu.fault.check(op)?;
        Ok(Some(index))
    }
}
