#!/usr/bin/env bash
# Mutates for SECONDS, shared by the targets: fuzz/run.sh {TARGET|all} SECONDS [keep]
# One line a target; of one that failed also the end of its log, and then a non-zero exit.
# With `keep`, what was found and reaches code that the corpus does not joins it; otherwise the corpus stays as it is.
set -euo pipefail
cd "$(dirname "$0")"
if [ $# -lt 2 ]; then
  echo "usage: fuzz/run.sh {TARGET|all} SECONDS [keep]" >&2
  exit 2
fi
# No sanitizer: see README.md. More codegen units than cargo-fuzz's one: a faster build for a slightly slower run.
build=(--sanitizer none --codegen-units 16)
# An input of 4 KiB that takes 5 s or half a GiB is a fault.
limits=(-max_len=4096 -rss_limit_mb=512 -timeout=5)

targets=("$1")
[ "$1" != all ] || mapfile -t targets < <(cargo fuzz list)
each=$(($2 / ${#targets[@]}))
[ "$each" -ge 1 ] || each=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
log=$work/log

# `all` is one build of every target.
if ! cargo fuzz build "${build[@]}" $([ "$1" = all ] || echo "$1") >"$log" 2>&1; then
  cat "$log" >&2
  exit 1
fi

# The last match of a pattern's group in the log, or 0.
number() { sed -nE "s/$1/\1/p" "$log" | tail -n 1 | grep . || echo 0; }

failed=()
for target in "${targets[@]}"; do
  corpus=corpus/$target
  found=$work/$target
  mkdir -p "$corpus" "$found"
  # The first directory is the one written to.
  if ! cargo fuzz run "${build[@]}" "$target" "$found" "$corpus" -- \
    "${limits[@]}" -max_total_time="$each" -print_final_stats=1 >"$log" 2>&1; then
    failed+=("$target")
    # Without the fuzzer's line for every find, and without what does not fit a screen.
    grep -vE '^#[0-9]+' "$log" | tail -n 60 | cut -c 1-300 >&2 || true
    echo "$target: FAILED; the input is in fuzz/artifacts/$target"
    continue
  fi
  printf '%s: %d inputs, %d executions in %d s, coverage %d -> %d, %d new inputs\n' "$target" \
    "$(find "$corpus" -type f | wc -l)" "$(number 'stat::number_of_executed_units: *([0-9]+)')" "$each" \
    "$(number '.*INITED +cov: ([0-9]+).*')" "$(number '.*DONE +cov: ([0-9]+).*')" \
    "$(number 'stat::new_units_added: *([0-9]+)')"
  if [ "${3:-}" = keep ]; then
    cargo fuzz run "${build[@]}" "$target" "$corpus" "$found" -- "${limits[@]}" -merge=1 >"$log" 2>&1 ||
      { cat "$log" >&2; exit 1; }
  fi
done
[ ${#failed[@]} -eq 0 ] || exit 1
