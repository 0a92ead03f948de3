//! What happens when clients misbehave, the engine fails, or there is too much to do: the right answer, and the server goes
//! on.

mod common;

use common::{
    Running,
    faulty::{FAIL, Orders, PANIC, faulty},
    http, novels, soon,
};
use opt_core::{Error, ErrorKind};
use opt_serve::{ServeOptions, Server};
use serde_json::{Value, json};
use std::{
    io::{BufReader, Read, Write},
    net::Shutdown,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const JSON: (&str, &str) = ("content-type", "application/json");

fn start(options: ServeOptions) -> (Running, Arc<Orders>) {
    let (opt, orders) = faulty(novels());
    (Running::start(opt, options), orders)
}

fn greedy(tokens: usize) -> Value {
    // No end token comes, so that it takes so many steps.
    json!({"prompt": "The river", "temperature": 0, "max_tokens": tokens, "min_new_tokens": tokens})
}

fn streamed(tokens: usize) -> Value {
    let mut body = greedy(tokens);
    body["stream"] = true.into();
    body
}

/// A stream that has begun: its first piece has been read.
fn begin(server: &Running, body: &Value) -> BufReader<std::net::TcpStream> {
    let mut stream = http::connect(server.address);
    stream
        .write_all(&http::request("POST", "/v1/completions", &[JSON], body.to_string().as_bytes()))
        .unwrap();
    let mut reader = BufReader::new(stream);
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        reader.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    assert!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
    assert!(http::chunk(&mut reader).unwrap().starts_with(b"data: {"));
    reader
}

/// What is left of a stream.
fn rest(mut reader: BufReader<std::net::TcpStream>) -> Vec<String> {
    let mut text = Vec::new();
    while let Some(chunk) = http::chunk(&mut reader) {
        text.extend(chunk);
    }
    http::events(&String::from_utf8(text).unwrap())
}

/// After whatever happened.
fn goes_on(server: &Running) {
    soon("ready again", || server.handle.is_ready());
    assert_eq!(server.complete(&greedy(4))["usage"]["completion_tokens"], 4);
    soon("nothing left", || server.handle.pending() == 0);
}

#[test]
fn a_failure_of_the_engine_is_answered_and_repaired() {
    let (server, orders) = start(ServeOptions::default());
    for fault in [FAIL, PANIC] {
        let before = server.metric("opt_engine_restarts_total");
        orders.next_pass(fault);
        let answer = server.post("/v1/completions", &greedy(4));
        assert_eq!(answer.error(), (503, "engine_restarting".into(), None));
        assert_eq!(answer.header("retry-after"), Some("1"));
        assert_eq!(server.metric("opt_engine_restarts_total"), before + 1.0);
        goes_on(&server);
        // A stream that has begun is told by an event, and has no [DONE].
        orders.pause(2);
        let reader = begin(&server, &streamed(200));
        orders.next_pass(fault);
        let events = rest(reader);
        let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "engine_restarting");
        orders.pause(0);
        goes_on(&server);
    }
}

#[test]
fn a_lost_device_is_loaded_again_however_often_it_takes() {
    let (broken, orders) = faulty(novels());
    let tries = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&tries);
    let server = Server::with(broken, ServeOptions::default()).unwrap().reload_with(move || {
        match counted.fetch_add(1, Ordering::SeqCst) {
            0 => Err(Error::new(ErrorKind::Backend, "not yet")),
            1 => panic!("not yet either"),
            _ => Ok(novels()),
        }
    });
    let server = Running::of(server);
    orders.next_pass(FAIL);
    assert_eq!(server.post("/v1/completions", &greedy(4)).error().0, 503);
    // While there is no engine, readiness says so, health does not, and nobody waits.
    assert_eq!(server.get("/ready").error(), (503, "engine_restarting".into(), None));
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.post("/v1/completions", &greedy(4)).error().0, 503);
    assert_eq!(server.metric("opt_ready"), 0.0);
    goes_on(&server);
    assert_eq!(tries.load(Ordering::SeqCst), 3);
    assert_eq!(server.metric("opt_ready"), 1.0);
    let passes = orders.passes();
    server.complete(&greedy(2));
    assert_eq!(orders.passes(), passes, "the new model runs, not the broken one");
}

