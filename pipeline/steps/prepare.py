"""Models as local Hugging Face directories: found, downloaded, converted or pruned, once."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipeline.project import Project
from storage.errors import ConfigError
from storage.fingerprint import (
    chat_template_digest,
    fingerprint_model,
    read_json,
    tokenizer_digest,
)
from storage.keys import TeacherFingerprint, key_of
from storage.tokenizer import effective_vocab_size
from student_train.config import PrunedModelConfig
from teacher_server.config import GgufModelConfig

DOWNLOADED_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model directory and who it is."""

    directory: str
    fingerprint: TeacherFingerprint

    @property
    def key(self) -> str:
        """Digest of the fingerprint."""
        return key_of(self.fingerprint)


@dataclass(frozen=True, slots=True)
class PreparedTeacher:
    """The teacher and what labels and prompts depend on."""

    model: PreparedModel
    """Its fingerprint covers the adapter."""
    adapter: str | None
    """Directory of the LoRA adapter that it is used with."""
    vocab_size: int
    """Effective vocabulary."""
    context: int
    """Tokens it can attend to."""
    tokenizer: str
    """Tokenizer digest."""
    chat_template: str | None
    """Digest of the chat template."""


def prepare_teacher(project: Project) -> PreparedTeacher:
    """Find or make the teacher's directory and identify it.

    Raises:
        ConfigError: if the model is missing, pickled, or has no usable tokenizer.
        TeacherError: if its adapter is no LoRA adapter of this model.
    """
    wanted = project.config.teacher.model
    directory = (
        _converted(project, wanted)
        if isinstance(wanted, GgufModelConfig)
        else local_directory(wanted)
    )
    path = Path(directory)
    config = read_json(path / "config.json")
    if "auto_map" in config and not project.config.teacher.trust_remote_code:
        raise ConfigError(
            f"{directory!r} brings its own code; read it, then set teacher.trust_remote_code: true"
        )
    adapter = project.config.teacher.adapter
    if adapter is not None:
        from teacher_server.adapters import read_adapter

        adapter = local_directory(adapter)
        read_adapter(adapter, directory)
    return PreparedTeacher(
        model=_identified(project, directory, adapter=adapter),
        adapter=adapter,
        vocab_size=min(effective_vocab_size(path), config.get("vocab_size", 2**31)),
        context=int(config.get("max_position_embeddings", 2**31 - 1)),
        tokenizer=tokenizer_digest(path, project.memo),
        chat_template=chat_template_digest(path),
    )


def prepare_student(
    project: Project, model: str | PrunedModelConfig, teacher: PreparedTeacher
) -> PreparedModel:
    """Find or make the directory of an untrained student and identify it.

    Raises:
        ConfigError: as :func:`prepare_teacher`.
    """
    if isinstance(model, str):
        return _identified(project, local_directory(model))
    source = teacher.model.directory if model.of == "teacher" else local_directory(model.of)
    parent = _identified(project, source)
    key = key_of({"of": parent.key, "keep_layers": model.keep_layers})
    output = project.directory / "models" / f"pruned-{key[:12]}"
    if not output.is_dir():
        from student_train.models.student import prune_layers

        with _making(project, output, f"pruning the student to {len(model.keep_layers)} layers"):
            prune_layers(Path(source), model.keep_layers, output)
    return _identified(project, str(output))


def local_directory(model: str) -> str:
    """The local directory of a model; the name of a model on a hub is downloaded.

    Raises:
        ConfigError: if it is neither a directory nor a downloadable name.
    """
    if Path(model).is_dir():
        return str(Path(model).absolute())
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ConfigError(f"model directory {model!r} does not exist (looked from {Path.cwd()})")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(model, allow_patterns=list(DOWNLOADED_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"model {model!r} is neither a local directory nor can it be downloaded: {error}"
        ) from error


def _converted(project: Project, config: GgufModelConfig) -> str:
    from teacher_server.convert import convert_gguf, gguf_file

    key = key_of({"gguf": project.memo.digest(gguf_file(config)), "dtype": config.dtype})
    output = project.directory / "models" / f"gguf-{key[:12]}"
    if not output.is_dir():
        with _making(project, output, f"converting {gguf_file(config).name} (once)"):
            convert_gguf(config, output)
    return str(output)


@contextmanager
def _making(project: Project, output: Path, what: str) -> Iterator[None]:
    """Note and show the making of a model directory."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with project.timed("prepare", model=output.name), project.console.status(what):
        yield


def _identified(project: Project, directory: str, *, adapter: str | None = None) -> PreparedModel:
    return PreparedModel(
        directory,
        fingerprint_model(
            Path(directory),
            project.memo,
            trust_remote_code=project.config.teacher.trust_remote_code,
            adapter=None if adapter is None else Path(adapter),
        ),
    )
