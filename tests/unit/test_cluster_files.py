"""The files that start clusters have the fields of their formats and fit images, lock and code."""

import re
import shlex
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.config import RunConfig
from pipeline.submit import STOP_GRACE_S

DOCKER = Path(__file__).resolve().parents[2] / "docker"
LOCKED_RAY = re.search(r"^ray==(.+)$", (DOCKER.parent / "constraints.txt").read_text(), re.M)


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# -- compose --------------------------------------------------------------------------------------
class Build(Strict):
    context: str
    dockerfile: str
    args: dict[str, str]


class HealthCheck(Strict):
    test: list[str]
    interval: str
    timeout: str
    retries: int


class Condition(Strict):
    condition: Literal["service_healthy", "service_started"]


class Service(Strict):
    image: str
    restart: Literal["no", "always", "unless-stopped", "on-failure"]
    shm_size: str
    environment: dict[str, str]
    volumes: list[str]
    networks: list[str]
    stop_grace_period: str
    entrypoint: list[str]
    command: list[str]
    build: Build | None = None
    ports: list[str] = []
    healthcheck: HealthCheck | None = None
    depends_on: dict[str, Condition] = {}


class Compose(Strict):
    name: str
    services: dict[str, Service]
    volumes: dict[str, None]
    networks: dict[str, None]

    @model_validator(mode="after")
    def _names_exist(self) -> "Compose":
        for service in self.services.values():
            assert {volume.split(":")[0] for volume in service.volumes} <= self.volumes.keys()
            assert set(service.networks) <= self.networks.keys()
            assert service.depends_on.keys() <= self.services.keys()
        return self


@pytest.fixture(scope="module")
def compose() -> Compose:
    tree = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return Compose.model_validate({k: v for k, v in tree.items() if not k.startswith("x-")})


def test_compose_builds_an_image_that_exists(compose: Compose) -> None:
    build = compose.services["head"].build
    assert build is not None
    root = (DOCKER / build.context).resolve()
    dockerfile = (root / build.dockerfile).read_text()
    assert re.findall(r"^ARG (\w+)", dockerfile, re.M) == list(build.args)
    assert {service.image for service in compose.services.values()} == {"distillcache:cpu"}


def test_compose_starts_one_head_and_workers_that_find_it(compose: Compose) -> None:
    head, worker = compose.services["head"], compose.services["worker"]
    assert head.entrypoint == worker.entrypoint == ["ray"]
    assert "--head" in head.command
    assert "--address=head:6379" in worker.command
    assert "--port=6379" in head.command
    assert all(port.startswith("127.0.0.1:") for port in head.ports)


def test_every_node_of_compose_lets_batches_in_flight_end(compose: Compose) -> None:
    for service in compose.services.values():
        assert int(service.stop_grace_period.removesuffix("s")) > STOP_GRACE_S


# -- KubeRay --------------------------------------------------------------------------------------
class Named(Strict):
    name: str


class Variable(Strict):
    name: str
    value: str


class SecretSource(Strict):
    name: str
    optional: bool


class EnvFrom(Strict):
    secret_ref: SecretSource = Field(alias="secretRef")


class Port(Strict):
    container_port: int = Field(alias="containerPort")
    name: str


class Mount(Strict):
    name: str
    mount_path: str = Field(alias="mountPath")
    read_only: bool = Field(default=False, alias="readOnly")


class Resources(Strict):
    requests: dict[str, str | int]
    limits: dict[str, str | int]


class Container(Strict):
    name: str
    image: str
    env: list[Variable]
    env_from: list[EnvFrom] = Field(alias="envFrom")
    ports: list[Port] = []
    resources: Resources
    volume_mounts: list[Mount] = Field(alias="volumeMounts")


class ClaimSource(Strict):
    claim_name: str = Field(alias="claimName")


class EmptyDir(Strict):
    medium: Literal["Memory"]
    size_limit: str = Field(alias="sizeLimit")


class Volume(Strict):
    name: str
    config_map: Named | None = Field(default=None, alias="configMap")
    claim: ClaimSource | None = Field(default=None, alias="persistentVolumeClaim")
    empty_dir: EmptyDir | None = Field(default=None, alias="emptyDir")


class SecurityContext(Strict):
    run_as_non_root: Literal[True] = Field(alias="runAsNonRoot")
    run_as_user: int = Field(alias="runAsUser")
    fs_group: int = Field(alias="fsGroup")


class Toleration(Strict):
    key: str
    operator: Literal["Exists"]
    effect: Literal["NoSchedule"]