#[test]
fn an_engine_that_hangs_is_seen_and_may_come_back() {
    let (server, orders) = start(ServeOptions::default().stall(Duration::from_secs(1)));
    // Steps that are only slow hang nowhere, however many they are.
    orders.pause(50);
    let slow = begin(&server, &streamed(12));
    while server.handle.pending() > 0 {
        assert!(server.handle.is_ready());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(rest(slow).last().map(String::as_str), Some("[DONE]"));
    // A step that has ended in a panic has ended.
    orders.pause(0);
    orders.next_pass(PANIC);
    assert_eq!(server.post("/v1/completions", &greedy(1)).error().0, 503);
    goes_on(&server);
    thread::sleep(Duration::from_millis(1200));
    assert!(server.handle.is_ready());
    orders.pause(4000);
    let mut waiting = http::connect(server.address);
    let request = http::request("POST", "/v1/completions", &[JSON], greedy(1).to_string().as_bytes());
    waiting.write_all(&request).unwrap();
    soon("it hangs", || !server.handle.is_ready());
    orders.pause(0);
    assert_eq!(server.get("/ready").error(), (503, "engine_stalled".into(), None));
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.metric("opt_ready"), 0.0);
    let begin = Instant::now();
    assert_eq!(server.post("/v1/completions", &greedy(1)).error(), (503, "engine_stalled".into(), None));
    assert!(begin.elapsed() < Duration::from_secs(1), "nobody waits for it");
    // What it hung at comes to its end.
    assert_eq!(http::read(&mut BufReader::new(waiting)).status, 200);
    goes_on(&server);
}

