"""The page of `opt serve`, used in a headless Chromium as a person would. Prints `N passed, M failed`.

    python3 ci/serve/page_test.py [--screenshots DIR]
"""
import http.client, http.server, json, re, socket, sys, threading, time, traceback, urllib.parse
from pathlib import Path
from devtools import CTRL, Browser
from server import Server

TOKENS = "document.querySelectorAll('.token')"
IDLE = "!document.querySelector('.busy')"
# Notes each state of a column's text, and whether its answer was still going on.
WATCH = """(() => { window.states = []; new MutationObserver(() => states.push([document.querySelector('.text').textContent,
  !!document.querySelector('.busy'), performance.now()])).observe(document.querySelector('.text'), {childList: true}); })()"""


def ready(page, url):
    page.open(url + "/")
    page.until("document.querySelector('select').options.length")


def set_field(page, name, value, column="First"):
    page.js(f"""(() => {{ const field = document.querySelector('[data-column={column}] [name={name}]');
        field.value = {value!r}; field.dispatchEvent(new Event('input', {{bubbles: true}})); }})()""")


def generate(page, tokens=40, **settings):
    for name, value in ({"max_tokens": tokens, "temperature": 0} | settings).items():
        set_field(page, name, str(value))
    page.click("#go")
    page.until(f"{IDLE} && document.querySelector('.status').textContent.includes('tokens/s')")


def text(page, column="First"):
    return page.js(f"document.querySelector('[data-column={column}] .text').textContent")


def tokens_appear_one_after_another(page, server):
    page.js(WATCH)
    generate(page, 120)
    states = page.js("states")
    going = [state for state in states if state[1]]
    assert len(going) >= 20, f"{len(going)} states while the answer went on"
    assert all(b[0].startswith(a[0]) for a, b in zip(going, going[1:])), "a state that does not go on from the one before"
    assert len({len(state[0]) for state in going}) >= 20 and going[-1][2] > going[0][2]
    status = page.js("document.querySelector('.status').textContent")
    assert re.search(r"^\d+ \+ 120 tokens · [\d.]+ tokens/s · first \d+ ms · max tokens$", status), status
    spoken = page.js("document.querySelector('[data-column=First] .spoken').textContent")
    assert spoken.endswith(text(page).removeprefix("The river")), spoken


def the_text_is_what_the_api_gives(page, server):
    generate(page, 24)
    body = '{"prompt": "The river", "max_tokens": 24, "temperature": 0}'
    whole = page.js(f"""fetch('v1/completions', {{method: 'POST', headers: {{'content-type': 'application/json'}},
        body: {body!r}}}).then((answer) => answer.json())""")
    assert text(page) == "The river" + whole["choices"][0]["text"]


def busy(server):
    """Gives the server so much else to do that a text takes longer than a click; whoever closes this frees it."""
    body = json.dumps({"prompt": "The", "n": 16, "best_of": 16, "max_tokens": 400, "logit_bias": {"2": -100}}).encode()
    other = socket.create_connection(("127.0.0.1", urllib.parse.urlsplit(server.url).port))
    other.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(body) + body)
    server.until(lambda: server.metric("opt_batch_running") == 1, 5)
    return other


def stop_stops(page, server):
    for way in ("button", "Escape"):
        before = server.metric("opt_cancelled_total")
        with busy(server):
            set_field(page, "max_tokens", "500")
            page.click("#go")
            page.until(f"{TOKENS}.length > 5")
            page.click("#stop") if way == "button" else page.key("Escape")
            page.until(IDLE, 2)
        count = page.js(f"{TOKENS}.length")
        assert 5 < count < 495, f"{count} tokens were shown"
        server.until(lambda: server.metric("opt_batch_running") == 0, 3)
        # The other one has gone as well.
        assert server.metric("opt_cancelled_total") == before + 2, way
        assert "stopped" in page.js("document.querySelector('.status').textContent")
        assert page.js("document.activeElement.id") == "go" or way == "Escape"
        assert page.js(f"{TOKENS}.length") == count, "tokens after the stop"


