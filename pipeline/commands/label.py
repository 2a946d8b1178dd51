"""``distill label``: fill the cache."""

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)


def label(config: ConfigArgument, overrides: SetOption = None, as_json: JsonOption = False) -> None:
    """Label what is missing; what is cached is never asked again."""
    from pipeline.cluster import Cluster
    from pipeline.run import label_project

    project = open_project(config, overrides, as_json=as_json)
    with project.running(), Cluster(project.config.cluster) as cluster:
        _, plan, labelled = label_project(project, cluster)
    if as_json:
        found = {
            "label_set": plan.spec.key,
            "labelled": labelled,
            "skipped_rows": list(plan.skipped_rows),
            "store": project.store_uri,
        }
        print_json(found)
    else:
        project.say(f"label set {plan.spec.key} in {project.store_uri}")
