"""The page at /, in a browser without a screen."""

import shutil

import pytest

sync = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")


@pytest.fixture(scope="module")
def page(server):
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request", lambda request: problems.append(request.url) if not request.url.startswith(server.url) else None
        )
        page.goto(server.url)
        yield page
        assert problems == []  # no error, and nothing fetched from elsewhere
        browser.close()


def test_talk(page):
    """A question is answered, kept with its answer, and a new conversation is empty."""
    page.wait_for_function("document.getElementById('model').textContent === 'tiny-jargon'")
    page.fill("#text", "What is kludge?")
    page.press("#text", "Enter")
    page.wait_for_function("document.querySelector('.assistant')?.textContent.length > 3", timeout=60000)
    assert page.inner_text(".user") == "What is kludge?"
    page.click("#send")  # it says Stop now
    page.wait_for_function("document.getElementById('send').textContent === 'Send'")
    assert page.evaluate("messages.map(m => m.role)") == ["user", "assistant"]
    page.wait_for_function("document.getElementById('cache').textContent.endsWith('%')")
    page.click("#anew")
    assert page.query_selector("main p") is None


def test_words_are_shown_as_words(page):
    page.evaluate("paragraph('assistant', '<img src=x onerror=alert(1)>')")
    assert page.query_selector("main img") is None
    page.click("#anew")


def test_a_refusal_is_shown(page):
    page.evaluate("say('kludge '.repeat(3000))")
    page.wait_for_selector(".error")
    assert "maximum context length" in page.inner_text(".error")
    page.click("#anew")
