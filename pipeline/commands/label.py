"""``distill label``: fill the cache."""

from typing import Annotated

import typer

from pipeline.commands.options import (
    ConfigArgument,
    JsonOption,
    SetOption,
    open_project,
    print_json,
)

RetryOption = Annotated[
    bool,
    typer.Option("--retry-quarantined", help="Also ask for samples that were set aside earlier."),
]


def label(
    config: ConfigArgument,
    overrides: SetOption = None,
    retry_quarantined: RetryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Label what is missing; what is cached is never asked again."""
    from pipeline.cluster import Cluster
    from pipeline.run import label_project

    project = open_project(config, overrides, as_json=as_json)
    with project.running(), Cluster(project.config.cluster) as cluster:
        _, plan, done = label_project(project, cluster, retry_quarantined=retry_quarantined)
    if as_json:
        found = {
            "label_set": plan.spec.key,
            "labelled": done.num_labelled,
            "quarantined": sorted(done.quarantined),
            "skipped_rows": list(plan.skipped_rows),
            "store": project.store_uri,
        }
        print_json(found)
    else:
        project.say(f"label set {plan.spec.key} in {project.store_uri}")
