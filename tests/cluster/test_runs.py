"""Runs on a real cluster: from `kubectl apply` to a served model, and through what goes wrong on the way."""

import json
import time
from typing import Any

import kubernetes
import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.fixtures import Cluster
from cluster.installed import SYSTEM, Operator, Runs, operator, runs

__all__ = ["operator", "runs"]

DATA = ("corpus", "tok", "tokens")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900, func_only=True)]


def test_the_quickstart_goes_from_apply_to_complete_while_the_operator_is_killed(
    runs: Runs, operator: Operator
) -> None:
    runs.cluster.apply(runs.manifest("quickstart", *DATA, "base", "eval", "ship", "serve"))
    runs.cluster.wait(lambda: runs.step("quickstart", "base") >= 1, "the first step", timeout_seconds=300)
    job = runs.cluster.get("job", "quickstart--base--1", "-n", runs.namespace)["metadata"]["uid"]
    nodes = {p["spec"]["nodeName"] for p in runs.pods("quickstart", "base")}
    assert len(nodes) == 2, "two pods, each on a node of its own"
    before = operator.restarts()
    operator.kill()
    runs.wait_complete("quickstart")
    assert operator.restarts() == before + 1 or not runs.cluster.own
    status = runs.get("quickstart")["status"]
    assert [(s["name"], s["state"], s["attempt"]) for s in status["stages"]] == [
        (name, "Succeeded", 1) for name in (*DATA, "base", "eval", "ship", "serve")
    ]
    assert status["restarts"] == 0
    assert runs.cluster.get("job", "quickstart--base--1", "-n", runs.namespace)["metadata"]["uid"] == job
    assert len(runs.losses("base")) == 40


def test_the_operators_image_has_neither_torch_nor_pip(runs: Runs, operator: Operator) -> None:
    question = (
        "import importlib.util as u; print([m for m in ('kopf', 'torch', 'megatron', 'pip', 'moto') if u.find_spec(m)])"
    )
    name = operator.pod()["metadata"]["name"]
    assert runs.cluster.kubectl("exec", name, "-n", SYSTEM, "--", "python", "-c", question).strip() == "['kopf']"


def test_the_columns_tell_how_a_run_is(runs: Runs) -> None:
    table = runs.cluster.kubectl("get", "trun", "quickstart", "-n", runs.namespace)
    assert table.split("\n")[0].split() == [
        "NAME",
        "STAGE",
        "STATUS",
        "STEP",
        "PROGRESS",
        "LOSS",
        "TOK/S",
        "RESTARTS",
        "ETA",
        "AGE",
    ]
    assert "Complete" in table


def test_the_served_model_answers(runs: Runs) -> None:
    assert runs.get("quickstart")["status"]["endpoint"] == f"http://quickstart--serve.{runs.namespace}.svc:8000"
    model = json.loads(_ask(runs, "GET", "services/quickstart--serve:8000/proxy/v1/models"))["data"][0]["id"]
    body = {"model": model, "prompt": "The function", "max_tokens": 8, "temperature": 0}
    answer = json.loads(_ask(runs, "POST", "services/quickstart--serve:8000/proxy/v1/completions", body))
    assert answer["choices"][0]["text"]


def _ask(runs: Runs, method: str, path: str, body: dict[str, Any] | None = None) -> str:
    """What a Service or a pod says, by way of the API server: nothing else reaches those of every cluster."""
    api = kubernetes.config.new_client_from_config(str(runs.cluster.kubeconfig))
    path = f"/api/v1/namespaces/{runs.namespace}/{path}"
    headers = {"Content-Type": "application/json"}
    request = api.param_serialize(method, path, header_params=headers, body=body, auth_settings=["BearerToken"])
    answer = api.call_api(*request, _request_timeout=60)
    text = answer.read().decode()
    assert answer.status == 200, text
    return text


def test_a_new_run_skips_what_is_in_storage_and_a_deleted_pod_changes_no_loss(runs: Runs) -> None:
    runs.cluster.apply(runs.manifest("second", *DATA, "base-deleted"))
    runs.cluster.wait(lambda: runs.step("second", "base-deleted") >= 6, "step 6", timeout_seconds=300)
    for stage in DATA:
        log = runs.cluster.kubectl("logs", runs.pods("second", stage)[0]["metadata"]["name"], "-n", runs.namespace)
        assert "AlreadyDone" in log
    victim = runs.pods("second", "base-deleted")[1]["metadata"]["name"]
    runs.cluster.kubectl("delete", "pod", victim, "-n", runs.namespace, "--wait=false", "--grace-period=1")
    runs.wait_complete("second")
    stage = runs.stage("second", "base-deleted")
    assert stage["attempt"] == 2
    assert runs.losses("base-deleted") == runs.losses("base")


