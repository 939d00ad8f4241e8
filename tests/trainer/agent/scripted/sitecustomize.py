"""Substitutes ``acts.py`` for two stage kinds: pretrain, whose ranks form a gang, and corpus, a task."""

import importlib.util
import sys
from pathlib import Path

_ACTS = Path(__file__).with_name("acts.py")
_PACKAGES = ("headrace_trainer.stages.pretrain", "headrace_trainer.stages.corpus")


class _Finder:
    @staticmethod
    def find_spec(name, _path=None, _target=None):
        if name in _PACKAGES:
            return importlib.util.spec_from_file_location(name, _ACTS, submodule_search_locations=[])
        if name.removesuffix(".stage") in _PACKAGES:
            return importlib.util.spec_from_file_location(name, _ACTS)
        return None


sys.meta_path.insert(0, _Finder)