def hover_shows_probabilities(page, server):
    generate(page)
    page.hover(".token:nth-child(8)")
    page.until("!document.querySelector('#card').hidden")
    shown = page.js("document.querySelector('.chosen').textContent")
    assert re.search(r"(\d+(\.\d)? %)$", shown), shown
    rows = page.js("[...document.querySelectorAll('#card li')].map((row) => row.textContent)")
    assert 5 <= len(rows) <= 6 and all(row.endswith("%") for row in rows), rows
    # Greedy: what was chosen is the likeliest.
    assert page.js("document.querySelector('#card button').getAttribute('aria-current')") == "true"
    probability = page.js("document.querySelector('.chosen b').textContent")
    assert rows[0].endswith(probability), (rows, shown)
    page.hover("h1")
    page.until("document.querySelector('#card').hidden", 2)


def alternatives_continue(page, server):
    generate(page)
    before = page.js(f"[...{TOKENS}].slice(0, 6).map((token) => token.textContent)")
    page.hover(".token:nth-child(8)")
    page.until("!document.querySelector('#card').hidden")
    page.js("document.querySelector('#card button:not(:disabled):not([aria-current])').id = 'other'")
    word = page.js("document.querySelector('#other span').textContent")
    page.click("#other")
    page.until(f"{IDLE} && {TOKENS}.length > 10")
    after = page.js(f"[...{TOKENS}].map((token) => token.textContent)")
    assert after[:6] == before and len(after) == 6 + 1 + 40, (before, after)
    assert page.js(f"{TOKENS}[6].classList.contains('turn')") and after[6].strip() == word.strip("\u2423").strip(), (word, after)
    # What was there before is now among the alternatives of the word that was chosen.
    page.hover(".turn")
    page.until("document.querySelectorAll('#card li').length >= 5")
    assert page.js("document.querySelector('.chosen b').textContent") != "100 %"


def two_settings_give_two_streams(page, server):
    page.click("#compare")
    set_field(page, "temperature", "1")
    for column in ("First", "Second"):
        set_field(page, "max_tokens", "200", column)
    page.click("#go")
    page.until("document.querySelectorAll('.busy').length === 2 && ['First', 'Second'].every((name) => "
               "document.querySelectorAll(`[data-column=${name}] .token`).length > 1)")
    page.until(IDLE, 60)
    for name in ("First", "Second"):
        assert page.js(f"document.querySelectorAll('[data-column={name}] .token').length") > 20, name
    assert text(page) != text(page, "Second"), "sampled and greedy texts are the same"
    boxes = page.js("[...document.querySelectorAll('.column')].map((c) => c.getBoundingClientRect().x)")
    assert boxes[0] < boxes[1], "not side by side"


def the_keyboard_is_enough(page, server):
    set_field(page, "max_tokens", "30")
    page.js("document.body.focus()")

    def tab_to(selector):
        for _ in range(30):
            if page.js(f"document.activeElement.matches({selector!r})"):
                return
            page.key("Tab")
        raise AssertionError(f"Tab does not come to {selector}")

    tab_to("#prompt")
    page.js("document.activeElement.select()")
    page.write("The old house")
    page.key("Enter", CTRL)
    page.until(f"{IDLE} && {TOKENS}.length > 20")
    assert text(page).startswith("The old house")
    tab_to(".token")
    page.until("!document.querySelector('#card').hidden")
    for _ in range(3):
        page.key("ArrowRight")
    assert page.js(f"document.activeElement === {TOKENS}[3] && document.activeElement.ariaLabel.includes('%')")
    outline = page.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline != "none", "the focus cannot be seen"
    page.key("Enter")
    assert page.js("document.querySelector('#card').contains(document.activeElement)")
    page.key("Escape")
    assert page.js(f"document.activeElement === {TOKENS}[3]")
    page.key("ArrowDown")
    page.key("ArrowDown")
    page.key("Enter")
    page.until(f"{IDLE} && document.querySelector('.turn') && {TOKENS}.length > 20")
    assert page.js(f"document.activeElement === {TOKENS}[3]"), "the focus is not on the word that was chosen"
    tab_to(".keep")
    page.key("Enter")
    assert page.js("document.querySelector('#prompt').value") == text(page)


