"""Making the next thing while this one is at work."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def later(make: Callable[[T], R], items: Iterable[T]) -> Iterator[Callable[[], R]]:
    """For each item in order, what gives make(item) or raises its error; a thread makes the next one meanwhile."""
    with ThreadPoolExecutor(1, "ahead") as pool:
        coming: Future[R] | None = None
        for item in items:
            now, coming = coming, pool.submit(make, item)
            if now:
                yield now.result
        if coming:
            yield coming.result


def ahead(make: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """make(item) of each in order; a thread makes the next one while the caller works with this one."""
    return (made() for made in later(make, items))
