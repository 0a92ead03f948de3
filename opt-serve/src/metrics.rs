//! What is counted and measured.

use opt_core::batching::BatchStats;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::Registry,
};
use std::{sync::atomic::AtomicU64, time::Duration};

type Float = Gauge<f64, AtomicU64>;

/// Labels of requests.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Answered {
    endpoint: &'static str,
    status: u16,
}

/// Labels of latencies.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Endpoint {
    endpoint: &'static str,
}

pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    latency: Family<Endpoint, Histogram, fn() -> Histogram>,
    queue_time: Histogram,
    first_token: Histogram,
    between_tokens: Histogram,
    step: Histogram,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    generated_tokens: Counter,
    tokens_per_second: Float,
    pub(crate) cancelled: Counter,
    pub(crate) restarts: Counter,
    ready: Gauge,
    pending: Gauge,
    waiting: Gauge,
    running: Gauge,
    sequences: Gauge,
    rows: Gauge,
    cache_reserved: Gauge,
    cache_kept: Gauge,
}

fn latency() -> Histogram {
    Histogram::new(exponential_buckets(0.005, 2.0, 16))
}

fn short() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 16))
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("opt");
        macro_rules! register {
            ($name:literal, $help:literal, $metric:expr) => {{
                let metric = $metric;
                registry.register($name, $help, metric.clone());
                metric
            }};
        }
        let latencies: Family<Endpoint, Histogram, fn() -> Histogram> =
            Family::new_with_constructor(latency as fn() -> Histogram);
        Self {
            requests: register!("requests", "Requests answered, by endpoint and status", Family::default()),
            latency: register!("request_seconds", "Time from a request to the end of its answer", latencies),
            queue_time: register!("queue_seconds", "Time that a prompt waited before it ran", latency()),
            first_token: register!(
                "first_token_seconds",
                "Time from a request to its first token",
                latency()
            ),
            between_tokens: register!("token_seconds", "Time between two tokens of a sequence", short()),
            step: register!("step_seconds", "Time of a step of the batch", short()),
            prompt_tokens: register!("prompt_tokens", "Tokens of prompts", Counter::default()),
            cached_tokens: register!(
                "cached_tokens",
                "Tokens of prompts that did not have to be run",
                Counter::default()
            ),
            generated_tokens: register!("generated_tokens", "Tokens generated", Counter::default()),
            tokens_per_second: register!(
                "tokens_per_second",
                "Tokens generated per second, over the last second or more in which there was work",
                Float::default()
            ),
            cancelled: register!("cancelled", "Prompts whose client went away", Counter::default()),
            restarts: register!(
                "engine_restarts",
                "Restarts of the engine after a failure",
                Counter::default()
            ),
            ready: register!("ready", "1 while requests are taken", Gauge::default()),
            pending: register!("pending", "Prompts that wait or run", Gauge::default()),
            waiting: register!("batch_waiting", "Prompts that wait for a place", Gauge::default()),
            running: register!("batch_running", "Prompts that run", Gauge::default()),
            sequences: register!("batch_sequences", "Sequences that run", Gauge::default()),
            rows: register!("batch_rows", "Rows of the last forward pass", Gauge::default()),
            cache_reserved: register!(
                "cache_reserved_bytes",
                "Bytes set aside for keys and values of prompts that run",
                Gauge::default()
            ),
            cache_kept: register!(
                "cache_kept_bytes",
                "Bytes of keys and values kept for prompts that begin alike",
                Gauge::default()
            ),
            registry,
        }
    }

    pub(crate) fn answered(&self, endpoint: &'static str, status: u16) {
        self.requests.get_or_create(&Answered { endpoint, status }).inc();
    }

    pub(crate) fn took(&self, endpoint: &'static str, time: Duration) {
        self.latency.get_or_create(&Endpoint { endpoint }).observe(time.as_secs_f64());
    }

    pub(crate) fn started(&self, waited: Duration) {
        self.queue_time.observe(waited.as_secs_f64());
    }

    pub(crate) fn first_token(&self, time: Duration) {
        self.first_token.observe(time.as_secs_f64());
    }

    pub(crate) fn next_token(&self, time: Duration) {
        self.between_tokens.observe(time.as_secs_f64());
    }

    /// What a step did; `before` are the numbers before it, since the batch counts from its own beginning.
    pub(crate) fn stepped(&self, time: Duration, before: &BatchStats, now: &BatchStats) {
        self.step.observe(time.as_secs_f64());
        self.prompt_tokens.inc_by(now.prompt_tokens.saturating_sub(before.prompt_tokens));
        self.cached_tokens.inc_by(now.cached_tokens.saturating_sub(before.cached_tokens));
        self.generated_tokens.inc_by(now.generated_tokens.saturating_sub(before.generated_tokens));
        self.batch(now);
    }

    /// How full the batch is.
    pub(crate) fn batch(&self, now: &BatchStats) {
        self.waiting.set(now.waiting as i64);
        self.running.set(now.running as i64);
        self.sequences.set(now.sequences as i64);
        self.rows.set(now.rows as i64);
        self.cache_reserved.set(now.cache_reserved as i64);
        self.cache_kept.set(now.cache_kept as i64);
    }

    pub(crate) fn speed(&self, tokens_per_second: f64) {
        self.tokens_per_second.set(tokens_per_second);
    }

    /// The text that Prometheus reads.
    pub(crate) fn text(&self, ready: bool, pending: usize) -> String {
        self.ready.set(i64::from(ready));
        self.pending.set(pending as i64);
        let mut text = String::new();
        // Writing into a string does not fail.
        let _ = text::encode(&mut text, &self.registry);
        text
    }
}
