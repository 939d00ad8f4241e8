"""An artifact's lineage: the finished stages behind it, from the manifests in the run's storage."""

from headrace_api.artifact import ARTIFACT_FILE, Artifact, ArtifactRef
from headrace_trainer.artifacts import read_manifest
from headrace_trainer.storage import ObjectStore


def lineage(store: ObjectStore, ref: ArtifactRef) -> list[Artifact]:
    """An artifact and everything it was made from, in order of creation.

    Args:
        store: the run's store.
        ref: the newest artifact.

    Returns:
        What is still in storage: a stage that was rerun has another digest and is omitted.
    """
    known = {artifact.digest: artifact for artifact in _finished(store)}
    found: dict[str, Artifact] = {}
    wanted = [ref.digest]
    while wanted:
        digest = wanted.pop()
        if digest in known and digest not in found:
            found[digest] = known[digest]
            wanted.extend(known[digest].inputs.values())
    return sorted(found.values(), key=lambda artifact: artifact.created_at)


def _finished(store: ObjectStore) -> list[Artifact]:
    manifests = (info.key for info in store.list() if info.key.count("/") == 1 and info.key.endswith(ARTIFACT_FILE))
    return [artifact for key in manifests if (artifact := read_manifest(store, key)) is not None]
