"""The operator against a real API server and real controllers, with the chart's permissions; no container runs.

Where a pod has to end, the test writes its status, as a kubelet would.
"""

import json
import urllib.error
import urllib.request
from typing import Any

import pytest

from builders import STAGES
from world import RUNTIME, Json, World, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(name="world")
def world_with_operator(world: World, operator: Any) -> World:
    return world


def test_a_gang_becomes_a_job_whose_pods_a_restricted_namespace_admits(world: World) -> None:
    pods = world.start_gang()
    for kind in ("jobs", "services", "configmaps"):
        assert "demo--base--1" in world.names(kind)
    assert world.names("serviceaccounts") == ["headrace--demo"]
    assert {p["spec"]["nodeSelector"]["pool"] for p in pods} == {"gpu"}
    assert {p["spec"]["containers"][0]["command"][2] for p in pods} == {"headrace_trainer.agent"}
    config = next(c for c in world.objects("configmaps") if c["metadata"]["name"] == "demo--base--1")
    stage = json.loads(config["data"]["stage.json"])
    assert (stage["run"], stage["attempt"], stage["outputUri"]) == ("demo", 1, "s3://bucket/demo/base")
    assert world.status()["summary"] == "Starting"


def test_a_failed_gang_is_restarted_within_its_budget_and_then_fails_with_its_last_words(world: World) -> None:
    world.start_gang(restartPolicy={"maxInfraRestarts": 1})
    words = {"fault": "process", "reason": "RanksFailed", "message": "rank 3 saw no light"}
    for attempt in (1, 2):
        first, _ = world.pods_of(attempt, count=2, stage="base")
        world.end_pod(first, exit_code=70, last_words=json.dumps(words))  # the Job ends the other one
    status = world.eventually(lambda: (s := world.status()).get("summary") == "Failed" and s)
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "RanksFailed")
    assert "rank 3 saw no light" in failed["message"]
    assert status["restarts"] == 1
    reasons = {e["reason"] for e in world.plane.get("-n", world.namespace, "events.events.k8s.io")["items"]}
    assert {"AttemptStarted", "AttemptFailed", "StageSucceeded", "StageFailed"} <= reasons


def test_a_stage_that_succeeds_hands_its_artifact_to_the_next(world: World) -> None:
    world.plane.apply(make_run(world.namespace, "corpus", "tok"))
    (pod,) = world.pods_of(1, count=1)
    world.end_pod(pod, exit_code=0, last_words=json.dumps({"artifactDigest": "ab" * 32, "metrics": {"documents": 7}}))
    world.eventually(lambda: "demo--tok--1" in world.names("jobs"))
    corpus = world.status()["stages"][0]
    assert (corpus["state"], corpus["metrics"]) == ("Succeeded", {"documents": 7})
    config = next(c for c in world.objects("configmaps") if c["metadata"]["name"] == "demo--tok--1")
    assert json.loads(config["data"]["stage.json"])["inputs"]["corpus"]["digest"] == "ab" * 32


def test_a_quota_is_waited_for_in_sight_and_the_run_starts_when_there_is_room(world: World) -> None:
    spec = {"hard": {"count/jobs.batch": "0"}}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "full"}, "spec": spec}
    world.plane.apply({**quota, "metadata": {"name": "full", "namespace": world.namespace}})
    world.eventually(lambda: "used" in world.plane.get("-n", world.namespace, "resourcequota", "full")["status"])
    world.plane.apply(make_run(world.namespace, "corpus", restartPolicy={"maxInfraRestarts": 0}))
    world.eventually(lambda: world.status().get("phaseMessage", "").startswith("Waiting: QuotaExceeded: jobs.batch"))
    world.plane.kubectl("-n", world.namespace, "delete", "resourcequota", "full")
    world.eventually(lambda: world.names("jobs") != [], timeout_seconds=60)
    assert world.status()["restarts"] == 0


