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
trap 'rm -f "$log"' EXIT
ci=${CI:-}

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

step "packaging"
cargo package --workspace --allow-dirty --quiet

msrv=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
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
