use opt_core::{CacheDType, Error, ErrorKind, Result, batching::BatchOptions};
use std::time::Duration;

/// How a [`crate::Server`] serves. The defaults suit one program on one machine: no keys, no other origins, limits that a
/// small machine survives.
///
/// ```
/// use opt_serve::ServeOptions;
///
/// let options = ServeOptions::default().model("opt-novels").api_keys(["secret"]).queue(32);
/// assert_eq!(options.queue, 32);
/// ```
#[derive(Clone)]
#[non_exhaustive]
pub struct ServeOptions {
    /// The name of the model in requests and answers.
    pub model: String,
    /// Limits of the batch that all requests share.
    pub batch: BatchOptions,
    /// How keys and values are held.
    pub cache_dtype: CacheDType,
    /// Most prompts that wait or run at once; what comes beyond is answered with 429. A single request with more is
    /// taken while nothing else is there.
    pub queue: usize,
    /// Most prompts or inputs of one request.
    pub prompts: usize,
    /// Most tokens that one request may ask for per choice; `None` is the context.
    pub max_tokens: Option<usize>,
    /// Largest `n` and `best_of`.
    pub choices: usize,
    /// Most `stop` strings of a request.
    pub stops: usize,
    /// Largest `logprobs`.
    pub logprobs: usize,
    /// Most bytes of a request's body.
    pub body_bytes: usize,
    /// Most bytes of all bodies that are being read at once, at least those of one: what comes beyond is answered with
    /// 429. Bytes as they are sent: JSON of short numbers takes some twenty times as much memory while it is read.
    pub bodies_bytes: usize,
    /// How long a request may take altogether, waiting included.
    pub timeout: Duration,
    /// How long a single step of the engine may take before it counts as one that hangs: readiness is then off and new
    /// requests are answered with 503, until it has ended. More than the longest step ([`BatchOptions::rows`] rows through
    /// the model) can take.
    pub stall: Duration,
    /// How long a client may take to send the head of a request, and then its body; and how long it may read nothing of
    /// an answer before its connection is closed ([`crate::Server::serve`] only).
    pub read_timeout: Duration,
    /// Most connections at once ([`crate::Server::serve`] only).
    pub connections: usize,
    /// How long requests that run may go on once the server is to end.
    pub shutdown: Duration,
    /// Time between two comments that keep a stream open through proxies while no token comes.
    pub keep_alive: Duration,
    /// Keys of which a request has to carry one (`Authorization: Bearer KEY`); empty: none needed.
    pub api_keys: Vec<String>,
    /// Origins whose pages may call this server from a browser (`https://example.org`, or `*`); empty: none.
    pub cors_origins: Vec<String>,
    /// Whether prompts and answers are logged (`tracing`, level info).
    pub log_prompts: bool,
    /// Whether the page at `/` is served.
    pub page: bool,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            model: "opt".to_owned(),
            batch: BatchOptions::default(),
            cache_dtype: CacheDType::default(),
            queue: 256,
            prompts: 2048,
            max_tokens: None,
            choices: 16,
            stops: 4,
            logprobs: 5,
            body_bytes: 8 << 20,
            bodies_bytes: 64 << 20,
            timeout: Duration::from_secs(600),
            stall: Duration::from_secs(120),
            read_timeout: Duration::from_secs(30),
            connections: 1024,
            shutdown: Duration::from_secs(30),
            keep_alive: Duration::from_secs(15),
            api_keys: Vec::new(),
            cors_origins: Vec::new(),
            log_prompts: false,
            page: true,
        }
    }
}

macro_rules! setters {
    ($($name:ident: $type:ty,)*) => {$(
        #[doc = concat!("Sets [`ServeOptions::", stringify!($name), "`].")]
        #[must_use]
        pub fn $name(self, $name: $type) -> Self {
            Self { $name, ..self }
        }
    )*};
}

impl ServeOptions {
    setters! {
        batch: BatchOptions,
        cache_dtype: CacheDType,
        queue: usize,
        prompts: usize,
        max_tokens: Option<usize>,
        choices: usize,
        stops: usize,
        logprobs: usize,
        body_bytes: usize,
        bodies_bytes: usize,
        timeout: Duration,
        stall: Duration,
        read_timeout: Duration,
        connections: usize,
        shutdown: Duration,
        keep_alive: Duration,
        log_prompts: bool,
        page: bool,
    }

    /// Sets [`ServeOptions::model`].
    #[must_use]
    pub fn model(self, model: impl Into<String>) -> Self {
        Self { model: model.into(), ..self }
    }

    /// Sets [`ServeOptions::api_keys`].
    #[must_use]
    pub fn api_keys(self, keys: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { api_keys: keys.into_iter().map(Into::into).collect(), ..self }
    }

    /// Sets [`ServeOptions::cors_origins`].
    #[must_use]
    pub fn cors_origins(self, origins: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self { cors_origins: origins.into_iter().map(Into::into).collect(), ..self }
    }

    /// # Errors
    /// [`ErrorKind::Option`], naming the option.
    pub(crate) fn check(&self) -> Result<()> {
        let fail = |name: &str, expected: &str, found: &dyn std::fmt::Display| {
            Err(Error::new(ErrorKind::Option, format!("{name}: expected {expected}, found {found}")))
        };
        let counts = [
            ("queue", self.queue),
            ("prompts", self.prompts),
            ("max_tokens", self.max_tokens.unwrap_or(1)),
            ("choices", self.choices),
            ("body_bytes", self.body_bytes),
            ("connections", self.connections),
        ];
        if let Some((name, _)) = counts.iter().find(|(_, count)| *count == 0) {
            return fail(name, "at least 1", &0);
        }
        let times = [
            ("timeout", self.timeout),
            ("stall", self.stall),
            ("read_timeout", self.read_timeout),
            ("keep_alive", self.keep_alive),
        ];
        if let Some((name, _)) = times.iter().find(|(_, time)| time.is_zero()) {
            return fail(name, "more than no time", &"0 s");
        }
        if self.model.is_empty() {
            return fail("model", "a name", &"an empty one");
        }
        let is_origin = |origin: &&String| {
            *origin == "*"
                || origin.split_once("://").is_some_and(|(scheme, host)| {
                    !scheme.is_empty() && !host.is_empty() && !host.contains(['/', ' ', '?', '#'])
                })
        };
        if let Some(bad) = self.cors_origins.iter().find(|origin| !is_origin(origin)) {
            return fail("cors_origins", "origins as https://example.org, or *", &format!("{bad:?}"));
        }
        // An empty key would let everybody in who sends an empty one.
        if self.api_keys.iter().any(String::is_empty) {
            return fail("api_keys", "keys", &"an empty one");
        }
        Ok(())
    }
}

impl std::fmt::Debug for ServeOptions {
    /// Without the keys.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServeOptions")
            .field("model", &self.model)
            .field("batch", &self.batch)
            .field("queue", &self.queue)
            .field("api_keys", &self.api_keys.len())
            .field("cors_origins", &self.cors_origins)
            .finish_non_exhaustive()
    }
}
