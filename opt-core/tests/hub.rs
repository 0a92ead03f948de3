//! Downloads from a server on loopback that behaves, and misbehaves, like the hub.
#![cfg(feature = "hub")]

use opt_core::{
    CancelToken, ErrorKind, Result,
    hub::{Hub, HubOptions, Snapshot},
};
use sha2::{Digest, Sha256};
use std::{
    collections::HashMap,
    fs,
    io::{BufRead, BufReader, Write},
    net::{TcpListener, TcpStream},
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

#[derive(Debug, Clone)]
struct Request {
    method: String,
    path: String,
    range: Option<usize>,
    authorization: Option<String>,
}

/// What the server does with a request.
enum Reply {
    Full {
        status: u16,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
    },
    /// Announces all of the body, sends this much of it, then closes or (with a time) stays silent.
    Partial {
        status: u16,
        headers: Vec<(String, String)>,
        body: Vec<u8>,
        sent: usize,
        silent: Option<Duration>,
    },
}

fn reply(status: u16, headers: &[(&str, &str)], body: impl Into<Vec<u8>>) -> Reply {
    let headers = headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Reply::Full { status, headers, body: body.into() }
}

struct Server {
    address: String,
    log: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(handler: impl Fn(&Request) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let (handler, seen) = (Arc::new(handler), log.clone());
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (handler, seen) = (handler.clone(), seen.clone());
                thread::spawn(move || serve(stream, &*handler, &seen));
            }
        });
        Self { address, log }
    }

    fn requests(&self) -> Vec<Request> {
        std::mem::take(&mut *self.log.lock().unwrap())
    }

    /// The places from which a file's content was asked for.
    fn ranges(&self, part: &str) -> Vec<Option<usize>> {
        let gets = self.requests().into_iter().filter(|r| r.method == "GET" && r.path.contains(part));
        gets.map(|r| r.range).collect()
    }
}

/// Errors here only mean that the client went away, which some tests want it to.
fn serve(stream: TcpStream, handler: &dyn Fn(&Request) -> Reply, log: &Mutex<Vec<Request>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut headers = HashMap::new();
    while let Some((key, value)) = lines.next()?.ok()?.split_once(": ") {
        headers.insert(key.to_ascii_lowercase(), value.to_owned());
    }
    let range = headers
        .get("range")
        .map(|range| range.trim_start_matches("bytes=").trim_end_matches('-').parse().unwrap());
    let request = Request { method, path, range, authorization: headers.remove("authorization") };
    log.lock().unwrap().push(request.clone());
    let (status, headers, body, sent, silent) = match handler(&request) {
        Reply::Full { status, headers, body } => (status, headers, body.clone(), body.len(), None),
        Reply::Partial { status, headers, body, sent, silent } => (status, headers, body, sent, silent),
    };
    let mut out = stream;
    let mut head = format!("HTTP/1.1 {status} X\r\nConnection: close\r\nContent-Length: {}\r\n", body.len());
    for (key, value) in headers {
        head += &format!("{key}: {value}\r\n");
    }
    out.write_all((head + "\r\n").as_bytes()).ok()?;
    if request.method != "HEAD" {
        out.write_all(&body[..sent.min(body.len())]).ok()?;
        out.flush().ok()?;
        thread::sleep(silent.unwrap_or_default());
    }
    Some(())
}

