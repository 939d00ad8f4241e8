"""A resolved stage and its runtime -> Kubernetes objects."""

import json
from typing import Any

import pytest

from builders import STAGES
from headrace_api.contract import ResolvedStage
from headrace_api.runtime import TrainingRuntime
from headrace_operator.body.build import build, owned

Json = dict[str, Any]


def resolve(stage: str = "base", *, storage: Json | None = None, **fields: Any) -> ResolvedStage:
    compute = fields.pop("compute", STAGES[stage].get("compute", {}))
    resolved = {
        "run": "demo",
        "namespace": "team",
        "runUid": "uid-1",
        "stage": {"name": stage, **STAGES[stage], "compute": compute},
        "attempt": 3,
        "seed": 1,
        "hash": "beef",
        "storage": {"uri": "s3://bucket/demo", **(storage or {})},
        "outputUri": f"s3://bucket/demo/{stage}",
    }
    return ResolvedStage.model_validate({**resolved, **fields})


def runtime(pod_template: Json | None = None, **others: Json) -> TrainingRuntime:
    trainer = {"image": "trainer:1", "python": "/opt/python", "podTemplate": pod_template or {}, **others}
    return TrainingRuntime.model_validate({"metadata": {"name": "default"}, "spec": {"trainer": trainer}})