def errors_are_one_clear_line(page, server):
    set_field(page, "temperature", "-1")
    page.click("#go")
    line = page.until("document.querySelector('.error').textContent")
    assert line.startswith("400: temperature: expected") and "\n" not in line, line
    expected = [c for c in page.complaints if "400 (Bad Request)" not in c]
    page.complaints[:] = expected
    generate(page, 8)
    assert page.js("document.querySelector('.error').textContent") == ""


def a_phone_does_not_scroll_sideways(page, server):
    for width in (320, 390, 699):
        page.size(width, 800, phone=True)
        ready(page, server.url)
        page.tap("#compare")
        generate(page, 60)
        page.tap(".token:nth-child(12)")
        page.until("!document.querySelector('#card').hidden")
        inside = page.js("""[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility())
            .map((e) => e.getBoundingClientRect()).filter((r) => r.right > innerWidth + 1 || r.left < -1).length""")
        assert inside == 0 and page.js("document.documentElement.scrollWidth <= innerWidth"), width
        lefts = page.js("[...document.querySelectorAll('.column')].map((c) => c.getBoundingClientRect().x)")
        assert lefts[0] == lefts[1], "two columns on a phone"


def colours_can_be_read(page, server):
    generate(page, 8)
    page.hover(".token:nth-child(4)")
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        low = page.js(CONTRAST)
        assert not low, f"{scheme}: {low}"
    page.media(prefers_color_scheme="light")


# Texts whose contrast with what is behind them is below 4.5, as WCAG's AA wants it.
CONTRAST = """(() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (colours) => { canvas.clearRect(0, 0, 1, 1);
    for (const c of colours) { canvas.fillStyle = c; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255).map((v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const low = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || e.matches("input, textarea, select");
    if (!own || !e.checkVisibility() || e.matches(":disabled, option, .spoken")) continue;
    const behind = [];
    for (let at = e; at; at = at.parentElement) behind.unshift(getComputedStyle(at).backgroundColor);
    const back = rgba(behind), front = rgba([...behind, getComputedStyle(e).color]);
    const [a, b] = [light(back), light(front)].sort((x, y) => y - x);
    if ((a + .05) / (b + .05) < 4.5) low.push(`${e.tagName}.${e.className} ${((a + .05) / (b + .05)).toFixed(2)}`);
  }
  return low.join(", ");
})()"""


def motion_can_be_reduced(page, server):
    page.media(prefers_reduced_motion="reduce")
    generate(page, 8)
    assert page.js("document.getAnimations().length") == 0
    assert page.js("getComputedStyle(document.querySelector('.token')).animationName") == "none"
    page.media(prefers_reduced_motion="no-preference")
    assert page.js("getComputedStyle(document.querySelector('.token')).animationName") == "appear"


def a_seed_repeats_and_stop_strings_stop(page, server):
    generate(page, 40, temperature=1, seed=7)
    first = text(page)
    generate(page, 40, temperature=1, seed=7)
    assert text(page) == first
    generate(page, 40, temperature=0, seed="")
    whole = text(page).removeprefix("The river")
    word = re.findall(r"\w+", whole)[6]
    generate(page, 40, temperature=0, stop=f"{word}|never said")
    assert text(page).removeprefix("The river") == whole.split(word)[0]
    assert page.js("document.querySelector('.status').textContent").endswith("ended")


def a_key_is_asked_for_and_kept_in_the_session(page, _):
    with Server(key="open sesame") as server:
        page.open(server.url + "/")
        page.until("document.querySelector('.error').textContent.startsWith('401')")
        assert page.js("document.querySelector('#access').open")
        page.complaints[:] = [c for c in page.complaints if "401 (Unauthorized)" not in c]
        page.click("#key")
        page.write("open sesame")
        page.key("Tab")
        page.until("document.querySelector('select').options.length && !document.querySelector('.error').textContent")
        ready(page, server.url)
        generate(page, 8)
        assert page.js("localStorage.length === 0 && document.cookie === '' && sessionStorage.length === 1")


