"""`opt serve` as a process of its own, for tests.

    python3 server.py COMMAND...    runs a command with OPT_URL set, and OPT_KEYED_URL, whose key is OPT_KEY
"""
import os, re, signal, subprocess, sys, threading, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OPT = os.environ.get("OPT", str(ROOT / "target/debug/opt"))
MODEL = os.environ.get("OPT_MODEL", str(ROOT / "models/opt-novels"))


class Server:
    def __init__(self, *flags, model=MODEL, key=None):
        environment = {name: value for name, value in os.environ.items() if name != "OPT_API_KEYS"}
        environment |= {"OPT_API_KEYS": key} if key else {}
        self.process = subprocess.Popen([OPT, "serve", "--model", model, "--port", "0", *flags], env=environment, text=True,
                                        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        self.key, self.said = key, []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.search(r"listening on (http://\S+)", line):
                self.url = found[1].rstrip("/")
                break
        else:
            raise RuntimeError(f"opt serve ended with {self.process.wait()}: {''.join(self.said)}")
        # What is not read would stop it one day.
        threading.Thread(target=lambda: self.said.extend(self.process.stdout), daemon=True).start()

    def get(self, path):
        headers = {"authorization": f"Bearer {self.key}"} if self.key else {}
        with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
            return answer.read().decode()

    def metric(self, name):
        """A number of /metrics that has no labels."""
        return float(re.search(rf"^{name} (\S+)$", self.get("/metrics"), re.M)[1])

    def until(self, condition, seconds=10):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"not after {seconds} s"
            time.sleep(0.02)

    def resident(self):
        """Bytes of memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024

    def stop(self):
        """Ends it as an operator would, and returns its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def main():
    command = sys.argv[1:]
    with Server() as server, Server(key="tests-key") as keyed:
        environment = {"OPT_URL": server.url, "OPT_KEYED_URL": keyed.url, "OPT_KEY": keyed.key, "OPT": OPT, "OPT_MODEL": MODEL}
        ended = subprocess.run(command, env=os.environ | environment).returncode
        codes = server.stop(), keyed.stop()
    assert codes == (0, 0), f"the servers ended with {codes}: {''.join(server.said)}{''.join(keyed.said)}"
    sys.exit(ended)


if __name__ == "__main__":
    main()
