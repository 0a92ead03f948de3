"""Serving beside plain peers, in turns, on the OPT-125m shape, all cores: `opt serve --quantize int8`, transformers behind
FastAPI (serving_transformers.py, f32, a request at a time), and CTranslate2's batches in its own process (int8).

    python3 benches/serving_peers.py DIR [--opt OPT] [--rounds N] [--streams 1,32] [--prompt-tokens N] [--new-tokens N]
    python3 benches/serving_peers.py DIR --soak 10        # resident memory over 10 thousand short requests

DIR has `bin/python` (torch 2.13, transformers 4.57.6, ctranslate2 4.8.5, fastapi 0.165.0, uvicorn 0.54.0) and
`opt-125m-random`, a checkpoint of that shape with random weights; CTranslate2's copy of it is made beside it. `cargo build
--release -p opt-cli` first.

Clients ask for streams, each as soon as its last one ended, `--turns` times; end tokens are held back, so that each stream
is as long as the others. Tokens per second are all new tokens over the time from the first request to the last token. The
time to first token is that of the first wave, in which all clients ask at once. Beside it is what the schedule allows: the
rows of the prompts in order of arrival, at the speed at which this server ran a prompt of 448 tokens, and one step.
"""
import argparse, asyncio, json, os, random, re, shlex, signal, statistics, subprocess, sys, time, urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CTRANSLATE2 = """
import ctranslate2, json, sys, time
path, prompts, streams, turns, new = sys.argv[1], json.load(open(sys.argv[2])), *map(int, sys.argv[3:6])
generator = ctranslate2.Generator(path, device="cpu", compute_type="int8", intra_threads=int(sys.argv[6]))
options = dict(max_length=new, min_length=new, sampling_topk=1, include_prompt_in_result=False, max_batch_size=streams)
generator.generate_batch(prompts[:1], **options)
firsts, tokens, start = [], 0, time.perf_counter()
for turn in range(turns):
    began, seen = time.perf_counter(), {}
    def told(result):
        seen.setdefault(result.batch_id, time.perf_counter() - began)
        return False
    some = prompts[turn * streams : (turn + 1) * streams]
    made = generator.generate_batch(some, callback=told, **options)
    tokens += sum(len(one.sequences_ids[0]) for one in made)
    if turn == 0:
        firsts = list(seen.values())
print(json.dumps({"tokens": tokens, "seconds": time.perf_counter() - start, "firsts": firsts}))
"""


async def stream(port, body):
    """Asks once, and returns when each event with text came, and how many tokens the server counted."""
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        data = json.dumps(body).encode()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                     b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(data) + data)
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        status = int(head.split()[1])
        if status != 200 or "chunked" not in head.lower():
            raise RuntimeError(f"{head}{(await reader.read(2000)).decode(errors='replace')}")
        text, times, tokens = b"", [], 0
        while size := int(await reader.readline(), 16):
            text += (await reader.readexactly(size + 2))[:-2]
            *events, text = text.split(b"\n\n")
            for event in events:
                if not event.startswith(b"data: ") or event == b"data: [DONE]":
                    continue
                told = json.loads(event[6:])
                if "error" in told:
                    raise RuntimeError(told["error"]["message"])
                if told["choices"] and told["choices"][0]["text"]:
                    times.append(time.perf_counter() - began)
                tokens = (told.get("usage") or {}).get("completion_tokens", tokens)
        return times, tokens
    finally:
        writer.close()


def body(prompt, new, **more):
    return {"prompt": prompt, "max_tokens": new, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}} | more


async def load(port, prompts, streams, turns, new, **more):
    """All clients' turns: tokens, seconds, and the first wave's times to first token."""
    firsts = []

    async def client(number):
        total = 0
        for turn in range(turns):
            times, tokens = await stream(port, body(prompts[turn * streams + number], new, **more))
            total += tokens
            if tokens != new:
                raise RuntimeError(f"expected {new} tokens, found {tokens}")
            if turn == 0:
                firsts.append(times[0])
        return total

    start = time.perf_counter()
    tokens = sum(await asyncio.gather(*map(client, range(streams))))
    return {"tokens": tokens, "seconds": time.perf_counter() - start, "firsts": sorted(firsts)}


class Process:
    """A server; `url` is a line that it prints, or a port that it answers on."""

    def __init__(self, command, port=None):
        self.process = subprocess.Popen([str(part) for part in command], stdout=None if port else subprocess.PIPE, text=True)
        self.port = port
        if port is None:
            for line in self.process.stdout:
                if found := re.search(r"listening on http://127\.0\.0\.1:(\d+)", line):
                    self.port = int(found[1])
                    break
        while port and self.process.poll() is None:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/openapi.json").close()
                break
            except OSError:
                time.sleep(0.1)
        if not self.port or self.process.poll() is not None:
            sys.exit(f"{command[0]} did not start")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def resident(self):
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024


def ours(args):
    return Process([args.opt, "serve", "--model", args.directory / "opt-125m-random", "--quantize", "int8", "--port", "0",
                    "--queue", "4096", "--quiet", *shlex.split(args.serve)])


def prompts_of(count, length, seed):
    # Another seed for each purpose: what begins alike would be run once only.
    source = random.Random(seed)
    return [[2, *(source.randrange(4, 50265) for _ in range(length - 1))] for _ in range(count)]


