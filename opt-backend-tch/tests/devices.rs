//! Devices that are not there, and what is said of those that are.

use opt_backend::{
    Backend, DType, ErrorKind, HostMatrix,
    ndarray::{Array2, array, s},
};
use opt_backend_tch::Tch;

fn refused(device: &str, parts: &[&str]) {
    let error = Tch::builder().device(device).build().expect_err(device);
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{device}: {error}");
    let text = error.to_string();
    for part in parts {
        assert!(text.contains(part), "{device}: expected {part:?} in {text:?}");
    }
    assert!(!text.contains('\n'), "{text:?}");
}

#[test]
fn unknown_names() {
    for name in [
        "",
        "gpu",
        "CPU",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:0x1",
        "cuda:+1",
        "cuda:99999999999999999999",
        "mps:0",
    ] {
        refused(name, &["unknown device", "expected cpu, cuda, cuda:N or mps", "cpu"]);
    }
}

#[test]
fn devices_that_are_not_there() {
    refused("cuda:4000", &["device cuda:4000 is not there; expected one of cpu"]);
    refused("cuda:18446744073709551615", &["is not there"]);
    if Tch::cuda(0).is_err() {
        refused("cuda", &["device cuda:0 is not there; expected one of cpu"]);
        assert_eq!(Tch::cuda(0).expect_err("no CUDA").kind(), ErrorKind::Unsupported);
    }
    if !tch::utils::has_mps() {
        refused("mps", &["device mps is not there"]);
        assert_eq!(Tch::mps().expect_err("no MPS").kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn numbers_of_threads() {
    for threads in [0, 1025, usize::MAX] {
        let error = Tch::builder().threads(threads).build().expect_err("a wrong number");
        assert_eq!(error.to_string(), format!("tch: expected 1 to 1024 threads, found {threads}"));
    }
    assert_eq!(Tch::builder().threads(3).build().expect("it starts").info().threads, 3);
}

#[test]
fn info_of_the_cpu() {
    let info = Tch::new().expect("it starts").info();
    assert_eq!((info.name.as_str(), info.device.as_str()), ("tch", "cpu"));
    assert!(info.threads >= 1);
    assert_eq!(info.dtypes, [DType::F32, DType::F16, DType::BF16]);
    let version =
        info.details.iter().find(|(name, _)| name == "LibTorch").map(|(_, version)| version.as_str());
    assert!(version.is_some_and(|version| version.starts_with("2.13.")), "{version:?}");
    assert_eq!(info.memory.is_some(), cfg!(target_os = "linux"));
}

#[test]
fn info_of_cuda() {
    for index in (0..).take_while(|index| Tch::cuda(*index).is_ok()) {
        let info = Tch::cuda(index).expect("it starts").info();
        assert_eq!(info.device, format!("cuda:{index}"));
        assert!(info.memory.is_some_and(|free| free > 0), "{info:?}");
    }
}

/// Settings of the environment under which f32 might be multiplied in less. They are read once in a process, so this
/// asks others: oneDNN must not follow, and where CUDA follows, the backend refuses to start.
#[test]
fn f32_is_f32() {
    if let Some(device) = std::env::var_os("OPT_TCH_TEST_START") {
        match Tch::builder().device(device.to_string_lossy()).build() {
            Ok(_) => println!("started"),
            Err(error) => println!("refused: {error}"),
        }
        return;
    }
    let this = std::env::current_exe().expect("a test has a path");
    let start = |device: &str, variable: &str, value: &str| {
        let mut command = std::process::Command::new(&this);
        command.args(["--exact", "f32_is_f32", "--nocapture"]).env("OPT_TCH_TEST_START", device);
        let output = command.env(variable, value).output().expect("runs");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let text = start("cpu", "ONEDNN_DEFAULT_FPMATH_MODE", "BF16");
    assert!(text.contains("started"), "{text}");
    if Tch::cuda(0).is_ok() {
        let text = start("cuda:0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1");
        assert!(text.contains("refused: tch: products of f32 are not computed in f32 on cuda:0"), "{text}");
    }
}

/// Results larger than any machine's memory: an error that says so, and the backend works on.
#[test]
fn out_of_memory() {
    let tch = Tch::new().expect("it starts");
    // 2²² rows times 2²² entries: 64 TiB of logits from two operands of 16 MiB.
    let column = Array2::<f32>::ones((1 << 22, 1));
    let table = tch.new_table(HostMatrix::F32(column.view()), DType::F32).expect("a table");
    let x = tch.upload(column.view()).expect("uploads");
    let error = tch.logits(&x, &table).expect_err("there is no such memory");
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert_eq!(error.to_string().lines().count(), 1, "{error}");
    let x = tch.upload(column.slice(s![..2, ..])).expect("uploads");
    let sum = tch.add(tch.upload(column.slice(s![..2, ..])).expect("uploads"), &x).expect("adds");
    assert_eq!(tch.block_on(tch.read(&sum)).expect("reads"), array![[2.0], [2.0]]);
}

/// LibTorch keeps the number on the calling thread; the next value built there is not to inherit it.
#[test]
fn a_number_of_threads_is_not_inherited() {
    let threads = || Tch::new().expect("the CPU").info().threads;
    let before = threads();
    let three = Tch::builder().threads(3).build().expect("three threads");
    let x = three.upload(Array2::ones((2, 2)).view()).expect("upload");
    three.block_on(three.read(&x)).expect("read");
    drop(x);
    assert_eq!(threads(), before);
}