/// Files of a repository by name.
type Files = Vec<(&'static str, Vec<u8>)>;

fn large() -> Vec<u8> {
    (0..700_000_u32).flat_map(|i| (i.wrapping_mul(2_654_435_761)).to_le_bytes()).collect()
}

fn model() -> Files {
    vec![
        ("config.json", b"{\"model_type\": \"opt\"}".to_vec()),
        ("tokenizer.json", b"{}".to_vec()),
        ("README.md", b"not needed".to_vec()),
        ("model.safetensors", large()),
        ("pytorch_model.bin", b"not needed either".to_vec()),
    ]
}

fn sha256(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

fn listing(files: &Files) -> Reply {
    let siblings: Vec<String> =
        files.iter().map(|(name, _)| format!("{{\"rfilename\": {name:?}}}")).collect();
    reply(200, &[], format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", siblings.join(", ")))
}

/// A hub that behaves, with the files kept in it (no redirects); weights are named by their SHA-256.
fn hub(files: &Files, request: &Request) -> Reply {
    if request.path == "/api/models/org/opt/revision/main" {
        return listing(files);
    }
    let name = request.path.strip_prefix(&format!("/org/opt/resolve/{COMMIT}/"));
    match files.iter().find(|(file, _)| Some(*file) == name) {
        Some((_, body)) => {
            let etag = format!("\"{}\"", sha256(body));
            match request.range {
                None => reply(200, &[("ETag", &etag)], body.clone()),
                Some(from) => {
                    let range = format!("bytes {from}-{}/{}", body.len() - 1, body.len());
                    reply(206, &[("ETag", &etag), ("Content-Range", &range)], &body[from..])
                }
            }
        }
        None => reply(404, &[("X-Error-Code", "RepoNotFound")], ""),
    }
}

struct Client {
    dir: tempfile::TempDir,
    options: HubOptions,
}

impl Client {
    fn new(endpoint: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut options = HubOptions::new(dir.path());
        options.endpoint = endpoint.to_owned();
        options.read_timeout = Duration::from_secs(30);
        options.connect_timeout = Duration::from_secs(2);
        Self { dir, options }
    }

    fn get(&self, id: &str) -> Result<Snapshot> {
        let mut progress = |_: opt_core::Progress<'_>| ControlFlow::Continue(());
        Hub::new(self.options.clone()).snapshot(id, &mut progress, &CancelToken::new())
    }

    fn error(&self, id: &str) -> (ErrorKind, String) {
        let error = self.get(id).unwrap_err();
        assert!(!error.to_string().contains('\n'));
        (error.kind(), error.to_string())
    }

    fn repository(&self) -> PathBuf {
        self.dir.path().join("models--org--opt")
    }

    fn blobs(&self) -> Vec<String> {
        let entries = fs::read_dir(self.repository().join("blobs")).into_iter().flatten().flatten();
        let mut names: Vec<String> = entries.map(|e| e.file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// No weights under a final name, and no revision that leads to half a snapshot.
    fn assert_no_weights(&self) {
        let snapshot = self.repository().join("snapshots").join(COMMIT);
        assert!(!snapshot.join("model.safetensors").exists());
        assert!(!self.repository().join("refs/main").exists());
        assert!(!self.blobs().contains(&sha256(&large())));
    }
}

fn check(path: &Path, files: &Files, expected: &[&str]) {
    let mut found: Vec<String> = fs::read_dir(path)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|name| path.join(name).is_file())
        .collect();
    found.sort();
    let mut wanted: Vec<&str> = expected.iter().copied().filter(|name| !name.contains('/')).collect();
    wanted.sort_unstable();
    assert_eq!(found, wanted);
    for name in expected {
        let body = &files.iter().find(|(file, _)| file == name).unwrap().1;
        assert!(&fs::read(path.join(name)).unwrap() == body, "{name} differs");
    }
}

const NEEDED: [&str; 3] = ["config.json", "tokenizer.json", "model.safetensors"];

#[test]
fn whole_model_in_the_cache_layout() {
    let server = Server::start(|r| hub(&model(), r));
    let client = Client::new(&server.address);
    let snapshot = client.get("org/opt").unwrap();
    assert_eq!(snapshot.path, client.repository().join("snapshots").join(COMMIT));
    assert_eq!((snapshot.commit.as_str(), snapshot.unchecked), (COMMIT, false));
    check(&snapshot.path, &model(), &NEEDED);
    assert_eq!(fs::read_to_string(client.repository().join("refs/main")).unwrap(), COMMIT);
    let mut etags: Vec<String> =
        NEEDED.iter().map(|n| sha256(&model().iter().find(|f| f.0 == *n).unwrap().1)).collect();
    etags.sort();
    assert_eq!(client.blobs(), etags);
    #[cfg(unix)]
    assert_eq!(
        fs::read_link(snapshot.path.join("model.safetensors")).unwrap(),
        Path::new("../../blobs").join(sha256(&large()))
    );

    // Again: one question whether the branch moved, nothing else. By commit: no question at all.
    server.requests();
    client.get("org/opt").unwrap();
    assert_eq!(server.requests().len(), 1);
    assert_eq!(client.get(&format!("org/opt@{COMMIT}")).unwrap().path, snapshot.path);
    assert_eq!(server.requests().len(), 0);
}

#[test]
fn progress_counts_bytes_and_can_cancel() {
    let server = Server::start(|r| hub(&model(), r));
    let client = Client::new(&server.address);
    let mut seen = HashMap::new();
    let mut record = |p: opt_core::Progress<'_>| {
        assert!(p.done <= p.total && p.done >= *seen.get(p.item).unwrap_or(&0));
        seen.insert(p.item.to_owned(), p.done);
        ControlFlow::Continue(())
    };
    let service = Hub::new(client.options.clone());
    service.snapshot("org/opt", &mut record, &CancelToken::new()).unwrap();
    assert_eq!(seen["model.safetensors"], large().len() as u64);

    for by_token in [true, false] {
        let client = Client::new(&server.address);
        let cancel = CancelToken::new();
        let mut stop = |p: opt_core::Progress<'_>| {
            if p.item == "model.safetensors" && p.done > 0 {
                if by_token {
                    cancel.cancel();
                } else {
                    return ControlFlow::Break(());
                }
            }
            ControlFlow::Continue(())
        };
        let error = Hub::new(client.options.clone()).snapshot("org/opt", &mut stop, &cancel).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        client.assert_no_weights();
        // What had come is kept for the next time.
        assert!(client.blobs().contains(&format!("{}.incomplete", sha256(&large()))));
        client.get("org/opt").unwrap();
        check(&client.repository().join("snapshots").join(COMMIT), &model(), &NEEDED);
    }
}

#[test]
fn large_files_redirect_to_another_host_without_the_token() {
    let cdn = Server::start(|r| match r.range {
        None => reply(200, &[("ETag", "\"the-cdn-s-own\"")], large()),
        Some(_) => reply(500, &[], ""),
    });
    let cdn_address = cdn.address.clone();
    let server = Server::start(move |r| {
        if r.authorization.as_deref() != Some("Bearer hf_secret") {
            return reply(401, &[], "");
        }
        if !r.path.ends_with("model.safetensors") {
            return hub(&model(), r);
        }
        if !r.path.starts_with("/renamed") {
            // As for a renamed repository: a redirect within the hub first.
            return reply(307, &[("Location", &format!("/renamed{}", r.path))], "");
        }
        let headers = [
            ("Location", format!("{cdn_address}/x/y?signature=z%2F")),
            ("X-Linked-Etag", format!("\"{}\"", sha256(&large()))),
            ("X-Linked-Size", large().len().to_string()),
            ("X-Repo-Commit", COMMIT.to_owned()),
            ("ETag", "\"not-this\"".to_owned()),
        ];
        reply(302, &headers.each_ref().map(|(k, v)| (*k, v.as_str())), "see elsewhere")
    });
    let mut client = Client::new(&server.address);
    client.options.token = Some("hf_secret".into());
    let snapshot = client.get("org/opt").unwrap();
    check(&snapshot.path, &model(), &NEEDED);
    assert!(client.blobs().contains(&sha256(&large())));
    let seen = cdn.requests();
    assert_eq!(seen.len(), 1);
    assert_eq!((seen[0].path.as_str(), &seen[0].authorization), ("/x/y?signature=z%2F", &None));
}

/// A hub that breaks off the weights after `cut` bytes, `times` times.
fn breaking(cut: usize, times: usize, ranges: bool) -> Server {
    let broken = AtomicUsize::new(0);
    Server::start(move |r| {
        if r.method == "HEAD" || !r.path.ends_with("model.safetensors") {
            return hub(&model(), r);
        }
        let full =
            if ranges { hub(&model(), r) } else { hub(&model(), &Request { range: None, ..r.clone() }) };
        match full {
            Reply::Full { status, headers, body } if broken.fetch_add(1, Ordering::Relaxed) < times => {
                Reply::Partial { status, headers, body, sent: cut, silent: None }
            }
            full => full,
        }
    })
}

#[test]
fn a_broken_download_continues() {
    let server = breaking(1_000_000, 2, true);
    let client = Client::new(&server.address);
    let snapshot = client.get("org/opt").unwrap();
    check(&snapshot.path, &model(), &NEEDED);
    assert_eq!(server.ranges("model.safetensors"), [None, Some(1_000_000), Some(2_000_000)]);
    assert_eq!(client.blobs().len(), 3);
}

#[test]
fn a_broken_download_continues_in_a_later_call() {
    let server = breaking(1_000_000, 1, true);
    let mut client = Client::new(&server.address);
    client.options.retries = 0;
    assert_eq!(client.error("org/opt").0, ErrorKind::Hub);
    client.assert_no_weights();
    let partial = client.repository().join("blobs").join(sha256(&large()) + ".incomplete");
    assert_eq!(fs::metadata(&partial).unwrap().len(), 1_000_000);
    let snapshot = client.get("org/opt").unwrap();
    check(&snapshot.path, &model(), &NEEDED);
    assert_eq!(server.ranges("model.safetensors"), [None, Some(1_000_000)]);
    assert!(!partial.exists());
}

#[test]
fn a_server_without_ranges_begins_again() {
    let server = breaking(1_000_000, 1, false);
    let client = Client::new(&server.address);
    check(&client.get("org/opt").unwrap().path, &model(), &NEEDED);
    assert_eq!(server.ranges("model.safetensors"), [None, Some(1_000_000)]);
}

#[test]
fn a_partial_file_that_is_wrong_is_thrown_away() {
    // Longer than the file; as long; shorter: each with other content than the hub's.
    for length in [large().len() + 1, large().len(), 1_000_000] {
        let server = Server::start(|r| hub(&model(), r));
        let client = Client::new(&server.address);
        let blobs = client.repository().join("blobs");
        fs::create_dir_all(&blobs).unwrap();
        fs::write(blobs.join(sha256(&large()) + ".incomplete"), vec![7; length]).unwrap();
        check(&client.get("org/opt").unwrap().path, &model(), &NEEDED);
    }
}

#[test]
fn other_content_than_announced_is_refused() {
    let wrong = |body: Vec<u8>| {
        let server = Server::start(move |r| {
            if r.method == "GET" && r.path.ends_with("model.safetensors") {
                return reply(200, &[], body.clone());
            }
            hub(&model(), r)
        });
        let mut client = Client::new(&server.address);
        client.options.retries = 1;
        let (kind, message) = client.error("org/opt");
        assert_eq!(kind, ErrorKind::Hub);
        client.assert_no_weights();
        message
    };
    let mut flipped = large();
    flipped[12_345] ^= 1;
    assert!(wrong(flipped).contains("expected the SHA-256"));
    assert!(
        wrong(large()[1..].to_vec()).contains("model.safetensors: expected 2800000 bytes, found 2799999")
    );
    assert!(wrong([large(), vec![0]].concat()).contains("expected 2800000 bytes, found more than"));
}

#[test]
fn a_silent_server_is_an_error_in_time() {
    for (part, sent) in [("/api/", 0), ("config.json", 5), ("model.safetensors", 1_000_000)] {
        let server = Server::start(move |r| match hub(&model(), r) {
            Reply::Full { status, headers, body } if r.method == "GET" && r.path.contains(part) => {
                Reply::Partial { status, headers, body, sent, silent: Some(Duration::from_secs(20)) }
            }
            full => full,
        });
        let mut client = Client::new(&server.address);
        client.options.read_timeout = Duration::from_millis(400);
        let start = Instant::now();
        let (kind, message) = client.error("org/opt");
        assert_eq!(kind, ErrorKind::Hub);
        assert!(message.contains("127.0.0.1 was silent for 0.4 s"), "{message}");
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
        client.assert_no_weights();
    }
    // One that accepts and never says a word.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Client::new(&format!("http://{}", listener.local_addr().unwrap()));
    client.options.read_timeout = Duration::from_millis(400);
    assert!(client.error("org/opt").1.contains("was silent"));
}

#[test]
fn refusals_say_what_to_do() {
    let answering = |status: u16, code: &'static str| {
        Server::start(move |_| reply(status, &[("X-Error-Code", code)], ""))
    };
    let error = |server: &Server, id: &str| Client::new(&server.address).error(id);

    let missing = answering(404, "RepoNotFound");
    let expected = format!("org/none: no such model or revision on {}", missing.address);
    assert_eq!(error(&missing, "org/none"), (ErrorKind::NotFound, expected));
    let revision = error(&answering(404, "RevisionNotFound"), "org/opt@v9");
    assert_eq!(revision, (ErrorKind::NotFound, "org/opt has no revision \"v9\"".into()));
    let (kind, message) = error(&answering(401, ""), "org/opt");
    let expected = "org/opt: refused (401): the model does not exist, or is private or gated; set HF_TOKEN to a token \
                    that may read it";
    assert_eq!((kind, message.as_str()), (ErrorKind::Hub, expected));
    let gated = answering(403, "GatedRepo");
    let mut client = Client::new(&gated.address);
    client.options.token = Some("hf_x".into());
    let expected =
        "org/opt: refused (403): the model is gated; the token that was sent (HF_TOKEN) may not read it";
    assert_eq!(client.error("org/opt"), (ErrorKind::Hub, expected.into()));
    let (kind, message) = error(&Server::start(|_| reply(200, &[], "<html>")), "org/opt");
    assert!(
        kind == ErrorKind::Hub && message.contains("expected the hub's description of org/opt"),
        "{message}"
    );
    let circle = Server::start(|r| reply(302, &[("Location", &r.path)], ""));
    assert!(error(&circle, "org/opt").1.contains("more than 10 redirects"));
    let elsewhere = Server::start(|_| reply(302, &[("Location", "file:///etc/passwd")], ""));
    assert!(error(&elsewhere, "org/opt").1.contains("expected an https address"));
    let empty = Server::start(|r| hub(&vec![("config.json", vec![])], r));
    assert!(error(&empty, "org/opt").1.starts_with("org/opt: the repository has no weights, expected"));

    for id in ["", "a/b/c", "../x", "a/..", "org/opt@", "org/opt@../../x", "/etc", "a b/c", "org\\opt"] {
        assert_eq!(error(&missing, id).0, ErrorKind::Option, "{id:?}");
    }
    assert_eq!(missing.requests().len(), 1);
}

#[test]
fn unreachable_without_cache() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (kind, message) = Client::new(&format!("http://{closed}")).error("org/opt");
    assert_eq!(kind, ErrorKind::Hub);
    assert!(message.starts_with("the connection to 127.0.0.1 failed: "), "{message}");
}

