"""Options of the divergences: names, defaults, and what is refused when they are read."""

import subprocess
import sys
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from storage.columns import POWERS, SCALARS
from student_train.losses import DIVERGENCES
from student_train.losses.config import (
    TAIL_SAMPLES,
    LinearTemperature,
    SoftConfig,
    required_columns,
    soft_config,
)
from student_train.losses.soft_term import make_divergence


class Section(BaseModel):
    soft: SoftConfig


def test_a_section_without_a_type_is_forward_kl() -> None:
    assert soft_config({"tail": "zero"}) == soft_config({"type": "forward_kl", "tail": "zero"})


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_name_is_short_for_its_defaults(name: str) -> None:
    short = Section.model_validate({"soft": name})
    assert short == Section.model_validate({"soft": {"type": name}})
    assert Section.model_validate_json(short.model_dump_json()) == short


PUBLISHED: list[tuple[str, dict[str, Any]]] = [
    ("forward_kl", {}),
    ("jsd", {"beta": 0.5, "log_floor": -30.0}),
    ("skew_forward_kl", {"skew": 0.1}),
    ("skew_reverse_kl", {"skew": 0.1}),
    ("tvd", {}),
    (
        "adaptive_kl",
        {"head_mass": 0.5, "head": "reach", "through_weights": False, "log_floor": -30.0},
    ),
    ("entropy_adaptive_kl", {"sharpness": 0.5, "through_weights": True, "log_floor": -30.0}),
    ("alpha_beta", {"alpha": 0.2, "beta": 0.7, "log_floor": -30.0}),
    ("taid", {"value": "cross_entropy", "log_floor": -30.0}),
]


@pytest.mark.parametrize(("name", "options"), PUBLISHED)
def test_the_defaults_are_the_published_ones(name: str, options: dict[str, Any]) -> None:
    config = soft_config(name)
    assert config.options() == options
    assert (config.tail, config.temperature, config.temperature_squared) == ("bucket", 1.0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("kullback", "forward_kl"),
        ({"type": "jsd", "beta": -0.1}, "greater than or equal to 0"),
        ({"type": "jsd", "beta": 1.1}, "less than or equal to 1"),
        ({"type": "jsd", "skew": 0.1}, "Extra inputs"),
        ({"type": "skew_reverse_kl", "skew": 0.0}, "greater than 0"),
        ({"type": "reverse_kl", "log_floor": 0.0}, "less than 0"),
        ({"type": "reverse_kl", "tail": "sampled"}, "unbiased for forward_kl only"),
        ({"type": "forward_kl", "tail": "sampled", "temperature": 2.0}, "temperature 1 only"),
        ({"type": "forward_kl", "temperature": 0.0}, "greater than 0"),
        (
            {"type": "forward_kl", "temperature": 0.7},
            r"1/T = 1\.42857, which no .* use one from 1 to 4, or one of 0\.25, 0\.5, 1\.33333",
        ),
        ({"type": "tvd", "temperature": 0.2}, r"1/T = 5, which no label column holds"),
        ({"type": "jsd", "temperature": {"start": 1.0, "end": 0.5}}, "between 1 and 4"),
        ({"type": "forward_kl", "temperature": 5.0}, r"power sum at 1/T = 0\.2"),
        ({"type": "forward_kl", "temperature": {"start": 1.0, "end": 5.0}}, "between 1 and 4"),
    ],
)
def test_what_cannot_be_computed_is_refused_when_it_is_read(options: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        soft_config(options)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, set()),
        ({"tail": "zero", "temperature": 2.0}, set()),
        ({"tail": "renorm", "temperature": 0.5}, set()),
        ({"tail": "sampled"}, {TAIL_SAMPLES}),
        ({"temperature": 2.0}, {"power_sums"}),
        ({"temperature": 4 / 3}, {"power_sums"}),
        ({"temperature": 4.0}, {"power_sums"}),
        ({"temperature": 3.0}, {"power_sums"}),
        # between 3/4 and 1 the slope at 1, minus the entropy, is needed too
        ({"temperature": 1.1}, {"power_sums", "entropy"}),
        ({"temperature": 10.0}, {"power_sum_10"}),
        ({"temperature": 0.5}, {"power_sum_200"}),
        ({"temperature": 0.25}, {"power_sum_400"}),
        ({"temperature": {"start": 4.0, "end": 1.0}}, {"power_sums", "entropy"}),
    ],
)
def test_the_columns_that_a_divergence_needs(options: dict[str, Any], columns: set[str]) -> None:
    assert required_columns(soft_config({"type": "forward_kl", **options})) == columns


def test_a_further_stored_power_allows_its_temperature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POWERS, "300", 3.0)  # type: ignore[misc]
    monkeypatch.setitem(SCALARS, "power_sum_300", ("log_power_sum_300",))
    config = soft_config({"type": "forward_kl", "temperature": 1 / 3})
    assert required_columns(config) == {"power_sum_300"}


def test_a_moving_temperature_is_linear_in_the_progress() -> None:
    moving = LinearTemperature(start=4.0, end=1.0)
    assert [moving.at(x) for x in (0.0, 0.5, 1.0)] == [4.0, 2.5, 1.0]
    config = soft_config({"type": "forward_kl", "temperature": moving, "temperature_squared": True})
    term = make_divergence(config, schedule={"progress": 0.5})
    assert (term.temperature, term.scale) == (2.5, 6.25)


def test_what_moves_has_to_be_told() -> None:
    with pytest.raises(ValueError, match=r"taid needs 't' .* holds \['progress'\]"):
        make_divergence(soft_config("taid"), schedule={"progress": 0.1})
    moving = soft_config({"type": "tvd", "temperature": {"start": 1.0, "end": 2.0}})
    with pytest.raises(ValueError, match="tvd needs 'progress'"):
        make_divergence(moving)


def test_options_are_read_without_torch() -> None:
    code = (
        "import sys; from student_train.losses.config import soft_config; "
        "soft_config({'type': 'taid', 'temperature': 2.0}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
