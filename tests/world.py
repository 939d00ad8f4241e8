"""What the operator's tests ask of a control plane, in one namespace: to apply a run, to end a pod as a kubelet would."""

import json
from collections.abc import Callable
from typing import Any

from builders import STAGES

Json = dict[str, Any]

RUNTIME = {
    "apiVersion": "headrace.dev/v1alpha1",
    "kind": "TrainingRuntime",
    "metadata": {"name": "test"},
    "spec": {"trainer": {"image": "trainer:test", "podTemplate": {"spec": {"nodeSelector": {"pool": "gpu"}}}}},
}


def make_run(namespace: str, *stages: str, **spec: Any) -> Json:
    chosen = [{"name": name, **STAGES[name]} for name in stages]
    fields = {"runtime": "test", "storage": {"uri": "s3://bucket/demo"}, **spec}
    return {
        "apiVersion": "headrace.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": "demo", "namespace": namespace},
        "spec": {**fields, "stages": chosen},
    }


class World:
    """What a test asks of the control plane, in its namespace."""

    def __init__(self, control_plane: Any, namespace: str, eventually: Callable[..., Any]) -> None:
        self.plane, self.namespace, self.eventually = control_plane, namespace, eventually

    def objects(self, kinds: str, selector: str = "headrace.dev/run=demo") -> list[Json]:
        return list(self.plane.get("-n", self.namespace, kinds, "-l", selector)["items"])

    def names(self, kind: str) -> list[str]:
        return sorted(o["metadata"]["name"] for o in self.objects(kind))

    def attempts(self, kind: str) -> list[str]:
        return sorted(o["metadata"]["labels"]["headrace.dev/attempt"] for o in self.objects(kind))

    def all_names(self, kind: str) -> list[str]:
        return [o["metadata"]["name"] for o in self.objects(kind, "headrace.dev/run")]

    def run(self) -> Json:
        return dict(self.plane.get("-n", self.namespace, "trainingrun", "demo"))

    def status(self) -> Json:
        return dict(self.run().get("status", {}))

    def pods(self, attempt: int, stage: str = "corpus") -> list[Json]:
        of_attempt = f"headrace.dev/run=demo,headrace.dev/stage={stage},headrace.dev/attempt={attempt}"
        return sorted(self.objects("pods", of_attempt), key=lambda pod: str(pod["metadata"]["name"]))

    def pods_of(self, attempt: int, *, count: int, stage: str = "corpus") -> list[Json]:
        self.eventually(lambda: len(self.pods(attempt, stage)) == count)
        return self.pods(attempt, stage)

    def start_gang(self, **spec: Any) -> list[Json]:
        """A run whose data stages have succeeded; returns the two pods of its pretraining."""
        run = make_run(self.namespace, "corpus", "tok", "tokens", "base", **spec)
        run["spec"]["stages"][3]["compute"] = {"nodes": 2, "ranksPerNode": 2}
        self.plane.apply(run)
        for stage in ("corpus", "tok", "tokens"):
            (pod,) = self.pods_of(1, count=1, stage=stage)
            self.end_pod(pod, exit_code=0, last_words=json.dumps({"artifactDigest": "ab" * 32}))
        return self.pods_of(1, count=2, stage="base")

    def start_server(self, **deploy: Any) -> list[Json]:
        """A run that has come to its deploy stage; returns the server's pods."""
        run = make_run(self.namespace, "corpus", "tok", "tokens", "base", "ship", "serve")
        run["spec"]["stages"][5]["deploy"] = {**STAGES["serve"]["deploy"], **deploy}
        self.plane.apply(run)
        for stage in ("corpus", "tok", "tokens", "base", "ship"):
            (pod,) = self.pods_of(1, count=1, stage=stage)
            self.end_pod(pod, exit_code=0, last_words=json.dumps({"artifactDigest": "ab" * 32}))
        return self.pods_of(1, count=deploy.get("replicas", 1), stage="serve")

    def deployment(self) -> Json:
        return dict(self.plane.get("-n", self.namespace, "deployment", "demo--serve"))

    def server(self) -> Json:
        """The container of the Deployment's template."""
        return dict(self.deployment()["spec"]["template"]["spec"]["containers"][0])

    def replicas(self) -> int:
        return int(self.deployment()["spec"]["replicas"])

    def edit(self, field: str, value: Any) -> None:
        """Edit a field of the spec, by its JSON pointer; returns when the operator has planned with it."""
        patch = json.dumps([{"op": "add", "path": f"/spec/{field}", "value": value}])
        self.plane.kubectl("-n", self.namespace, "patch", "trainingrun", "demo", "--type=json", "-p", patch)
        generation = self.run()["metadata"]["generation"]
        self.eventually(lambda: self.status().get("observedGeneration") == generation)

    def complete(self) -> bool:
        conditions = self.status().get("conditions", [])
        return any(c["type"] == "Complete" and c["status"] == "True" for c in conditions)

    def run_pod(self, pod: Json) -> None:
        """Write the status that a kubelet writes when a container runs."""
        started = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        container = {"name": "trainer", "image": "trainer:test", "imageID": "", "ready": True, "restartCount": 0}
        ready = [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}]
        container_status = {**container, "state": started}
        self.patch_pod(pod, {"phase": "Running", "containerStatuses": [container_status], "conditions": ready})

    def end_pod(self, pod: Json, *, exit_code: int, last_words: str = "") -> None:
        """Write the status that a kubelet writes when a container ends."""
        ended = {
            "exitCode": exit_code,
            "message": last_words,
            "reason": "Error" if exit_code else "Completed",
            "startedAt": "2026-01-01T00:00:00Z",
            "finishedAt": "2026-01-01T00:00:01Z",
        }
        container = {
            "name": "trainer",
            "image": "trainer:test",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"terminated": ended},
        }
        status = {"phase": "Failed" if exit_code else "Succeeded", "containerStatuses": [container]}
        self.patch_pod(pod, status)

    def patch_pod(self, pod: Json, status: Json) -> None:
        patch = ["patch", "pod", pod["metadata"]["name"], "--subresource=status", "--type=merge"]
        self.plane.kubectl("-n", self.namespace, *patch, "-p", json.dumps({"status": status}))
