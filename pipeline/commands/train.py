"""``distill train``: students from cached labels."""

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)


def train(config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Train every student that is not published; never calls the teacher."""
    from pipeline.cluster import Cluster
    from pipeline.run import labelled_plan, train_project

    project = open_project(config, overrides, as_json=as_json)
    with project.running(), Cluster(project.config.cluster) as cluster:
        teacher, plan = labelled_plan(project)
        students = train_project(project, teacher, plan, cluster)
    if as_json:
        print_json([{**s.result, "model": s.model} for s in students])
    else:
        for student in students:
            project.say(f"student {student.name}: {student.model}")
