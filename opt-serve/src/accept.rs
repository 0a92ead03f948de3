//! Accepting connections, and ending them.

use crate::{engine::State, options::ServeOptions, patience::Patience};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use std::{future::Future, io, pin::pin, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::Semaphore, task::JoinSet};

/// Largest head of a request, in bytes.
const HEAD_BYTES: usize = 64 << 10;
/// How long answers that were cut off may take to leave.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// Pause after an error that is not a single connection's, such as too many open files.
const PAUSE: Duration = Duration::from_millis(100);

pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    state: &State,
    options: &ServeOptions,
    shutdown: impl Future<Output = ()>,
) -> io::Result<()> {
    let places = Arc::new(Semaphore::new(options.connections.min(Semaphore::MAX_PERMITS)));
    let graceful = GracefulShutdown::new();
    let mut connections = JoinSet::new();
    let mut shutdown = pin!(shutdown);
    loop {
        // Connections that have ended are forgotten.
        while connections.try_join_next().is_some() {}
        // Without a free place the next connection waits in the system's own queue.
        let accept = async {
            let place = Arc::clone(&places).acquire_owned().await.map_err(io::Error::other)?;
            Ok::<_, io::Error>((place, listener.accept().await?))
        };
        let closing = async {
            while !state.is_closing() {
                let changed = state.changed.notified();
                if state.is_closing() {
                    break;
                }
                changed.await;
            }
        };
        let (place, (stream, _)) = tokio::select! {
            accepted = accept => match accepted {
                Ok(accepted) => accepted,
                Err(error) if is_of_the_connection(&error) => continue,
                Err(error) => {
                    tracing::warn!(%error, "a connection cannot be accepted");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            },
            () = &mut shutdown => break,
            () = closing => break,
        };
        // Tokens are to leave as they come.
        let _ = stream.set_nodelay(true);
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(options.read_timeout)
            .max_buf_size(HEAD_BYTES)
            .serve_connection(
                TokioIo::new(Patience::new(stream, options.read_timeout)),
                TowerToHyperService::new(router.clone()),
            );
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection has ended early");
            }
            drop(place);
        });
    }
    // New connections are refused by the system from here on.
    drop(listener);
    state.close();
    tracing::info!(pending = state.pending(), "shutting down");
    let mut ended = pin!(graceful.shutdown());
    if tokio::time::timeout(options.shutdown, &mut ended).await.is_err() {
        state.cut_off();
        let _ = tokio::time::timeout(LAST_WORDS, &mut ended).await;
    }
    connections.abort_all();
    Ok(())
}

fn is_of_the_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}
