"""How far a run came, what stopped it, and how to go on."""

from collections.abc import Sequence
from typing import Any

from pipeline.logs import LOGS_DIRECTORY
from pipeline.stopping import StoppedError

ADVICE = {
    "finished": "Nothing is left to do.",
    "running": "A process is working in the run folder: `distill status` shows how far it is, and "
    "it writes this report anew when it ends.",
    "failed": "Remove the cause and run again: what is published or committed is kept and skipped, "
    "and a training goes on from its last checkpoint.",
    "stopped": "It was asked to stop. Run again: it goes on where it stopped.",
    "interrupted": "The process ended without a word: it was killed, ran out of memory, or its "
    "machine did. Run again: what is published or committed is kept and skipped, and a training "
    "goes on from its last checkpoint.",
    "unfinished": "Run again: only what is missing is done.",
}
"""By outcome, what to do."""


DIED = {"teacher died": ("label", "detail"), "training died": ("train", "why")}
"""Events of processes that were replaced: their step, and where the reason stands."""

LASTING = ("certify", "plan")
"""Steps whose failure counts though everything is there: nothing that they made shows it."""


def run_state(
    events: Sequence[dict[str, Any]],
    *,
    live: bool,
    missing: Sequence[str],
    go_on: str,
    own_run: str = "",
) -> dict[str, Any]:
    """The outcome of the last run, and every step that did not end well.

    Args:
        events: Of ``events.jsonl``, in order.
        live: Whether a process is working in the run folder now.
        missing: What the settings ask for and is not there, in words.
        go_on: Command line that goes on.
        own_run: Id of the run that asks, which has not ended.
    """
    steps = [event for event in events if "step" in event]
    begun: dict[str, dict[str, Any]] = {}
    problems: list[dict[str, Any]] = []
    for event in steps:
        step = event["step"]
        if event["event"] == "started":
            # a step that starts again without having ended was interrupted
            problems += [_problem(begun[step], "interrupted")] if step in begun else []
            begun[step] = event
            continue
        begun.pop(step, None)
        if event["event"] == "failed":
            problems.append(_problem(event, _failure(event)))
    killed = [] if live else [_problem(event, "interrupted") for event in begun.values()]
    if not live and not killed and (dead := _killed_between_steps(events, own_run)) is not None:
        killed = [dead]
    died = [_died(event) for event in events if event["event"] in DIED]
    last = None
    if live:
        outcome = "running"
    elif not missing and not any(p["step"] in LASTING for p in (*problems[-1:], *killed)):
        outcome = "finished"  # what failed once was done since, or is not wanted any more
    elif steps and steps[-1]["event"] == "failed":
        last = problems[-1]
        outcome = last["state"]
    elif killed:
        last = killed[-1]
        outcome = "interrupted"
    else:
        outcome = "unfinished" if missing else "finished"
    return {
        "outcome": outcome,
        "step": None if last is None else last["step"],
        "why": None if last is None else last["error"],
        "advice": ADVICE[outcome],
        "go_on": None if outcome in ("finished", "running") else go_on,
        "missing": list(missing),
        "problems": sorted([*problems, *killed, *died], key=lambda p: str(p["time"])),
        "logs": None if outcome == "finished" else _logs(events),
    }


def _killed_between_steps(events: Sequence[dict[str, Any]], own_run: str) -> dict[str, Any] | None:
    """The last run, if it never said how it ended."""
    runs = [event for event in events if event["event"] in ("run started", "run ended")]
    if not runs or runs[-1]["event"] == "run ended" or runs[-1].get("run") == own_run:
        return None
    last = events[-1]
    what = " ".join(filter(None, (last.get("step"), last["event"])))
    error = f"the process ended without a word; the last event is {what!r}, {last['time']}"
    return {"step": None, "state": "interrupted", "time": last["time"], "error": error}


def _died(event: dict[str, Any]) -> dict[str, Any]:
    """An engine or a training that died while its step went on."""
    step, detail = DIED[event["event"]]
    who = event.get("student") or event.get("reason") or ""
    error = f"{who}: {event.get(detail, 'no reason was noted')}"
    return {"step": step, "state": "died", "time": event["time"], "error": error}


def _logs(events: Sequence[dict[str, Any]]) -> str | None:
    """The logs of the last run, relative to the run folder."""
    runs = [event["run"] for event in events if event.get("run")]
    return f"{LOGS_DIRECTORY}/{runs[-1]}" if runs else None


def _failure(event: dict[str, Any]) -> str:
    stopped = str(event.get("error", "")).startswith(f"{StoppedError.__name__}:")
    return "stopped" if stopped else "failed"


def _problem(event: dict[str, Any], state: str) -> dict[str, Any]:
    return {
        "step": event["step"],
        "state": state,
        "time": event["time"],
        "error": event.get("error", "no reason was noted"),
    }
