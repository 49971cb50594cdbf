"""`python -m xentjax bench`: cases, contenders, timing and report."""

from xentjax._commands.bench.command import run

__all__ = ["run"]
