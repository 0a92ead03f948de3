#!/usr/bin/env bash
# Tests the embedded backend for 64-bit ARM under emulation. $1: the oldest supported Rust.
# Outside of CI it says what it leaves out and why; in CI (CI=true) it installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
msrv=$1
target=aarch64-unknown-linux-gnu
packages="qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross rustc-web rust-web-src"

# Debian's compiler, if new enough, and the sources of its standard library; what builds the latter is unstable.
debian_std() {
  local oldest
  [ -d /usr/lib/rustlib/src/rust/library ] && [ -x /usr/bin/rustc ] || return 1
  oldest=$(printf '%s\n' "$msrv" "$(/usr/bin/rustc --version | cut -d' ' -f2)" | sort -V | head -n 1)
  [ "$oldest" = "$msrv" ]
}
installed_std() { [ -d "$(rustc --print target-libdir --target "$target")" ]; }
tools() {
  command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null &&
    { installed_std || debian_std; }
}

if [ -n "${CI:-}" ] && ! tools; then
  # shellcheck disable=SC2086
  apt-get update -qq && apt-get install -y -qq $packages
fi
if ! tools; then
  echo "skipped: aarch64 (needs qemu-aarch64, aarch64-linux-gnu-gcc and Rust's std for it: rustup target add $target;" \
    "on Debian: apt-get install $packages)"
  exit 0
fi
run=(cargo test -p opt-kernels -p opt-backend-cpu --lib --tests --no-fail-fast --target "$target")
if ! installed_std; then
  run=(env RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 "${run[@]}" -Zbuild-std=std,panic_unwind)
fi
# The guarded run of the conformance suite has the cases of the plain one, which is left out for time.
CARGO_TARGET_DIR=target/aarch64 CARGO_PROFILE_DEV_DEBUG=none OPT_QUICK_TESTS=1 \
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
  CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
  "${run[@]}" -- --skip conformance --skip training
