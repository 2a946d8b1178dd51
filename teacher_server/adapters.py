"""LoRA adapters of a teacher: what is taken, and what is refused before an engine is started.

Taken is what every backend computes alike: pairs of matrices A [r, in] and B [out, r] that add a
multiple of B A to linear layers inside of the model. Other things that peft can do to a model
belong into its weights: merge them, and name the merged model as the teacher.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.fingerprint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from teacher_server.errors import TeacherError

Shapes = dict[str, tuple[int, ...]]

_TENSOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")

HARMLESS_STARTS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
"""Values of ``init_lora_weights`` that leave the weights of the model as they are."""

NOT_TAKEN = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "modules_to_save": "whole modules of its own (modules_to_save)",
    "trainable_token_indices": "token embeddings of its own",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "activation by tokens (aLoRA)",
    "target_parameters": "parameters that are not those of linear layers",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal matrices",
    "arrow_config": "a router over several adapters",
}
"""Entries of an adapter's configuration that make it more than a product of two matrices."""

WAY_OUT = "merge it into the model (peft: merge_and_unload, save_pretrained) and label with that"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that fits its model."""

    directory: str
    rank: int
    """The largest of all its modules."""
    modules: frozenset[str]
    """Modules that it changes, by their path in the model of transformers."""

    @property
    def module_names(self) -> list[str]:
        """Last parts of the paths, each once: ``q_proj`` and so on."""
        return sorted({module.rpartition(".")[2] for module in self.modules})


def read_adapter(directory: str, model: str) -> Adapter:
    """Read what an adapter changes, and check that it fits a model; loads no weights.

    Args:
        directory: Of the adapter, as peft saves it.
        model: Directory of the model.

    Raises:
        TeacherError: if it is no LoRA adapter, does more than LoRA, changes the vocabulary or the
            output layer, or was made for a model of other shapes.
        ConfigError: if its configuration is no JSON.
    """
    _require_lora(Path(directory))
    pairs = _pairs(directory)
    _require_fit(directory, pairs, Path(model))
    return Adapter(directory, max(a[0] for a, _ in pairs.values()), frozenset(pairs))


def _require_lora(directory: Path) -> None:
    missing = [n for n in (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if not (directory / n).is_file()]
    if missing:
        raise TeacherError(
            f"teacher.adapter {str(directory)!r} is not a LoRA adapter as peft saves it: "
            f"{' and '.join(missing)} missing; pickled weights (adapter_model.bin) are refused"
        )
    config = read_json(directory / ADAPTER_CONFIG)
    found = [name for entry, name in NOT_TAKEN.items() if config.get(entry)]
    if config.get("peft_type") != "LORA":
        found.append(f"peft_type {config.get('peft_type')!r}, not 'LORA'")
    if config.get("bias", "none") != "none":
        found.append("biases")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in HARMLESS_STARTS:
        found.append(f"a start that changes the model's own weights ({start})")
    if found:
        raise TeacherError(
            f"teacher.adapter {str(directory)!r} is more than LoRA: it has "
            f"{', '.join(dict.fromkeys(found))}; {WAY_OUT}"
        )


def _pairs(directory: str) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of A and B by module.

    Raises:
        TeacherError: naming the tensor that belongs to no pair.
    """
    sides: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in _shapes(Path(directory) / ADAPTER_WEIGHTS).items():
        found = _TENSOR.fullmatch(name)
        if found is None or len(shape) != 2:
            what = "changes the vocabulary" if "embed" in name else "is more than LoRA"
            raise TeacherError(
                f"teacher.adapter {directory!r} {what}: it holds {name} {list(shape)}, which is no "
                f"matrix of a linear layer; {WAY_OUT}"
            )
        sides.setdefault(found["module"], {})[found["side"]] = shape
    for module, shapes in sides.items():
        if len(shapes) < 2 or shapes["A"][0] != shapes["B"][1]:
            raise TeacherError(
                f"teacher.adapter {directory!r} is damaged: {module} has {shapes}, wanted are A "
                "[r, in] and B [out, r]"
            )
    if not sides:
        raise TeacherError(f"teacher.adapter {directory!r} holds no matrices at all")
    return {module: (shapes["A"], shapes["B"]) for module, shapes in sides.items()}


def _require_fit(directory: str, pairs: dict[str, Any], model: Path) -> None:
    """Compare the pairs with the weights of the model that they are added to."""
    config = read_json(model / "config.json")
    weights: Shapes = {}
    for file in sorted(model.glob("*.safetensors")):
        weights |= _shapes(file)
    for module, (a_shape, b_shape) in pairs.items():
        added = (b_shape[0], a_shape[1])
        if config.get("vocab_size") in added:
            raise TeacherError(
                f"teacher.adapter {directory!r} changes {module}, whose {config['vocab_size']} "
                f"rows are the vocabulary; {WAY_OUT}"
            )
        found = _weight_of(module, weights)
        if found is None and "quantization_config" not in config:
            raise TeacherError(
                f"teacher.adapter {directory!r} was made for another model: it changes {module}, "
                f"which {str(model)!r} does not have"
            )
        # a convolution of width one, as in GPT-2, stores its matrix the other way round
        if found is not None and len(found) == 2 and added not in (found, found[::-1]):
            raise TeacherError(
                f"teacher.adapter {directory!r} was made for another model: it adds {list(added)} "
                f"to {module}, which is {list(found)} in {str(model)!r}"
            )


def _weight_of(module: str, weights: Shapes) -> tuple[int, ...] | None:
    """Shape of a module's weight; a checkpoint may leave out the first parts of its path."""
    parts = module.split(".")
    names = (".".join([*parts[start:], "weight"]) for start in range(len(parts)))
    return next((weights[name] for name in names if name in weights), None)


def _shapes(file: Path) -> Shapes:
    """Shapes of all tensors of a safetensors file; reads its header only."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            return {n: tuple(tensors.get_slice(n).get_shape()) for n in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise TeacherError(f"{str(file)!r} cannot be read as safetensors: {error}") from error
