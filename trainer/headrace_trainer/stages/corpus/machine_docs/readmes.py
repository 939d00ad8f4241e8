"""READMEs, changelogs and licences of installed packages, and the long descriptions in their metadata.

In: site-packages. Out: one ``Found`` per text, by path.
"""

import email
import email.policy
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from headrace_trainer.stages.corpus.machine_docs.found import Found, clean_text

_SUFFIXES = (".md", ".rst")
_NAMES = ("license", "licence", "copying", "notice", "readme", "changelog", "authors")


def find_readmes() -> Iterator[Found[str]]:
    """Texts ordered by path."""
    root = Path(sysconfig.get_path("purelib"))
    for path in sorted(root.rglob("*")):
        if _is_wanted(path) and (text := _read(path)) is not None:
            yield Found(name=path.relative_to(root).as_posix(), content=text)


def _is_wanted(path: Path) -> bool:
    name = path.name.lower()
    by_name = name.startswith(_NAMES) and path.suffix.lower() in ("", ".txt", *_SUFFIXES)
    return (path.name == "METADATA" or by_name or path.suffix.lower() in _SUFFIXES) and path.is_file()


def _read(path: Path) -> str | None:
    data = path.read_bytes()
    if path.name != "METADATA":
        return clean_text(data)
    return clean_text(long_description(data).encode())


def long_description(metadata: bytes) -> str:
    """The body of a METADATA file, which package indexes show."""
    payload = email.message_from_bytes(metadata, policy=email.policy.compat32).get_payload(decode=True)
    return payload.decode("utf-8", "ignore") if isinstance(payload, bytes) else ""
