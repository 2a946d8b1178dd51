"""A small server for looking at whole label sets: local, read-only, one page per request.

It listens on loopback, answers only requests that name a loopback host (a foreign page whose name
resolves to this machine is refused), and knows no method but GET and HEAD.
"""

import ipaddress
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from pipeline.inspection.choose import COMPARED_SORT, SORTS, Choice, chosen_keys, default_measure
from pipeline.inspection.listing import Entry, Listing
from pipeline.inspection.measures import measure_named
from pipeline.inspection.page import Links, render, render_sample
from pipeline.inspection.pieces import pieces, plain
from pipeline.inspection.source import Inspector
from storage.errors import ConfigError, DistillError, NotLabelledError

LOOPBACK = "127.0.0.1"
PAGE_SAMPLES = 50
HELD_CHOICES = 8
"""Answers to conditions and sorts that are kept."""

HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a request gets."""

    status: HTTPStatus
    page: str


class Viewer:
    """Pages of one label set.

    Args:
        inspector: Reads its samples.
        tokenizer: As the user named it, for conditions on text.
    """

    def __init__(self, inspector: Inspector, tokenizer: str | None = None) -> None:
        self._inspector, self._tokenizer = inspector, tokenizer
        self._listing = Listing(inspector.label_set)
        self._chosen: OrderedDict[tuple[Choice, int], list[str]] = OrderedDict()
        # label set and students are used by one request at a time
        self._lock = Lock()

    def answer(self, path: str, query: str) -> Answer:
        """The page of a path; expected failures become pages too."""
        words = {name: values[-1] for name, values in parse_qs(query).items()}
        try:
            with self._lock:
                if path == "/":
                    return Answer(HTTPStatus.OK, self._list(words))
                if path.startswith("/sample/"):
                    return Answer(HTTPStatus.OK, self._sample(path.removeprefix("/sample/"), words))
        except NotLabelledError as error:
            return self._problem(HTTPStatus.NOT_FOUND, str(error), words)
        except DistillError as error:
            return self._problem(HTTPStatus.BAD_REQUEST, str(error), words)
        return self._problem(HTTPStatus.NOT_FOUND, f"there is no page {path!r}", {})

    # -- the list ---------------------------------------------------------------------------------
    def _list(self, words: dict[str, str]) -> str:
        start = _number(words.get("start", "0"))
        choice = _choice(words)
        num_samples = self._listing.num_samples()
        if choice.needs_query:
            keys = self._keys(choice)
            entries, total = self._listing.entries(keys[start : start + PAGE_SAMPLES]), len(keys)
        else:
            entries, total = self._listing.page(start, PAGE_SAMPLES), num_samples
        return self._render_list(words, entries, start, total)

    def _keys(self, choice: Choice) -> list[str]:
        """Samples of a choice; asked anew when labels were added."""
        known = (choice, self._inspector.label_set.log.last)
        if known not in self._chosen:
            self._chosen[known] = chosen_keys(self._inspector, choice, tokenizer=self._tokenizer)
            if len(self._chosen) > HELD_CHOICES:
                self._chosen.popitem(last=False)
        self._chosen.move_to_end(known)
        return self._chosen[known]

    def _render_list(
        self,
        words: dict[str, str],
        entries: list[Entry],
        start: int,
        total: int,
        problem: str | None = None,
    ) -> str:
        kept = {name: words[name] for name in ("where", "sort", "order") if words.get(name)}
        sorts = [
            n for n in (*SORTS, COMPARED_SORT) if n != COMPARED_SORT or self._inspector.compares
        ]

        def at(place: int) -> str:
            return "/?" + urlencode({**kept, "start": place})

        return render(
            "list.html.jinja",
            label_set=self._inspector.label_set.key,
            store=self._inspector.store,
            entries=[self._entry(e, kept, start + n) for n, e in enumerate(entries)],
            start=start,
            stop=start + len(entries),
            total=total,
            kept=kept,
            sorts=sorts,
            problem=problem,
            previous=at(max(0, start - PAGE_SAMPLES)) if start > 0 else None,
            next=at(start + PAGE_SAMPLES) if start + PAGE_SAMPLES < total else None,
        )

    def _entry(self, entry: Entry, kept: dict[str, str], place: int) -> dict[str, Any]:
        shown = pieces(entry.prompt_tail, self._inspector.vocabulary)
        text = "".join(
            piece.joined or piece.text for n, piece in enumerate(shown) if piece.first == n
        )
        link = f"/sample/{entry.key}?" + urlencode({**kept, "place": place})
        return {"entry": entry, "preview": plain(text), "link": link}

    # -- one sample -------------------------------------------------------------------------------
    def _sample(self, key: str, words: dict[str, str]) -> str:
        by = words.get("by") or default_measure(self._inspector)
        measure_named(by)
        (inspected,) = self._inspector.read([key])
        return render_sample(inspected, by=by, links=self._links(words))

    def _links(self, words: dict[str, str]) -> Links:
        kept = {name: words[name] for name in ("where", "sort", "order") if words.get(name)}
        if "place" not in words:
            return Links(all="/")
        place = _number(words["place"])
        start = place - place % PAGE_SAMPLES
        back = "/?" + urlencode({**kept, "start": start})
        return Links(back, self._at(place - 1, kept), self._at(place + 1, kept))

    def _at(self, place: int, kept: dict[str, str]) -> str | None:
        """Permalink of the sample at a place of the list."""
        choice = _choice(kept)
        if place < 0:
            return None
        if choice.needs_query:
            keys = self._keys(choice)[place : place + 1]
        else:
            keys = [entry.key for entry in self._listing.page(place, 1)]
        return f"/sample/{keys[0]}?" + urlencode({**kept, "place": place}) if keys else None

    def _problem(self, status: HTTPStatus, text: str, words: dict[str, str]) -> Answer:
        return Answer(status, self._render_list(words, [], 0, 0, problem=text))


def _choice(words: dict[str, str]) -> Choice:
    return Choice(
        words.get("where", "").strip() or None,
        words.get("sort") or None,
        words.get("order") == "desc",
    )


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 12:
        raise ConfigError(f"{text!r} is no place in a list; take a number from 0")
    return int(text)


# -- HTTP ------------------------------------------------------------------------------------------
def make_server(
    viewer: Viewer, *, port: int, note: Callable[[str], None] | None = None
) -> ThreadingHTTPServer:
    """A server on loopback that is ready to serve.

    Args:
        viewer: What it shows.
        port: Where; 0 takes a free one.
        note: Gets a line per request; None for silence.

    Raises:
        ConfigError: if the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version = "distill", ""
        timeout = 30

        def do_GET(self) -> None:
            self._respond(body=True)

        def do_HEAD(self) -> None:
            self._respond(body=False)

        def _respond(self, *, body: bool) -> None:
            if not is_local(self.headers.get("Host", "")) or self._is_foreign():
                self.send_error(HTTPStatus.FORBIDDEN, "only for requests of this machine")
                return
            path, _, query = self.path.partition("?")
            answer = viewer.answer(path, query)
            data = answer.page.encode()
            self.send_response(answer.status)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if body:
                self.wfile.write(data)

        def _is_foreign(self) -> bool:
            """Whether another site's page asks for data; it may link to a page."""
            site = self.headers.get("Sec-Fetch-Site", "none")
            mode = self.headers.get("Sec-Fetch-Mode", "navigate")
            return site not in ("none", "same-origin") and mode != "navigate"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name
            if note is not None:
                note(format % args)

    try:
        return ThreadingHTTPServer((LOOPBACK, port), Handler)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {LOOPBACK}:{port}: {error.strerror}; choose another --port"
        ) from error


def is_local(host: str) -> bool:
    """Whether a Host header names this machine by loopback."""
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:  # an open bracket
        return False
    if name is None:
        return False
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"
