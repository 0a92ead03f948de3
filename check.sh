#!/usr/bin/env bash
# The project's tests: formatting, lints, documentation, every test on every backend, packaging, the oldest Rust, and
# some fuzzing.
#
#   ./check.sh          what this machine can run; says what it skips and why
#   CI=true ./check.sh  everything; installs what is missing, and leaving anything out is a failure
#
# Test data beyond what is in the repository is looked for in OPT_TEST_DATA, else in ../shared/data; real OPT weights
# in OPT_WEIGHTS. Tests that need either say so when they skip.
set -euo pipefail
cd "$(dirname "$0")"
log=$(mktemp -d)
beside=
# The job beside the suites is a process group of its own, which ends with this.
trap '[ -z "$beside" ] || kill -- -"$beside" 2>/dev/null || true; rm -rf "$log"' EXIT
ci=${CI:-}
msrv=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

step() {
  printf '\n== %s (%d:%02d, %s free)\n' "$*" $((SECONDS / 60)) $((SECONDS % 60)) "$(df -h . | awk 'END { print $4 }')"
}
skip() {
  printf 'skipped: %s\n' "$*"
  if [ -n "$ci" ]; then
    echo "nothing may be left out in CI" >&2
    exit 1
  fi
}
# Runs a command, its output in a file that is shown if it fails; the lines that count tests are shown in any case.
logged() { # NAME COMMAND...
  local file="$log/$1"
  shift
  if ! "$@" >"$file" 2>&1; then
    cat "$file"
    exit 1
  fi
  grep -E '^(test result|running [1-9]|     Running|   Doc-tests|[0-9]+ passed,)' "$file" || true
}

if [ -z "${OPT_TEST_DATA:-}" ] && [ -d ../shared/data ]; then
  OPT_TEST_DATA=$(cd ../shared/data && pwd)
  export OPT_TEST_DATA
fi
echo "test data: ${OPT_TEST_DATA:-none beyond the repository}; real weights: ${OPT_WEIGHTS:-none}"

