"""What lies in a run folder, said in the folder itself."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from storage.files import write_atomically

GUIDE_FILE = "README.txt"
RUN_FILE = "run.json"

FILES = {
    "README.txt": "this file",
    "run.json": "the last run: its id, process, state, error, and every step with time and cost",
    "config.json": "all settings, defaults filled in; `distill run config.json` goes on",
    "provenance.json": "versions, git revision, host and command of the last run",
    "events.jsonl": "the story of all runs, one event per line; `run` is the id of the run",
    "logs/RUN/": "structured logs of a run, one file per process; `sort logs/RUN/*.jsonl`",
    "plan.json": "which labels the newest plan asks for, and the teacher's tokenizer",
    "plans/": "plans that are remembered, by what they were made from",
    "digests.json": "digests of files that were read, so that they are read once",
    "models/": "models that were converted or pruned for this project",
    "untrained/": "held-out quality of the models that students start from",
    "students/NAME-KEY/": "a student; student.json is written last, and says that it is finished",
    "students/NAME-KEY/job.json": "what `python -m student_train job.json` trains, without Ray",
    "students/NAME-KEY/metrics.jsonl": "its training, one line per optimiser step",
    "students/NAME-KEY/checkpoints/": "where its training goes on; gone once it is finished",
    "students/NAME-KEY/model/": "the trained model, a Hugging Face directory with a model card",
    "students/NAME-KEY/evaluation-*.json": "its held-out quality",
    "report.html, report.json": "what came out; `distill report` writes it at any time",
}
"""What each file is; a folder holds those that its run came to."""


def write_guide(directory: Path, project: str) -> None:
    """Write ``README.txt``."""
    width = max(map(len, FILES))
    lines = [
        f"Run folder of the distillation project {project}.",
        "",
        *(f"{name:<{width}}  {meaning}" for name, meaning in FILES.items()),
        "",
        "How did it go, and how does it go on: distill report " + str(directory),
        "Labels are not here but in the store that config.json names.",
    ]
    write_atomically(directory / GUIDE_FILE, ("\n".join(lines) + "\n").encode())


def write_run(
    directory: Path, facts: dict[str, Any], *, state: str, events: Sequence[dict[str, Any]]
) -> None:
    """Write ``run.json``.

    Args:
        directory: The run folder.
        facts: Of the run: ``run``, ``host``, ``process``, ``command``, ``started_at``.
        state: ``running``, ``finished``, ``failed`` or ``stopped``.
        events: Of all runs.
    """
    steps: dict[str, dict[str, Any]] = {}
    for event in events:
        if event.get("run") == facts["run"] and "step" in event:
            told = {n: v for n, v in event.items() if n not in ("run", "step", "event", "time")}
            begun = steps.get(event["step"], {}).get("started_at", event["time"])
            ended = {} if event["event"] == "started" else {"ended_at": event["time"]}
            state_now = "running" if event["event"] == "started" else event["event"]
            steps[event["step"]] = {"state": state_now, "started_at": begun, **ended, **told}
    run = {**facts, "state": state, "steps": steps}
    write_atomically(directory / RUN_FILE, json.dumps(run, indent=1).encode())


def holder(directory: Path) -> str:
    """Who works in a run folder, in words; empty if it does not say."""
    try:
        run = json.loads((directory / RUN_FILE).read_text())
        return (
            f"process {run['process']} on {run['host']}, since {run['started_at']}: "
            f"{run['command']}"
        )
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return ""