class Prefix(http.server.BaseHTTPRequestHandler):
    """Passes what comes under /llm/ on to a server, as a proxy in front of it would."""
    upstream = ""

    def pass_on(self):
        if not self.path.startswith("/llm/"):
            self.send_error(404)
            return
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        upstream = http.client.HTTPConnection(self.upstream)
        upstream.request(self.command, self.path.removeprefix("/llm"), body,
                         {k: v for k, v in self.headers.items() if k.lower() in ("content-type", "accept")})
        answer = upstream.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                self.send_header(name, value)
        self.end_headers()
        while piece := answer.read1(65536):
            # Cut behind each byte that begins or goes on within a character, as a network may do it.
            for part in re.split(rb"(?<=[\x80-\xff])", piece):
                self.wfile.write(part)
                self.wfile.flush()
                time.sleep(0.002 if part[-1:] >= b"\x80" else 0)

    do_GET = do_POST = pass_on

    def log_message(self, *_):
        pass


def it_works_under_a_prefix(page, server):
    Prefix.upstream = urllib.parse.urlsplit(server.url).netloc
    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Prefix)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    try:
        ready(page, f"http://127.0.0.1:{proxy.server_port}/llm")
        page.js("document.querySelector('#prompt').value = 'He took her hand. “'")
        generate(page, 80)
        made = text(page).removeprefix("He took her hand. “")
        assert "”" in made and "\ufffd" not in made, made
    finally:
        proxy.shutdown()


CHECKS = [tokens_appear_one_after_another, the_text_is_what_the_api_gives, stop_stops, hover_shows_probabilities,
          alternatives_continue, two_settings_give_two_streams, the_keyboard_is_enough, errors_are_one_clear_line,
          a_seed_repeats_and_stop_strings_stop, a_phone_does_not_scroll_sideways, colours_can_be_read, motion_can_be_reduced,
          it_works_under_a_prefix, a_key_is_asked_for_and_kept_in_the_session]


def screenshots(browser, server, folder):
    """Pictures to look at; nothing is checked here."""
    folder.mkdir(parents=True, exist_ok=True)
    page = browser.page(1200, 900)
    ready(page, server.url)
    page.screenshot(folder / "empty.png")
    generate(page, 100, temperature=0.8, seed=3)
    page.hover(".token:nth-child(20)")
    for scheme in ("light", "dark"):
        page.media(prefers_color_scheme=scheme)
        page.screenshot(folder / f"hover-{scheme}.png")
    page.media(prefers_color_scheme="light")
    page.click("#compare")
    generate(page, 60)
    page.screenshot(folder / "two.png")
    set_field(page, "temperature", "-1")
    page.click("#go")
    page.until("document.querySelector('.error').textContent")
    page.screenshot(folder / "error.png")
    page.size(390, 844, phone=True)
    ready(page, server.url)
    page.screenshot(folder / "phone.png")
    generate(page, 80, temperature=0.8, seed=3)
    page.tap(".token:nth-child(20)")
    page.screenshot(folder / "phone-tapped.png")


def main():
    failed = 0
    with Server() as server, Browser() as browser:
        if "--screenshots" in sys.argv:
            return screenshots(browser, server, Path(sys.argv[sys.argv.index("--screenshots") + 1]))
        for check in CHECKS:
            page = browser.page()
            try:
                ready(page, server.url)
                check(page, server)
                assert not page.complaints, f"the browser complains: {page.complaints}"
            except Exception:
                failed += 1
                print(f"FAILED {check.__name__}\n{traceback.format_exc()}", flush=True)
            else:
                print(f"ok {check.__name__.replace('_', ' ')}", flush=True)
            browser.close(page)
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
