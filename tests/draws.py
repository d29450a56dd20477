"""hypothesis where it is installed. Elsewhere (a GPU machine) tests that draw their cases are skipped, no others."""

from typing import Any

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Strategies:
        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: self

    st = _Strategies()  # type: ignore[assignment]

    def given(*_: Any, **__: Any) -> Any:  # type: ignore[no-redef]
        def skipped(test: Any) -> Any:
            # Without the arguments that it draws, which are no fixtures.
            @pytest.mark.skip(reason="needs hypothesis")
            def in_its_place() -> None: ...

            in_its_place.__name__ = test.__name__
            return in_its_place

        return skipped

    def settings(*_: Any, **__: Any) -> Any:  # type: ignore[no-redef]
        return lambda test: test


__all__ = ["given", "settings", "st"]
