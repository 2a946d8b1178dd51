"""The server of ``distill view``: pages, permalinks, and who may ask."""

import http.client
from collections.abc import Iterator
from http import HTTPStatus
from threading import Thread

import pytest

from pipeline.inspection.listing import Listing
from pipeline.inspection.server import LOOPBACK, Viewer, is_local, make_server
from pipeline.inspection.source import Inspector
from storage.errors import ConfigError
from storage.ipc import ArrowFile
from storage.label_set import LabelSet
from storage.store import LabelStore
from storage.testing import make_sample, make_spec

NUM_SAMPLES = 120


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> LabelSet:
    """Three shards of 40 samples."""
    store = LabelStore(str(tmp_path_factory.mktemp("many")), create=True)
    spec = make_spec()
    label_set = store.create(spec, {})
    for start in range(0, NUM_SAMPLES, 40):
        label_set.append([make_sample(n, spec) for n in range(start, start + 40)], {})
    return label_set


def inspector_of(label_set: LabelSet) -> Inspector:
    from pipeline.inspection.source import find_vocabulary

    uri = label_set.objects.uri
    opened = LabelStore(uri).open(label_set.key)
    return Inspector(opened, uri, find_vocabulary(opened, "ids"))


@pytest.fixture
def viewer(many: LabelSet) -> Viewer:
    return Viewer(inspector_of(many), "ids")


# -- the list -------------------------------------------------------------------------------------
def test_pages_hold_every_sample_once(many: LabelSet) -> None:
    listing = Listing(LabelStore(many.objects.uri).open(many.key))
    assert listing.num_samples() == NUM_SAMPLES
    found = [e for start in range(0, NUM_SAMPLES, 50) for e in listing.page(start, 50)]
    keys = [entry.key for entry in found]
    assert len(keys) == len(set(keys)) == NUM_SAMPLES
    assert set(keys) == {str(key) for key in many.to_arrow(["sample_key"])["sample_key"].unique()}
    assert listing.entries(keys[::-7]) == found[::-7]
    assert listing.page(NUM_SAMPLES, 50) == []
    assert listing.entries([]) == []


def test_entries_tell_what_the_samples_are(many: LabelSet) -> None:
    listing = Listing(LabelStore(many.objects.uri).open(many.key))
    listing.num_samples()
    entries = listing.page(35, 10)
    for entry, sample in zip(entries, many.read([e.key for e in entries]), strict=True):
        assert entry.num_tokens == len(sample.response_ids_R)
        assert entry.num_rows == len(sample.positions_N)
        assert list(entry.prompt_tail) == sample.prompt_ids_P.tolist()
        assert entry.finish_reason == sample.finish_reason


def test_copies_that_are_not_served_are_left_out(many: LabelSet) -> None:
    listing = Listing(LabelStore(many.objects.uri).open(many.key))
    listing.num_samples()
    first, second, third = many.live_shards()
    entries = listing.page(0, 3)
    keys = [entry.key for entry in entries]
    assert listing._served(first, keys, entries, 0) == entries
    assert listing._served(second, keys, entries, 0) == []
    assert third.num_samples == 40


