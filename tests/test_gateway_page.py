"The page at / in a real browser: upload, ask, a streamed answer, times that jump the player. And schemathesis against the OpenAPI document."
import os, shutil, subprocess, sys, time
from pathlib import Path

import httpx
import pytest

from test_gateway import House, place  # noqa: F401
from video_vlm.gateway import make_key

@pytest.fixture(scope="module")
def browser():
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync.sync_playwright() as p:
        path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
        try: b = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        except sync.Error as e: pytest.skip(f"no chromium here (apt install chromium, or playwright install chromium): {str(e).splitlines()[0][:100]}")
        yield b
        b.close()

def opened(browser, house):
    page, errors = browser.new_page(), []
    page.set_default_timeout(240_000)
    page.on("pageerror", lambda e: errors.append(str(e))); page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(house.url + "/")
    return page, errors

def until(page, what, seconds=240):
    "Asks again and again from here: playwright's own `wait_for_function` calls `eval` in the page, which the page's Content-Security-Policy forbids, as it should."
    end = time.time() + seconds
    while not page.evaluate(what):
        assert time.time() < end, f"never true: {what}"
        page.wait_for_timeout(50)

@pytest.fixture(scope="module")
def webm(place):
    "A clip that a browser without licensed codecs can play."
    from fractions import Fraction
    import av, numpy as np
    path = place[0] / "clips" / "web.webm"
    with av.open(str(path), "w") as c:
        s = c.add_stream("libvpx", rate=8, options={"deadline": "realtime"}); s.width, s.height, s.pix_fmt = 128, 96, "yuv420p"
        for i in range(48):
            x = np.full((96, 128, 3), 30, np.uint8); x[20:60, 2 * i:2 * i + 30] = (220, 40, 40)
            f = av.VideoFrame.from_ndarray(x, format="rgb24"); f.pts, f.time_base = i, Fraction(1, 8); c.mux(s.encode(f))
        c.mux(s.encode(None))
    return path

@pytest.mark.slow
def test_upload_ask_jump(browser, place, webm):
    h = House(place[0] / "page", place[1], place[0] / "clips", sync_seconds=30.)
    from video_vlm.serving import Delta, Usage
    async def words(req):                                          # the model is random: its words are not, so that there is a time to click
        for i, w in enumerate(("The square ", "moves from 1.0s ", "to 2.5s ", "<script>alert(1)</script>.")):
            yield Delta(w, (i,), 0, "stop" if w.endswith(".") else None, Usage(20, 64, 4, 0) if w.endswith(".") else None)
    try:
        page, errors = opened(browser, h)
        real, h.gw.engine.generate = h.gw.engine.generate, words
        page.set_input_files("#file", str(webm))
        page.fill("#question", "When does it move?"); page.click("#go")
        page.wait_for_selector("article .facts")
        assert "moves from 1.0s to 2.5s <script>" in page.inner_text("article .a")          # text, never HTML
        assert "tokens: 20 text, 64 video, 4 out" in page.inner_text("article .facts") and "first token" in page.inner_text("article .facts") and "clip encoded now" in page.inner_text("article .facts")
        page.click("article .t >> nth=1")
        until(page, "document.getElementById('player').currentTime > 2.4")
        assert abs(page.evaluate("document.getElementById('player').currentTime") - 2.5) < .2
        h.gw.engine.generate = real
        until(page, "document.getElementById('pick').options.length == 2")
        page.select_option("#pick", index=1)                                                # the same clip, picked from the server
        page.fill("#question", "And now?"); page.click("#go")
        until(page, "document.querySelectorAll('article .facts').length == 2")
        assert "known clip, nothing encoded" in page.inner_text("article >> nth=0")
        assert len(httpx.get(h.url + "/v1/files").json()["data"]) == 1 and not errors, errors
        page.close()
    finally: h.close()

@pytest.mark.slow
def test_long_video_and_errors_on_the_page(browser, place):
    h = House(place[0] / "page2", place[1], place[0] / "clips")
    try:
        key = make_key(h.gw.book, "acme")
        page, _ = opened(browser, h)
        page.set_input_files("#file", str(place[3])); page.fill("#question", "What happens?"); page.click("#go")
        page.wait_for_selector("article .error"); assert "API key" in page.inner_text("article .error")
        page.fill("#key", key); page.click("#go")
        page.wait_for_selector("article .facts")                                            # indexed as a job, then answered
        assert h.gw.book.one("select state from jobs")["state"] == "done"
        page.close()
    finally: h.close()

@pytest.mark.slow
def test_schemathesis_finds_no_server_error(place, tmp_path):
    pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
    h = House(place[0] / "schema", place[1], place[0] / "clips")
    try:
        st = Path(sys.executable).parent / "st"
        p = subprocess.run([str(st), "run", h.url + "/openapi.json", "--checks", "not_a_server_error", "--max-examples", "25", "--request-timeout", "60", "--generation-deterministic", "--phases", "examples,coverage,fuzzing",
                            "--suppress-health-check", "all"], capture_output=True, text=True, cwd=tmp_path, timeout=3000, env={**os.environ, "NO_COLOR": "1"})
        assert p.returncode == 0, p.stdout[-4000:] + p.stderr[-1000:]
        assert httpx.get(h.url + "/health").status_code == 200
    finally: h.close()