step "what the backends need"
# candle and wgpu build with Rust alone; LibTorch must be there to build tch; wgpu needs an adapter to run.
features=hub,candle,wgpu
exclude=()
if [ -n "$ci" ]; then
  ls /usr/share/vulkan/icd.d/*.json >/dev/null 2>&1 ||
    { apt-get update -qq && apt-get install -y -qq mesa-vulkan-drivers libvulkan1; }
  # A device that is not there is then a failed test, not a skipped one.
  export OPT_REQUIRE_BACKENDS=1
  # Nothing is built a second time here, so what would make that faster only takes space: a quarter of all. Where a
  # test failed it says without line tables.
  export CARGO_INCREMENTAL=0 CARGO_PROFILE_DEV_DEBUG=none
fi
if libtorch=$(ci/libtorch.sh ${ci:+--install} 2>"$log/libtorch"); then
  eval "$libtorch"
  features=$features,tch
  echo "LibTorch: there"
else
  skip "tch: $(tail -n 1 "$log/libtorch")"
  exclude=(--exclude opt-backend-tch)
fi
workspace=(--workspace ${exclude[@]+"${exclude[@]}"} --features "$features")

step "formatting"
cargo fmt --all --check

step "lints"
cargo clippy "${workspace[@]}" --all-targets --quiet -- -D warnings

step "documentation"
RUSTDOCFLAGS="-D warnings" cargo doc "${workspace[@]}" --no-deps --quiet

step "the default build needs nothing but Rust, and one backend brings no other"
tree() { cargo tree -p opt-core -e normal,build --prefix none "$@" | cut -d' ' -f1 | sort -u; }
if tree | grep -xE 'cc|cmake|bindgen|pkg-config'; then
  echo "opt-core's default features compile C code: see above" >&2
  exit 1
fi
engines='opt-backend-cpu opt-backend-tch tch opt-backend-candle candle-core opt-backend-wgpu wgpu'
for feature in cpu tch candle wgpu; do
  for crate in $engines; do
    case $crate in *-$feature | $feature | $feature-core) continue ;; esac
    if tree --no-default-features --features "$feature" | grep -qx "$crate"; then
      echo "opt-core with the feature $feature alone compiles $crate" >&2
      exit 1
    fi
  done
done
cargo check -p opt-core --quiet

step "tests"
logged tests cargo test "${workspace[@]}" --no-fail-fast
grep '^skipped' "$log/tests" || true

# Scripts of their own: they install what they need in CI, and elsewhere say on a line what they leave out and why.
script() { # NAME TARGET_FOLDER
  logged "$1" "ci/$1.sh" "$msrv"
  [ -z "$ci" ] || rm -rf "target/$2"
  local left_out
  while read -r left_out; do skip "${left_out#skipped: }"; done < <(grep '^skipped: ' "$log/$1" || true)
}
arm_and_asan() {
  step "64-bit ARM: the embedded backend, emulated"
  script arm aarch64
  step "AddressSanitizer: the crates with kernels on host memory"
  script asan asan
}
# Much of the time these, like the suites, keep one core busy.
if [ -n "$ci" ]; then
  set -m
  arm_and_asan >"$log/beside" 2>&1 </dev/null &
  beside=$!
  set +m
fi

# The tests of opt-core that run a model, and those of opt-eval beside the harness, each backend in its turn.
suite=(adapters agreement batching distilling embedding engine generation harness heads loading models properties quantized sampling scoring search sessions streaming texts
  training tuning)
suite_args=()
for name in "${suite[@]}"; do suite_args+=(--test "$name"); done
# How many tests of the suite passed in a log.
passed() {
  awk -v suite=" ${suite[*]} " '
    / Running / { split($2, path, /[\/.]/); counts = $2 ~ /^tests\// && index(suite, " " path[2] " ") }
    /^test result:/ { if (counts) sum += $4; counts = 0 }
    END { print sum + 0 }' "$1"
}
expected=$(passed "$log/tests")
[ "$expected" -gt 50 ] || { echo "expected the suite's tests among those that ran, found $expected" >&2; exit 1; }
declare -A ran=([cpu]=$expected)
for backend in tch candle wgpu; do
  step "the suite on $backend"
  # The command, which the tests have built, knows whether a backend is usable here, and why not. (Built by itself, without
  # what only tests need, half of all would be compiled again with other features.)
  found=$(target/debug/opt backends --json | grep "\"name\":\"$backend\"" || true)
  case $found in
    '') skip "$backend is not part of this build"; continue ;;
    *'"error":'*) skip "$backend: $found"; continue ;;
  esac
  # Software adapters take a second for what others do in a millisecond: fewer random cases.
  logged "suite-$backend" env OPT_TEST_BACKEND=$backend PROPTEST_CASES="${PROPTEST_CASES:-8}" \
    cargo test "${workspace[@]}" --no-fail-fast "${suite_args[@]}"
  ran[$backend]=$(passed "$log/suite-$backend")
done

step "tests of the suite by backend"
for backend in cpu tch candle wgpu; do
  echo "$backend: ${ran[$backend]:-none}"
  if [ "${ran[$backend]:-$expected}" != "$expected" ]; then
    echo "expected $expected tests on $backend as on cpu, found ${ran[$backend]}" >&2
    exit 1
  fi
done

if [ -n "$ci" ]; then
  step "beside the suites"
  wait "$beside" || { cat "$log/beside"; exit 1; }
  cat "$log/beside"
  # The counts are in the logs of both.
  rm "$log/beside"
  beside=
else
  arm_and_asan
fi
step "browsers: wasm32, and opt-novels on WebGPU in Chromium"
script wasm wasm
step "the server: its page in Chromium, and OpenAI's clients"
script serve serve

step "packaging"
# All crates, since opt-core names them all. What was packed is then compiled as a workspace of its own, where the
# dependencies are those checked above: cargo's own verification would build all of them again, each crate by itself.
packed=$PWD/target/packed
rm -rf "$packed" target/package
cargo package --workspace --features "$features" --no-verify --allow-dirty --quiet
mkdir -p "$packed"
# With the times of now (-m): those inside are all the same, and would look to cargo as if nothing had changed.
for crate in target/package/*.crate; do tar -xzmf "$crate" -C "$packed"; done
cp Cargo.lock "$packed"
{
  printf '[workspace]\nresolver = "3"\nmembers = ["opt-*"]\n\n[patch.crates-io]\n'
  (cd "$packed" && for crate in opt-*; do printf '%s = { path = "%s" }\n' "${crate%-*}" "$crate"; done)
  printf '\n'
  sed -n '/^\[profile\.dev/,/^$/p' Cargo.toml
} >"$packed/Cargo.toml"
(cd "$packed" && CARGO_TARGET_DIR=../ cargo check "${workspace[@]}" --quiet)

step "the oldest supported Rust, $msrv"
if rustc --version | grep -q "^rustc $msrv"; then
  echo "it is the one that ran everything above"
elif command -v rustup >/dev/null && rustup run "$msrv" rustc --version >/dev/null 2>&1; then
  CARGO_TARGET_DIR=target/msrv rustup run "$msrv" cargo check "${workspace[@]}" --quiet
else
  # No failure in CI: its image has one toolchain, which on the day of writing is this one.
  echo "skipped: no toolchain $msrv here (rustup toolchain install $msrv)"
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
  fuzz/run.sh all "${FUZZ_SECONDS:-15}"
fi

step "result"
cat "$log"/* | awk '/^test result:/ { passed += $4; failed += $6; ignored += $8 }
  /^[0-9]+ passed, [0-9]+ failed$/ { passed += $1; failed += $3 }
  END { printf "%d passed, %d failed, %d skipped\n", passed, failed, ignored }'
