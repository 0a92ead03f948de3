//! A headless Chromium.

use std::{
    error::Error,
    fs::File,
    process::{Child, Command, Stdio},
};
use tempfile::TempDir;

/// A browser that shows one page, and is ended when this is dropped.
pub struct Browser {
    process: Child,
    /// Its profile, and what it said.
    directory: TempDir,
}

const NAMES: [&str; 4] = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"];

impl Browser {
    /// Opens `url` with WebGPU on SwiftShader, a GPU in software that Chromium brings with it.
    pub fn start(url: &str) -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let log = File::create(directory.path().join("log"))?;
        let chosen = std::env::var("CHROMIUM").ok();
        let names = chosen.as_deref().map_or(NAMES.to_vec(), |name| vec![name]);
        for name in &names {
            let mut command = Command::new(name);
            command
                // In a container one is root, for whom Chromium has no sandbox; the page is ours.
                .args([
                    "--headless",
                    "--no-sandbox",
                    "--enable-unsafe-webgpu",
                    "--use-webgpu-adapter=swiftshader",
                ])
                .args(["--enable-logging=stderr", "--no-first-run", "--disable-quic", "--disable-sync"])
                .args(["--disable-background-networking", "--disable-component-update"])
                .arg(format!("--user-data-dir={}", directory.path().join("profile").display()))
                .arg(url)
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log.try_clone()?);
            match command.spawn() {
                Ok(process) => return Ok(Self { process, directory }),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(format!("{name}: {error}").into()),
            }
        }
        Err(format!("no browser: tried {}; the environment variable CHROMIUM can name one", names.join(", "))
            .into())
    }

    /// Whether it has ended by itself.
    pub fn ended(&mut self) -> bool {
        !matches!(self.process.try_wait(), Ok(None))
    }

    /// The end of what it said.
    pub fn log(&self) -> String {
        let said = std::fs::read(self.directory.path().join("log")).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        // Where there is no desktop, most of it is about that.
        let lines: Vec<&str> = said.lines().filter(|line| !line.contains("dbus")).collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // The processes that it has started end with it.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
