//! The thread pool: fork-join regions of a few microseconds.
//!
//! Decoding one token runs some seventy parallel regions, so the cost of opening one counts. Workers therefore spin
//! for a moment after a region and sleep only when no other follows. The caller works too, and a region ends when
//! its tasks are done, not when every worker has looked at it: a worker that the operating system has set aside is
//! not waited for unless it holds a task. Tasks are handed out by a counter; results must not depend on who runs them.
//!
//! A region that finds the pool taken (another thread is in one, or a task opens one) runs on its caller alone.

use opt_backend::{Error, ErrorKind, Result};
use std::{
    cell::UnsafeCell,
    hint,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Condvar, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

/// How long a worker looks for the next region before it sleeps.
const SPIN: Duration = Duration::from_micros(60);
/// Spins between two looks at the clock.
const SPINS: usize = 32;

// `state` is the number of the region, whether it is closed to workers, and how many are in it.
const WORKERS: u64 = (1 << 31) - 1;
const CLOSED: u64 = 1 << 31;
const REGION: u64 = 1 << 32;

type Body<'a> = dyn Fn(usize) + Sync + 'a;

struct Inner {
    state: AtomicU64,
    /// The region's body and number of tasks; written only while no worker is in a region.
    job: UnsafeCell<Option<(*const Body<'static>, usize)>>,
    next: AtomicUsize,
    panicked: AtomicBool,
    stop: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written by the holder of the region lock while `state` is closed and empty, and read by threads
// that entered through `state`; the pointer refers to a `Sync` body that outlives the region.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// A fixed set of threads, ended when this is dropped.
pub struct Pool {
    inner: Arc<Inner>,
    workers: Vec<JoinHandle<()>>,
    region: Mutex<()>,
}

impl Pool {
    /// `threads` in all, the caller of a region included.
    pub fn new(threads: usize) -> Result<Self> {
        let inner = Arc::new(Inner {
            state: AtomicU64::new(CLOSED),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        let mut pool = Self { inner, workers: Vec::new(), region: Mutex::new(()) };
        for i in 1..threads {
            let inner = pool.inner.clone();
            let worker = thread::Builder::new().name(format!("opt-cpu-{i}")).spawn(move || inner.work());
            let worker = worker.map_err(|e| {
                Error::new(
                    ErrorKind::Device,
                    "cpu",
                    format_args!("cannot start thread {i} of {threads}: {e}"),
                )
            })?;
            pool.workers.push(worker);
        }
        Ok(pool)
    }

    /// Threads that can work on a region.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `body` with each of `0..tasks`, in any order and on any thread.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if the body panicked; then some tasks may not have run.
    pub fn run(&self, tasks: usize, body: &Body<'_>) -> Result<()> {
        let guard = match self.region.try_lock() {
            _ if tasks <= 1 || self.workers.is_empty() => None,
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let panicked = if guard.is_some() {
            self.share(tasks, body)
        } else {
            catch_unwind(AssertUnwindSafe(|| (0..tasks).for_each(body))).is_err()
        };
        if panicked {
            return Err(Error::new(ErrorKind::Device, "cpu", "a kernel panicked; please report this"));
        }
        Ok(())
    }

    /// The region itself; the region lock is held.
    fn share(&self, tasks: usize, body: &Body<'_>) -> bool {
        let inner = &*self.inner;
        // SAFETY: only the lifetime changes, and no thread uses the pointer after this function returns.
        let body: *const Body<'static> = unsafe { std::mem::transmute(std::ptr::from_ref(body)) };
        // SAFETY: the previous region is closed and empty, so no worker reads the job.
        unsafe { *inner.job.get() = Some((body, tasks)) };
        inner.next.store(0, Ordering::Relaxed);
        inner.panicked.store(false, Ordering::Relaxed);
        let region = (inner.state.load(Ordering::Relaxed) & !(REGION - 1)).wrapping_add(REGION);
        inner.state.store(region, Ordering::SeqCst);
        if inner.sleepers.load(Ordering::SeqCst) > 0 {
            // With the lock held, a worker is either asleep already or will see the new region before it sleeps.
            drop(inner.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            inner.wake.notify_all();
        }
        inner.drain(body, tasks);
        inner.state.fetch_or(CLOSED, Ordering::AcqRel);
        let mut spins = 0;
        while inner.state.load(Ordering::Acquire) & WORKERS != 0 {
            spins += 1;
            // A worker that takes long may be waiting for this very core.
            if spins % 4096 == 0 { thread::yield_now() } else { hint::spin_loop() }
        }
        inner.panicked.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish_non_exhaustive()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.inner.stop.store(true, Ordering::SeqCst);
        drop(self.inner.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.inner.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl Inner {
    /// Runs tasks until none is left.
    fn drain(&self, body: *const Body<'static>, tasks: usize) {
        // SAFETY: the region is open or this thread is counted in it, so its caller still holds the body.
        let body = unsafe { &*body };
        loop {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= tasks {
                return;
            }
            if catch_unwind(AssertUnwindSafe(|| body(task))).is_err() {
                self.panicked.store(true, Ordering::Relaxed);
            }
        }
    }

    /// A worker's life.
    fn work(&self) {
        let mut seen = 0;
        while let Some(state) = self.await_region(seen) {
            seen = state & !(REGION - 1);
            if self.enter(seen) {
                // SAFETY: this thread is counted in the region, so the job stays as it is.
                if let Some((body, tasks)) = unsafe { *self.job.get() } {
                    self.drain(body, tasks);
                }
                self.state.fetch_sub(1, Ordering::Release);
            }
        }
    }

    /// Counts this thread in, unless the region is closed or over.
    fn enter(&self, region: u64) -> bool {
        let mut state = self.state.load(Ordering::Relaxed);
        while state & CLOSED == 0 && state & !(REGION - 1) == region {
            match self.state.compare_exchange_weak(state, state + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => state = now,
            }
        }
        false
    }

    /// The state once its region is another than `seen`; `None` when the pool is dropped.
    fn await_region(&self, seen: u64) -> Option<u64> {
        let news = || {
            let state = self.state.load(Ordering::SeqCst);
            (state & !(REGION - 1) != seen || self.stop.load(Ordering::SeqCst)).then_some(state)
        };
        let end = Instant::now() + SPIN;
        let found = 'found: {
            loop {
                for _ in 0..SPINS {
                    if let Some(state) = news() {
                        break 'found state;
                    }
                    hint::spin_loop();
                }
                if Instant::now() >= end {
                    break;
                }
            }
            let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let state = loop {
                if let Some(state) = news() {
                    break state;
                }
                guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            };
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
            state
        };
        (!self.stop.load(Ordering::SeqCst)).then_some(found)
    }
}

/// Physical cores this process may use: its affinity and quota, hyper-threads of one core counted once.
///
/// Two threads on one core share its arithmetic units, and kernels that fill them gain nothing from the second.
pub fn usable_cores() -> usize {
    let available = thread::available_parallelism().map_or(1, |n| n.get());
    physical_cores().map_or(available, |cores| cores.clamp(1, available))
}

#[cfg(target_os = "linux")]
fn physical_cores() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = std::collections::BTreeSet::new();
    for range in allowed.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        for cpu in first.parse::<usize>().ok()?..=last.parse::<usize>().ok()? {
            let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            // Lists of allowed CPUs name absent ones too.
            if let Ok(siblings) = std::fs::read_to_string(path) {
                cores.insert(siblings);
            }
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(not(target_os = "linux"))]
fn physical_cores() -> Option<usize> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        let pool = Pool::new(4).unwrap();
        for tasks in [0, 1, 2, 3, 100, 1000] {
            let ran: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            for _ in 0..50 {
                pool.run(tasks, &|i| _ = ran[i].fetch_add(1, Ordering::Relaxed)).unwrap();
            }
            assert!(ran.iter().all(|n| n.load(Ordering::Relaxed) == 50));
        }
    }

    #[test]
    fn callers_from_many_threads_and_nested_regions() {
        let pool = Pool::new(3).unwrap();
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        pool.run(5, &|i| {
                            pool.run(2, &|j| _ = sum.fetch_add(i + j, Ordering::Relaxed)).unwrap();
                        })
                        .unwrap();
                    }
                });
            }
        });
        // Each region adds 2 (0 + 1 + 2 + 3 + 4) + 5.
        assert_eq!(sum.into_inner(), 4 * 200 * 25);
    }

    #[test]
    fn sleeping_workers_are_woken() {
        let pool = Pool::new(2).unwrap();
        for _ in 0..5 {
            thread::sleep(SPIN * 20);
            let threads = Mutex::new(std::collections::HashSet::new());
            pool.run(2, &|_| {
                threads.lock().unwrap().insert(thread::current().id());
                // Long enough that a woken worker takes the other task.
                thread::sleep(Duration::from_millis(50));
            })
            .unwrap();
            assert_eq!(threads.into_inner().unwrap().len(), 2);
        }
    }

    #[test]
    fn a_panic_is_an_error_and_the_pool_lives_on() {
        let pool = Pool::new(2).unwrap();
        for tasks in [1, 8] {
            let error = pool.run(tasks, &|i| assert!(i != tasks - 1, "meant")).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Device);
            assert!(pool.run(tasks, &|_| ()).is_ok());
        }
    }

    #[test]
    fn cores_are_counted() {
        let cores = usable_cores();
        assert!((1..=thread::available_parallelism().unwrap().get()).contains(&cores));
    }
}
