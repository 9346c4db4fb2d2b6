"""fastpoem trains GPT-2 on short texts, classical Chinese poems above all, as fast as the machine allows.

    run = fastpoem.fit("poems.txt", model="uer/gpt2-distil-chinese-cluecorpussmall", device="cuda:7")
    run.generate("春江", count=3)
    fastpoem.Run("runs/x").generate("春江")  # one that was trained before

Rooms, downwards: the commands (train, prepare, generate) call run/, which asks doctor/ what this machine may be trusted with and drives
engine/, which knows model/ and corpus/, which rest on the package fastpoem_kernels (tests/test_imports.py holds it so). Importing fastpoem
imports none of them: torch alone takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastpoem.version import __version__

if TYPE_CHECKING:
    from fastpoem.api import fit as fit
    from fastpoem.corpus.store import TokenStore as TokenStore
    from fastpoem.run.opened import Run as Run

__all__ = ["Run", "TokenStore", "__version__", "fit"]


def __getattr__(name: str) -> Any:
    if name == "fit":
        from fastpoem.api import fit

        return fit
    if name == "TokenStore":
        from fastpoem.corpus.store import TokenStore

        return TokenStore
    if name == "Run":
        from fastpoem.run.opened import Run

        return Run
    raise AttributeError(f"module 'fastpoem' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
