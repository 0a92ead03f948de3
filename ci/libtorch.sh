#!/usr/bin/env bash
# Says where LibTorch is: prints the variables that building and running the tch backend need.
#
#   eval "$(ci/libtorch.sh)"             an existing one: LIBTORCH, python3's torch, or the one installed below
#   eval "$(ci/libtorch.sh --install)"   installs it first if there is none (Python 3, about 5 GB)
#
# Exit code 1, with the reason on stderr, where there is none of the right version. tch 0.26 needs exactly 2.13.
set -euo pipefail
version=2.13.0
venv=${OPT_LIBTORCH_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/opt-rs/torch-$version}

torch_of() { "$1" -c 'import torch, os; print(torch.__version__.split("+")[0], os.path.dirname(torch.__file__))' 2>/dev/null; }
use_python() { # PYTHON LIBRARY_FOLDER
  printf 'export LIBTORCH_USE_PYTORCH=1 PATH=%q:"$PATH" LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:"$LD_LIBRARY_PATH"}\n' \
    "$(dirname "$1")" "$2/lib"
}

if [ -n "${LIBTORCH:-}" ]; then
  found=$(cut -d+ -f1 "$LIBTORCH/build-version" 2>/dev/null || true)
  if [ "$found" != "$version" ]; then
    echo "LIBTORCH=$LIBTORCH: expected LibTorch $version, found ${found:-no build-version file}" >&2
    exit 1
  fi
  printf 'export LIBTORCH=%q LD_LIBRARY_PATH=%q${LD_LIBRARY_PATH:+:"$LD_LIBRARY_PATH"}\n' "$LIBTORCH" "$LIBTORCH/lib"
  exit 0
fi

if [ "${1:-}" = --install ] && [ ! -e "$venv/installed" ]; then
  # Half an installation is none: the mark comes last.
  if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    { apt-get update -qq && apt-get install -y -qq python3-venv; } >&2
  fi
  rm -rf "$venv"
  python3 -m venv "$venv" >&2
  "$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check "torch==$version" numpy >&2
  touch "$venv/installed"
fi

for python in "$venv/bin/python3" "$(command -v python3 || true)"; do
  if [ -x "$python" ] && read -r found folder < <(torch_of "$python"); then
    if [ "$found" = "$version" ]; then
      use_python "$python" "$folder"
      exit 0
    fi
    other="$python has torch $found"
  fi
done
echo "no LibTorch $version${other:+ ($other)}: eval \"\$(ci/libtorch.sh --install)\", or set LIBTORCH to an unpacked one" >&2
exit 1
