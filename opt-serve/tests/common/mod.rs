//! A server on a free port, a client that does what it is told, and an engine that fails when it is told.
#![allow(dead_code)] // Not every test uses all of it.

pub mod faulty;
pub mod http;

use opt_core::Opt;
use opt_serve::{Handle, ServeOptions, Server};
use serde_json::Value;
use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::OnceLock,
    thread,
};
use tokio::sync::oneshot;

/// A file or directory of the repository.
pub fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// The small trained model, loaded once.
pub fn novels() -> Opt {
    static OPT: OnceLock<Opt> = OnceLock::new();
    OPT.get_or_init(|| Opt::open(root("models/opt-novels")).unwrap()).clone()
}

/// A server that runs until it is dropped.
pub struct Running {
    pub address: SocketAddr,
    pub handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<opt_core::Result<()>>>,
}

impl Running {
    pub fn start(opt: Opt, options: ServeOptions) -> Self {
        Self::of(Server::with(opt, options.model("opt-novels")).unwrap())
    }

    pub fn of(server: Server) -> Self {
        let handle = server.handle();
        let (stop, stopped) = oneshot::channel::<()>();
        let (told, address) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
                told.send(listener.local_addr().unwrap()).unwrap();
                server.serve(listener, async { drop(stopped.await) }).await
            })
        });
        Self { address: address.recv().unwrap(), handle, stop: Some(stop), thread: Some(thread) }
    }

    /// Asks the server to end.
    pub fn ask_to_stop(&mut self) {
        drop(self.stop.take());
    }

    /// Ends it and waits for that.
    pub fn stop(mut self) {
        self.ask_to_stop();
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    pub fn post(&self, path: &str, body: &Value) -> http::Answer {
        http::send(
            self.address,
            "POST",
            path,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
    }

    /// A completion that has to succeed.
    pub fn complete(&self, body: &Value) -> Value {
        let answer = self.post("/v1/completions", body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        answer.json()
    }

    pub fn get(&self, path: &str) -> http::Answer {
        http::send(self.address, "GET", path, &[], b"")
    }

    /// The value of a metric without labels.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|line| line.split(' ').next() == Some(name));
        line.unwrap_or_else(|| panic!("{name} in {text}")).split(' ').nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.ask_to_stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Waits for something that happens soon.
pub fn soon(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..1000 {
        if is() {
            return;
        }
        thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("not within ten seconds: {what}");
}
