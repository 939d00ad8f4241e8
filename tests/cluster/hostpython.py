"""Runs this checkout's Python in pods without an image: the host's own files, mounted read-only.

`restricted` Pod Security refuses hostPath volumes, but not claims, and a PersistentVolume may be of type hostPath. So each
mounted folder is a PersistentVolume bound beforehand to a claim in the test's namespace; inside the container it has the same
path as on the host, which keeps the virtual environment's links and the editable installs true. Every node of tests/cluster
sees the host's files, so the volumes name no node.

In: a namespace. Out: objects to apply first, and what to put into a pod (or into the chart's values). The claims are removed
with the namespace; the volumes are not namespaced and stay until `volumes_delete_command` or the end of the cluster.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.layout import HOST_PYTHON_IMAGE, REPO

KubernetesObject = dict[str, Any]

VIRTUAL_ENVIRONMENT = REPO / ".venv"
PYTHON = VIRTUAL_ENVIRONMENT / "bin/python"
SOURCES = ("api", "operator", "trainer", "cli")
SCRATCH = "/tmp"
VOLUME_LABEL = "headrace.test/namespace"

# What a container needs to pass `restricted`, and to prove that nothing writes outside of its scratch folder.
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 65532,
    "runAsGroup": 65532,
    "seccompProfile": {"type": "RuntimeDefault"},
}


@dataclass(frozen=True)
class PodPython:
    """A Python for the pods of one namespace: the host's, or (on another cluster, without `paths`) an image's."""

    namespace: str
    paths: tuple[Path, ...] = ()
    """paths are the host's folders, mounted at the same place in the container."""
    image: str = HOST_PYTHON_IMAGE
    image_pull_policy: str = "Never"
    python: str = str(PYTHON)

    @property
    def objects(self) -> list[KubernetesObject]:
        """The volumes and their claims: apply them once, after the namespace."""
        return [item for path in self.paths for item in (self._volume(path), self._claim(path))]

    @property
    def volumes(self) -> list[KubernetesObject]:
        """For `spec.volumes` of a pod, or the chart's `extraVolumes`."""
        return [
            {"name": name_of(path), "persistentVolumeClaim": {"claimName": name_of(path), "readOnly": True}}
            for path in self.paths
        ]

    @property
    def volume_mounts(self) -> list[KubernetesObject]:
        """For `volumeMounts` of a container, or the chart's `extraVolumeMounts`."""
        return [{"name": name_of(path), "mountPath": str(path), "readOnly": True} for path in self.paths]

    @property
    def env(self) -> list[KubernetesObject]:
        """For `env` of a container: the environment's programs first, and no writes beside the sources."""
        values = {"HOME": SCRATCH, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}
        if self.paths:
            values["PATH"] = f"{VIRTUAL_ENVIRONMENT}/bin:/usr/local/bin:/usr/bin:/bin"
        return [{"name": name, "value": value} for name, value in values.items()]

    def container(self, name: str, command: list[str], **fields: Any) -> KubernetesObject:
        """A container that passes `restricted` and may write to /tmp; `fields` add to it, `env` to its variables."""
        env = [*self.env, *fields.pop("env", [])]
        mounts = [*self.volume_mounts, {"name": "scratch", "mountPath": SCRATCH}, *fields.pop("volumeMounts", [])]
        return {
            "name": name,
            "image": self.image,
            "imagePullPolicy": self.image_pull_policy,
            "command": command,
            "env": env,
            "volumeMounts": mounts,
            "securityContext": CONTAINER_SECURITY,
            **fields,
        }

    def pod_spec(self, *containers: KubernetesObject, **fields: Any) -> KubernetesObject:
        """A pod's spec that passes `restricted`; `fields` add to it, `volumes` to its volumes."""
        volumes = [*self.volumes, {"name": "scratch", "emptyDir": {}}, *fields.pop("volumes", [])]
        defaults = {"restartPolicy": "Never", "securityContext": POD_SECURITY, "automountServiceAccountToken": False}
        return {**defaults, "containers": list(containers), "volumes": volumes, **fields}

    def _volume(self, path: Path) -> KubernetesObject:
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": self._volume_name(path), "labels": {VOLUME_LABEL: self.namespace}},
            "spec": {
                **storage_fields(),
                "capacity": {"storage": "1Gi"},
                "hostPath": {"path": str(path), "type": "Directory"},
                "claimRef": {"namespace": self.namespace, "name": name_of(path)},
                "persistentVolumeReclaimPolicy": "Retain",
            },
        }

    def _claim(self, path: Path) -> KubernetesObject:
        return {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name_of(path), "namespace": self.namespace},
            "spec": {
                **storage_fields(),
                "resources": {"requests": {"storage": "1Gi"}},
                "volumeName": self._volume_name(path),
            },
        }

    def _volume_name(self, path: Path) -> str:
        return f"{self.namespace}-{name_of(path)}"


def host_python(namespace: str) -> PodPython:
    """The host's Python for a namespace; ValueError when another user could not read a folder of it."""
    if not PYTHON.exists():
        raise ValueError(f"{PYTHON}: not there; create the project's virtual environment first")
    paths = mounted_paths()
    for path in paths:
        if path.stat().st_mode & 0o005 != 0o005:
            raise ValueError(f"{path}: pods run as another user and could not read it; run `chmod -R o+rX {path}`")
    return PodPython(namespace=namespace, paths=paths)


def volumes_delete_command(namespace: str) -> list[str]:
    """Arguments for kubectl that remove a namespace's volumes."""
    return ["delete", "persistentvolume", "--selector", f"{VOLUME_LABEL}={namespace}", "--wait=false"]


def mounted_paths() -> tuple[Path, ...]:
    """The folders that Python and the sources are made of; one that lies in another is left out."""
    system = [Path(name) for name in ("/usr", "/lib", "/lib64") if Path(name).is_dir() and not Path(name).is_symlink()]
    sources = [REPO / name for name in SOURCES if (REPO / name).is_dir()]
    candidates = [*system, *interpreter_prefixes(), VIRTUAL_ENVIRONMENT, *sources]
    return tuple(path for path in dict.fromkeys(candidates) if not any(other in path.parents for other in candidates))


def interpreter_prefixes() -> list[Path]:
    """The installation that the virtual environment was made from, under the name it knows and under its real one."""
    lines = (VIRTUAL_ENVIRONMENT / "pyvenv.cfg").read_text().splitlines()
    settings = dict(line.split(" = ", 1) for line in lines if " = " in line)
    prefix = Path(settings["home"]).parent
    return [prefix, prefix.resolve()]


def name_of(path: Path) -> str:
    """A Kubernetes name for a path."""
    return f"host-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def storage_fields() -> KubernetesObject:
    """What a volume and its claim must agree on; the empty class keeps provisioners away."""
    return {"storageClassName": "", "accessModes": ["ReadOnlyMany"]}
