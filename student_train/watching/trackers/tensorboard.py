"""TensorBoard: event files in the output directory of a training."""

from collections.abc import Mapping

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import text

from student_train.watching.trackers.base import TrackedRun

DIRECTORY = "tensorboard"
"""Folder of the event files, in the output directory."""


class TensorBoard:
    """Writes event files; a resumed training writes a further one that takes back later steps.

    All numbers of a call are one event: an event for each would take several times as long.

    Args:
        run: The training.
    """

    def __init__(self, run: TrackedRun) -> None:
        self._writer = FileWriter(str(run.directory / DIRECTORY))
        first = run.finished_steps + 1
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=first, file_version="brain.Event:2"))
        self._writer.add_event(Event(step=first, session_log=start))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """See :class:`student_train.watching.trackers.base.Tracker`; on disk when it returns."""
        found = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_summary(Summary(value=found), step)
        # a killed process leaves what its last checkpoint contains, and more
        self._writer.flush()

    def texts(self, step: int, values: Mapping[str, str]) -> None:
        """See :class:`student_train.watching.trackers.base.Tracker`."""
        for name, value in values.items():
            self._writer.add_summary(text(name, value), step)  # type: ignore[no-untyped-call]
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
