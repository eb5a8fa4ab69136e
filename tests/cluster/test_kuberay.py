"""The Kubernetes manifests, checked by Ray's autoscaler, by Kubernetes' schemas and against each other."""

import copy
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import validate_config

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "kuberay"
KUBERNETES = "1.32"

# Fields of KubeRay's ray.io/v1 API, as its reference for 1.6 lists them; Ray's validator passes over unknown ones.
CLUSTER_FIELDS = {
    *("authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec"),
    *("headServiceAnnotations", "managedBy", "rayVersion", "suspend", "upgradeStrategy", "workerGroupSpecs"),
}
AUTOSCALER_FIELDS = {
    *("env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext"),
    *("upscalingMode", "version", "volumeMounts"),
}
GROUP_FIELDS = {"labels", "rayStartParams", "resources", "template"}
HEAD_FIELDS = GROUP_FIELDS | {"enableIngress", "headService", "serviceType"}
WORKER_FIELDS = GROUP_FIELDS | {
    *("groupName", "idleTimeoutSeconds", "maxReplicas", "minReplicas", "numOfHosts", "replicas", "scaleStrategy"),
    *("suspend",),
}
JOB_FIELDS = {
    *("activeDeadlineSeconds", "backoffLimit", "clusterSelector", "deletionStrategy", "entrypoint"),
    *("entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "jobId", "managedBy", "metadata"),
    *("rayClusterSpec", "runtimeEnvYAML", "shutdownAfterJobFinishes", "submissionMode"),
    *("submitterConfig", "submitterPodTemplate", "suspend", "ttlSecondsAfterFinished"),
}


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def cluster() -> dict[str, Any]:
    return documents("raycluster.yaml")[0]


def job() -> dict[str, Any]:
    return documents("rayjob.yaml")[0]


def pod_templates(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        yield group["template"]


def only(fields: dict[str, Any], known: set[str], where: str) -> None:
    unknown = set(fields) - known
    if unknown:
        raise ValueError(f"{where}: unknown fields {sorted(unknown)}")


def check_cluster(manifest: dict[str, Any]) -> dict[str, Any]:
    """Raises for what KubeRay, Ray's autoscaler or Kubernetes would refuse; returns the autoscaler's view."""
    spec = manifest["spec"]
    only(spec, CLUSTER_FIELDS, "spec")
    only(spec["autoscalerOptions"], AUTOSCALER_FIELDS, "autoscalerOptions")
    only(spec["headGroupSpec"], HEAD_FIELDS, "headGroupSpec")
    for group in spec["workerGroupSpecs"]:
        only(group, WORKER_FIELDS, group["groupName"])
    config = _derive_autoscaling_config_from_ray_cr(manifest)
    validate_config(config)
    for template in pod_templates(spec):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    return config


def check_job(manifest: dict[str, Any]) -> None:
    only(manifest["spec"], JOB_FIELDS, "spec")
    check_cluster({"metadata": {"name": "job", "namespace": "maps-ray"}, "spec": manifest["spec"]["rayClusterSpec"]})


def test_autoscaler_reads_the_cluster() -> None:
    config = check_cluster(cluster())
    types = config["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 0
    assert types["gpu"]["resources"]["GPU"] == 1
    assert "GPU" not in types["cpu"]["resources"]
    for name in ("gpu", "cpu"):
        assert types[name]["min_workers"] == 0 < types[name]["max_workers"]


def test_cluster_is_autoscaled_and_guarded_by_the_token() -> None:
    spec = cluster()["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["authOptions"] == {"mode": "token", "secretName": "maps-ray"}
    pinned = (ROOT / "constraints.txt").read_text().split()
    assert f"ray=={spec['rayVersion']}" in pinned
    for template in pod_templates(spec):
        assert template["spec"]["restartPolicy"] == "Never"


def test_job_is_whole_and_runs_on_the_same_cluster() -> None:
    check_job(job())
    spec = job()["spec"]
    assert spec["rayClusterSpec"] == cluster()["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] > 0
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
    program, script, run_spec, *_ = spec["entrypoint"].split()
    assert program == "python" and (ROOT / script).is_file() and (ROOT / run_spec).is_file()


def _misspelt_pod_field(manifest: dict[str, Any]) -> None:
    pod = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]
    pod["containers"][0]["volumeMount"] = pod["containers"][0].pop("volumeMounts")


def _misspelt_security_field(manifest: dict[str, Any]) -> None:
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsNonroot"] = True


def _wrong_type(manifest: dict[str, Any]) -> None:
    manifest["spec"]["headGroupSpec"]["template"]["spec"]["securityContext"]["runAsUser"] = "maps"


def _renamed_max_replicas(manifest: dict[str, Any]) -> None:
    group = manifest["spec"]["workerGroupSpecs"][0]
    group["maxReplica"] = group.pop("maxReplicas")


def _lost_max_replicas(manifest: dict[str, Any]) -> None:
    del manifest["spec"]["workerGroupSpecs"][0]["maxReplicas"]


def _bad_quantity(manifest: dict[str, Any]) -> None:
    resources = manifest["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]
    resources["limits"]["cpu"] = "four"


def _lost_cpus(manifest: dict[str, Any]) -> None:
    del manifest["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]["resources"]


def _misspelt_idle_timeout(manifest: dict[str, Any]) -> None:
    options = manifest["spec"]["autoscalerOptions"]
    options["idleTimeoutSecond"] = options.pop("idleTimeoutSeconds")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_misspelt_pod_field, r"'volumeMount' was unexpected"),
        (_misspelt_security_field, r"'runAsNonroot' was unexpected"),
        (_wrong_type, r"'maps' is not of type"),
        (_renamed_max_replicas, r"unknown fields \['maxReplica'\]"),
        (_lost_max_replicas, r"maxReplicas"),
        (_bad_quantity, r"four"),
        (_lost_cpus, r"CPU"),
        (_misspelt_idle_timeout, r"unknown fields \['idleTimeoutSecond'\]"),
    ],
)
def test_a_damaged_cluster_is_refused(damage: Any, message: str) -> None:
    manifest = copy.deepcopy(cluster())
    damage(manifest)
    with pytest.raises(Exception, match=message):
        check_cluster(manifest)


def test_a_damaged_job_is_refused() -> None:
    manifest = job()
    manifest["spec"]["shutdownAfterJobFinish"] = True
    with pytest.raises(ValueError, match="shutdownAfterJobFinish"):
        check_job(manifest)


PLAIN = ["namespace.yaml", "storage.yaml", "mlflow.yaml", "mlflow-postgres.yaml"]


@pytest.mark.parametrize("name", PLAIN)
def test_plain_manifests_fit_kubernetes_schemas(name: str) -> None:
    for document in documents(name):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


@pytest.mark.parametrize(
    ("kind", "path", "value"),
    [
        ("Deployment", ("spec", "strategies"), {"type": "Recreate"}),
        ("Deployment", ("spec", "replicas"), "one"),
        ("Service", ("spec", "ports", 0, "targetport"), "http"),
        ("PersistentVolumeClaim", ("spec", "accessMode"), ["ReadWriteOnce"]),
    ],
)
def test_a_damaged_plain_manifest_is_refused(kind: str, path: tuple[str | int, ...], value: Any) -> None:
    document = next(document for document in documents("mlflow.yaml") if document["kind"] == kind)
    section: Any = document
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, KUBERNETES, strict=True)


def all_pods() -> Iterator[dict[str, Any]]:
    for template in [*pod_templates(cluster()["spec"]), *pod_templates(job()["spec"]["rayClusterSpec"])]:
        yield template["spec"]
    for name in PLAIN:
        for document in documents(name):
            if document["kind"] in ("Deployment", "StatefulSet"):
                yield document["spec"]["template"]["spec"]


def test_every_pod_is_unprivileged_and_limited() -> None:
    for pod in all_pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])


