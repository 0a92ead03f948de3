//! The server as a command; what it answers is tested in `opt-serve`.

use super::*;
use std::{
    io::{BufRead, BufReader, Read},
    net::{TcpListener, TcpStream},
    process::Child,
};

/// A server that ends with the test.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(more: &[&str], keys: Option<&str>) -> Self {
        let mut command = opt();
        command.args(["serve", "--port", "0", "--quiet"]).args(more).env_remove("OPT_API_KEYS");
        keys.map(|keys| command.env("OPT_API_KEYS", keys));
        let mut child =
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the command starts");
        let mut line = String::new();
        BufReader::new(child.stdout.take().expect("a pipe")).read_line(&mut line).expect("a line");
        let address = line.trim_end().strip_prefix("listening on http://127.0.0.1:").expect("an address");
        Self { address: format!("127.0.0.1:{address}"), child }
    }

    /// Status line and body of an answer.
    fn ask(&self, request: &str, headers: &str, body: &str) -> (String, String) {
        let mut stream = TcpStream::connect(&self.address).expect("it listens");
        let length = body.len();
        let request = format!(
            "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n{headers}\r\n{body}"
        );
        stream.write_all(request.as_bytes()).expect("it reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("text");
        let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
        (head.lines().next().unwrap_or_default().to_owned(), body.to_owned())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn it_serves_and_ends_when_told() {
    let mut serving = Serving::start(&[], None);
    let (status, models) = serving.ask("GET /v1/models", "", "");
    assert_eq!(status, "HTTP/1.1 200 OK");
    let models: Value = serde_json::from_str(&models).expect("JSON");
    assert_eq!(models["data"][0]["id"], "opt-novels");
    let body = r#"{"prompt": "The river", "temperature": 0, "max_tokens": 6}"#;
    let (_, answer) = serving.ask("POST /v1/completions", "", body);
    let answer: Value = serde_json::from_str(&answer).expect("JSON");
    let generated = run(opt().args(["generate", "--json", "--max-new-tokens", "6", "The river"])).json();
    assert_eq!(answer["choices"][0]["text"], generated[0]["sequences"][0]["text"]);
    #[cfg(unix)]
    {
        let sent = Command::new("kill").args(["-TERM", &serving.child.id().to_string()]).status();
        assert!(sent.expect("kill is there").success());
        assert_eq!(serving.child.wait().expect("it ends").code(), Some(0));
        let mut stderr = String::new();
        serving.child.stderr.take().expect("a pipe").read_to_string(&mut stderr).expect("text");
        assert_eq!(stderr, "");
    }
}

#[test]
fn keys_and_names_come_from_where_they_are_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("keys");
    std::fs::write(&file, "first\n\nsecond\n").expect("a file");
    let file = file.to_str().expect("text");
    let serving =
        Serving::start(&["--api-key-file", file, "--model-name", "house", "--no-page"], Some("third"));
    let ask = |key: &str| serving.ask("GET /v1/models", &format!("authorization: Bearer {key}\r\n"), "");
    assert!(ask("fourth").0.contains("401"));
    for key in ["first", "second", "third"] {
        let (status, body) = ask(key);
        assert!(status.contains("200") && body.contains("\"house\""), "{key}: {status}");
    }
    assert!(serving.ask("GET /", "", "").0.contains("404"));
}

#[test]
fn what_cannot_be_served_is_one_line() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    run(opt().args(["serve", "--port", &port])).refused(1, &[&port, "cannot listen", "--port 0"]);
    run(opt().args(["serve", "--port", "0", "--model", "nowhere"])).refused(1, &["nowhere"]);
    run(opt().args(["serve", "--queue", "0"])).refused(2, &["--queue"]);
    run(opt().args(["serve", "--timeout", "soon"])).refused(2, &["--timeout"]);
    let dir = tempfile::tempdir().expect("a directory");
    let empty = dir.path().join("keys");
    std::fs::write(&empty, "\n").expect("a file");
    let empty = empty.to_str().expect("text");
    run(opt().args(["serve", "--port", "0", "--api-key-file", empty])).refused(1, &["API key", "none"]);
}
