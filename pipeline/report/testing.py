"""Reports of a made-up run, for tests: hostile texts, right-to-left ones and invisible ones."""

from typing import Any

HOSTILE = "</script><script>alert(1)</script>"
TEXTS = ["The", " cat", "\n\n", "\t", "  ", "", HOSTILE, "<|im_end|>", "\ufffd", "\U0001f98a"]
ARABIC = "\u0645\u0631\u062d\u0628\u0627"


def make_token(text: str, entropy: float | None = 0.25, rank: int = 1) -> dict[str, Any]:
    """A token of the shown response."""
    top = [{"text": text, "probability": 0.75}, {"text": HOSTILE, "probability": 0.125}]
    return {
        "text": text,
        "entropy": entropy,
        "probability": 0.75,
        "rank": rank,
        "tail_mass": 0.0625,
        "top": top,
    }


def make_student(name: str, num_steps: int = 3) -> dict[str, Any]:
    """A published student."""
    curve = [
        {"step": n + 1, "loss": 2.5 - n / 8, "soft": 1.5 - n / 8, "hard": 3.5 - n / 8}
        for n in range(num_steps)
    ]
    return {
        "name": name,
        "published": True,
        "steps": num_steps,
        "trained_tokens": 3000,
        "teacher_forward_tokens": 0,
        "directory": f"runs/demo/students/{name}-0123456789ab",
        "curve": curve,
        "heldout_curve": [],
    }


def make_evaluation(name: str, kl: float) -> dict[str, Any]:
    """An evaluation with one generation."""
    generation = {
        "sample_key": "a1",
        "prompt": f"Say {ARABIC} {HOSTILE}",
        "teacher": f"{ARABIC}, she said.",
        "student": "" if name == "untrained" else f"answer of {name}",
    }
    return {
        "name": name,
        "metrics": {"kl": kl, "cross_entropy": kl + 1, "agreement": 1 / (1 + kl)},
        "num_tokens": 4321,
        "generations": [generation],
    }


def make_state(outcome: str, **changes: Any) -> dict[str, Any]:
    """How the run ended."""
    state: dict[str, Any] = {
        "outcome": outcome,
        "step": None,
        "why": None,
        "advice": "Nothing is left to do.",
        "go_on": None,
        "missing": [],
        "problems": [],
    }
    return {**state, **changes}


def make_report(num_students: int = 2, **changes: Any) -> dict[str, Any]:
    """A whole report; changes replace parts of it."""
    names = [f"student-{n}" for n in range(num_students)]
    models = ["untrained", *names]
    report: dict[str, Any] = {
        "key": "0" * 64,
        "project": "demo",
        "state": make_state("finished"),
        "missing": {},
        "certificates": [{"label_set": "1" * 64, "verdict": "none", "reasons": []}],
        "positions": None,
        "samples": None,
        "cost_summary": {"phases": [], "teacher_once": None},
        "labels": {
            "key": "1" * 64,
            "store": "labels",
            "k": 64,
            "mode": "generate",
            "samples": {"train": 1200, "heldout": 1},
            "selections": {"train": "2" * 64, "heldout": "3" * 64},
            "served_by": {"1" * 64: 1000, "4" * 64: 201},
            "stored_samples": 1201,
            "stored_tokens": 2000,
            "stored_bytes": 500_000,
            "forward_tokens": 4000,
            "skipped_rows": [],
        },
        "costs": [
            {
                "step": "label",
                "what": "",
                "state": "finished",
                "seconds": 12.5,
                "devices": 2.0,
                "device_seconds": 25.0,
                "teacher_forward_tokens": 2500,
                "trained_tokens": 0,
            }
        ],
        "students": [make_student(name) for name in names],
        "evaluations": [make_evaluation(name, 2.0 / (n + 1)) for n, name in enumerate(models)],
        "response": {
            "sample_key": "a1",
            "prompt": f"Say {ARABIC} {HOSTILE}",
            "tokens": [make_token(text) for text in TEXTS],
        },
        "provenance": {"created_at": "2026-01-05T10:11:12+00:00", "command": "distill run"},
        "config": {"name": "demo", "note": HOSTILE},
    }
    return {**report, **changes}


def make_samples(name: str) -> dict[str, Any]:
    """The samples of one student, the worst one only."""
    sample = {
        "sample_key": "ab" * 16,
        "label_set": "1" * 64,
        "num_tokens": 40,
        "kl": 0.5,
        "untrained_kl": 2.25,
        "position": 7,
        "view": f"http://127.0.0.1:8601/sample/{'ab' * 16}?by=kl#p7",
        "inspect": "distill inspect 1111 --sample abab",
        "prompt": HOSTILE,
    }
    return {
        "name": name,
        "measured": 12,
        "has_baseline": True,
        "viewers": ["distill view 1111 --port 8601"],
        "improved": [],
        "worst": [sample],
    }