def test_a_training_pod_serves_its_metrics_where_its_annotations_say(runs: Runs) -> None:
    runs.cluster.apply(runs.manifest("third", *DATA, "base-suspended"))
    runs.cluster.wait(lambda: runs.step("third", "base-suspended") >= 3, "step 3", timeout_seconds=300)
    pod = min(runs.pods("third", "base-suspended"), key=lambda p: p["metadata"]["name"])["metadata"]
    assert pod["annotations"]["prometheus.io/scrape"] == "true"
    text = _ask(runs, "GET", f"pods/{pod['name']}:{pod['annotations']['prometheus.io/port']}/proxy/metrics")
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    labels = {"namespace": runs.namespace, "run": "third", "stage": "base-suspended"}
    assert all(sample.labels == labels for sample in samples)
    figures = {sample.name.removeprefix("headrace_trainer_"): sample.value for sample in samples}
    assert 3 <= figures["done"] <= figures["planned"] == 40
    assert 0 < figures["loss"] < 10
    assert figures["tokens_per_second"] > 0
    assert 0 < figures["last_heartbeat_timestamp_seconds"] <= time.time()


def test_suspending_saves_and_frees_the_pods_and_resuming_goes_on(runs: Runs) -> None:
    runs.cluster.apply(runs.manifest("third", *DATA, "base-suspended"))
    runs.cluster.wait(lambda: runs.step("third", "base-suspended") >= 3, "step 3", timeout_seconds=300)
    _set_suspend(runs, "third", True)
    runs.cluster.kubectl(
        "wait", "--for=condition=Suspended", "trun/third", "-n", runs.namespace, "--timeout=120s", timeout_seconds=150
    )
    saved = runs.get("third")["status"]["checkpoint"]
    assert saved["step"] >= 3
    assert saved["uri"].startswith(f"s3://{runs.bucket}/store/base-suspended/checkpoints/")
    runs.cluster.wait(lambda: runs.pods("third", "base-suspended") == [], "the pods to be gone", timeout_seconds=60)
    _set_suspend(runs, "third", False)
    runs.wait_complete("third")
    assert runs.get("third")["status"]["restarts"] == 0
    assert runs.losses("base-suspended") == runs.losses("base")


def test_a_model_is_taught_to_chat_and_reinforced_and_suspending_in_the_middle_changes_no_loss(runs: Runs) -> None:
    asked = [
        {"role": "user", "content": f"Say something of {word}"} for word in ("classes", "modules", "types", "lists")
    ]
    chats = [{"messages": [turn, {"role": "assistant", "content": "It is an object."}]} for turn in asked * 20]
    for name, rows in {"chats": chats, "prompts": [{"prompt": [turn]} for turn in asked]}.items():
        body = "".join(json.dumps(row) + "\n" for row in rows).encode()
        runs.s3.client().put_object(Bucket=runs.bucket, Key=f"records/{name}.jsonl", Body=body)

    def stage(kind: str, records: str, **fields: Any) -> dict[str, Any]:
        source = {"uri": f"s3://{runs.bucket}/records/{records}.jsonl"}
        block = {"data": {"sources": [source]}, "sequenceLength": 64, "precision": "fp32", "globalBatchSize": 8}
        return {"compute": {"nodes": 2}, kind: {**block, "checkpoint": {"every": 1, "keep": 2}, **fields}}

    def reinforced(name: str) -> dict[str, Any]:
        sizes = {"promptsPerIteration": 4, "groupSize": 4, "epochsPerIteration": 2, "maxNewTokens": 8, "epochs": 10}
        rule = {"rule": {"regex": {"pattern": "object"}}}
        return {"name": name, **stage("rl", "prompts", **{"from": {"model": "chat"}}, rewards=[rule], **sizes)}

    def manifest(name: str, last: str) -> dict[str, Any]:
        value = runs.manifest(name, *DATA, "base")
        chat = {"name": "chat", **stage("sft", "chats", **{"from": {"model": "base"}}, epochs=2)}
        value["spec"]["stages"] += [chat, reinforced(last)]
        return value

    runs.cluster.apply(manifest("aligned", "rl"))
    runs.wait_complete("aligned")
    runs.cluster.apply(manifest("paused", "rl-suspended"))
    # An iteration has four steps: the answers of the second one are there, and not yet trained on twice.
    runs.cluster.wait(lambda: runs.step("paused", "rl-suspended") >= 5, "step 5", timeout_seconds=300)
    _set_suspend(runs, "paused", True)
    condition = ("--for=condition=Suspended", "trun/paused", "-n", runs.namespace, "--timeout=120s")
    runs.cluster.kubectl("wait", *condition, timeout_seconds=150)
    assert 5 <= runs.get("paused")["status"]["checkpoint"]["step"] < 40
    _set_suspend(runs, "paused", False)
    runs.wait_complete("paused")
    assert len(runs.losses("rl")) == 40
    assert runs.losses("rl-suspended") == runs.losses("rl")


