"""Checkpoints for another number of ranks than wrote them, by DeepSpeed's universal format."""

import argparse
import contextlib
import io
import shutil
from pathlib import Path

PREFIX = ".universal-"


def make_universal(checkpoint: Path) -> Path:
    """Convert a checkpoint of ZeRO stage 1, 2 or 3; returns a folder with the same tag below.

    Sharded states are put together parameter by parameter; every number of ranks can then load
    its shares. The folder takes the space of the checkpoint once more, until it is removed.
    """
    from deepspeed.checkpoint.ds_to_universal import main

    output = checkpoint.parent / f"{PREFIX}{checkpoint.name}"
    shutil.rmtree(output, ignore_errors=True)
    arguments = argparse.Namespace(
        input_folder=str(checkpoint),
        output_folder=str(output / checkpoint.name),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        # tells about the layout of plain models what only Megatron's writes into its checkpoints
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(arguments)  # shows two progress bars
    return output


def remove_universal(directory: Path) -> None:
    """Remove all conversions below ``directory``."""
    for path in directory.glob(f"{PREFIX}*"):
        shutil.rmtree(path, ignore_errors=True)
