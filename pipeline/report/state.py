"""How far a run came, what stopped it, and how to go on."""

from collections.abc import Sequence
from typing import Any

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


def run_state(
    events: Sequence[dict[str, Any]], *, live: bool, missing: Sequence[str], go_on: str
) -> dict[str, Any]:
    """The outcome of the last run, and every step that did not end well.

    Args:
        events: Of ``events.jsonl``, in order.
        live: Whether a process is working in the run folder now.
        missing: What the settings ask for and is not there, in words.
        go_on: Command line that goes on.
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
    last = None
    if live:
        outcome = "running"
    elif not missing and not any(p["step"] == "certify" for p in (*problems[-1:], *killed)):
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
        "problems": sorted([*problems, *killed], key=lambda problem: str(problem["time"])),
    }


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