class Pod(Strict):
    grace_s: int = Field(alias="terminationGracePeriodSeconds")
    security: SecurityContext = Field(alias="securityContext")
    tolerations: list[Toleration] = []
    containers: list[Container]
    volumes: list[Volume]

    @model_validator(mode="after")
    def _mounts_exist(self) -> "Pod":
        names = {volume.name for volume in self.volumes}
        assert all(m.name in names for c in self.containers for m in c.volume_mounts)
        return self


class PodTemplate(Strict):
    spec: Pod


class HeadGroup(Strict):
    ray_start_params: dict[str, str] = Field(alias="rayStartParams")
    template: PodTemplate


class WorkerGroup(HeadGroup):
    name: str = Field(alias="groupName")
    replicas: int
    min_replicas: int = Field(alias="minReplicas")
    max_replicas: int = Field(alias="maxReplicas")


class RayCluster(Strict):
    ray_version: str = Field(alias="rayVersion")
    head: HeadGroup = Field(alias="headGroupSpec")
    workers: list[WorkerGroup] = Field(alias="workerGroupSpecs")


class RayJobSpec(Strict):
    entrypoint: str
    submission_mode: Literal["K8sJobMode", "HTTPMode"] = Field(alias="submissionMode")
    shutdown: bool = Field(alias="shutdownAfterJobFinishes")
    ttl_s: int = Field(alias="ttlSecondsAfterFinished")
    deadline_s: int = Field(alias="activeDeadlineSeconds")
    backoff: int = Field(alias="backoffLimit")
    runtime_env: str = Field(alias="runtimeEnvYAML")
    cluster: RayCluster = Field(alias="rayClusterSpec")


class RayJob(Strict):
    version: Literal["ray.io/v1"] = Field(alias="apiVersion")
    kind: Literal["RayJob"]
    metadata: Named
    spec: RayJobSpec


@pytest.fixture(scope="module")
def job() -> RayJobSpec:
    return RayJob.model_validate(yaml.safe_load((DOCKER / "rayjob.yaml").read_text())).spec


def test_the_job_runs_a_command_of_ours_with_settings_that_exist(job: RayJobSpec) -> None:
    words = shlex.split(job.entrypoint)
    assert words[:5] == ["python", "-u", "-m", "pipeline", "run"]
    overrides = words[7::2]
    assert set(words[6::2]) == {"--set"}
    assert {override.split("=")[0] for override in overrides} <= RunConfig.model_fields.keys()
    mounts = [m.mount_path for m in job.cluster.head.template.spec.containers[0].volume_mounts]
    assert str(Path(words[5]).parent) in mounts


def test_the_cluster_runs_the_ray_of_the_lock_in_the_users_image(job: RayJobSpec) -> None:
    assert LOCKED_RAY is not None
    assert job.cluster.ray_version == LOCKED_RAY[1]
    uid = re.search(r"--uid (\d+)", (DOCKER / "Dockerfile.cuda").read_text())
    assert uid is not None
    for group in (job.cluster.head, *job.cluster.workers):
        pod = group.template.spec
        assert pod.security.run_as_user == int(uid[1])
        assert [c.image for c in pod.containers] == ["distillcache:cuda"]


def test_nodes_see_the_same_paths_and_have_time_to_stop(job: RayJobSpec) -> None:
    pods = [group.template.spec for group in (job.cluster.head, *job.cluster.workers)]
    paths = [{m.mount_path for m in pod.containers[0].volume_mounts} - {"/dev/shm"} for pod in pods]
    assert all(found == paths[0] for found in paths)
    assert all(pod.grace_s > STOP_GRACE_S for pod in pods)
    variables = yaml.safe_load(job.runtime_env)["env_vars"]
    assert variables == {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}


def test_workers_have_gpus_and_stay_within_bounds(job: RayJobSpec) -> None:
    (gpu,) = job.cluster.workers
    assert gpu.min_replicas <= gpu.replicas <= gpu.max_replicas
    resources = gpu.template.spec.containers[0].resources
    assert resources.requests["nvidia.com/gpu"] == resources.limits["nvidia.com/gpu"] == 1


def test_no_file_of_a_cluster_holds_a_credential() -> None:
    for path in ("compose.yaml", "rayjob.yaml"):
        tree: Any = yaml.safe_load((DOCKER / path).read_text())
        assert not re.search(r"(?i)(secret_?access|password|token|api_?key)\W*[:=]\s*\S", str(tree))
