"""How often a model is compiled while it grows, and dynamo's limit on that."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import _dynamo as dynamo

__all__ = ["CompilationWatch"]

_MARGIN = 2
"""Compilations of one function that are left when the limit is raised: a growth takes one in training and one in
validation."""


class CompilationWatch:
    """Counts what ``torch.compile`` compiles during a ``fit``, and keeps growth clear of the recompile limit.

    Growth changes what a compiled function computes, so dynamo compiles it anew. After
    ``torch._dynamo.config.recompile_limit`` versions of one function (8) dynamo gives up on it and runs it
    eagerly for good; a growing run comes there by rights. The limit is therefore raised in time, with a
    warning that says so, and is put back when the run ends.

    Attributes:
        num_compilations: Functions compiled, in this process and by whomever, since :meth:`start`.
        num_recompilations: Those of them that had been compiled before.
    """

    def __init__(self) -> None:
        self.num_compilations = 0
        self.num_recompilations = 0
        self._versions: dict[str, int] = {}
        self._told = 0
        self._limit_before: int | None = None

    @property
    def most_versions(self) -> int:
        """How often the function was compiled that was compiled most often."""
        return max(self._versions.values(), default=0)

    def start(self) -> None:
        """Begin to count from zero."""
        self.stop()
        self.num_compilations = self.num_recompilations = self._told = 0
        self._versions = {}
        dynamo.callback_handler.register_start_callback(self._note)

    def stop(self) -> None:
        """Stop counting, and put dynamo's limit back."""
        if self._note in dynamo.callback_handler.start_callbacks:
            dynamo.callback_handler.remove_start_callback(self._note)
        if self._limit_before is not None:
            dynamo.config.recompile_limit, self._limit_before = self._limit_before, None

    def news(self, *, grown: bool) -> dict[str, Any] | None:
        """What was compiled anew since the last call, for the journal; raises dynamo's limit when it is near.

        Args:
            grown: Whether the model has ever carried a seed; without one the limit is the user's affair.
        """
        if (
            self._note not in dynamo.callback_handler.start_callbacks
        ):  # the user has called torch.compiler.reset()
            dynamo.callback_handler.register_start_callback(self._note)
        if self.num_recompilations == self._told:
            return None
        self._told = self.num_recompilations
        if grown:
            self._keep_clear_of_limit()
        return {
            "compilations": self.num_compilations,
            "recompilations": self.num_recompilations,
            "versions_of_one_function": self.most_versions,
            "recompile_limit": dynamo.config.recompile_limit,
        }

    def _note(self, args: Any) -> None:
        if args.callback_trigger.name != "DYNAMO":
            return  # a backward that is compiled late, autotuning: part of a compilation that was counted
        function, _, version = str(args.compile_id).rpartition("/")
        if not version.isdigit():
            return  # a further attempt at the same compilation
        number = int(version)
        self.num_compilations += 1
        self.num_recompilations += number > 0
        self._versions[function] = number + 1

    def _keep_clear_of_limit(self) -> None:
        limit = int(dynamo.config.recompile_limit)
        if self.most_versions + _MARGIN < limit:
            return
        raised = 2 * limit
        if self._limit_before is None:
            self._limit_before = limit
            rank_zero_warn(
                f"a compiled function has been compiled {self.most_versions} times, because seeds changed what it "
                f"computes; at torch._dynamo.config.recompile_limit = {limit} dynamo would run it uncompiled for the "
                f"rest of the run. esper raises the limit to {raised}, and further as the model grows, until the run "
                "ends. To choose it yourself, set torch._dynamo.config.recompile_limit before trainer.fit; to "
                "recompile less, compile blocks of the model instead of the whole, or grow less often "
                "(budget.site_cooldown_steps). TORCH_LOGS=recompiles shows the reason of each"
            )
        dynamo.config.recompile_limit = raised
