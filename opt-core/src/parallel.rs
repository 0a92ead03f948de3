//! Work on many things, on several threads where there are threads at all.

#[cfg(not(target_arch = "wasm32"))]
use std::{
    sync::{LazyLock, Mutex, PoisonError},
    thread,
};

/// Cores of this machine.
pub(crate) fn cores() -> usize {
    #[cfg(target_arch = "wasm32")]
    return 1;
    #[cfg(not(target_arch = "wasm32"))]
    {
        static CORES: LazyLock<usize> =
            LazyLock::new(|| thread::available_parallelism().map_or(1, |n| n.get()));
        *CORES
    }
}

/// Does `work` to each item, whoever is free taking the next, on up to `threads` threads, of which this is one. A panic
/// goes on here with what it said.
#[cfg(not(target_arch = "wasm32"))]
pub(crate) fn for_each<T: Send>(
    threads: usize,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T) + Sync,
) {
    if threads <= 1 {
        return items.for_each(work);
    }
    let items = Mutex::new(items);
    let next = || items.lock().unwrap_or_else(PoisonError::into_inner).next();
    let all = || std::iter::from_fn(next).for_each(&work);
    thread::scope(|scope| {
        // Where there is no thread to be had, this one does it all.
        let spawn = |_| thread::Builder::new().name("opt-work".to_owned()).spawn_scoped(scope, all).ok();
        let others: Vec<_> = (1..threads).map_while(spawn).collect();
        all();
        for other in others {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
    });
}

/// Does `work` to each item.
#[cfg(target_arch = "wasm32")]
pub(crate) fn for_each<T>(_: usize, items: impl Iterator<Item = T>, work: impl Fn(T)) {
    items.for_each(work);
}