def test_a_start_that_admission_refuses_is_charged_and_ends_in_its_words(world: World) -> None:
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": f"no-jobs-{world.namespace}"},
        "spec": {
            "failurePolicy": "Fail",
            "matchConstraints": {
                "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
                "resourceRules": [
                    {"apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"]}
                ],
            },
            "validations": [{"expression": "false", "message": "no jobs on Sundays"}],
        },
    }
    binding = {"policyName": policy["metadata"]["name"], "validationActions": ["Deny"]}
    world.plane.apply(policy, {**policy, "kind": "ValidatingAdmissionPolicyBinding", "spec": binding})
    probe = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "probe", "namespace": world.namespace}}
    container = {"name": "c", "image": "i"}
    probe["spec"] = {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}}
    world.eventually(lambda: refused(world, probe))
    world.plane.apply(make_run(world.namespace, "corpus", restartPolicy={"maxInfraRestarts": 1}))
    status = world.eventually(lambda: (s := world.status()).get("summary") == "Failed" and s)
    (failed,) = [c for c in status["conditions"] if c["type"] == "Failed"]
    assert (failed["reason"], status["restarts"]) == ("StartRefused", 1)
    assert "no jobs on Sundays" in failed["message"]
    assert world.names("jobs") == []
    world.plane.kubectl("delete", "validatingadmissionpolicy", policy["metadata"]["name"])


def refused(world: World, obj: Json) -> bool:
    """Whether the API server does not take an object; policies take a moment to be enforced."""
    try:
        world.plane.kubectl("create", "--dry-run=server", "-f", "-", stdin=json.dumps(obj))
    except AssertionError:
        return True
    return False


def test_a_copy_of_a_pod_neither_fails_nor_finishes_its_attempt(world: World) -> None:
    """The pod that `kubectl debug --copy-to --keep-labels` makes; without the Job's labels, or the Job would take it."""
    world.plane.apply(make_run(world.namespace, "corpus", restartPolicy={"maxInfraRestarts": 0}))
    (pod,) = world.pods_of(1, count=1)
    labels = {k: v for k, v in pod["metadata"]["labels"].items() if k.startswith("headrace.dev/")}
    meta = {k: v for k, v in pod["metadata"].items() if k == "annotations"}
    spec = {k: v for k, v in pod["spec"].items() if k not in ("hostname", "subdomain")}
    for name, exit_code in (("failed-copy", 2), ("finished-copy", 0)):
        copied = {**meta, "name": name, "namespace": world.namespace, "labels": labels}
        copy = {"apiVersion": "v1", "kind": "Pod", "metadata": copied, "spec": spec}
        world.plane.apply(copy)
        world.end_pod(copy, exit_code=exit_code, last_words=json.dumps({"artifactDigest": "ef" * 32}))
    world.end_pod(pod, exit_code=0, last_words=json.dumps({"artifactDigest": "ab" * 32}))
    status = world.eventually(lambda: (s := world.status()).get("summary") == "Complete" and s)
    assert (status["restarts"], status["stages"][0]["artifact"]["digest"]) == (0, "ab" * 32)


def test_a_job_that_somebody_makes_again_is_not_the_attempts(world: World) -> None:
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.pods_of(1, count=1)
    (job,) = world.objects("jobs")
    world.eventually(lambda: world.status()["stages"][0].get("workload") == job["metadata"]["uid"])
    again = {**job, "metadata": {k: v for k, v in job["metadata"].items() if k not in ("uid", "resourceVersion")}}
    del again["spec"]["selector"]
    for made in ("batch.kubernetes.io/controller-uid", "controller-uid"):
        again["spec"]["template"]["metadata"]["labels"].pop(made, None)
    world.plane.kubectl("-n", world.namespace, "replace", "--force", "-f", "-", stdin=json.dumps(again))
    world.eventually(lambda: world.attempts("jobs") == ["2"])
    assert world.status()["restarts"] == 1


def test_a_new_operator_finds_nothing_to_change(world: World, operators: Any, operator: Any) -> None:
    world.start_gang()
    world.eventually(lambda: world.status().get("phaseMessage") == "Starting: 0 of 2 pods run")

    def versions() -> dict[str, str]:
        found = [*world.objects("jobs,services,configmaps,serviceaccounts"), world.run()]
        return {f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for o in found}

    before = versions()
    assert operator.stop() == 0
    second = operators("second", port=operator.port)
    world.eventually(second.leads)
    seen = 'headrace_operator_watch_events_total{kind="TrainingRun"}'
    world.eventually(lambda: seen in second.metrics() and "reconcile_duration_seconds_count 0" not in second.metrics())
    assert versions() == before


