"""fastpoem trains GPT-2 on short texts, classical Chinese poems above all, as fast as the machine allows.

    run = fastpoem.fit(data="poems.txt", model="uer/gpt2-distil-chinese-cluecorpussmall", device="cuda:7")
    run.generate("春江", count=3)

Rooms, downwards: the commands (train, prepare, generate) call run/, which drives engine/, which knows model/ and corpus/, which rest on
the package fastpoem_kernels. Importing fastpoem imports none of them: torch alone takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastpoem.corpus.store import TokenStore as TokenStore
    from fastpoem.run.fit import Run as Run

__version__ = "0.1.0"
__all__ = ["Run", "TokenStore", "fit"]


def fit(**settings: Any) -> Run:
    """Train; the settings are the flags of `python -m fastpoem.train` with underscores.

    Raises `fastpoem.errors.InputError` for what cannot work, naming the thing, the reason and the mend.
    """
    from fastpoem.config import from_kwargs

    config = from_kwargs(**settings)
    from fastpoem.run.fit import fit as run_fit

    return run_fit(config)


def __getattr__(name: str) -> Any:
    if name == "TokenStore":
        from fastpoem.corpus.store import TokenStore

        return TokenStore
    if name == "Run":
        from fastpoem.run.fit import Run

        return Run
    raise AttributeError(name)
