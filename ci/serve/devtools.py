"""A headless Chromium, driven by its DevTools protocol over two pipes: nothing needed but Python.

    with Browser() as browser:
        page = browser.page()
        page.open("http://127.0.0.1:8080/")
        page.js("document.title")
"""
import base64, itertools, json, os, shutil, signal, subprocess, tempfile, threading, time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a key is called, and the text it makes.
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "Space": (32, " "), "Home": (36, ""), "End": (35, ""),
        "ArrowLeft": (37, ""), "ArrowUp": (38, ""), "ArrowRight": (39, ""), "ArrowDown": (40, "")}
CTRL, SHIFT = 2, 8


def find():
    """The browser's path, or None. The environment variable CHROMIUM can name one."""
    names = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else NAMES
    return next((path for path in map(shutil.which, names) if path), None)


class Browser:
    def __init__(self):
        self.folder = tempfile.mkdtemp()
        there, self.writer = os.pipe()
        self.reader, back = os.pipe()
        # Chromium reads from descriptor 3 and writes to 4. The ends go there by way of high numbers, which neither is.
        shell = f'exec 3<&{there} 4>&{back} && exec "$@"'
        # In a container one is root, for whom Chromium has no sandbox; the page is ours.
        flags = ["--headless=new", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run", "--disable-sync",
                 "--disable-background-networking", "--disable-component-update", "--disable-quic", "--disable-gpu",
                 "--disable-dev-shm-usage", f"--user-data-dir={self.folder}/profile", "about:blank"]
        self.log = open(f"{self.folder}/log", "wb")
        # bash, whose redirections take descriptors above 9. A process group, whose helpers end with it.
        self.process = subprocess.Popen(["bash", "-c", shell, "bash", find(), *flags], pass_fds=(there, back),
                                        stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, start_new_session=True)
        os.close(there)
        os.close(back)
        self.numbers, self.answers, self.pages = itertools.count(1), {}, {}
        self.news = threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self):
        rest = b""
        while data := os.read(self.reader, 1 << 16):
            *messages, rest = (rest + data).split(b"\0")
            with self.news:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    elif page := self.pages.get(message.get("sessionId")):
                        page.heard(message["method"], message["params"])
                self.news.notify_all()
        with self.news:
            self.answers = None
            self.news.notify_all()

    def call(self, method, session=None, **params):
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.writer, json.dumps(message).encode() + b"\0")
        with self.news:
            done = self.news.wait_for(lambda: self.answers is None or number in self.answers, 30)
            if not done or self.answers is None:
                self.log.flush()
                said = open(self.log.name, errors="replace").read()[-2000:]
                raise RuntimeError(f"{method}: the browser {'does not answer' if not done else 'ended'}\n{said}")
            answer = self.answers.pop(number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def page(self, width=1200, height=900):
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, target)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        page.size(width, height)
        return page

    def close(self, page):
        self.pages.pop(page.session)
        self.call("Target.closeTarget", targetId=page.target)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


class Page:
    def __init__(self, browser, session, target):
        self.browser, self.session, self.target = browser, session, target
        # What the page complained of: exceptions, errors on the console, violations of its security policy.
        self.complaints = []
        self.loaded = False

    def call(self, method, **params):
        return self.browser.call(method, self.session, **params)

    def heard(self, method, params):
        if method == "Page.loadEventFired":
            self.loaded = True
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(arg.get("value")) for arg in params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{params['entry']['text']} ({params['entry'].get('url', '')})")

    def open(self, url):
        self.loaded = False
        self.call("Page.navigate", url=url)
        with self.browser.news:
            if not self.browser.news.wait_for(lambda: self.loaded, 30):
                raise RuntimeError(f"{url} did not load")

    def js(self, expression):
        """What an expression, or a promise, comes to."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    def until(self, expression, seconds=30):
        """Waits until an expression is true, and returns it."""
        end = time.monotonic() + seconds
        while True:
            if found := self.js(expression):
                return found
            if time.monotonic() > end:
                raise AssertionError(f"after {seconds} s still not: {expression}")
            time.sleep(0.02)

    def size(self, width, height, phone=False):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2 if phone else 1,
                  mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def media(self, **features):
        self.call("Emulation.setEmulatedMedia",
                  features=[{"name": name.replace("_", "-"), "value": value} for name, value in features.items()])

    def middle(self, selector):
        """Where an element is, after scrolling to it."""
        box = self.js(f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{ block: "nearest" }}); const r = e.getClientRects()[0];
            return [r.x + r.width / 2, r.y + r.height / 2]; }})()""")
        return {"x": box[0], "y": box[1]}

    def hover(self, selector):
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **self.middle(selector))

    def click(self, selector):
        at = self.middle(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **at)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)

    def tap(self, selector):
        at = self.middle(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[at])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def key(self, name, modifiers=0):
        code, text = KEYS[name]
        event = {"key": text if name == "Space" else name, "code": name, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        made = {"text": text} if text and not modifiers else {}
        self.call("Input.dispatchKeyEvent", type="keyDown" if made else "rawKeyDown", **event, **made)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text):
        self.call("Input.insertText", text=text)

    def screenshot(self, path):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        with open(path, "wb") as file:
            file.write(base64.b64decode(data))
