"""Language identification with py3langid: naive Bayes over byte n-grams, with the model that ships with the package.

In: a text. Out: an ISO 639 code and its probability.
"""

from functools import lru_cache

from py3langid.langid import MODEL_FILE, LanguageIdentifier

# A few thousand characters are enough: more would cost a millisecond per kilobyte and change nothing.
_JUDGED_CHARACTERS = 4_000


@lru_cache(maxsize=1)
def _identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def identify(text: str) -> tuple[str, float]:
    """The most probable language of the start of ``text``, and its probability in [0, 1]."""
    code, probability = _identifier().classify(text[:_JUDGED_CHARACTERS])
    return str(code), float(probability)


def known_languages() -> list[str]:
    """The codes that ``identify`` can return."""
    return sorted(_identifier().labels)
