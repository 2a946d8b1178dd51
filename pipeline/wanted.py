"""Which steps of a run are wanted: all of them, one, or those from one on."""

from dataclasses import dataclass
from enum import StrEnum

from storage.errors import ConfigError


class Step(StrEnum):
    """The steps of a run, in order; the plan is always made, from what is remembered of it."""

    PLAN = "plan"
    LABEL = "label"
    TRAIN = "train"
    EVALUATE = "evaluate"
    REPORT = "report"


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that a run does, and those whose published results it does not keep."""

    wanted: frozenset[Step] = frozenset(Step)
    forced: frozenset[Step] = frozenset()

    @property
    def need_students(self) -> bool:
        """Whether any step behind labelling is wanted."""
        return not self.wanted <= {Step.PLAN, Step.LABEL}


def choose_steps(
    only: Step | None = None, first: Step | None = None, force: list[Step] | None = None
) -> Steps:
    """The steps that a user wants.

    Args:
        only: Nothing but this one.
        first: This one and all behind it.
        force: Steps to be done again though they are published.

    Raises:
        ConfigError: for choices that contradict each other, or labels that would be replaced.
    """
    if only is not None and first is not None:
        raise ConfigError(f"--only {only} and --from {first} contradict each other; use one")
    wanted = list(Step)
    if only is not None:
        wanted = [only]
    elif first is not None:
        wanted = wanted[wanted.index(first) :]
    forced = force or []
    if Step.LABEL in forced:
        raise ConfigError(
            "labels are never replaced: the first committed response is the sample, for every "
            "project. `distill rm KEY` removes a label set, another label.sampling.seed asks for "
            "other responses, `distill label --retry-quarantined` for what was set aside"
        )
    left_out = [step for step in forced if step not in wanted]
    if left_out:
        raise ConfigError(f"--force {left_out[0]} needs that step, which is left out of this run")
    return Steps(frozenset(wanted), frozenset(forced))
