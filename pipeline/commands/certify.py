"""``distill certify``: score a sample of stored labels again."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.commands.options import (
    JsonOption,
    SetOption,
    StoreOption,
    console,
    open_project,
    open_store,
    print_json,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from storage.certificate import Certificate
    from storage.label_set import LabelSet
    from storage.qa import QaConfig

CONFIG_SUFFIXES = (".yaml", ".yml")


def certify(
    target: Annotated[
        str,
        typer.Argument(metavar="CONFIG|KEY", help="YAML file of a project, or key of a label set."),
    ],
    overrides: SetOption = None,
    store: StoreOption = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With a key: directory of the teacher, if it is elsewhere now."
        ),
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --teacher: directory of its LoRA adapter."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Score so many samples again.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Certify again what has a certificate already.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a sample of stored labels again and certify them; exit code 2 if they are unfit."""
    from storage.certificate import UnfitLabelsError

    if Path(target).suffix in CONFIG_SUFFIXES:
        certificates = _of_project(Path(target), overrides, samples, force, as_json=as_json)
    else:
        certificates = [_of_set(target, store, (teacher, adapter), samples, force, as_json=as_json)]
    if as_json:
        print_json([certificate.model_dump(mode="json") for certificate in certificates])
    else:
        for certificate in certificates:
            print_certificate(certificate, console(as_json=False))
    unfit = [found.label_set for found in certificates if found.verdict == "unfit"]
    if unfit:
        raise UnfitLabelsError(
            f"the labels of {', '.join(unfit)} are unfit: "
            + "; ".join(reason for found in certificates for reason in found.reasons)
        )


def _of_project(
    config: Path, overrides: list[str] | None, samples: int | None, force: bool, *, as_json: bool
) -> list["Certificate"]:
    """Certificates of the label sets of a project."""
    from pipeline.cluster import Cluster
    from pipeline.run import plan_project
    from pipeline.steps.certify import certify_labels

    project = open_project(config, overrides, as_json=as_json)
    with project.running(), Cluster(project.config.cluster) as cluster:
        prepared, plan = plan_project(project)
        settings = _settings(project.config.label.qa, samples)
        return certify_labels(project, plan, prepared, cluster, settings, force=force)


def _of_set(
    key: str,
    store: str | None,
    given: tuple[Path | None, Path | None],
    samples: int | None,
    force: bool,
    *,
    as_json: bool,
) -> "Certificate":
    """The certificate of one label set."""
    import os

    from pipeline.steps.certify import valid_certificate
    from storage.qa import QaConfig

    out = console(as_json=as_json)
    label_set = open_store(store).open(key)
    settings = _settings(QaConfig(), samples)
    found = None if force else valid_certificate(label_set, settings)
    if found is not None:
        return found
    directory, adapter = _teacher_directories(label_set, *given)
    from teacher_server.certify import certify as certify_set

    with out.status("certifying labels"):
        return certify_set(
            label_set,
            str(directory),
            settings,
            adapter=None if adapter is None else str(adapter),
            threads=len(os.sched_getaffinity(0)),
        )


def _settings(settings: "QaConfig", samples: int | None) -> "QaConfig":
    return settings if samples is None else settings.model_copy(update={"samples": samples})


def _teacher_directories(
    label_set: "LabelSet", given: Path | None, given_adapter: Path | None
) -> tuple[Path, Path | None]:
    """Where teacher and adapter of a label set are: as given, or as its provenance says.

    Raises:
        ConfigError: if there is no model.
        TeacherError: if it is another model.
    """
    from storage.errors import ConfigError
    from storage.fingerprint import DigestMemo, fingerprint_model
    from teacher_server.certify import require_teacher

    facts = label_set.document.provenance
    directory = given or Path(facts.get("teacher", ""))
    adapter = given_adapter
    if adapter is None and "adapter" in facts:
        adapter = Path(facts["adapter"])
    if given is None and not (directory / "config.json").is_file():
        raise ConfigError(
            f"the teacher of label set {label_set.key} is not at {str(directory)!r} any more; give "
            "its directory with --teacher"
        )
    fingerprint = fingerprint_model(directory, DigestMemo(None), adapter=adapter)
    require_teacher(label_set.spec, fingerprint, directory=str(directory))
    return directory, adapter


# -- for people -----------------------------------------------------------------------------------
def print_certificate(
    certificate: "Certificate", out: "Console", *, is_current: bool = True
) -> None:
    """Verdict, reasons and figures."""
    age = "" if is_current else f"; samples were added since commit {certificate.commit}"
    out.print(
        f"certificate {certificate.number} of label set {certificate.label_set}: "
        f"{certificate.verdict} ({certificate.created_at}{age})",
        highlight=False,
        soft_wrap=True,
    )
    for reason in certificate.reasons:
        out.print(f"  unfit: {reason}", highlight=False, soft_wrap=True, markup=False)
    if certificate.agreement is not None:
        out.print(_differences(certificate))
    for line in _lines(certificate):
        out.print(f"  {line}", highlight=False, soft_wrap=True)


def _differences(certificate: "Certificate") -> "Table":
    from rich.table import Table

    agreement = certificate.agreement
    assert agreement is not None
    table = Table(
        title=f"{len(agreement.sample_keys)} samples, {agreement.num_rows} rows scored again with "
        f"{certificate.provenance.get('backend', 'another engine')}"
    )
    table.add_column("difference", no_wrap=True)
    for title in ("typical", "noise", "limit", "largest", "limit"):
        table.add_column(title, justify="right")
    for name, found in agreement.differences.items():
        values: tuple[Any, ...] = (
            found.typical,
            found.typical_noise,
            found.typical_limit,
            found.max,
            found.max_limit,
        )
        table.add_row(name, *("" if value is None else f"{value:.1e}" for value in values))
    return table


def _lines(certificate: "Certificate") -> list[str]:
    """Everything that is not in the table."""
    lines = []
    agreement, drawing, coverage = (
        certificate.agreement,
        certificate.drawing,
        certificate.coverage,
    )
    if agreement is not None:
        lines.append(
            f"worst sample: KL {agreement.worst_sample_kl:.1e} nats, limit "
            f"{agreement.worst_sample_limit:.1e} ({agreement.worst_sample}); sharpness "
            f"{agreement.sharpness.value:.4f}; likeliest token equal in "
            f"{agreement.argmax_agreement:.2%} of rows, stored ids in {agreement.head_overlap:.2%}"
        )
    if drawing is not None:
        tested = {
            "given": "responses were given, nothing was drawn",
            "greedy": f"greedy: {drawing.impossible_rows} tokens are not the likeliest",
        }.get(drawing.method)
        if tested is None:
            p_value = "too few rows" if drawing.p_value is None else f"p = {drawing.p_value:.2g}"
            tested = f"chi-square over {drawing.tested_rows} rows: {p_value}"
        lines.append(f"sampled tokens: {tested} ({drawing.num_samples} samples read)")
    if coverage is not None:
        kept, tail = (
            ", ".join(f"{name} {value:.3g}" for name, value in values.items())
            for values in (coverage.kept_mass, coverage.tail_mass)
        )
        ends = ", ".join(f"{share:.0%} {end}" for end, share in coverage.finish_reasons.items())
        lines.append(f"stored mass: {kept}; tail mass: {tail}")
        lines.append(f"{coverage.mean_kept_ids:.3g} ids per row; responses: {ends}")
    return lines