def test_references_between_the_manifests_hold() -> None:
    plain = [document for name in PLAIN for document in documents(name)]
    claims = {document["metadata"]["name"] for document in plain if document["kind"] == "PersistentVolumeClaim"}
    for pod in all_pods():
        volumes = {volume["name"]: volume for volume in pod.get("volumes", [])}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert volume["persistentVolumeClaim"]["claimName"] in claims
        for container in pod["containers"]:
            templates = {"data"}  # of the StatefulSet
            assert {mount["name"] for mount in container["volumeMounts"]} <= set(volumes) | templates
            secrets = [entry["valueFrom"]["secretKeyRef"] for entry in container.get("env", []) if "valueFrom" in entry]
            assert {secret["name"] for secret in secrets} <= {"maps-ray"}
    services = {document["metadata"]["name"]: document for document in plain if document["kind"] == "Service"}
    workloads = [document for document in plain if document["kind"] in ("Deployment", "StatefulSet")]
    for workload in workloads:
        service = services[workload["metadata"]["name"]]
        labels = workload["spec"]["template"]["metadata"]["labels"]
        assert service["spec"]["selector"] == labels == workload["spec"]["selector"]["matchLabels"]
        ports = {port["name"] for port in workload["spec"]["template"]["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert all(document["metadata"].get("namespace", "maps-ray") == "maps-ray" for document in plain)


def test_mlflow_answers_to_the_name_of_its_service() -> None:
    server = next(document for document in documents("mlflow.yaml") if document["kind"] == "Deployment")
    environment = server["spec"]["template"]["spec"]["containers"][0]["env"]
    allowed = next(entry["value"] for entry in environment if entry["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS")
    uri = next(part for part in job()["spec"]["entrypoint"].split() if part.startswith("tracking.uri="))
    assert uri.removeprefix("tracking.uri=http://") in allowed.split(",")


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl, which holds kustomize, is not installed")
def test_kustomize_builds_the_standing_part() -> None:
    built = subprocess.run(["kubectl", "kustomize", str(FOLDER)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    kinds = sorted(document["kind"] for document in yaml.safe_load_all(built.stdout))
    assert kinds == [
        *("Deployment", "Namespace", "PersistentVolumeClaim", "PersistentVolumeClaim", "RayCluster", "Service"),
    ]
