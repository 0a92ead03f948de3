//! Both programs, run.

use opt_core::Opt;
use opt_serve::{ServeOptions, Server};
use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
};

/// A program that ends with the test.
struct Started(Child);

impl Drop for Started {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_program_with_users() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let mut command = Command::new(env!("CARGO_BIN_EXE_embed"));
    let server = command.current_dir(&root).arg("127.0.0.1:0").stdout(Stdio::piped()).spawn().unwrap();
    let mut server = Started(server);
    let mut line = String::new();
    BufReader::new(server.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let base = line.trim().strip_prefix("listening on ").unwrap().to_owned();
    let get = |path: &str, headers: &str| {
        let mut stream = TcpStream::connect(base.strip_prefix("http://").unwrap()).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    assert!(get("/", "").contains("a program with a model in it"));
    assert!(get("/llm/v1/models", "").starts_with("HTTP/1.1 403"));
    assert!(get("/llm/v1/models", "x-user: ann\r\nx-pass: sesame\r\n").contains("opt-novels"));
}

#[test]
fn the_client_at_the_terminal() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let opt = Opt::open(root.join("models/opt-novels")).unwrap();
    let server = Server::with(opt, ServeOptions::default().api_keys(["sesame"])).unwrap();
    let (told, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            told.send(listener.local_addr().unwrap()).unwrap();
            server.serve(listener, std::future::pending()).await
        })
    });
    let address = address.recv().unwrap();
    let talk = |key: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_chat"));
        command.arg(format!("http://{address}/")).env("OPT_API_KEY", key);
        let command = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut client = command.spawn().unwrap();
        // One that is refused does not read the second line.
        let _ = client.stdin.take().unwrap().write_all(b"Where are we bound?\nAnd who are you?\n\n");
        client.wait_with_output().unwrap()
    };
    let talked = talk("sesame");
    let said = String::from_utf8(talked.stdout).unwrap();
    assert!(talked.status.success(), "{}", String::from_utf8_lossy(&talked.stderr));
    let words: usize = said.lines().skip(1).map(|line| line.split_whitespace().count()).sum();
    assert!(words > 0 && !said.contains("Visitor:"), "{said}");
    let refused = talk("other");
    assert!(!refused.status.success());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("the API key is not known here"));
}
