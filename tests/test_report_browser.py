"""The report in a real browser: headless Chromium, driven through the W3C WebDriver protocol that chromedriver speaks.

Skipped where Debian's `chromium` and `chromium-driver` (or any chromedriver) are not installed.
"""

import base64
import itertools
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from synthetic_run import make_run

import plotter
import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver"),
]

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]  # fmt: skip
KEYS = {"left": "\ue012", "right": "\ue014", "enter": "\ue007", "escape": "\ue00c"}
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element


class Browser:
    """One window of a headless Chromium."""

    def __init__(self, port: int, profile: Path):
        self.address = f"http://127.0.0.1:{port}"
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options,
                  "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}  # fmt: skip
        session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None):
        request = urllib.request.Request(self.address + path, json.dumps(body or {}).encode(), method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the driver is on this machine
        try:
            with opener.open(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as refusal:
            raise AssertionError(json.load(refusal)["value"]["message"]) from None

    def post(self, path: str, **body):
        return self._call("POST", self.session + path, body)

    def open(self, page: Path, width: int = 1280, height: int = 900) -> None:
        self.complaints()  # empties the log
        self.post("/window/rect", width=width, height=height)
        self.post("/url", url=page.resolve().as_uri())
        self.wait_for("document.querySelector('#step').textContent")  # the samples are unpacked

    def script(self, code: str):
        return self.post("/execute/sync", script=code, args=[])

    def click(self, selector: str) -> None:
        element = self.post("/element", using="css selector", value=selector)[ELEMENT]
        self.post(f"/element/{element}/click")

    def type(self, selector: str, text: str) -> None:
        element = self.post("/element", using="css selector", value=selector)[ELEMENT]
        self.post(f"/element/{element}/value", text=text)

    def press(self, key: str) -> None:
        """Press a key in the element that has the focus."""
        keys = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        self.post("/actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def text(self, selector: str) -> str:
        return self.script(f"return document.querySelector({json.dumps(selector)}).innerText")

    def wait_for(self, code: str) -> None:
        deadline = time.monotonic() + 10
        while not self.script(f"return Boolean({code})"):
            assert time.monotonic() < deadline, f"never became true: {code}"
            time.sleep(0.05)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self._call("GET", self.session + "/screenshot")))

    def complaints(self) -> list[str]:
        """The messages of the console, and all requests of the page to anything but its file."""
        found = [f"{entry['level']}: {entry['message']}" for entry in self.post("/se/log", type="browser")]
        for entry in self.post("/se/log", type="performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                url, asker = message["params"]["request"]["url"], message["params"]["documentURL"]
                if asker.startswith("file:") and not url.startswith(("file:", "data:")):
                    found.append(f"request: {url}")
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("browser")
    home = {**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)}
    driver = subprocess.Popen(
        [DRIVER, f"--port={port}"], env=home, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        window = Browser(port, folder / "profile")
        yield window
        window._call("DELETE", window.session)
    finally:
        driver.terminate()
        driver.wait()


def report_of(folder: Path) -> Path:
    assert plotter.main(["--output_dir", str(folder)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def clock_run(tmp_path_factory):
    """A run with its report."""
    run = make_run(tmp_path_factory.mktemp("clock") / "run", "clock", steps=6, eval_steps=3, eval_size=5)
    report_of(run)
    return run


def test_a_real_short_run_is_shown(browser, tmp_path, model_folder):
    import main

    options = {"max_steps": 2, "eval_steps": 1, "prompts_per_step": 2, "num_generations": 4, "train_size": 8,
               "eval_size": 3, "max_prompt_length": 200, "max_completion_length": 24, "log_completions_steps": 1,
               "model_path": model_folder("qwen2_vl"), "dataset_name": "clock", "output_dir": tmp_path / "run",
               "device": "cpu"}  # fmt: skip
    assert main.main([text for name, value in options.items() for text in (f"--{name}", str(value))]) == 0
    browser.open(report_of(tmp_path / "run"))
    assert browser.text("#step") == "step 1 (1 of 2)"
    assert browser.script("return window.scrollY") == 0  # the page opens at the summary
    assert browser.script("return document.querySelectorAll('article').length") == 4
    logged = json.loads((tmp_path / "run/train_samples/step_000002.json").read_text())["groups"][1]
    browser.press("right")
    browser.press("j")
    assert logged["id"] in browser.text("#group p") and logged["answer"] in browser.text("#group p")
    shown = browser.script("return [...document.querySelectorAll('article .text')].map(text => text.textContent)")
    assert sorted(shown) == sorted(
        report.visible(c["text"]) for c in logged["completions"]
    )  # a random model writes anything
    browser.click("#kinds button[value=eval]")
    assert browser.text("#step") == "step 2 (3 of 3)"
    browser.type("#search", logged["id"])
    browser.wait_for("document.querySelector('#hits').textContent.startsWith('1 of ')")
    assert browser.complaints() == []


def test_the_report_is_read_from_top_to_bottom(browser, clock_run):
    run = clock_run
    browser.open(run / "report.html")
    assert "mean error" in browser.text("#summary") and "guessing gives 180.0 min" in browser.text("#summary")
    assert browser.script("return [...document.querySelectorAll('#charts img')].every(i => i.src.startsWith('data:'))")
    browser.click("#charts img")
    assert browser.script("return document.querySelector('#charts img').naturalWidth") == 1200

    # A group as it was logged: its picture, its completions with the best rewarded first, the answer marked.
    logged = json.loads((run / "train_samples/step_000001.json").read_text())["groups"][0]
    assert browser.text("#step") == "step 1 (1 of 6)"
    assert browser.script("return document.querySelector('#group img').naturalWidth") == 56
    cards = browser.script("return [...document.querySelectorAll('article')].map(card => card.innerText)")
    rewards = sorted((c["reward"] for c in logged["completions"]), reverse=True)
    assert len(cards) == 8 and f"reward {rewards[0]:.4g}" in cards[0] and f"reward {rewards[-1]:.4g}" in cards[-1]
    best = max(logged["completions"], key=lambda c: c["reward"])
    assert f"advantage +{best['advantage']:.4g}" in cards[0] and f"clock {best['rewards']['clock']:.4g}" in cards[0]
    assert browser.text("article mark.answer").strip() == best["text"].split("<answer>\n")[1].split("\n")[0]
    assert browser.complaints() == []


def test_steps_kinds_and_examples_are_walked_through(browser, clock_run):
    browser.open(clock_run / "report.html")
    browser.press("right")
    browser.press("right")
    assert browser.text("#step") == "step 3 (3 of 6)"
    browser.press("left")
    assert browser.text("#step") == "step 2 (2 of 6)" and "train-0-2-0" in browser.text("#group p")
    browser.press("j")
    assert "train-0-2-1" in browser.text("#group p")
    browser.click("#groups button:first-child")
    assert "train-0-2-0" in browser.text("#group p")
    browser.click("#next")
    assert browser.text("#step") == "step 3 (3 of 6)"
    browser.click("#kinds button[value=eval]")
    assert browser.text("#step") == "step 3 (2 of 3)" and "test-0-0" in browser.text("#group p")
    for _ in range(5):
        browser.press("right")
    assert browser.text("#step") == "step 6 (3 of 3)"  # stops at the end
    assert browser.complaints() == []


def test_search_finds_words_in_every_step(browser, tmp_path):
    run = make_run(tmp_path / "run", "arithmetic", steps=6, eval_steps=3, eval_size=5)
    for step, where in ((2, 0), (5, 1)):
        path = run / f"train_samples/step_{step:06d}.json"
        content = json.loads(path.read_text())
        content["groups"][where]["completions"][3]["text"] += " Quetzal (sic"
        path.write_text(json.dumps(content))
    browser.open(report_of(run))
    browser.press("/")
    browser.type("#search", "quetzal (SIC")
    browser.wait_for("document.querySelector('#hits').textContent === '1 of 2 found'")
    assert browser.text("#step") == "step 2 (2 of 6)" and browser.text("mark.hit") == "Quetzal (sic"
    browser.press("enter")
    assert browser.text("#step") == "step 5 (5 of 6)" and browser.text("#hits") == "2 of 2 found"
    assert "train-0-5-1" in browser.text("#group p")
    browser.type("#search", "nowhere")
    browser.wait_for("document.querySelector('#hits').textContent === '0 found'")
    browser.press("escape")
    browser.press("left")
    assert browser.text("#step") == "step 4 (4 of 6)"
    assert browser.complaints() == []


def test_examples_that_changed_can_be_picked_out(browser, tmp_path):
    run = make_run(tmp_path / "run", "gsm8k", steps=4, eval_steps=4, eval_size=40)
    before, after = (json.loads((run / f"eval_logs/samples_{step:06d}.json").read_text()) for step in (0, 4))
    right = [[g["completions"][0]["prediction"] == float(g["answer"]) for g in x["groups"]] for x in (before, after)]
    learned = sum(b and not a for a, b in zip(*right, strict=True))
    browser.open(report_of(run))
    browser.click("#kinds button[value=eval]")
    browser.press("right")
    browser.script("const f = document.querySelector('#filter'); f.value = 'wrong → right'; f.onchange()")
    assert 0 < learned == browser.script("return document.querySelectorAll('#groups button').length")
    assert "wrong → right" in browser.text("#group p") and "✓" in browser.text("article")
    assert browser.complaints() == []


def test_model_text_is_never_run_as_html(browser, tmp_path):
    run = make_run(tmp_path / "run", "arithmetic", steps=2, eval_steps=2, eval_size=3)
    evil = (
        "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'><!--<script> \x1b[2J\u202e"
    )
    path = run / "train_samples/step_000001.json"
    content = json.loads(path.read_text())
    group = content["groups"][0]
    group["prompt"] = group["id"] = group["answer"] = evil
    for c in group["completions"]:
        c["text"], c["prediction"] = evil + "\ud800", evil
        c["rewards"][evil] = 1.0
    path.write_text(json.dumps(content))
    config = json.loads((run / "config.json").read_text())
    config["command"] = evil
    (run / "config.json").write_text(json.dumps(config))
    browser.open(report_of(run))
    assert browser.script("return window.broken ?? 0") == 0
    assert "<img src=x onerror='window.broken = 2'>" in browser.text("article .text")
    assert "␛[2J�" in browser.text("article .text") and "\x1b" not in (run / "report.html").read_text()
    assert "</script><script>" in browser.text("pre.command")
    assert browser.complaints() == []


def test_light_dark_and_narrow(browser, clock_run):
    browser.open(clock_run / "report.html", width=520)
    light = browser.script("return getComputedStyle(document.body).backgroundColor")
    browser.click("#theme")
    assert browser.script("return getComputedStyle(document.body).backgroundColor") != light
    overflow = browser.script("return document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert overflow == 0
    assert browser.complaints() == []


@pytest.mark.parametrize(("width", "columns"), [(1280, 2), (520, 1)])
def test_charts_leave_no_holes_and_samples_are_one_click_away(browser, clock_run, width, columns):
    browser.open(clock_run / "report.html", width=width)
    code = "return [...document.querySelectorAll('#charts img')].map(i => {i.loading = 'eager'; return i.complete})"
    browser.wait_for(f"(() => {{ {code} }})().every(Boolean)")
    boxes = browser.script(
        "return [...document.querySelectorAll('#charts img')].map(i => i.getBoundingClientRect())"
        ".map(b => [Math.round(b.left), b.top, b.bottom])"
    )
    by_column = {left: sorted(box[1:] for box in boxes if box[0] == left) for left in {box[0] for box in boxes}}
    assert len(by_column) == columns
    for column in by_column.values():
        gaps = [below[0] - above[1] for above, below in itertools.pairwise(column)]
        assert all(0 <= gap < 30 for gap in gaps), gaps
    browser.click("#to-samples")
    browser.wait_for("Math.abs(document.querySelector('#samples').getBoundingClientRect().top) < 60")
    assert browser.complaints() == []


def test_several_runs_share_a_report(browser, tmp_path):
    folders = [make_run(tmp_path / f"{rate}-{seed}", "correlation", steps=4, eval_steps=4, eval_size=5, seed=seed,
                        learning_rate=rate) for rate in (1e-4, 1e-5) for seed in (0, 1)]  # fmt: skip
    assert plotter.main(["--output_dir", *map(str, folders), "--plots_dir", str(tmp_path / "both")]) == 0
    browser.open(tmp_path / "both/report.html")
    assert "learning_rate=1e-05" in browser.text("#summary table") and "0, 1" in browser.text("#summary table")
    browser.script("const r = document.querySelector('#run'); r.value = 1; r.onchange()")
    assert browser.text("#step") == "step 1 (1 of 4)" and browser.text("article")
    assert browser.complaints() == []
