"""``distill plan``: hits, misses and what they will cost."""

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    human_bytes,
    open_project,
    print_json,
)


def plan(config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Say which labels exist and what the missing ones will cost; calls no teacher."""
    from rich.table import Table

    from pipeline.run import plan_project
    from pipeline.steps.plan import forecast

    project = open_project(config, overrides, as_json=as_json)
    with project.running():
        _, planned = plan_project(project)
    found = forecast(project, planned)
    if as_json:
        print_json(found)
        return
    table = Table(title=f"label set {found['label_set']}")
    for title in ("split", "prompts", "samples", "cached", "to label"):
        table.add_column(title, justify="left" if title == "split" else "right")
    for split, counts in found["splits"].items():
        numbers = (counts[name] for name in ("prompts", "samples", "hits", "misses"))
        table.add_row(split, *(str(number) for number in numbers))
    project.console.print(table)
    project.say(
        f"to label: {found['misses']} samples, about {found['expected_prompt_tokens']} prompt and "
        f"{found['expected_response_tokens']} response tokens, "
        f"about {human_bytes(found['expected_bytes'])} on disk in {found['store']}"
    )
    if found["in_both_splits"]:
        project.say(f"note: {found['in_both_splits']} samples are in train and in held-out")
    for row in found["skipped_rows"]:
        project.say(f"skipped {row}")