#[test]
fn the_cache_serves_offline_and_when_the_hub_is_down() {
    let down = Arc::new(AtomicUsize::new(0));
    let switch = down.clone();
    let server = Server::start(move |r| match switch.load(Ordering::Relaxed) {
        0 => hub(&model(), r),
        status => reply(status as u16, &[], ""),
    });
    let mut client = Client::new(&server.address);
    client.options.offline = true;
    let (kind, message) = client.error("org/opt");
    assert_eq!(kind, ErrorKind::NotFound);
    assert!(message.contains("not in the cache") && message.ends_with("offline mode is on"), "{message}");
    assert_eq!(server.requests().len(), 0);

    client.options.offline = false;
    let path = client.get("org/opt").unwrap().path;
    server.requests();
    client.options.offline = true;
    let offline = client.get("org/opt").unwrap();
    assert_eq!((&offline.path, offline.unchecked, server.requests().len()), (&path, true, 0));
    client.options.offline = false;
    down.store(503, Ordering::Relaxed);
    let cached = client.get("org/opt").unwrap();
    assert_eq!((&cached.path, cached.unchecked), (&path, true));
    // A plain no is not the same as no answer.
    down.store(404, Ordering::Relaxed);
    assert_eq!(client.error("org/opt").0, ErrorKind::NotFound);
    client.options.endpoint = "http://127.0.0.1:1".into();
    assert_eq!(client.get("org/opt").unwrap().path, path);
    // A snapshot that lost its weights is not one.
    fs::remove_file(client.repository().join("blobs").join(sha256(&large()))).unwrap();
    assert_eq!(client.error("org/opt").0, ErrorKind::Hub);
    down.store(0, Ordering::Relaxed);
    client.options.endpoint = server.address.clone();
    check(&client.get("org/opt").unwrap().path, &model(), &NEEDED);
}