#[test]
fn bodies_have_a_common_bound() {
    let options = ServeOptions::default().body_bytes(100_000).bodies_bytes(150_000);
    let (server, _) = start(options);
    let body = json!({"prompt": "x", "max_tokens": 1, "user": "y".repeat(90_000)}).to_string();
    let request = http::request("POST", "/v1/completions", &[JSON], body.as_bytes());
    let send = || {
        let mut stream = http::connect(server.address);
        let _ = stream.write_all(&request);
        http::read(&mut BufReader::new(stream))
    };
    // Beside one that has sent nearly all of its body and stops there. (Where both come at the same moment, it may be the
    // one that is refused.)
    let mut half = None;
    soon("there is no room for another one", || {
        let mut stream = http::connect(server.address);
        stream.write_all(&request[..request.len() - 10]).unwrap();
        thread::sleep(Duration::from_millis(50));
        half = Some(stream);
        send().status == 429
    });
    let refused = send();
    assert_eq!(refused.error(), (429, "bodies_full".into(), None));
    assert_eq!(refused.header("retry-after"), Some("1"));
    // So are those of the other route, and those that do not say how long they are.
    let input = json!({"input": "x", "user": "y".repeat(90_000)});
    assert_eq!(server.post("/v1/embeddings", &input).error(), (429, "bodies_full".into(), None));
    let chunked = || {
        let mut stream = http::connect(server.address);
        let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        let _ = stream.write_all(format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", body.len()).as_bytes());
        http::read(&mut BufReader::new(stream))
    };
    assert_eq!(chunked().error().1, "bodies_full");
    // Small ones still fit, and the room comes back, whatever became of a body.
    goes_on(&server);
    drop(half);
    soon("there is room again", || send().status == 200);
    let broken = format!("{{{}", " ".repeat(90_000));
    for _ in 0..5 {
        assert_eq!((send().status, chunked().status), (200, 200));
        let answer = http::send(server.address, "POST", "/v1/completions", &[JSON], broken.as_bytes());
        assert_eq!(answer.error().1, "invalid_json");
    }
}

#[test]
fn a_full_queue_is_429_and_a_client_that_goes_frees_its_place() {
    let (server, orders) = start(ServeOptions::default().queue(2));
    orders.pause(5);
    let (one, two) = (begin(&server, &streamed(400)), begin(&server, &streamed(400)));
    let answer = server.post("/v1/completions", &greedy(1));
    assert_eq!(answer.error(), (429, "queue_full".into(), None));
    assert_eq!(answer.header("retry-after"), Some("1"));
    assert_eq!(server.get("/ready").status, 200, "busy is not broken");
    drop(one);
    soon("a place is free", || server.handle.pending() == 1);
    assert_eq!(server.complete(&greedy(1))["usage"]["completion_tokens"], 1);
    drop(two);
    soon("all places are free", || server.handle.pending() == 0);
    // One that waits for a whole answer goes as well.
    let mut stream = http::connect(server.address);
    stream
        .write_all(&http::request("POST", "/v1/completions", &[JSON], greedy(400).to_string().as_bytes()))
        .unwrap();
    soon("it runs", || server.metric("opt_batch_running") == 1.0);
    drop(stream);
    soon("it is gone", || server.handle.pending() == 0);
    assert!(server.metric("opt_cancelled_total") >= 3.0);
    // What is more than the queue by itself is possible while nothing else is there.
    orders.pause(0);
    let many = json!({"prompt": ["a", "b", "c", "d"], "max_tokens": 1});
    assert_eq!(server.complete(&many)["choices"].as_array().unwrap().len(), 4);
}

#[test]
fn a_thousand_streams_aborted_in_a_row() {
    let (server, _) = start(ServeOptions::default());
    let request = http::request("POST", "/v1/completions", &[JSON], streamed(300).to_string().as_bytes());
    for i in 0..1000 {
        let mut stream = http::connect(server.address);
        stream.write_all(&request).unwrap();
        if i % 10 == 0 {
            // Some have seen a piece of it.
            stream.read_exact(&mut [0; 16]).unwrap();
        }
        if i % 3 == 0 {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
    soon("all of them are gone", || server.handle.pending() == 0);
    goes_on(&server);
}

#[test]
fn a_reader_that_does_not_read_holds_up_nobody() {
    let (server, _) = start(ServeOptions::default());
    let mut body = streamed(400);
    body["logprobs"] = 5.into();
    body["n"] = 8.into();
    let slow = begin(&server, &body);
    // Its tokens are made while it sleeps, and others get theirs.
    goes_on(&server);
    let events = rest(slow);
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"));
}

#[test]
fn what_takes_too_long_is_ended() {
    let (server, orders) = start(ServeOptions::default().timeout(Duration::from_millis(300)));
    orders.pause(20);
    assert_eq!(server.post("/v1/completions", &greedy(200)).error(), (408, "request_timeout".into(), None));
    let events = rest(begin(&server, &streamed(200)));
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "request_timeout");
    soon("both are gone", || server.handle.pending() == 0);
    orders.pause(0);
    goes_on(&server);
}

#[test]
fn bodies_and_heads_that_do_not_end() {
    let options = ServeOptions::default().body_bytes(10_000).read_timeout(Duration::from_millis(300));
    let (server, _) = start(options);
    // Announced, and chunked without a word of it.
    let large = json!({"prompt": "x".repeat(20_000)});
    assert_eq!(server.post("/v1/completions", &large).error(), (413, "body_too_large".into(), None));
    let mut stream = http::connect(server.address);
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    for _ in 0..20 {
        let _ = stream.write_all(format!("3e8\r\n{}\r\n", " ".repeat(1000)).as_bytes());
    }
    assert_eq!(http::read(&mut BufReader::new(stream)).error().0, 413);
    // A body that comes drop by drop.
    let mut stream = http::connect(server.address);
    stream.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{").unwrap();
    assert_eq!(http::read(&mut BufReader::new(stream)).error(), (408, "request_timeout".into(), None));
    // A head that comes drop by drop: the connection is closed.
    let mut slow = http::connect(server.address);
    let begin = Instant::now();
    let ended = (0..100).any(|_| {
        thread::sleep(Duration::from_millis(50));
        slow.write_all(b"x").is_err()
    });
    assert!(ended && begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());
    // A head without end, one that is no HTTP, and one that lies about its length.
    for bytes in [vec![b'a'; 200_000], b"\x16\x03\x01\x02\x00\x01\x00\x01".to_vec()] {
        let mut stream = http::connect(server.address);
        let _ = stream.write_all(&bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(
            answer.is_empty() || answer.starts_with(b"HTTP/1.1 4"),
            "{}",
            String::from_utf8_lossy(&answer)
        );
    }
    // A socket closed for writing in the middle of a request, and behind it.
    for part in [40, usize::MAX] {
        let request = http::request("POST", "/v1/completions", &[JSON], greedy(2).to_string().as_bytes());
        let mut stream = http::connect(server.address);
        stream.write_all(&request[..part.min(request.len())]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read_to_end(&mut Vec::new());
    }
    goes_on(&server);
}

#[test]
fn a_shutdown_lets_what_runs_end() {
    let (mut server, orders) = start(ServeOptions::default());
    orders.pause(5);
    let reader = begin(&server, &streamed(40));
    server.ask_to_stop();
    soon("it is closing", || !server.handle.is_ready());
    let events = rest(reader);
    assert_eq!(events.last().map(String::as_str), Some("[DONE]"), "{events:?}");
    let begin = Instant::now();
    server.stop();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_shutdown_cuts_off_what_does_not_end() {
    let (mut server, orders) = start(ServeOptions::default().shutdown(Duration::from_millis(200)));
    orders.pause(20);
    let reader = begin(&server, &streamed(450));
    server.ask_to_stop();
    let events = rest(reader);
    let last: Value = serde_json::from_str(events.last().unwrap()).unwrap();
    assert_eq!(last["error"]["code"], "shutting_down");
    let begin = Instant::now();
    server.stop();
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[test]
fn those_who_read_nothing_lose_their_connections() {
    let (server, _) = start(ServeOptions::default().connections(2).read_timeout(Duration::from_millis(400)));
    // Far more answers than a socket holds, of which none is read.
    let asked = b"GET /openapi.json HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(3000);
    let deaf: Vec<_> = (0..2)
        .map(|_| {
            let mut stream = http::connect(server.address);
            stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
            let _ = stream.write_all(&asked);
            stream
        })
        .collect();
    goes_on(&server);
    drop(deaf);
}

#[test]
fn more_connections_than_there_may_be_wait() {
    let (server, _) = start(ServeOptions::default().connections(2).read_timeout(Duration::from_millis(400)));
    let (_one, _two) = (http::connect(server.address), http::connect(server.address));
    // The two say nothing and lose their places in time.
    goes_on(&server);
}