@pytest.mark.parametrize("kind", ["gang", "server"])
def test_a_new_leader_that_would_build_it_otherwise_leaves_what_runs_as_it_is(
    world: World, operators: Any, operator: Any, kind: str
) -> None:
    if kind == "gang":
        world.start_gang()
        world.eventually(lambda: world.names("configmaps,services").count("demo--base--1") == 2)
    else:
        world.run_pod(world.start_server()[0])
        world.eventually(world.complete)

    def versions() -> dict[str, str]:
        found = world.objects("jobs,deployments,services,configmaps")
        return {f"{o['kind']}/{o['metadata']['name']}": o["metadata"]["resourceVersion"] for o in found}

    before = versions()
    assert operator.stop() == 0
    second = operators("second")  # at another address, which is in every stage.json that it writes
    world.eventually(second.leads)
    for budget in (20, 30):  # that the second edit was planned says that the first was carried out
        world.edit("restartPolicy", {"maxInfraRestarts": budget})
    assert versions() == before


def test_an_edit_of_compute_stops_the_gang_and_the_next_attempt_has_it(world: World) -> None:
    world.start_gang()
    config = [
        "-n",
        world.namespace,
        "patch",
        "configmap",
        "demo--base--1",
        "--type=merge",
        "-p",
        '{"data": {"a": "b"}}',
    ]
    with pytest.raises(AssertionError, match="immutable"):
        world.plane.kubectl(*config)
    world.edit("stages/3/compute/nodes", 1)
    world.pods_of(2, count=1, stage="base")
    world.eventually(lambda: "demo--base--1" not in world.names("jobs"))
    status = world.eventually(lambda: (s := world.status())["stages"][3]["attempt"] == 2 and s)
    generation = world.run()["metadata"]["generation"]
    assert (status["restarts"], status["observedGeneration"]) == (0, generation)
    assert status["stages"][3]["generation"] == generation