fn sharded(second: &str) -> Files {
    let index = format!(
        "{{\"metadata\": {{}}, \"weight_map\": {{\"a\": \"model-00001-of-00002.safetensors\", \"b\": {second:?}, \"c\": {second:?}}}}}"
    );
    vec![
        ("config.json", b"{}".to_vec()),
        ("model.safetensors.index.json", index.into_bytes()),
        ("model-00001-of-00002.safetensors", b"one".to_vec()),
        ("deep/er/two.safetensors", b"two".to_vec()),
        ("pytorch_model.bin.index.json", b"{}".to_vec()),
        ("unrelated-00001-of-00002.safetensors", b"x".to_vec()),
    ]
}

#[test]
fn shards_that_the_index_names() {
    let server = Server::start(|r| hub(&sharded("deep/er/two.safetensors"), r));
    let client = Client::new(&server.address);
    let snapshot = client.get("org/opt").unwrap();
    let names = [
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "deep/er/two.safetensors",
    ];
    check(&snapshot.path, &sharded("deep/er/two.safetensors"), &names);
    // Complete only with all shards.
    fs::remove_file(snapshot.path.join(names[3])).unwrap();
    let mut offline = Client { dir: client.dir, options: client.options };
    offline.options.offline = true;
    assert_eq!(offline.error("org/opt").0, ErrorKind::NotFound);
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() {
    for bad in ["../../x", "/etc/passwd", "a/../../x", "..\\x", "C:\\x"] {
        let server = Server::start(move |r| hub(&sharded(bad), r));
        let client = Client::new(&server.address);
        let (kind, message) = client.error("org/opt");
        assert_eq!(kind, ErrorKind::Checkpoint);
        assert!(message.contains("expected a file below its own directory"), "{message}");
        assert!(server.requests().iter().all(|r| !r.path.contains("passwd") && !r.path.ends_with('x')));
    }
    let server = Server::start(|r| hub(&sharded("gone.safetensors"), r));
    let (kind, message) = Client::new(&server.address).error("org/opt");
    assert_eq!(kind, ErrorKind::NotFound);
    assert_eq!(message, "org/opt: the index names \"gone.safetensors\", which the repository does not have");
}

#[test]
fn two_at_once_download_once() {
    let server = Server::start(|r| hub(&model(), r));
    let client = Client::new(&server.address);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| check(&client.get("org/opt").unwrap().path, &model(), &NEEDED));
        }
    });
    assert_eq!(server.ranges("model.safetensors"), [None]);
}

#[test]
fn hub_moves_between_threads() {
    fn check<T: Clone + Send + Sync + 'static>() {}
    check::<Hub>();
}
