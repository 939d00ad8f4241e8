"""Laying one piece of a manifest over another, as platform engineers expect of a pod template.

Dicts merge; lists of named things merge by name, volume mounts by path; tolerations and envFrom add up; anything else
is replaced by the upper piece.
"""

from typing import Any

_IDENTITIES = {"volumeMounts": "mountPath", "volumeDevices": "devicePath", "hostAliases": "ip"}
"""List field -> what tells its entries apart, where that is not ``name``."""
_ADDED = frozenset({"tolerations", "envFrom"})
"""List fields whose entries have no identity and do not exclude one another."""
_SOURCES = frozenset(
    {"configMap", "csi", "emptyDir", "ephemeral", "hostPath", "nfs", "persistentVolumeClaim", "projected", "secret"}
    | {"value", "valueFrom"}
)
"""A volume, and a variable, has exactly one of these: the upper piece's replaces the lower one's."""


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``; neither is changed."""
    merged = {k: v for k, v in under.items() if k not in _SOURCES or k in over or _SOURCES.isdisjoint(over)}
    for field, value in over.items():
        merged[field] = _merged(field, merged[field], value) if field in merged else value
    return merged


def _merged(field: str, under: Any, over: Any) -> Any:
    if isinstance(under, dict) and isinstance(over, dict):
        return merge(under, over)
    if isinstance(under, list) and isinstance(over, list):
        return _merged_list(field, under, over)
    return over


def _merged_list(field: str, under: list[Any], over: list[Any]) -> list[Any]:
    if field in _ADDED:
        return [*under, *(entry for entry in over if entry not in under)]
    identity = _IDENTITIES.get(field, "name")
    if not all(isinstance(entry, dict) and identity in entry for entry in [*under, *over]):
        return over
    entries = {entry[identity]: entry for entry in under}
    for entry in over:
        entries[entry[identity]] = merge(entries.get(entry[identity], {}), entry)
    return list(entries.values())
