"""Identity of models and tokenizers by content, never by path, name or branch.

Hashing a large checkpoint takes minutes, so digests of files are remembered by path, size and
modification time in a small JSON file; a tampered byte changes the time and with it the digest.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from storage.errors import ConfigError
from storage.files import write_atomically
from storage.keys import TeacherFingerprint, key_of

WEIGHT_SUFFIXES = (".safetensors",)
REFUSED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
CONFIG_ORIGIN_FIELDS = ("_name_or_path", "_model_name_or_path", "transformers_version")
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_ORIGIN_FIELDS = ("base_model_name_or_path", "revision", "peft_version")


class DigestMemo:
    """Remembers file digests between processes.

    Args:
        path: JSON file of the memory; ``None`` remembers nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, list[object]] = {}
        if path is not None and path.exists():
            self._known = json.loads(path.read_text())

    def digest(self, file: Path) -> str:
        """SHA-256 of a file in hex, from memory when path, size and mtime are unchanged."""
        stat = file.stat()
        name, state = str(file.resolve()), [stat.st_size, stat.st_mtime_ns]
        remembered = self._known.get(name)
        if remembered is not None and remembered[:2] == state:
            return str(remembered[2])
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._known[name] = [*state, digest]
        if self._path is not None:
            write_atomically(self._path, json.dumps(self._known, indent=1).encode())
        return digest


def fingerprint_model(
    directory: Path,
    memo: DigestMemo,
    *,
    trust_remote_code: bool = False,
    adapter: Path | None = None,
) -> TeacherFingerprint:
    """Fingerprint a Hugging Face model directory.

    Args:
        directory: Of the model.
        memo: Remembers digests.
        trust_remote_code: Whether code shipped with the model may run.
        adapter: Directory of the LoRA adapter that the model is used with.

    Raises:
        ConfigError: if the directory does not exist, has no ``config.json`` or no safetensors, or
            the adapter is not as peft saves it.
    """
    config_file = directory / "config.json"
    if not config_file.is_file():
        raise ConfigError(
            f"{str(directory)!r} is not a Hugging Face model directory: config.json is missing; "
            "give the path of a local directory"
        )
    weights = sorted(p for p in directory.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    if not weights:
        found = sorted(p.name for p in directory.iterdir() if p.suffix in REFUSED_SUFFIXES)
        raise ConfigError(
            f"{str(directory)!r} holds no .safetensors weights (found {found or 'none at all'}); "
            "pickled weights are refused, convert them with "
            "save_pretrained(safe_serialization=True)"
        )
    config = read_json(config_file)
    for field in CONFIG_ORIGIN_FIELDS:
        config.pop(field, None)
    return TeacherFingerprint(
        weights=key_of([memo.digest(file) for file in weights]),
        config=key_of(config),
        adapters=() if adapter is None else (adapter_digest(adapter, memo),),
        trust_remote_code=trust_remote_code,
    )


def adapter_digest(directory: Path, memo: DigestMemo) -> str:
    """Digest of a LoRA adapter: the bytes of its weights, and its configuration without its origin.

    Raises:
        ConfigError: if one of the two files is missing, or the configuration is no JSON object.
    """
    weights = directory / ADAPTER_WEIGHTS
    if not weights.is_file():
        raise ConfigError(f"adapter {str(directory)!r} holds no {ADAPTER_WEIGHTS}")
    config = read_json(directory / ADAPTER_CONFIG)
    for field in ADAPTER_ORIGIN_FIELDS:
        config.pop(field, None)
    return key_of({"weights": memo.digest(weights), "config": key_of(config)})


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model directory.

    Raises:
        ConfigError: if the file is missing or is none.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{str(file)!r} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{str(file)!r} must hold a JSON object")
    return document


def tokenizer_digest(directory: Path, memo: DigestMemo) -> str:
    """Digest of the files that decide how text becomes token ids.

    Raises:
        ConfigError: if the directory holds none of them.
    """
    files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    if not files:
        raise ConfigError(
            f"{str(directory)!r} holds no tokenizer (looked for {', '.join(TOKENIZER_FILES)})"
        )
    return key_of({file.name: memo.digest(file) for file in files})


def chat_template_digest(directory: Path) -> str | None:
    """Digest of the chat template of a tokenizer directory, ``None`` when it has none."""
    template = directory / "chat_template.jinja"
    if template.is_file():
        return key_of(template.read_text())
    config = directory / "tokenizer_config.json"
    text = read_json(config).get("chat_template") if config.is_file() else None
    return None if text is None else key_of(text)