def test_the_first_page_reads_no_labels(many: LabelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    viewer = Viewer(inspector_of(many), "ids")
    opened: list[str] = []
    original = LabelSet.open_table

    def counted(self: LabelSet, shard: object, table: str) -> ArrowFile:
        opened.append(table)
        return original(self, shard, table)  # type: ignore[arg-type]

    monkeypatch.setattr(LabelSet, "open_table", counted)
    assert viewer.answer("/", "").status == HTTPStatus.OK
    assert opened == ["samples", "samples"]  # the 50 first samples lie in two of the three shards


def test_the_list_is_paged(viewer: Viewer) -> None:
    first = viewer.answer("/", "").page
    assert "1 to 50 of 120 samples" in first
    assert first.count("<li>") == 50
    assert 'rel="next" href="/?start=50"' in first
    assert 'rel="prev"' not in first
    last = viewer.answer("/", "start=100").page
    assert "101 to 120 of 120 samples" in last
    assert 'rel="next"' not in last


def test_conditions_and_sorts_stay_in_the_links(viewer: Viewer) -> None:
    found = viewer.answer("/", "where=num_tokens+%3E+1&sort=entropy&order=desc").page
    assert "1 to 50 of 120 samples" in found
    assert "/?where=num_tokens+%3E+1&amp;sort=entropy&amp;order=desc&amp;start=50" in found


def test_a_sample_links_to_its_neighbours(viewer: Viewer, many: LabelSet) -> None:
    listing = Listing(many)
    listing.num_samples()
    before, here, behind = (entry.key for entry in listing.page(49, 3))
    page = viewer.answer(f"/sample/{here}", "place=50").page
    assert f'rel="prev" href="/sample/{before}?place=49"' in page
    assert f'rel="next" href="/sample/{behind}?place=51"' in page
    assert 'href="/?start=50"' in page
    assert 'rel="next"' not in viewer.answer(f"/sample/{here}", "").page


def test_labels_that_are_added_appear(tmp_path_factory: pytest.TempPathFactory) -> None:
    store = LabelStore(str(tmp_path_factory.mktemp("growing")), create=True)
    spec = make_spec()
    label_set = store.create(spec, {})
    viewer = Viewer(inspector_of(label_set), "ids")
    assert "no sample here" in viewer.answer("/", "").page
    label_set.append([make_sample(0, spec)], {})
    assert "1 to 1 of 1 samples" in viewer.answer("/", "").page
    assert "1 to 1 of 1 samples" in viewer.answer("/", "sort=tokens").page
    label_set.append([make_sample(1, spec)], {})
    assert "1 to 2 of 2 samples" in viewer.answer("/", "sort=tokens").page


@pytest.mark.parametrize(
    ("path", "query", "status"),
    [
        ("/nowhere", "", 404),
        ("/sample/" + "0" * 32, "", 404),
        ("/sample/../../etc/passwd", "", 400),
        ("/", "where=nonsense", 400),
        ("/", "sort=loss", 400),
        ("/", "start=-1", 400),
        ("/", "start=" + "9" * 40, 400),
        ("/", "where=%3Cscript%3Ealert(1)%3C/script%3E", 400),
    ],
)
def test_what_cannot_be_shown_is_told(viewer: Viewer, path: str, query: str, status: int) -> None:
    answer = viewer.answer(path, query)
    assert answer.status == status
    assert 'role="alert"' in answer.page
    assert "<script>" not in answer.page


# -- HTTP -----------------------------------------------------------------------------------------
@pytest.fixture
def port(viewer: Viewer) -> Iterator[int]:
    with make_server(viewer, port=0) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        assert server.server_address[0] == LOOPBACK
        yield server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=10)
    connection.request(method, "/", headers={k.replace("_", "-"): v for k, v in headers.items()})
    response = connection.getresponse()
    response.body = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


def test_this_machine_gets_a_page_with_strict_headers(port: int) -> None:
    found = ask(port)
    assert found.status == 200
    assert found.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = found.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert found.headers["Cache-Control"] == "no-store"
    assert b"<!doctype html>" in found.body  # type: ignore[attr-defined]


def test_head_has_no_body(port: int) -> None:
    assert ask(port, "HEAD").body == b""  # type: ignore[attr-defined]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_can_be_changed(port: int, method: str) -> None:
    assert ask(port, method).status == 501


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "192.168.1.1", "[", ""])
def test_other_names_of_this_machine_are_refused(port: int, host: str) -> None:
    assert ask(port, Host=host).status == 403


def test_scripts_of_other_sites_are_refused_and_their_links_are_not(port: int) -> None:
    site = {"Sec_Fetch_Site": "cross-site"}
    assert ask(port, **site, Sec_Fetch_Mode="no-cors").status == 403
    assert ask(port, **site, Sec_Fetch_Mode="navigate").status == 200


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:80", "127.0.0.1:9", "[::1]:80", "127.9.9.9"]
)
def test_names_of_loopback(host: str) -> None:
    assert is_local(host)


def test_a_port_that_is_taken_is_told(viewer: Viewer, port: int) -> None:
    with pytest.raises(ConfigError, match=f"cannot listen on {LOOPBACK}:{port}.*--port"):
        make_server(viewer, port=port)
