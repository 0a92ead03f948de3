use crate::Result;
use std::{future::Future, pin::Pin};

/// `Send` everywhere but on wasm32, where device handles belong to one thread.
#[cfg(not(target_arch = "wasm32"))]
pub trait MaybeSend: Send {}
#[cfg(not(target_arch = "wasm32"))]
impl<T: Send + ?Sized> MaybeSend for T {}
/// `Sync` everywhere but on wasm32.
#[cfg(not(target_arch = "wasm32"))]
pub trait MaybeSync: Sync {}
#[cfg(not(target_arch = "wasm32"))]
impl<T: Sync + ?Sized> MaybeSync for T {}

/// `Send` everywhere but on wasm32, where device handles belong to one thread.
#[cfg(target_arch = "wasm32")]
pub trait MaybeSend {}
#[cfg(target_arch = "wasm32")]
impl<T: ?Sized> MaybeSend for T {}
/// `Sync` everywhere but on wasm32.
#[cfg(target_arch = "wasm32")]
pub trait MaybeSync {}
#[cfg(target_arch = "wasm32")]
impl<T: ?Sized> MaybeSync for T {}

/// A boxed future; `Send` everywhere but on wasm32.
#[cfg(not(target_arch = "wasm32"))]
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
/// A boxed future; `Send` everywhere but on wasm32.
#[cfg(target_arch = "wasm32")]
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// A value on its way from the device: awaitable, and it can fail. Native code may wait for it with
/// [`crate::Backend::block_on`].
pub type Readback<'a, T> = BoxFuture<'a, Result<T>>;

/// A readback whose value is at hand already.
pub fn ready<'a, T: MaybeSend + 'a>(value: Result<T>) -> Readback<'a, T> {
    Box::pin(std::future::ready(value))
}

/// Waits for a future by parking this thread between polls.
///
/// On wasm32 the only thread must return to the browser before anything can arrive, so there a future that is not
/// ready at once is an error; await it instead.
#[cfg(not(target_arch = "wasm32"))]
pub fn block_on<F: Future>(future: F) -> F::Output {
    use std::{
        sync::Arc,
        task::{Context, Poll, Wake, Waker},
        thread::{self, Thread},
    };

    struct Unpark(Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }

    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    let mut future = std::pin::pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => thread::park(),
        }
    }
}

/// Takes the value of a readback that is ready at once; on wasm32 nothing can be waited for.
#[cfg(target_arch = "wasm32")]
pub fn block_on<T>(mut future: impl Future<Output = Result<T>> + Unpin) -> Result<T> {
    use std::task::{Context, Poll, Waker};
    match Pin::new(&mut future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => Err(crate::Error::new(
            crate::ErrorKind::Unsupported,
            "block_on",
            "wasm32 cannot wait for the device; await the asynchronous form",
        )),
    }
}
