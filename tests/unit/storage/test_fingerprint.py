"""Models and tokenizers are identified by content."""

import json
import os
from pathlib import Path

import pytest

from storage.errors import ConfigError
from storage.fingerprint import (
    DigestMemo,
    chat_template_digest,
    fingerprint_model,
    tokenizer_digest,
)

NOTHING = DigestMemo(None)


def make_model(directory: Path, *, weights: bytes = b"weights", **config: object) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"vocab_size": 100, **config}))
    (directory / "model-00001-of-00002.safetensors").write_bytes(weights)
    (directory / "model-00002-of-00002.safetensors").write_bytes(b"more")
    return directory


def test_copies_under_other_names_are_one_teacher(tmp_path: Path) -> None:
    one = make_model(tmp_path / "one", _name_or_path="org/model", transformers_version="5.0")
    other = make_model(tmp_path / "other", _name_or_path="/data/model", transformers_version="5.1")
    assert fingerprint_model(one, NOTHING) == fingerprint_model(other, NOTHING)


def test_one_byte_of_one_weight_file_is_another_teacher(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = fingerprint_model(model, NOTHING)
    (model / "model-00001-of-00002.safetensors").write_bytes(b"weighty")
    after = fingerprint_model(model, NOTHING)
    assert after.weights != before.weights
    assert after.config == before.config


def test_another_config_is_another_teacher(tmp_path: Path) -> None:
    one = fingerprint_model(make_model(tmp_path / "one", rope_theta=1e4), NOTHING)
    other = fingerprint_model(make_model(tmp_path / "other", rope_theta=1e6), NOTHING)
    assert one.config != other.config
    assert one.weights == other.weights


def test_remote_code_is_another_teacher(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    trusting = fingerprint_model(model, NOTHING, trust_remote_code=True)
    assert trusting != fingerprint_model(model, NOTHING)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json is missing; give the path"):
        fingerprint_model(tmp_path, NOTHING)


def test_pickled_weights_are_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"found \['pytorch_model\.bin'\].*save_pretrained"):
        fingerprint_model(tmp_path, NOTHING)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="found none at all"):
        fingerprint_model(tmp_path, NOTHING)


def test_a_remembered_digest_saves_reading_the_file_again(tmp_path: Path) -> None:
    """Content replaced behind the memory's back (same size and time) shows that it was used."""
    file, memo = tmp_path / "weights", tmp_path / "memo.json"
    file.write_bytes(b"aaaa")
    digest = DigestMemo(memo).digest(file)
    time_ns = file.stat().st_mtime_ns
    file.write_bytes(b"bbbb")
    os.utime(file, ns=(time_ns, time_ns))
    assert DigestMemo(memo).digest(file) == digest
    assert DigestMemo(None).digest(file) != digest


@pytest.mark.parametrize(("content", "later_ns"), [(b"bbbb", 1), (b"aaaab", 0)])
def test_a_changed_time_or_size_is_read_again(
    tmp_path: Path, content: bytes, later_ns: int
) -> None:
    file, memo = tmp_path / "weights", tmp_path / "memo.json"
    file.write_bytes(b"aaaa")
    digest = DigestMemo(memo).digest(file)
    time_ns = file.stat().st_mtime_ns + later_ns
    file.write_bytes(content)
    os.utime(file, ns=(time_ns, time_ns))
    assert DigestMemo(memo).digest(file) != digest


def test_a_tokenizer_is_its_files_and_nothing_else(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text("{}")
    (tmp_path / "other" / "README.md").write_text("text")
    one, other = (tokenizer_digest(tmp_path / name, NOTHING) for name in ("one", "other"))
    assert one == other
    (tmp_path / "other" / "merges.txt").write_text("a b")
    assert tokenizer_digest(tmp_path / "other", NOTHING) != one


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no tokenizer \(looked for tokenizer\.json"):
        tokenizer_digest(tmp_path, NOTHING)


def test_a_chat_template_is_found_in_both_places(tmp_path: Path) -> None:
    assert chat_template_digest(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    from_config = chat_template_digest(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert chat_template_digest(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert from_config is not None
    assert chat_template_digest(tmp_path) == from_config
