"""The store of newest versions: it converges whatever order events arrive in, and however often."""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from headrace_operator.body.store import Entry, Store

SEED = int(os.environ.get("HEADRACE_SEED", random.randrange(10**6)))


@dataclass(frozen=True)
class News:
    """What a watch says of an object."""

    name: str
    uid: str
    version: int
    deleted: bool = False


def tell(store: Store[str, int], news: News) -> None:
    if news.deleted:
        store.drop(news.name, uid=news.uid, version=news.version)
    else:
        store.put(news.name, Entry(uid=news.uid, version=news.version, value=news.version))


def put(store: Store[str, int], uid: str, version: int) -> bool:
    return store.put("a", Entry(uid=uid, version=version, value=version))


def test_the_deletion_of_an_object_leaves_the_one_that_took_its_name() -> None:
    store: Store[str, int] = Store()
    assert put(store, "old", 1) and put(store, "new", 3)
    assert store.drop("a", uid="old", version=2) is None
    assert store.get("a") == 3


@pytest.mark.parametrize("version", [1, 4, 5])
def test_what_is_gone_does_not_come_back(version: int) -> None:
    store: Store[str, int] = Store()
    put(store, "old", 4)
    assert store.drop("a", uid="old", version=5) == 4
    assert not put(store, "old", version)
    assert store.get("a") is None


def test_an_object_that_a_selector_misses_for_a_while_comes_back() -> None:
    """A watch with a selector calls it deleted when its labels no longer match."""
    store: Store[str, int] = Store()
    put(store, "one", 4)
    store.drop("a", uid="one", version=5)
    assert put(store, "one", 6)


def test_an_object_that_was_replaced_unseen_does_not_come_back() -> None:
    store: Store[str, int] = Store()
    put(store, "old", 1)
    put(store, "new", 9)
    store.drop("a", uid="new", version=10)
    assert not put(store, "old", 5)


def test_a_list_forgets_what_it_does_not_have_but_for_what_is_newer_than_it() -> None:
    store: Store[str, int] = Store()
    for name, version in (("listed", 1), ("ghost", 2), ("just made", 11)):
        store.put(name, Entry(uid=f"uid of {name}", version=version, value=version))
    assert store.keep_only({"uid of listed"}, version=10) == [("ghost", 2)]
    assert sorted(store) == ["just made", "listed"]


def histories(rng: random.Random) -> Iterator[list[News]]:
    """Lives of objects that share three names, one after the other."""
    version = 0
    for name in "abc":
        for life in range(rng.randint(1, 4)):
            uid, news = f"{name}{life}", []
            for _ in range(rng.randint(1, 4)):
                version += 1
                news.append(News(name, uid, version))
            version += 1
            yield [*news, News(name, uid, version, deleted=True)] if life < 3 or rng.random() < 0.5 else news


@pytest.mark.parametrize("trial", range(200))
def test_any_order_of_any_replay_ends_as_the_truth(trial: int) -> None:
    print(f"HEADRACE_SEED={SEED}")
    rng = random.Random(f"{SEED}/{trial}")
    lives = list(histories(rng))
    said = [news for life in lives for news in life]
    said += rng.choices(said, k=len(said))  # a watch that begins anew says it again
    rng.shuffle(said)
    store: Store[str, int] = Store()
    for news in said:
        tell(store, news)
    alive = {life[-1].name: life[-1].version for life in lives if not life[-1].deleted}
    assert {name: store.get(name) for name in store} == alive
