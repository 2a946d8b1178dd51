"""Pages in a real browser; where none is installed these tests fail, they are never skipped."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from pipeline.inspection.page import render_sample
from pipeline.inspection.server import LOOPBACK, Viewer, make_server
from pipeline.inspection.source import Inspector, find_vocabulary
from pipeline.inspection.testing import TEXTS, keys_of, make_store
from storage.label_set import LabelSet

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.fail(
            f"no browser is installed (looked for {', '.join(BROWSERS)}); install the Debian "
            "package chromium"
        )
    with sync_playwright() as playwright:
        # the sandbox of the browser needs rights that containers do not give
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(params=["light", "dark"])
def theme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that may ask for nothing outside this machine, and throws no error."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    opened = context.new_page()
    problems: list[str] = []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda m: problems.append(m.text) if m.type == "error" else None)
    requests: list[str] = []
    opened.on("request", lambda request: requests.append(request.url))
    yield opened
    context.close()
    assert problems == []
    assert [u for u in requests if not u.startswith(("file:", f"http://{LOOPBACK}:"))] == []


@pytest.fixture(scope="session")
def two_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[LabelSet, LabelSet]:
    """Two label sets of the same chosen texts."""
    root = tmp_path_factory.mktemp("browser")
    return make_store(root), make_store(root, seed=1)


@pytest.fixture(scope="session")
def inspector(two_sets: tuple[LabelSet, LabelSet]) -> Inspector:
    first, second = two_sets
    vocabulary = find_vocabulary(first, None)
    return Inspector(first, first.objects.uri, vocabulary, others=[second])


@pytest.fixture
def page_file(
    inspector: Inspector, two_sets: tuple[LabelSet, LabelSet], tmp_path: Path
) -> Callable[[str], str]:
    """A function that writes the page of a text and returns its address."""
    keys = dict(zip(TEXTS, keys_of(two_sets[0]), strict=True))

    def write(name: str) -> str:
        file = tmp_path / f"{name}.html"
        (inspected,) = inspector.read([keys[name]])
        file.write_text(render_sample(inspected, by="entropy"), encoding="utf-8")
        return file.as_uri()

    return write


@pytest.fixture
def address(inspector: Inspector) -> Iterator[str]:
    """Address of a running viewer."""
    with make_server(Viewer(inspector), port=0) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://{LOOPBACK}:{server.server_port}/"
        server.shutdown()
        thread.join()