def _set_suspend(runs: Runs, name: str, value: bool) -> None:
    patch = json.dumps({"spec": {"suspend": value}})
    runs.cluster.kubectl("patch", "trun", name, "-n", runs.namespace, "--type=merge", "-p", patch)


@pytest.mark.parametrize("name", ["quickstart", "second", "third", "aligned", "paused"])
def test_deleting_a_run_leaves_no_object_behind(runs: Runs, name: str) -> None:
    kinds = "jobs,pods,services,configmaps,serviceaccounts,deployments,replicasets,endpointslices,secrets,leases,persistentvolumeclaims"
    labels = ["-n", runs.namespace, "-l", f"headrace.dev/run={name}"]
    assert runs.cluster.get(kinds, *labels)["items"], "there must be something to remove"
    runs.cluster.kubectl("delete", "trun", name, "-n", runs.namespace, timeout_seconds=150)
    runs.cluster.wait(
        lambda: runs.cluster.get(kinds, *labels)["items"] == [], "every child to be gone", timeout_seconds=150
    )


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (
            ("parallelism", "tensor"),
            3,
            "spec.stages[3].pretrain: Invalid value: parallelism.tensor must divide the model's kvHeads",
        ),
        (("parallelism", "pipeline"), 4, "parallelism.pipeline must divide the model's layers"),
        (
            ("precision",),
            "fp8",
            "precision fp8 needs GPUs with Transformer Engine; set compute.gpusPerNode, or use bf16",
        ),
        (("sequenceLength",), 1, "spec.stages[3].pretrain.sequenceLength"),
        (("learningRat",), 1, 'unknown field "learningRat"'),
    ],
)
def test_the_api_server_refuses_a_run_that_cannot_work(runs: Runs, path, value, expected) -> None:
    manifest = runs.manifest("bad", *DATA, "base")
    node = manifest["spec"]["stages"][3]["pretrain"]
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    with pytest.raises(AssertionError) as caught:
        runs.cluster.apply(manifest)
    assert expected in str(caught.value)


def test_storage_must_be_named_in_a_cluster(runs: Runs) -> None:
    manifest = runs.manifest("bad", *DATA)
    manifest["spec"]["storage"] = {}
    with pytest.raises(AssertionError, match=r"storage\.uri is unset: write s3://bucket/prefix"):
        runs.cluster.apply(manifest)


def test_explain_shows_the_fields_with_their_meaning(cluster: Cluster, operator: Operator) -> None:
    text = cluster.kubectl("explain", "trun.spec.stages.pretrain.schedule")
    assert "learningRate is the peak, reached at the end of the warm-up." in text


def test_no_secret_is_in_a_status_a_log_or_a_config_map(runs: Runs) -> None:
    runs.cluster.apply(runs.manifest("quiet", *DATA))
    runs.wait_complete("quiet")
    told = runs.cluster.kubectl("get", "configmaps,trun,jobs,events,pods", "-n", runs.namespace, "-o", "json")
    logs = "".join(
        runs.cluster.kubectl("logs", p["metadata"]["name"], "-n", runs.namespace)
        for s in DATA
        for p in runs.pods("quiet", s)
    )
    assert runs.s3.secret_key not in told + logs
