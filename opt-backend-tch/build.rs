//! Looks for LibTorch before `torch-sys` does, to say which version is needed and how to get it, and tells this
//! crate's tests where its libraries are.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// The LibTorch that tch 0.26 is made for. C++ has no stable interface: no other will do.
const VERSION: &str = "2.13.0";

const HOW: &str = "\
opt-backend-tch needs LibTorch 2.13.0. Either of these will do:
  - Python's wheel:  pip install torch==2.13.0
    then build with  LIBTORCH_USE_PYTORCH=1  and that Python first on PATH
  - the archive of https://pytorch.org/get-started/locally (LibTorch, C++/Java), version 2.13.0, unpacked;
    then build with  LIBTORCH=/path/to/libtorch
At run time the system must find its libraries: LD_LIBRARY_PATH (macOS: DYLD_LIBRARY_PATH, Windows: PATH) with the
folder torch/lib of the wheel or lib of the archive.";

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for name in
        ["LIBTORCH", "LIBTORCH_LIB", "LIBTORCH_USE_PYTORCH", "LIBTORCH_BYPASS_VERSION_CHECK", "DOCS_RS"]
    {
        println!("cargo::rerun-if-env-changed={name}");
    }
    // The hosted documentation is built without LibTorch.
    if env::var_os("DOCS_RS").is_some() {
        return;
    }
    match find() {
        Ok(found) => {
            let bypass = env::var_os("LIBTORCH_BYPASS_VERSION_CHECK").is_some();
            match found.version {
                Some(version) if version != VERSION && !bypass => {
                    fail(&format!("LibTorch {version} was found in {}", found.lib.display()));
                }
                _ => search_at_run_time(&found.lib),
            }
        }
        Err(reason) => fail(&reason),
    }
}

struct Found {
    lib: PathBuf,
    version: Option<String>,
}

/// In the places and the order in which `torch-sys` looks.
fn find() -> Result<Found, String> {
    if env::var_os("LIBTORCH_USE_PYTORCH").is_some() {
        return find_in_python();
    }
    let root = match env::var_os("LIBTORCH") {
        Some(root) => PathBuf::from(root),
        None if Path::new("/usr/lib/libtorch.so").exists() => PathBuf::from("/usr"),
        None => {
            return Err("no LibTorch was found: neither LIBTORCH nor LIBTORCH_USE_PYTORCH is set".to_owned());
        }
    };
    let lib = env::var_os("LIBTORCH_LIB").map_or_else(|| root.clone(), PathBuf::from).join("lib");
    if !lib.is_dir() {
        return Err(format!("LIBTORCH: there is no folder {}", lib.display()));
    }
    let version = fs::read_to_string(root.join("build-version")).ok();
    Ok(Found { lib, version: version.map(|version| plain(&version)) })
}

fn find_in_python() -> Result<Found, String> {
    const SCRIPT: &str = "import torch, os; print(torch.__version__); print(os.path.dirname(torch.__file__))";
    let python = match env::var("CARGO_CFG_TARGET_OS").as_deref() {
        Ok("windows") => "python.exe",
        _ if env::var_os("VIRTUAL_ENV").is_some() => "python",
        _ => "python3",
    };
    let output = Command::new(python).args(["-c", SCRIPT]).output();
    let output =
        output.map_err(|error| format!("LIBTORCH_USE_PYTORCH is set, but {python} does not run: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    match text.lines().collect::<Vec<_>>()[..] {
        [version, folder, ..] => {
            Ok(Found { lib: Path::new(folder).join("lib"), version: Some(plain(version)) })
        }
        _ => Err(format!("LIBTORCH_USE_PYTORCH is set, but the {python} on PATH has no torch")),
    }
}

/// `2.13.0` of `2.13.0+cu130`.
fn plain(version: &str) -> String {
    version.split('+').next().unwrap_or_default().trim().to_owned()
}

/// This crate's own tests find the libraries without being told. Programs of other crates cannot be reached from
/// here.
fn search_at_run_time(lib: &Path) {
    if matches!(env::var("CARGO_CFG_TARGET_OS").as_deref(), Ok("linux" | "macos")) {
        println!("cargo::rustc-link-arg=-Wl,-rpath,{}", lib.display());
    }
}

fn fail(reason: &str) {
    println!("cargo::error={reason}");
    for line in HOW.lines() {
        println!("cargo::error={line}");
    }
}