def measure_ours(args, streams):
    prompts = prompts_of(streams * args.turns, args.prompt_tokens, 1)
    with ours(args) as server:
        async def all_of_it():
            await stream(server.port, body(prompts_of(1, 8, 2)[0], 8))
            long = prompts_of(3, 448, 3)
            spent = [(await stream(server.port, body(prompt, 1)))[0][0] for prompt in long]
            times, _ = await stream(server.port, body(prompts_of(1, 32, 4)[0], 32, min_new_tokens=32))
            found = await load(server.port, prompts, streams, args.turns, args.new_tokens, min_new_tokens=args.new_tokens)
            return found | {"prefill": 448 / statistics.median(spent), "step": (times[-1] - times[0]) / (len(times) - 1)}

        found = asyncio.run(all_of_it())
    rows = range(1, streams + 1)
    found["ideals"] = [args.prompt_tokens * row / found["prefill"] + found["step"] for row in rows]
    return found


def measure_transformers(args, streams):
    # A request at a time takes as long whatever the number of clients: one turn says as much as several.
    turns = 1 if streams > 1 else args.turns
    prompts = prompts_of(streams * turns, args.prompt_tokens, 1)
    command = [args.directory / "bin/python", ROOT / "benches/serving_transformers.py", args.directory / "opt-125m-random", 8765]
    with Process(command, port=8765) as server:
        async def all_of_it():
            await stream(server.port, body(prompts[0], 2))
            return await load(server.port, prompts, streams, turns, args.new_tokens, min_tokens=args.new_tokens)

        return asyncio.run(all_of_it())


def measure_ctranslate2(args, streams):
    copy = args.directory / "ct2-int8"
    if not copy.exists():
        convert = [args.directory / "bin/ct2-transformers-converter", "--model", args.directory / "opt-125m-random"]
        subprocess.run([*convert, "--output_dir", copy, "--quantization", "int8"], check=True, stdout=subprocess.DEVNULL)
    names = json.loads((copy / "vocabulary.json").read_text())
    prompts = [[names[token] for token in prompt] for prompt in prompts_of(streams * args.turns, args.prompt_tokens, 1)]
    path = args.directory / "serving-prompts.json"
    path.write_text(json.dumps(prompts))
    numbers = [str(number) for number in (streams, args.turns, args.new_tokens, args.threads)]
    # Version 4.8.5 ends itself now and then; a run that ended so is none.
    for attempt in range(5):
        ran = subprocess.run([args.directory / "bin/python", "-c", CTRANSLATE2, copy, path, *numbers], stdout=subprocess.PIPE,
                             text=True)
        if ran.returncode != -signal.SIGABRT:
            break
        print(f"CTranslate2, {streams}: has ended itself (try {attempt + 1})", flush=True)
    path.unlink()
    ran.check_returncode()
    return json.loads(ran.stdout.splitlines()[-1])


PROGRAMS = {"opt serve": measure_ours, "transformers": measure_transformers, "CTranslate2": measure_ctranslate2}


def compare(args):
    streams = [int(count) for count in args.streams.split(",")]
    rates = {(name, count): [] for name in PROGRAMS for count in streams}
    firsts = {key: [] for key in rates}
    ideals = {count: [] for count in streams}
    for number in range(args.rounds):
        for count in streams:
            for name in list(PROGRAMS) if number % 2 == 0 else reversed(PROGRAMS):
                if name in args.without:
                    continue
                found = PROGRAMS[name](args, count)
                rates[name, count].append(found["tokens"] / found["seconds"])
                firsts[name, count].append(statistics.mean(found["firsts"]))
                said = f"{name}, {count}: {rates[name, count][-1]:.1f} tokens/s, first {firsts[name, count][-1] * 1000:.0f} ms"
                if "ideals" in found:
                    ideals[count].append(statistics.mean(found["ideals"]))
                    said += (f" (ideal {ideals[count][-1] * 1000:.0f}; prefill {found['prefill']:.0f} tokens/s, "
                             f"step {found['step'] * 1000:.1f} ms)")
                print(said, flush=True)
    print("\n| streams | | tokens/s | ours beside it (all rounds) | first token, ms | of the ideal |\n|---|---|---|---|---|---|")
    for (name, count), found in rates.items():
        if not found:
            continue
        ratios = sorted(a / b for a, b in zip(rates["opt serve", count], found))
        beside = "" if name == "opt serve" else f"{statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})"
        first = statistics.median(firsts[name, count])
        ideal = f"{statistics.median(a / b for a, b in zip(firsts[name, count], ideals[count])):.2f}" if name == "opt serve" else ""
        print(f"| {count} | {name} | {statistics.median(found):.1f} | {beside} | {first * 1000:.0f} | {ideal} |")


def soak(args):
    source = random.Random(11)
    with ours(args) as server:
        async def client(left):
            while left:
                left.pop()
                # Of any length up to where what is kept of beginnings is full after a while.
                prompt = [2, *(source.randrange(4, 50265) for _ in range(source.randrange(1, 80)))]
                _, tokens = await stream(server.port, body(prompt, source.randrange(1, 5)))
                if not 0 < tokens < 5:
                    raise RuntimeError(f"{tokens} tokens")

        async def some(count):
            left = [None] * count
            await asyncio.gather(*(client(left) for _ in range(16)))

        print("| requests | resident, MiB |\n|---|---|")
        asyncio.run(some(16))
        print(f"| 16 | {server.resident():.1f} |", flush=True)
        for thousand in range(args.soak):
            asyncio.run(some(1000))
            print(f"| {1000 * (thousand + 1)} | {server.resident():.1f} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--opt", type=Path, default=ROOT / "target/release/opt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="1,32")
    parser.add_argument("--turns", type=int, default=2, help="requests of each client")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CTranslate2's")
    parser.add_argument("--without", nargs="*", default=[], help="peers to leave out")
    parser.add_argument("--serve", default="", help="further flags of opt serve, in one string: '--serve=--compute int8'")
    parser.add_argument("--soak", type=int, metavar="THOUSANDS")
    args = parser.parse_args()
    soak(args) if args.soak else compare(args)


if __name__ == "__main__":
    main()
