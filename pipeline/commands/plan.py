"""``distill plan``: hits, upgrades, misses and what they will cost."""

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)
from pipeline.text import human_bytes


def plan(config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Say which labels exist and what the missing ones will cost; calls no teacher."""
    from rich.table import Table

    from pipeline.run import plan_project
    from pipeline.steps.plan import STATES, forecast

    project = open_project(config, overrides, as_json=as_json)
    with project.running():
        _, planned = plan_project(project)
    found = forecast(project, planned)
    if as_json:
        print_json(found)
        return
    table = Table(title=f"label set {found['label_set']}")
    for title in ("split", "prompts", "samples", "cached", "upgradable", "to label"):
        table.add_column(title, justify="left" if title == "split" else "right")
    for split, counts in found["splits"].items():
        numbers = (counts[name] for name in ("prompts", "samples", *STATES))
        table.add_row(split, *(str(number) for number in numbers))
    totals = [found[state] for state in STATES]
    table.add_row("distinct", "", str(sum(totals)), *(str(number) for number in totals))
    project.console.print(table)
    if found["upgrades"]:
        project.say(
            f"{found['upgrades']} upgradable samples keep their responses: the teacher only scores "
            "the tokens that are stored"
        )
    project.say(
        f"to label: {found['upgrades'] + found['misses']} samples, "
        f"about {found['expected_prompt_tokens']} prompt and "
        f"{found['expected_response_tokens']} response tokens through the teacher, "
        f"about {human_bytes(found['expected_bytes'])} on disk in {found['store']}"
    )
    lengths = found["prompt_tokens"]
    project.say(
        "tokens of a prompt: "
        + ", ".join(f"{name} {length}" for name, length in lengths.items())
        + f"; the context has {planned.context}"
    )
    if found["cut_by_context"]:
        project.say(
            f"note: {found['cut_by_context']} prompts leave less room than "
            "label.sampling.max_tokens; the context may cut their responses"
        )
    if found["in_both_splits"]:
        project.say(f"note: {found['in_both_splits']} samples are in train and in held-out")
    for row in found["skipped_rows"]:
        project.say(f"skipped {row}")
