"""``distill run``: the whole project."""

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)


def run(config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Plan, label, train, evaluate and report; whatever is published already is skipped."""
    from pipeline.run import quality_table, run_project

    project = open_project(config, overrides, as_json=as_json)
    with project.running():
        result = run_project(project)
    if as_json:
        print_json(project.read_json("report.json"))
        return
    if result.evaluations:
        project.console.print(quality_table(result.evaluations))
    places = {
        "labels": f"{project.store_uri} (label set {result.plan.spec.key})",
        "run folder": project.directory,
        **{f"student {s.name}": s.model for s in result.students},
        "report": project.directory / "report.html",
    }
    for what, where in places.items():
        project.console.print(f"{what}: {where}", soft_wrap=True, highlight=False)
