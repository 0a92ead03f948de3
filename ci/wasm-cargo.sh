#!/usr/bin/env bash
# cargo for wasm32-unknown-unknown: with the target's standard library where rustup has installed it, else with Debian's
# compiler and the sources of its standard library (building the latter is unstable). Exits with 3 where neither is there.
#
#   ci/wasm-cargo.sh build -p opt-core
#   ci/wasm-cargo.sh                     # only whether it could
set -euo pipefail
target=wasm32-unknown-unknown
msrv=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml")

if [ -d "$(rustc --print target-libdir --target $target)" ]; then
  [ $# = 0 ] || exec cargo "$@" --target $target
  exit 0
fi
if [ -x /usr/bin/rustc ] && [ -d /usr/lib/rustlib/src/rust/library ] && command -v wasm-ld >/dev/null; then
  found=$(/usr/bin/rustc --version | cut -d' ' -f2)
  if [ "$(printf '%s\n' "$msrv" "$found" | sort -V | head -n 1)" = "$msrv" ]; then
    export RUSTC=/usr/bin/rustc RUSTC_BOOTSTRAP=1 CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER=wasm-ld
    [ $# = 0 ] || exec cargo "$@" --target $target -Zbuild-std=std,panic_abort
    exit 0
  fi
fi
echo "no standard library for $target: rustup target add $target; on Debian: apt-get install rustc-web rust-web-src lld" >&2
exit 3
