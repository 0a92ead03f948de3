#!/usr/bin/env bash
# Packs tests and benchmarks for a machine with a GPU that has neither Rust nor a network: WebGPU over Vulkan, LibTorch
# over CUDA.
#
#   benches/gpu_kit.sh OUT_DIR                 binaries, the small model, fixtures: about 100 MB
#   benches/gpu_kit.sh OUT_DIR --with-libtorch and LibTorch's libraries with CUDA (some GB; copied from the one that
#                                              ci/libtorch.sh finds). Without, `run.sh` looks for LibTorch there.
#
# Carry OUT_DIR over and run OUT_DIR/run.sh there: the conformance suite and the fixtures on each device, then speed.
# The machine needs a Vulkan driver (with NVIDIA: libnvidia-gl and the loader libvulkan1) and glibc no older than here.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: gpu_kit.sh OUT_DIR [--with-libtorch]}
mkdir -p "$out"
out=$(cd "$out" && pwd)

# The executables of `cargo ... --message-format=json`, as `name path`.
executables() {
  python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable"):
        print(message["target"]["name"], message["executable"])'
}
# pack BACKEND: its command, benchmark and tests, into OUT_DIR/BACKEND. Each by itself, so that one does not need what
# the other links to.
pack() {
  local backend=$1
  mkdir -p "$out/$backend"
  {
    cargo build --release -p opt-cli --features "$backend" --message-format=json
    cargo test --release --no-run -p "opt-backend-$backend" --test conformance --message-format=json
    cargo test --release --no-run -p opt-core --features "$backend" --test agreement --test models \
      --test generation --test texts --message-format=json
    cargo bench --no-run -p opt-benches --features "$backend" --bench backends --message-format=json
  } | executables | while read -r name path; do
    cp "$path" "$out/$backend/$name"
  done
}

pack wgpu
backends=wgpu
if libtorch=$(ci/libtorch.sh); then
  eval "$libtorch"
  pack tch
  backends="wgpu tch"
  if [ "${2:-}" = --with-libtorch ]; then
    lib=${LD_LIBRARY_PATH%%:*}
    mkdir -p "$out/libtorch"
    cp -L "$lib"/*.so* "$out/libtorch/"
    # The wheel's CUDA libraries lie beside torch.
    if [ -d "$lib/../../nvidia" ]; then
      find "$lib/../../nvidia" -name '*.so*' -exec cp -L {} "$out/libtorch/" \;
    else
      echo "note: no CUDA libraries beside $lib; the machine must have them" >&2
    fi
  fi
fi
cargo run --release -q -p opt-benches --bin random_model -- "$out/opt-125m-random"
mkdir -p "$out/repository/opt-core/tests" "$out/repository/models"
cp -r opt-core/tests/fixtures "$out/repository/opt-core/tests/"
cp -r models/opt-novels "$out/repository/models/"
sed -e "s/@BACKENDS@/$backends/" >"$out/run.sh" <<'RUN'
#!/usr/bin/env bash
# Runs what gpu_kit.sh packed. Results go to stdout and to results/. Arguments pick some of: check bench.
set -uo pipefail
cd "$(dirname "$0")"
[ $# -gt 0 ] || set -- check bench
export OPT_TEST_REPOSITORY=$PWD/repository OPT_MODEL=$PWD/repository/models/opt-novels OPT_REQUIRE_BACKENDS=1
mkdir -p results
[ -d libtorch ] && export LD_LIBRARY_PATH=$PWD/libtorch${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
failed=0
for backend in @BACKENDS@; do
  case $backend in
    tch) export OPT_TEST_DEVICE=${TCH_DEVICE:-cuda:0} ;;
    *) export OPT_TEST_DEVICE=${WGPU_DEVICE:-0} ;;
  esac
  export OPT_TEST_BACKEND=$backend
  "$backend/opt" backends || failed=1
  for what in "$@"; do
    case $what in
      check)
        for test in conformance agreement models generation texts; do
          "$backend/$test" 2>&1 | tee "results/$backend-$test.txt" | grep -E '^test |^test result|panicked' || true
          grep -q '^test result: ok' "results/$backend-$test.txt" || failed=1
        done
        ;;
      bench)
        for dtype in f32 f16 bf16; do
          "$backend/opt" bench --backend "$backend" --device "$OPT_TEST_DEVICE" --dtype "$dtype" --json \
            --model opt-125m-random --prompt-tokens 128,512 --batch 1,8 --gen-tokens 128 \
            | tee "results/$backend-$dtype.json" || failed=1
        done
        # Criterion's report: results/criterion/report/index.html.
        CRITERION_HOME=$PWD/results/criterion "$backend/backends" --bench "^[^/]*/$backend " || failed=1
        ;;
    esac
  done
done
exit $failed
RUN
chmod +x "$out/run.sh"
du -sh "$out"
