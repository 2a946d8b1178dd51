"""The shipped demo, shrunk: the same teacher, files and commands, fewer prompts and tokens."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest

REPOSITORY = Path(__file__).parent.parent.parent
TRAIN_PROMPTS, HELDOUT_PROMPTS = 20, 4


@dataclass(frozen=True, slots=True)
class Demo:
    """A private copy of the demo in a directory of its own."""

    directory: Path

    @property
    def arguments(self) -> list[str]:
        settings = {
            "store": self.directory / "labels",
            "runs": self.directory / "runs",
            "data.train": f"[{{path: {self.directory}/train.jsonl}}]",
            "data.heldout": f"[{{path: {self.directory}/heldout.jsonl}}]",
            "label.sampling.max_tokens": 8,
            "label.commit_samples": 4,
            "teacher.backend.max_num_seqs": 4,
            "train.model.keep_layers": "[0, 29]",
            "train.batch": "{tokens: 512, micro_tokens: 512}",
            "students.hard": "null",
            "students.soft": "null",
            "evaluate": "{generations: 1, max_new_tokens: 4}",
        }
        return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]

    def command(self, name: str, *more: str) -> list[str]:
        config = REPOSITORY / "examples" / "demo" / "run.yaml"
        return [sys.executable, "-m", "pipeline", name, str(config), *self.arguments, *more]

    def run(self, name: str, *more: str) -> str:
        done = subprocess.run(
            self.command(name, *more),
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**os.environ, "COLUMNS": "200"},
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def start(self, name: str, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self.command(name, *more),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=REPOSITORY,
            start_new_session=True,
        )

    @property
    def run_folder(self) -> Path:
        return self.directory / "runs" / "demo"

    def events(self) -> list[dict[str, object]]:
        lines = (self.run_folder / "events.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def committed_files(self) -> dict[str, bytes]:
        """Every file that a commit record names, and the records themselves."""
        files = {}
        for record in sorted((self.directory / "labels").rglob("commits/*.json")):
            files[str(record)] = record.read_bytes()
            for shard in json.loads(record.read_bytes())["shards"]:
                for table in ("labels", "samples"):
                    path = record.parent.parent / "shards" / f"{shard['name']}.{table}.arrow"
                    files[str(path)] = path.read_bytes()
        return files

    def stored_keys(self) -> Counter[str]:
        """How often each sample key stands in the committed files, read without our reader."""
        found: Counter[str] = Counter()
        for name, data in self.committed_files().items():
            if name.endswith(".samples.arrow"):
                table = pa.ipc.open_file(data).read_all()
                found.update(table.column("sample_key").to_pylist())
        return found


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory = tmp_path_factory.mktemp("demo")
    for name, count in (("train", TRAIN_PROMPTS), ("heldout", HELDOUT_PROMPTS)):
        lines = (REPOSITORY / f"examples/demo/data/{name}.jsonl").read_text().splitlines(True)
        (directory / f"{name}.jsonl").write_text("".join(lines[:count]))
    return Demo(directory)
