//! Puts the page together, serves it on this machine, and, asked to, tests it in a headless browser.

mod browser;
mod server;

use server::{Reply, Request, Server};
use std::{
    error::Error,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::mpsc::channel,
    time::{Duration, Instant},
};
use wasm_bindgen_cli_support::Bindgen;

const USAGE: &str = "usage: opt-web-serve [--wasm FILE] [--model DIR] [--port N] [--test [--timeout SECONDS]]

Serves the page of opt_web.wasm (built for wasm32-unknown-unknown) with a model's directory. With --test a headless
Chromium (environment variable CHROMIUM, else chromium or google-chrome) opens it, and the exit code is the tests'.";

/// The files of a model that the page may ask for.
const MODEL_FILES: [&str; 5] =
    ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];

struct Options {
    wasm: PathBuf,
    model: PathBuf,
    port: u16,
    test: bool,
    timeout: Duration,
}

/// What the page is made of.
struct Site {
    /// Where wasm-bindgen wrote the module and its JavaScript.
    module: PathBuf,
    /// index.html and what it names.
    page: PathBuf,
    model: PathBuf,
    fixtures: PathBuf,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Result<Self, String> {
        let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut options = Self {
            wasm: here.join("target/wasm32-unknown-unknown/release/opt_web.wasm"),
            model: here.join("../../models/opt-novels"),
            port: 0,
            test: false,
            timeout: Duration::from_secs(300),
        };
        while let Some(flag) = args.next() {
            let mut value = || args.next().ok_or(format!("{flag}: expected a value"));
            let number = |text: String| text.parse::<u16>().map_err(|e| format!("{flag} {text}: {e}"));
            match flag.as_str() {
                "--wasm" => options.wasm = value()?.into(),
                "--model" => options.model = value()?.into(),
                "--port" => options.port = number(value()?)?,
                "--timeout" => options.timeout = Duration::from_secs(number(value()?)?.into()),
                "--test" => options.test = true,
                _ => return Err(format!("unknown argument {flag}")),
            }
        }
        Ok(options)
    }
}

impl Site {
    fn answer(&self, request: &Request) -> Option<Reply> {
        let path = request.path.split('?').next().unwrap_or_default();
        let file = match path.strip_prefix('/')? {
            "" => self.page.join("index.html"),
            "test.js" => self.page.join("test.js"),
            name @ ("opt_web.js" | "opt_web_bg.wasm") => self.module.join(name),
            path => match path.split_once('/')? {
                ("model", name) if MODEL_FILES.contains(&name) => self.model.join(name),
                ("fixtures", name) if name.split('/').all(plain) => self.fixtures.join(name),
                _ => return None,
            },
        };
        let kind = match file.extension()?.to_str()? {
            "html" => "text/html; charset=utf-8",
            "js" => "text/javascript; charset=utf-8",
            "wasm" => "application/wasm",
            "json" => "application/json",
            _ => "application/octet-stream",
        };
        Some(Reply { kind, body: fs::read(file).ok()? })
    }
}

/// Whether this is the name of a file, not a way out of the directory.
fn plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.contains(['\\', ':'])
}

fn run(options: Options) -> Result<bool, Box<dyn Error>> {
    // Beside the module, where cargo cleans up.
    let out = options.wasm.with_extension("page");
    let wasm = options.wasm.display();
    if !options.wasm.exists() {
        let build = "cargo build --release --target wasm32-unknown-unknown -p opt-web";
        return Err(format!("{wasm}: no such file; it comes from: {build}").into());
    }
    Bindgen::new()
        .input_path(&options.wasm)
        .web(true)?
        .omit_default_module_path(false)
        .typescript(false)
        .remove_name_section(true)
        .generate(&out)?;
    let size = fs::metadata(out.join("opt_web_bg.wasm"))?.len();
    println!("opt_web_bg.wasm: {} KiB", size.div_ceil(1024));

    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let site = Site {
        module: out,
        page: here.join("static"),
        model: options.model,
        fixtures: here.join("../../opt-core/tests/fixtures"),
    };
    let (sender, reports) = channel();
    let server =
        Server::start(options.port, move |request| match (&request.method[..], &request.path[..]) {
            ("GET", _) => site.answer(&request),
            ("POST", "/report") => {
                // Nobody listens where the page is only served.
                let _ = sender.send(String::from_utf8_lossy(&request.body).into_owned());
                Some(Reply { kind: "text/plain", body: Vec::new() })
            }
            _ => None,
        })?;
    let address = format!("http://{}", server.address);
    if !options.test {
        println!("{address}/ (ctrl-c ends it)");
        loop {
            std::thread::park();
        }
    }

    let started = Instant::now();
    let mut browser = browser::Browser::start(&format!("{address}/?test"))?;
    loop {
        match reports.recv_timeout(Duration::from_millis(500)) {
            // The last line is that of cargo's tests.
            Ok(line) if line.trim_start().starts_with("test result:") => {
                println!("{line}; finished in {:.2}s", started.elapsed().as_secs_f64());
                return Ok(line.contains("test result: ok."));
            }
            Ok(line) => println!("{line}"),
            Err(_) if browser.ended() => {
                return Err(format!("the browser ended without a result\n{}", browser.log()).into());
            }
            Err(_) if started.elapsed() < options.timeout => {}
            Err(_) => {
                let waited = options.timeout.as_secs();
                return Err(format!("no result after {waited} s\n{}", browser.log()).into());
            }
        }
    }
}

fn main() -> ExitCode {
    let options = match Options::parse(std::env::args().skip(1)) {
        Ok(options) => options,
        Err(message) => {
            eprintln!("{message}\n\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(options) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
