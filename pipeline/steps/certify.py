"""Certify what was labelled: a sample of every label set is scored again, in a Ray task."""

from pipeline.cluster import Cluster, unwrapped
from pipeline.project import Project
from pipeline.steps.plan import Plan
from pipeline.steps.prepare import PreparedTeacher
from storage.certificate import Certificate, is_current, newest_certificate
from storage.errors import FormatError, ShardCorruptError
from storage.label_set import LabelSet
from storage.qa import QaConfig
from storage.store import LabelStore
from teacher_server.config import FakeBackendConfig
from teacher_server.errors import TeacherError


class CertifyWorker:
    """Certifies label sets in a process of its own (a Ray actor)."""

    def certify(
        self,
        store_uri: str,
        key: str,
        model: str,
        adapter: str | None,
        settings: QaConfig,
        threads: int,
    ) -> Certificate:
        """Certify one label set; see :func:`teacher_server.certify.certify`."""
        from teacher_server.certify import certify

        label_set = LabelStore(store_uri).open(key)
        return certify(label_set, model, settings, adapter=adapter, threads=threads)


def certify_labels(
    project: Project,
    plan: Plan,
    teacher: PreparedTeacher,
    cluster: Cluster,
    settings: QaConfig,
    *,
    force: bool = False,
) -> list[Certificate]:
    """Certificates of all label sets that serve samples of a plan, made where there is none yet.

    A certificate is made again once samples were added, or where other settings are wanted. A
    teacher that transformers cannot run is no reason to stop: its labels stay without one.

    Args:
        project: The project.
        plan: Whose samples.
        teacher: Who labelled them.
        cluster: Where to score them again.
        settings: What is looked at, and what is refused.
        force: Make every certificate again.
    """
    if isinstance(project.config.teacher.backend, FakeBackendConfig):
        return []
    certificates: list[Certificate] = []
    sample_keys = [request.key for request in plan.requests()]
    for label_set in project.store.view(plan.spec).serving(sample_keys):
        certificate = None if force else valid_certificate(label_set, settings)
        if certificate is None:
            try:
                certificate = _certify(project, label_set, teacher, cluster, settings)
            except TeacherError as error:
                project.note("not certified", label_set=label_set.key, error=str(error))
                project.say(f"labels: not certified, the teacher cannot be run again: {error}")
                continue
        certificates.append(certificate)
        project.say(f"labels: {in_words(certificate)}")
    return certificates


def valid_certificate(label_set: LabelSet, settings: QaConfig) -> Certificate | None:
    """The newest certificate, if it was made with these settings and no sample was added since."""
    try:
        found = newest_certificate(label_set)
    except (FormatError, ShardCorruptError):  # a damaged one is as good as none
        return None
    if found is None or not is_current(label_set, found):
        return None
    same = found.settings.model_copy(update={"enabled": settings.enabled}) == settings
    return found if same else None


def in_words(certificate: Certificate) -> str:
    """A certificate in one line, or in several if the labels are unfit."""
    said = f"certificate {certificate.number} of {certificate.label_set[:12]}: "
    agreement = certificate.agreement
    if certificate.verdict == "unfit" or agreement is None:
        return said + "unfit\n  " + "\n  ".join(certificate.reasons)
    return (
        f"{said}fit ({len(agreement.sample_keys)} samples scored again, mean KL "
        f"{agreement.differences['kl'].mean:.1e} nats)"
    )


def _certify(
    project: Project,
    label_set: LabelSet,
    teacher: PreparedTeacher,
    cluster: Cluster,
    settings: QaConfig,
) -> Certificate:
    """Score again in a process of its own, which gives its memory back.

    Raises:
        TeacherError: if transformers cannot run this teacher.
    """
    ray = cluster.ray
    options = cluster.options(
        threads=cluster.cpus, gpus=1 if project.config.cluster.teacher_gpus else 0
    )
    with project.timed("certify", label_set=label_set.key) as cost:
        worker = ray.remote(CertifyWorker).options(**options).remote()
        call = worker.certify.remote(
            project.store_uri,
            label_set.key,
            teacher.model.directory,
            teacher.adapter,
            settings,
            cluster.cpus,
        )
        with project.console.status("certifying labels"):
            try:
                certificate: Certificate = ray.get(call)
            except ray.exceptions.RayTaskError as error:
                raise unwrapped(error) from None
            finally:
                ray.kill(worker)
        cost["verdict"] = certificate.verdict
    return certificate
