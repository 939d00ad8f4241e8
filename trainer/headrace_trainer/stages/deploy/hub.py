"""An artifact's folder as a repository of Hugging Face's cache, so that a server calls the model by name.

``transformers serve`` lists as ``/v1/models`` what this cache holds, and answers for the name it was started with: a
folder's path would be a name that is not listed, and that differs between pods. The layout is that of
https://huggingface.co/docs/huggingface_hub/guides/manage-cache, with links in place of downloads.
"""

from pathlib import Path

_REVISION_CHARACTERS = 40


def link_into_cache(folder: Path, cache: Path, *, name: str, digest: str) -> None:
    """Make ``folder`` the only revision of the repository ``name``.

    Args:
        folder: the files of an exported model.
        cache: where the cache begins (``HF_HUB_CACHE``).
        name: of ``served_model_name``.
        digest: the artifact's, in hexadecimal: it stands for the commit.
    """
    repository, revision = cache / f"models--{name.replace('/', '--')}", digest[:_REVISION_CHARACTERS]
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        link = repository / "snapshots" / revision / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(file.absolute())
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
