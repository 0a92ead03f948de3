use crate::{
    accept,
    app::App,
    engine::{Engine, State},
    options::ServeOptions,
};
use axum::Router;
use opt_core::{Error, ErrorKind, Opt, Result};
use std::{future::Future, sync::Arc};
use tokio::net::TcpListener;

/// A model behind HTTP: an engine loop on a thread of its own, and the router to it.
///
/// ```
/// use opt_core::Opt;
/// use opt_serve::Server;
///
/// # fn main() -> opt_core::Result<()> {
/// let opt = Opt::open("../models/opt-novels")?;
/// let app: axum::Router = axum::Router::new().nest("/llm", Server::new(opt)?.router());
/// # Ok(())
/// # }
/// ```
///
/// The engine's thread ends when the server and all its routers are gone.
pub struct Server {
    app: Arc<App>,
}

impl Server {
    /// A server with default options.
    ///
    /// # Errors
    /// Those of [`Server::with`].
    pub fn new(opt: Opt) -> Result<Self> {
        Self::with(opt, ServeOptions::default())
    }

    /// A server.
    ///
    /// # Errors
    /// [`ErrorKind::Option`] for options out of range; [`ErrorKind::Io`] if the engine's thread cannot be started.
    pub fn with(opt: Opt, options: ServeOptions) -> Result<Self> {
        options.check()?;
        let engine = Engine::start(opt, &options)?;
        Ok(Self { app: Arc::new(App::new(engine, options)) })
    }

    /// Loads the model by `load` after a failure of the engine, rather than going on with the same, whose device may be
    /// lost. It is called on the engine's thread, again and again until it succeeds.
    #[must_use]
    pub fn reload_with(self, load: impl FnMut() -> Result<Opt> + Send + 'static) -> Self {
        self.app.engine.reload_with(Box::new(load));
        self
    }

    /// The routes: `/v1/...`, `/health`, `/ready`, `/metrics`, `/openapi.json` and the page at `/`.
    pub fn router(&self) -> Router {
        Arc::clone(&self.app).router()
    }

    /// What asks for readiness, and ends the server, from elsewhere.
    pub fn handle(&self) -> Handle {
        Handle { state: Arc::clone(&self.app.engine.state) }
    }

    /// Serves connections until `shutdown` is ready or [`Handle::shutdown`] is called; then what runs may go on for
    /// [`ServeOptions::shutdown`], and is cut off with an error behind that.
    ///
    /// Beyond what the router does by itself, it limits the number of connections and the time to send the head of a
    /// request.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if connections cannot be accepted.
    pub async fn serve(self, listener: TcpListener, shutdown: impl Future<Output = ()>) -> Result<()> {
        let router = self.router();
        let state = Arc::clone(&self.app.engine.state);
        accept::serve(listener, router, &state, &self.app.options, shutdown)
            .await
            .map_err(|error| Error::because(ErrorKind::Io, "connections cannot be accepted", error))
    }
}

/// Asks a server how it is, and ends it. Cheap to clone; it does not keep the server alive.
#[derive(Clone)]
pub struct Handle {
    state: Arc<State>,
}

impl Handle {
    /// Whether requests are taken: not while the engine is being restarted or hangs ([`ServeOptions::stall`]), and not once
    /// the server is to end.
    pub fn is_ready(&self) -> bool {
        self.state.is_ready()
    }

    /// Prompts that wait or run.
    pub fn pending(&self) -> usize {
        self.state.pending()
    }

    /// Begins to end the server: new requests are answered with 503, those that run go on.
    pub fn shutdown(&self) {
        self.state.close();
    }

    /// Ends what still runs, with an error, at the next step. For programs that serve the router themselves;
    /// [`Server::serve`] does it when its time is over.
    pub fn cut_off(&self) {
        self.state.cut_off();
    }

    /// Waits until nothing runs any more; sensible behind [`Handle::shutdown`].
    pub async fn idle(&self) {
        while self.state.pending() > 0 {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }
}
