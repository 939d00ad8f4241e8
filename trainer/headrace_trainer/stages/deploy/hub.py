"""Present an artifact's folder as a repository in Hugging Face's cache, so that the server uses the model's name.

``transformers serve`` lists this cache's contents as ``/v1/models``, and serves the name it was started with. A
folder's path would be a name that is not listed and that differs between pods. The layout follows
https://huggingface.co/docs/huggingface_hub/guides/manage-cache, with symlinks instead of downloads.
"""

from pathlib import Path

_REVISION_CHARACTERS = 40


def link_into_cache(folder: Path, cache: Path, *, name: str, digest: str) -> None:
    """Link ``folder`` as the only revision of the repository ``name``.

    Args:
        folder: an exported model.
        cache: the root of the cache (``HF_HUB_CACHE``).
        name: from ``served_model_name``.
        digest: the artifact's digest in hexadecimal; serves as the commit.
    """
    repository, revision = cache / f"models--{name.replace('/', '--')}", digest[:_REVISION_CHARACTERS]
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        link = repository / "snapshots" / revision / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.absolute())
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
