#!/usr/bin/env bash
# Tests the crates with kernels on host memory under AddressSanitizer. (The candle backend's loops are these kernels
# too; its own unsafe code is one call with its bounds asserted before it.)
# The sanitizer is an unstable option of every compiler; RUSTC_BOOTSTRAP opens it to a stable one.
set -euo pipefail
cd "$(dirname "$0")/.."
host=$(rustc -vV | sed -n 's/^host: //p')
case $host in
  x86_64-unknown-linux-gnu | aarch64-unknown-linux-gnu) ;;
  *)
    echo "skipped: AddressSanitizer (not tried on $host)"
    exit 0
    ;;
esac
# The conformance suite runs once, with the cases that need most memory left out.
CARGO_TARGET_DIR=target/asan CARGO_PROFILE_DEV_DEBUG=none RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address \
  OPT_QUICK_TESTS=1 PROPTEST_CASES=4 \
  cargo test -p opt-kernels -p opt-backend-cpu --lib --tests --no-fail-fast --target "$host" \
  -- --skip nothing_is_written_outside
