//! As much of an HTTP server as a page on this machine needs: one request a connection.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

/// Bytes of a request's head and body.
const MOST: u64 = 1 << 20;

/// What a browser asks for.
pub struct Request {
    pub method: String,
    pub path: String,
    pub body: Vec<u8>,
}

/// What it gets.
pub struct Reply {
    pub kind: &'static str,
    pub body: Vec<u8>,
}

/// Serves until the process ends.
pub struct Server {
    pub address: SocketAddr,
}

impl Server {
    /// Serves what `answer` gives, on a port of the loopback interface; 0 takes a free one. No answer is 404.
    pub fn start(
        port: u16,
        answer: impl Fn(Request) -> Option<Reply> + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port))?;
        let address = listener.local_addr()?;
        let answer = Arc::new(answer);
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let answer = Arc::clone(&answer);
                // A browser that goes away is no fault of the page's.
                thread::spawn(move || drop(serve(stream, &*answer)));
            }
        });
        Ok(Self { address })
    }
}

fn serve(mut stream: TcpStream, answer: &dyn Fn(Request) -> Option<Reply>) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let reply = read(&stream)?.and_then(answer);
    let (status, reply) = match reply {
        Some(reply) => ("200 OK", reply),
        None => ("404 Not Found", Reply { kind: "text/plain", body: b"not found".to_vec() }),
    };
    let Reply { kind, body } = reply;
    let length = body.len();
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nCache-Control: no-store\r\n\
         Connection: close\r\n\r\n"
    )?;
    stream.write_all(&body)?;
    stream.flush()
}

/// `None` for what is not a request.
fn read(stream: &TcpStream) -> io::Result<Option<Request>> {
    let mut reader = BufReader::new(stream.take(MOST));
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let (Some(method), Some(path)) = (words.next(), words.next()) else { return Ok(None) };
    let (method, path) = (method.to_owned(), path.to_owned());
    let mut length = 0;
    loop {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Ok(None);
        }
        match line.trim().split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().unwrap_or(0);
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut body = Vec::new();
    reader.take(length).read_to_end(&mut body)?;
    Ok(Some(Request { method, path, body }))
}