def test_an_autoscalers_replicas_are_kept_until_the_manifest_asks_for_others(world: World) -> None:
    world.start_server(replicas=2)
    assert world.replicas() == 2
    uid = world.deployment()["metadata"]["uid"]
    scaler = {"apiVersion": "autoscaling/v2", "kind": "HorizontalPodAutoscaler"}
    scaler["metadata"] = {"name": "serve", "namespace": world.namespace}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "demo--serve"}
    cpu = {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": 50}}
    metric = {"type": "Resource", "resource": cpu}
    scaler["spec"] = {"scaleTargetRef": target, "minReplicas": 5, "maxReplicas": 9, "metrics": [metric]}
    world.plane.apply(scaler)
    world.eventually(lambda: world.replicas() == 5, timeout_seconds=60)
    world.edit("stages/5/compute", {"memory": "1Gi"})  # another attempt, which is applied to the same Deployment
    world.eventually(lambda: world.deployment()["metadata"]["labels"]["headrace.dev/attempt"] == "2")
    assert world.server()["resources"]["limits"] == {"memory": str(2**30)}
    assert world.replicas() == 5
    world.edit("stages/5/deploy/replicas", 7)
    world.eventually(lambda: world.replicas() == 7)
    world.edit("stages/5/compute", {})
    world.eventually(lambda: world.deployment()["metadata"]["labels"]["headrace.dev/attempt"] == "3")
    assert (world.replicas(), world.deployment()["metadata"]["uid"]) == (7, uid)
    assert world.server().get("resources", {}) == {}, "what is no longer asked for is taken away"


def test_a_change_of_replicas_touches_nothing_but_their_number(world: World) -> None:
    (pod,) = world.start_server()
    before = world.deployment()
    world.edit("stages/5/deploy/replicas", 3)
    pods = world.pods_of(1, count=3, stage="serve")
    after = world.deployment()
    assert after["spec"] == {**before["spec"], "replicas": 3}
    assert pod["metadata"]["uid"] in {p["metadata"]["uid"] for p in pods}
    assert world.status()["stages"][5]["attempt"] == 1


def test_an_old_server_stays_up_until_the_new_model_is_served(world: World) -> None:
    (old,) = world.start_server()
    world.run_pod(old)
    world.eventually(world.complete)
    endpoint = f"http://demo--serve.{world.namespace}.svc:8000"
    assert world.status()["endpoint"] == endpoint
    world.edit("stages/4/export", {"from": {"model": "base"}, "dtype": "bf16"})
    (export,) = world.pods_of(2, count=1, stage="ship")
    assert not world.complete() and world.status()["endpoint"] == endpoint
    assert [p["metadata"]["uid"] for p in world.pods(1, "serve")] == [old["metadata"]["uid"]]
    world.end_pod(export, exit_code=0, last_words=json.dumps({"artifactDigest": "cd" * 32}))
    (new,) = world.pods_of(2, count=1, stage="serve")
    world.eventually(lambda: "1 of an earlier attempt" in world.status().get("phaseMessage", ""))
    assert not world.complete() and world.pods(1, "serve") != []
    assert {"demo--serve--1", "demo--serve--2"} <= set(world.names("configmaps"))
    world.run_pod(new)
    world.eventually(world.complete)
    world.eventually(lambda: world.pods(1, "serve") == [])
    assert world.status()["restarts"] == 0


def test_when_the_leader_dies_another_takes_over_and_only_then(world: World, operators: Any, operator: Any) -> None:
    second = operators("second")
    world.eventually(second.metrics)
    assert not second.leads()
    operator.stop(gracefully=False)
    world.eventually(second.leads)
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.pods_of(1, count=1)


def test_a_suspended_run_loses_its_job_and_a_resumed_one_gets_the_next(world: World) -> None:
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.pods_of(1, count=1)
    world.plane.apply(make_run(world.namespace, "corpus", suspend=True))
    world.eventually(lambda: world.status().get("summary") == "Suspended")
    assert world.names("jobs") == []
    world.eventually(lambda: world.names("pods,services,configmaps") == [])
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.eventually(lambda: world.names("jobs") == ["demo--corpus--2"])


def test_nothing_is_left_of_a_deleted_run(world: World) -> None:
    world.start_gang()
    world.plane.kubectl("-n", world.namespace, "delete", "trainingrun", "demo")
    world.eventually(lambda: world.names("jobs,services,configmaps,serviceaccounts,pods") == [])


def test_a_run_that_the_operator_refuses_says_why(world: World) -> None:
    """The API server's rules cannot work out how much memory a model needs; the operator does."""
    run = make_run(world.namespace, "corpus", "tok", "tokens", "base")
    pretrain = {**STAGES["base"]["pretrain"], "model": {"preset": "llama-1b"}}
    run["spec"]["stages"][3] = {"name": "base", "compute": {"ranksPerNode": 2, "memory": "8Gi"}, "pretrain": pretrain}
    world.plane.apply(run)
    status = world.eventually(world.status)
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "Invalid"
    # 16 layers of 60.8M parameters over 2 tensor ranks, two tables of 4096 x 2048 halved, norms; 4 + 4 + 8 bytes each.
    assert (
        "compute.memory: weights, gradients and optimizer state take 7.9 GB per rank, but its 2 ranks share 8.6 GB"
        in failed["message"]
    )
    assert world.names("jobs") == []
    world.plane.apply(make_run(world.namespace, "corpus"))
    world.eventually(lambda: world.status()["summary"] == "Starting")


@pytest.mark.parametrize("part", ["run", "stage"])
def test_the_api_server_refuses_names_that_could_be_put_together_in_two_ways(world: World, part: str) -> None:
    run = make_run(world.namespace, "corpus")
    (run["metadata"] if part == "run" else run["spec"]["stages"][0])["name"] = "a--b"
    with pytest.raises(AssertionError, match="two hyphens in a row" if part == "run" else r"stages\[0\]\.name"):
        world.plane.apply(run)


def test_a_run_is_running_once_its_first_pod_has_reported_that_the_ranks_joined(reports: "Reports") -> None:
    world = reports.world
    first, second = world.pods(1, "base")
    world.eventually(lambda: world.status().get("phaseMessage") == "Starting: 0 of 2 pods run")
    for pod in (first, second):
        assert world.status()["summary"] == "Starting"
        world.run_pod(pod)
    world.eventually(lambda: world.status()["phaseMessage"] == "Starting: its ranks have not joined yet")
    token = reports.token(first)
    assert reports.post(token, reports.body(phase="Starting")) == (204, "")
    assert reports.post(token, reports.body(phase="Running")) == (204, "")
    world.eventually(lambda: world.status()["summary"] == "Running")


def test_a_model_that_is_larger_than_the_runtimes_gpus_is_refused_until_they_are_larger(world: World) -> None:
    runtime = {**RUNTIME, "metadata": {"name": "small"}}
    runtime["spec"] = {"trainer": {**RUNTIME["spec"]["trainer"], "gpuMemory": "24Gi"}}
    world.plane.apply(runtime)
    run = make_run(world.namespace, "corpus", "tok", "tokens", "base", runtime="small")
    pretrain = {**STAGES["base"]["pretrain"], "model": {"preset": "llama-7b"}, "precision": "bf16"}
    run["spec"]["stages"][3] = {"name": "base", "compute": {"gpusPerNode": 2}, "pretrain": pretrain}
    world.plane.apply(run)
    status = world.eventually(world.status)
    failed = next(c for c in status["conditions"] if c["type"] == "Failed")
    assert "take 58.6 GB per rank, but a GPU has 25.8 GB; split the model over more ranks" in failed["message"]
    runtime["spec"]["trainer"]["gpuMemory"] = "80Gi"
    world.plane.apply(runtime)
    world.eventually(lambda: world.status()["summary"] == "Starting")


def test_a_run_waits_for_its_runtime_and_says_so(world: World) -> None:
    world.plane.apply(make_run(world.namespace, "corpus", runtime="later"))
    world.eventually(lambda: "TrainingRuntime later not found" in world.status().get("phaseMessage", ""))
    world.plane.apply({**RUNTIME, "metadata": {"name": "later"}})
    world.pods_of(1, count=1)


def test_an_object_of_somebody_else_is_left_alone_and_reported(world: World) -> None:
    theirs = {"apiVersion": "v1", "kind": "ConfigMap", "data": {"mine": "yes"}}
    theirs["metadata"] = {"name": "demo--corpus--1", "namespace": world.namespace}
    world.plane.apply(theirs)
    world.plane.apply(make_run(world.namespace, "corpus"))

    def told() -> list[str]:
        events = world.plane.get("-n", world.namespace, "events.events.k8s.io")["items"]
        return [e["note"] for e in events if e["reason"] == "StartFailed"]

    (note,) = world.eventually(told)
    assert "demo--corpus--1 exists and is not this run's" in note
    kept = world.plane.get("-n", world.namespace, "configmap", "demo--corpus--1")
    assert kept["data"] == {"mine": "yes"}
    world.plane.kubectl("-n", world.namespace, "delete", "configmap", "demo--corpus--1")
    world.eventually(lambda: world.names("configmaps") == ["demo--corpus--1"])


class Reports:
    """Progress reports with real tokens of a run's pods."""

    def __init__(self, world: World, operator: Any) -> None:
        self.world, self.operator = world, operator

    def token(self, pod: Json, *, audience: str = "headrace-progress") -> str:
        meta = pod["metadata"]
        bound = ["--bound-object-kind=Pod", f"--bound-object-name={meta['name']}", f"--bound-object-uid={meta['uid']}"]
        command = ["create", "token", "headrace--demo", f"--audience={audience}", *bound]
        return str(self.world.plane.kubectl("-n", self.world.namespace, *command)).strip()

    def body(self, **changes: Any) -> Json:
        progress = {"stage": "base", "attempt": 1, "done": 3, "total": 9, "unit": "documents"}
        report = {"namespace": self.world.namespace, "run": "demo"}
        told = {k: v for k, v in changes.items() if k in report}
        progress |= {k: v for k, v in changes.items() if k not in report}
        return {**report, **told, "progress": {**progress, "time": "2026-01-01T00:00:00Z"}}

    def post(self, token: str, body: Json) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.operator.progress_url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, ""
        except urllib.error.HTTPError as error:
            return error.code, str(json.loads(error.read())["error"])


@pytest.fixture
def reports(world: World, operator: Any) -> Reports:
    world.start_gang()
    return Reports(world, operator)


def test_a_pods_report_becomes_the_runs_columns(reports: Reports) -> None:
    first, _ = reports.world.pods(1, "base")
    assert reports.post(reports.token(first), reports.body()) == (204, "")
    reports.world.eventually(lambda: reports.world.status().get("step") == "3/9")
    assert reports.world.status()["progress"] == "33%"
    assert 'headrace_stage_done{namespace="' in reports.operator.metrics()


def test_a_pod_reports_for_itself_only(reports: Reports) -> None:
    first, second = reports.world.pods(1, "base")
    own = reports.token(first)
    cases = [
        (reports.token(first, audience="https://kubernetes.default.svc"), reports.body(), 401, "audience"),
        ("nonsense", reports.body(), 401, "not valid"),
        (own, reports.body(attempt=2), 403, "may not report for run"),
        (own, reports.body(stage="tok"), 403, "may not report for run"),
        (own, reports.body(run="another"), 403, "may not report for run"),
        (own, reports.body(namespace="default"), 403, "may not report for run"),
        (reports.token(second), reports.body(), 403, "only index 0"),
        (own, {"namespace": "x"}, 400, "not a progress report"),
    ]
    for token, body, status, said in cases:
        answer = reports.post(token, body)
        assert answer[0] == status and said in answer[1], (body, answer)
