#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = opt_core::tokenizer::fuzz(bytes);
});
