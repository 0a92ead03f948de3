#!/bin/sh
# Mutates for SECONDS in all: fuzz/run.sh {TARGET|all} SECONDS [keep]
# With `keep`, what was found joins the corpus, minimised; otherwise the corpus stays as it is.
set -eu
cd "$(dirname "$0")"
if [ $# -lt 2 ]; then
    echo "usage: fuzz/run.sh {TARGET|all} SECONDS [keep]" >&2
    exit 2
fi
targets=$1
[ "$targets" = all ] && targets=$(cargo +nightly fuzz list)
each=$(($2 / $(echo "$targets" | wc -w)))
[ "$each" -ge 1 ] || each=1
for target in $targets; do
    mkdir -p "corpus/$target"
    found=$(mktemp -d)
    # 1 GiB (the sanitizer keeps freed memory) and 5 s: an input of 4 KiB that takes more is a fault. The first directory is the one written to.
    cargo +nightly fuzz run "$target" "$found" "corpus/$target" -- -max_total_time="$each" -max_len=4096 \
        -rss_limit_mb=1024 -malloc_limit_mb=256 -timeout=5 -print_final_stats=1
    if [ "${3:-}" = keep ]; then
        cp "$found"/* "corpus/$target" 2>/dev/null || true
        cargo +nightly fuzz cmin "$target" -- -max_len=4096
    fi
    rm -rf "$found"
done