def pod_of(workload: Json) -> Json:
    spec = workload["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


def trainer_of(workload: Json) -> Json:
    (container,) = [c for c in pod_of(workload)["containers"] if c["name"] == "trainer"]
    assert isinstance(container, dict)
    return container


def env_of(workload: Json) -> dict[str, Any]:
    return {e["name"]: e.get("value", e.get("valueFrom")) for e in trainer_of(workload)["env"]}


def test_a_gang_is_an_indexed_job_that_never_retries_by_itself() -> None:
    job = build(resolve(compute={"nodes": 4, "ranksPerNode": 2}), runtime()).workload
    assert job["kind"] == "Job" and job["metadata"]["name"] == "demo--base--3"
    spec = {k: v for k, v in job["spec"].items() if k != "template"}
    assert spec == {
        "completionMode": "Indexed",
        "completions": 4,
        "parallelism": 4,
        "backoffLimit": 0,
        "podReplacementPolicy": "Failed",
    }
    assert pod_of(job)["restartPolicy"] == "Never"


def test_pods_find_the_first_of_them_through_the_headless_service() -> None:
    objects = build(resolve(), runtime())
    service = next(o for o in objects.dependents if o["kind"] == "Service")
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"]
    assert service["spec"]["selector"].items() <= objects.workload["spec"]["template"]["metadata"]["labels"].items()
    assert pod_of(objects.workload)["subdomain"] == service["metadata"]["name"] == "demo--base--3"
    assert env_of(objects.workload)["HEADRACE_MASTER_ADDR"] == "demo--base--3-0.demo--base--3.team.svc"


def test_the_config_map_holds_the_stage_as_the_trainer_parses_it() -> None:
    resolved = resolve()
    config = next(o for o in build(resolved, runtime()).dependents if o["kind"] == "ConfigMap")
    told = json.loads(config["data"]["stage.json"])
    assert ResolvedStage.model_validate(told) == resolved
    assert told == resolved.dump(), "by the manifest's names, and without what is unset"


def test_each_attempt_has_a_config_map_of_its_own_that_nobody_can_change() -> None:
    for stage in ("base", "serve"):
        first, second = (build(resolve(stage, attempt=n), runtime()) for n in (1, 2))
        configs = [next(o for o in objects.dependents if o["kind"] == "ConfigMap") for objects in (first, second)]
        assert [c["immutable"] for c in configs] == [True, True]
        names = [c["metadata"]["name"] for c in configs]
        assert names[0] != names[1]
        mounted = [
            v["configMap"]["name"]
            for objects in (first, second)
            for v in pod_of(objects.workload)["volumes"]
            if v["name"] == "headrace-stage"
        ]
        assert mounted == names


def test_every_object_says_what_its_attempt_was_resolved_to() -> None:
    resolved = resolve()
    objects = build(resolved, runtime())
    template = objects.workload["spec"]["template"]
    for made in (objects.workload, template, *objects.dependents):
        assert made["metadata"]["annotations"]["headrace.dev/resolved"] == resolved.digest


@pytest.mark.parametrize(
    ("fields", "same"),
    [
        ({"attempt": 4}, True),
        ({"progressUrl": "http://elsewhere"}, True),
        ({"compute": {"nodes": 2, "ranksPerNode": 2}}, False),
        ({"compute": {"ranksPerNode": 2, "memory": "1Gi"}}, False),
        ({"runtime": "h200"}, False),
        ({"seed": 2}, False),
        ({"storage": {"endpoint": "https://other"}}, False),
    ],
)
def test_what_takes_another_attempt(fields: Json, same: bool) -> None:
    assert (resolve().digest == resolve(**fields).digest) is same


def test_a_version_with_more_fields_resolves_the_same_manifest_to_the_same_digest() -> None:
    class Newer(ResolvedStage):
        spares: int = 0
        """spares is a field of the next version."""

    value = resolve().dump()
    assert Newer.model_validate(value).digest == resolve().digest
    assert Newer.model_validate({**value, "spares": 1}).digest != resolve().digest


def test_pods_meet_the_restricted_level() -> None:
    job = build(resolve(), runtime()).workload
    security = pod_of(job)["securityContext"]
    assert (security["runAsNonRoot"], security["runAsUser"]) == (True, 65532)
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert trainer_of(job)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod_of(job)["automountServiceAccountToken"] is False


def test_the_token_is_for_progress_reports_only() -> None:
    volumes = {v["name"]: v for v in pod_of(build(resolve(), runtime()).workload)["volumes"]}
    (source,) = volumes["headrace-token"]["projected"]["sources"]
    assert source["serviceAccountToken"]["audience"] == "headrace-progress"


@pytest.mark.parametrize(
    ("compute", "resources", "threads"),
    [
        ({}, {}, None),
        ({"cpu": "500m"}, {"requests": {"cpu": "500m"}}, "1"),
        ({"cpu": "8", "ranksPerNode": 2}, {"requests": {"cpu": "8"}}, "4"),
        ({"memory": "1Gi"}, {"requests": {"memory": "1073741824"}, "limits": {"memory": "1073741824"}}, None),
        ({"gpusPerNode": 2}, {"limits": {"nvidia.com/gpu": "2"}}, None),
    ],
)
def test_resources_and_threads_follow_compute(compute: Json, resources: Json, threads: str | None) -> None:
    workload = build(resolve(compute={"ranksPerNode": 2, **compute}), runtime()).workload
    assert trainer_of(workload)["resources"] == resources
    assert env_of(workload).get("OMP_NUM_THREADS") == threads


def test_a_gang_prefers_a_node_for_each_pod() -> None:
    alone, gang = build(resolve(), runtime()), build(resolve(compute={"nodes": 2, "ranksPerNode": 2}), runtime())
    assert "affinity" not in pod_of(alone.workload)
    assert "podAntiAffinity" in pod_of(gang.workload)["affinity"]


def test_credentials_come_from_the_secret_beside_what_the_runtime_adds() -> None:
    extra = {"configMapRef": {"name": "proxy"}}
    template = {"spec": {"containers": [{"name": "trainer", "envFrom": [extra]}]}}
    workload = build(resolve(storage={"secretRef": {"name": "s3"}}), runtime(template)).workload
    assert trainer_of(workload)["envFrom"] == [extra, {"secretRef": {"name": "s3"}}]


def test_a_runtime_adds_and_overrides_but_does_not_break_the_contract() -> None:
    template = {
        "metadata": {"labels": {"team": "ml", "headrace.dev/run": "stolen"}},
        "spec": {
            "nodeSelector": {"pool": "h100"},
            "restartPolicy": "Always",
            "serviceAccountName": "root",
            "automountServiceAccountToken": True,
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "containers": [
                {
                    "name": "trainer",
                    "command": ["sh"],
                    "env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "HEADRACE_MASTER_PORT", "value": "1"}],
                    "securityContext": {"capabilities": {"add": ["IPC_LOCK"]}},
                },
                {"name": "sidecar", "image": "logs:1"},
            ],
        },
    }
    job = build(resolve(), runtime(template)).workload
    pod, trainer, env = pod_of(job), trainer_of(job), env_of(job)
    assert pod["nodeSelector"] == {"pool": "h100"}
    assert [c["name"] for c in pod["containers"]] == ["trainer", "sidecar"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists"} in pod["tolerations"]
    assert trainer["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert env["NCCL_DEBUG"] == "WARN"
    assert job["spec"]["template"]["metadata"]["labels"]["team"] == "ml"
    assert job["spec"]["template"]["metadata"]["labels"]["headrace.dev/run"] == "demo"
    assert (pod["restartPolicy"], pod["serviceAccountName"]) == ("Never", "headrace--demo")
    assert pod["automountServiceAccountToken"] is False
    assert trainer["command"] == ["/opt/python", "-m", "headrace_trainer.agent", "/etc/headrace/stage.json"]
    assert env["HEADRACE_MASTER_PORT"] == "29400"


def test_a_cache_that_outlives_pods_is_mounted_where_the_trainer_looks_for_it() -> None:
    assert "HEADRACE_CACHE" not in env_of(build(resolve(), runtime()).workload)
    volume = {"hostPath": {"path": "/var/lib/headrace", "type": "DirectoryOrCreate"}}
    job = build(resolve(), runtime(cache=volume)).workload
    folder = env_of(job)["HEADRACE_CACHE"]
    assert {"name": "headrace-cache", "mountPath": folder} in trainer_of(job)["volumeMounts"]
    assert {"name": "headrace-cache", **volume} in pod_of(job)["volumes"]


def test_a_service_is_a_deployment_with_one_address_for_all_attempts() -> None:
    objects = build(resolve("serve"), runtime())
    deployment = objects.workload
    service = next(o for o in objects.dependents if o["kind"] == "Service")
    assert deployment["kind"] == "Deployment"
    assert deployment["metadata"]["name"] == service["metadata"]["name"] == "demo--serve"
    selector = deployment["spec"]["selector"]["matchLabels"]
    assert selector == service["spec"]["selector"]
    assert "headrace.dev/attempt" not in selector
    probe = trainer_of(deployment)["readinessProbe"]["exec"]["command"]
    assert probe == ["/opt/python", "-m", "headrace_trainer.stages.deploy.ready"]
    assert {"name": "http", "containerPort": 8000, "protocol": "TCP"} in trainer_of(deployment)["ports"]
    assert env_of(deployment)["JOB_COMPLETION_INDEX"] == "0"


def test_the_run_owns_the_workload_and_the_workload_the_rest() -> None:
    objects = build(resolve(), runtime())
    (owner,) = objects.workload["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"], owner["controller"]) == ("TrainingRun", "demo", "uid-1", True)
    stored = {**objects.workload, "metadata": {**objects.workload["metadata"], "uid": "uid-2"}}
    for dependent in objects.dependents:
        (owner,) = owned(dependent, by=stored)["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"]) == ("Job", "uid-2")


def test_building_again_gives_the_same_and_another_runtime_another_digest() -> None:
    def digest(template: Json | None = None) -> str:
        annotations = build(resolve("serve"), runtime(template)).workload["metadata"]["annotations"]
        return str(annotations["headrace.dev/digest"])

    assert digest() == digest()
    assert digest() != digest({"spec": {"nodeSelector": {"pool": "h100"}}})
