"""``distill evaluate``: held-out quality of published students."""

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)


def evaluate(
    config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False
) -> None:
    """Measure all students on the held-out labels; trains those that are missing."""
    from pipeline.cluster import Cluster
    from pipeline.run import labelled_plan, quality_table, train_project
    from pipeline.steps.evaluate import evaluate_students
    from storage.errors import ConfigError

    project = open_project(config, overrides, as_json=as_json)
    with project.running(), Cluster(project.config.cluster) as cluster:
        teacher, plan = labelled_plan(project)
        students = train_project(project, teacher, plan, cluster)
        evaluations = evaluate_students(project, students, plan, cluster)
    if not evaluations:
        raise ConfigError("data.heldout is empty: there is nothing to evaluate on")
    if as_json:
        print_json([{"name": e.name, **e.result} for e in evaluations])
    else:
        project.console.print(quality_table(evaluations))
