#!/usr/bin/env bash
# `opt serve` as its users meet it: the page in headless Chromium, and the clients that OpenAI publishes for Python and
# Node. Outside of CI it says what it leaves out and why; in CI (CI=true), or with --install, it installs what is missing:
# Chromium from apt, the clients and a Node of the right age into an environment of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
install=${CI:-}
[ "${1:-}" != --install ] || install=1

quietly() { "$@" >"$log" 2>&1 || { cat "$log"; return 1; }; }
browser() { [ -n "${CHROMIUM:-}" ] || command -v chromium || command -v chromium-browser || command -v google-chrome; }

# What the clients are is said in one file; another file is another environment.
stamp=$(sha256sum ci/clients/requirements.txt | cut -c1-12)
venv=${OPT_CLIENTS_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/opt-rs/clients-$stamp}
if [ -n "$install" ]; then
  packages=()
  command -v python3 >/dev/null && python3 -c 'import ensurepip, venv' 2>/dev/null || packages+=(python3 python3-venv)
  browser >/dev/null || packages+=(chromium)
  if [ ${#packages[@]} -gt 0 ]; then
    quietly apt-get update -qq
    quietly apt-get install -y -qq --no-install-recommends "${packages[@]}"
  fi
  if [ ! -e "$venv/installed" ]; then
    # Half an installation is none: the mark comes last.
    rm -rf "$venv"
    quietly python3 -m venv "$venv"
    quietly "$venv/bin/pip" install --quiet --no-cache-dir --disable-pip-version-check -r ci/clients/requirements.txt
    quietly python3 ci/clients/fetch_npm.py "$venv"
    touch "$venv/installed"
  fi
fi

export OPT=${OPT:-target/debug/opt}
if ! command -v python3 >/dev/null; then
  echo "skipped: the server's page and clients (no python3)"
  exit 0
fi
# Here check.sh has built it.
[ -x "$OPT" ] || quietly cargo build -p opt-cli --bin opt

echo "the page in Chromium"
if browser >/dev/null; then
  python3 ci/serve/page_test.py
else
  echo "skipped: the server's page in a browser (Chromium or Chrome; the environment variable CHROMIUM can name one)"
fi
if [ -e "$venv/installed" ]; then
  echo "OpenAI's client for Python"
  python3 ci/serve/server.py "$venv/bin/python" ci/clients/openai_client.py
  echo "OpenAI's client for Node"
  python3 ci/serve/server.py env NODE_PATH= "$venv/bin/node" ci/clients/openai_client.mjs "$venv/openai/index.mjs"
else
  echo "skipped: OpenAI's clients against the server (ci/serve.sh --install fetches them)"
fi
