#!/usr/bin/env bash
# The project's tests: formatting, lints, documentation, every test, packaging, the oldest Rust, and some fuzzing.
#
#   ./check.sh          what this machine can run; says what it skips and why
#   CI=true ./check.sh  everything; installs what is missing
#
# Test data beyond what is in the repository is looked for in OPT_TEST_DATA, else in ../shared/data; real OPT weights
# in OPT_WEIGHTS. Tests that need either say so when they skip.
set -euo pipefail
cd "$(dirname "$0")"
log=$(mktemp)
trap 'rm -f "$log" "$log.arm"' EXIT
ci=${CI:-}
msrv=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

step() { printf '\n== %s\n' "$*"; }
skip() { printf 'skipped: %s\n' "$*"; }

if [ -z "${OPT_TEST_DATA:-}" ] && [ -d ../shared/data ]; then
  OPT_TEST_DATA=$(cd ../shared/data && pwd)
  export OPT_TEST_DATA
fi
echo "test data: ${OPT_TEST_DATA:-none beyond the repository}; real weights: ${OPT_WEIGHTS:-none}"

step "formatting"
cargo fmt --all --check

step "lints"
cargo clippy --workspace --all-targets --all-features --quiet -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --all-features --quiet

step "the default build needs nothing but Rust"
if cargo tree -p opt-core -e normal,build --prefix none | grep -E '^(cc|cmake|bindgen|pkg-config) '; then
  echo "opt-core's default features compile C code: see above" >&2
  exit 1
fi
cargo build -p opt-core --quiet

step "tests"
# The output goes through a file so that the tests can be counted and a failure still ends the script.
if ! cargo test --workspace --all-features --no-fail-fast >"$log" 2>&1; then
  cat "$log"
  exit 1
fi
grep -E '^(test result|skipped|running [1-9]|     Running|   Doc-tests)' "$log" || true

step "64-bit ARM: the embedded backend, emulated"
arm=aarch64-unknown-linux-gnu
# Debian's compiler, if new enough, and the sources of its standard library; what builds the latter is unstable.
debian_std() {
  local oldest
  [ -d /usr/lib/rustlib/src/rust/library ] && [ -x /usr/bin/rustc ] || return 1
  oldest=$(printf '%s\n' "$msrv" "$(/usr/bin/rustc --version | cut -d' ' -f2)" | sort -V | head -n 1)
  [ "$oldest" = "$msrv" ]
}
installed_std() { [ -d "$(rustc --print target-libdir --target "$arm")" ]; }
arm_tools() {
  command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-gcc >/dev/null &&
    { installed_std || debian_std; }
}
arm_packages="qemu-user gcc-aarch64-linux-gnu libc6-dev-arm64-cross rustc-web rust-web-src"
if [ -n "$ci" ] && ! arm_tools; then
  # shellcheck disable=SC2086
  { apt-get update -qq && apt-get install -y -qq $arm_packages; } >"$log.arm" 2>&1 || { cat "$log.arm"; exit 1; }
fi
if arm_tools; then
  arm_run=(cargo test -p opt-backend-cpu --lib --tests --no-fail-fast --target "$arm")
  if ! installed_std; then
    arm_run=(env RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 "${arm_run[@]}" -Zbuild-std=std,panic_unwind)
  fi
  # The guarded run of the conformance suite has the cases of the plain one, which is left out for time.
  if ! CARGO_TARGET_DIR=target/aarch64 CARGO_PROFILE_DEV_DEBUG=none OPT_QUICK_TESTS=1 \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
    CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64 -L /usr/aarch64-linux-gnu" \
    "${arm_run[@]}" -- --skip conformance >"$log.arm" 2>&1; then
    cat "$log.arm"
    exit 1
  fi
  grep -E '^(test result|running [1-9]|     Running)' "$log.arm"
  cat "$log.arm" >>"$log"
else
  skip "aarch64 (needs qemu-aarch64, aarch64-linux-gnu-gcc and Rust's std for it: rustup target add $arm;" \
    "on Debian: apt-get install $arm_packages)"
fi

step "packaging"
cargo package --workspace --allow-dirty --quiet

step "the oldest supported Rust, $msrv"
if rustc --version | grep -q "^rustc $msrv"; then
  echo "it is the one that ran everything above"
elif command -v rustup >/dev/null && rustup run "$msrv" rustc --version >/dev/null 2>&1; then
  CARGO_TARGET_DIR=target/msrv rustup run "$msrv" cargo check --workspace --all-features --quiet
else
  skip "no toolchain $msrv here (rustup toolchain install $msrv)"
fi

step "fuzzing"
if [ -n "$ci" ] && ! cargo fuzz --version >/dev/null 2>&1; then
  cargo install cargo-fuzz --locked --quiet
fi
if ! cargo fuzz --version >/dev/null 2>&1; then
  skip "mutation (cargo install cargo-fuzz); the corpora were replayed by the tests"
elif ! command -v c++ >/dev/null; then
  skip "mutation (the fuzzer's own code needs a C++ compiler); the corpora were replayed by the tests"
else
  fuzz/run.sh all "${FUZZ_SECONDS:-60}"
fi

step "result"
awk '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
  END { printf "%d passed, %d failed, %d skipped\n", passed, failed, ignored }' "$log"
