"""How many programs XLA compiles."""

import contextlib
from collections.abc import Iterator

import jax

_NAMES = []


def _listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
    del duration_secs, kwargs
    if event == "/jax/core/compile/backend_compile_duration":
        _NAMES.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


class Counter:
    """The programs that were compiled since it was made."""

    def __init__(self) -> None:
        self._before = len(_NAMES)

    @property
    def count(self) -> int:
        return len(_NAMES) - self._before


@contextlib.contextmanager
def no_compilation() -> Iterator[None]:
    """Fails if something is compiled inside."""
    compiled = Counter()
    yield
    assert compiled.count == 0, f"{compiled.count} programs were compiled"
