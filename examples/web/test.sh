#!/usr/bin/env bash
# Builds the page, opens it in a headless Chromium, and exits with 0 if all its tests passed.
set -euo pipefail
cd "$(dirname "$0")"
log=$(mktemp)
trap 'rm -f "$log"' EXIT

build() { ../../ci/wasm-cargo.sh build --release -p opt-web && cargo build -p opt-web-serve; }
if ! build >"$log" 2>&1 || grep -qE '^warning: `opt-' "$log"; then
  cat "$log"
  exit 1
fi
target/debug/opt-web-serve --test "$@"
