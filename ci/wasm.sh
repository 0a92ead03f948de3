#!/usr/bin/env bash
# The browser: what must compile for wasm32-unknown-unknown, and the page of examples/web in headless Chromium.
# Outside of CI it says what it leaves out and why; in CI (CI=true) it installs what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# Runs a command quietly; shows what it said if it fails, or warns of our own crates.
quietly() {
  if ! "$@" >"$log" 2>&1 || grep -qE '^warning: `opt-' "$log"; then
    cat "$log"
    return 1
  fi
}
browser() { [ -n "${CHROMIUM:-}" ] || command -v chromium || command -v chromium-browser || command -v google-chrome; }

able=0
ci/wasm-cargo.sh 2>"$log" || able=$?
if [ -n "${CI:-}" ]; then
  packages=()
  [ "$able" = 0 ] || packages+=(rustc-web rust-web-src lld)
  browser >/dev/null || packages+=(chromium)
  if [ ${#packages[@]} -gt 0 ]; then
    quietly apt-get update -qq
    quietly apt-get install -y -qq --no-install-recommends "${packages[@]}"
  fi
elif [ "$able" != 0 ]; then
  echo "skipped: $(cat "$log")"
  exit 0
fi

echo "opt-backend-wgpu and opt-core with only wgpu compile for wasm32"
quietly env CARGO_TARGET_DIR=target/wasm ci/wasm-cargo.sh check -p opt-backend-wgpu
quietly env CARGO_TARGET_DIR=target/wasm ci/wasm-cargo.sh check -p opt-core --no-default-features --features wgpu

echo "the page of examples/web"
(cd examples/web && cargo fmt --all --check && quietly cargo clippy -p opt-web-serve -- -D warnings)
if browser >/dev/null; then
  examples/web/test.sh
else
  echo "skipped: the tests in a browser (Chromium or Chrome; the environment variable CHROMIUM can name one)"
  (cd examples/web && quietly ../../ci/wasm-cargo.sh build --release -p opt-web)
fi
