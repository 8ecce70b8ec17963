"""A network that learns what candidates are worth from those that were tried to the end.

Its logits are utilities over a temperature, ``logit_c − logit_WAIT = U_c / τ``, so the same weights are a value model
and a policy: PPO goes on from where this ends.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from esper.errors import DataFormatError, LearningError
from esper.tamiyo.graph.data import CandidateGraph
from esper.tamiyo.learning.config import SupervisedConfig
from esper.tamiyo.learning.decision_metrics import Floats, decision_metrics
from esper.tamiyo.learning.loss import risk_loss, urgency_loss
from esper.tamiyo.learning.packed import batch
from esper.tamiyo.learning.rows import ValueRow
from esper.tamiyo.network.distribution import CandidateDistribution

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

__all__ = ["FitResult", "evaluate", "fit", "predict", "supervised_loss"]


@dataclass(frozen=True)
class FitResult:
    """How a fit went.

    Attributes:
        best_epoch: Whose weights the network has now; 0 means those it began with.
        history: Training loss and validation metrics of every epoch, the first before any training.
        metrics: Of the best epoch.
    """

    best_epoch: int
    history: tuple[dict[str, float], ...]

    @property
    def metrics(self) -> dict[str, float]:
        """Of the best epoch."""
        return self.history[self.best_epoch]


class _Batch(NamedTuple):
    graphs: CandidateGraph
    utility: Tensor
    stderr: Tensor
    harm: Tensor
    urgency: Tensor
    tried: Tensor


def fit(
    network: nn.Module,
    train: Sequence[ValueRow],
    validation: Sequence[ValueRow],
    config: SupervisedConfig | None = None,
    *,
    logger: Logger | None = None,
) -> FitResult:
    """Fit a network to tried candidates, and leave it with the weights of the best epoch, in eval mode.

    With ``config.keep`` of ``last`` the last epoch counts as the best. Else the best epoch has the smallest loss on
    ``validation``: the regret of some dozens of hosts jumps from epoch to epoch, and the regret of drawing from
    the policy falls with mere boldness. Torch's global random numbers stay as they are.

    Args:
        network: Maps a batch of graphs to a :class:`~esper.tamiyo.network.network.PolicyOutput`.
        train: Rows to learn from.
        validation: Rows of other hosts, to stop by.
        config: Settings.
        logger: Gets every epoch's metrics.

    Raises:
        DataFormatError: No rows, or a host in both sets.
        LearningError: A loss or gradient is not finite.
    """
    config = config or SupervisedConfig()
    _check(train, validation)
    device = next(network.parameters()).device
    optimizer = AdamW(network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
    num_batches = math.ceil(len(train) / config.batch_size)
    total = num_batches * config.max_epochs
    scheduler = LambdaLR(optimizer, lambda step: _warm_cosine(step, num_batches, total))
    generator = np.random.default_rng(config.seed)
    if logger is not None:
        logger.log_hyperparams(asdict(config))
    history = [evaluate(network, validation, config)]
    best, best_weights = 0, copy.deepcopy(network.state_dict())
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        for epoch in range(1, config.max_epochs + 1):
            network.train()
            mean = MeanMetric()
            for part in np.array_split(generator.permutation(len(train)), num_batches):
                loss = supervised_loss(network, [train[i] for i in part], config)
                _descend(network, optimizer, loss, config.gradient_clip_norm, epoch)
                scheduler.step()
                mean.update(float(loss.detach()), weight=len(part))
            metrics = {
                "loss/train": float(mean.compute()),
                **evaluate(network, validation, config),
                "learning_rate": float(scheduler.get_last_lr()[0]),
            }
            history.append(metrics)
            if logger is not None:
                logger.log_metrics(metrics, step=epoch)
            if config.keep == "last" or metrics["loss/validation"] < history[best]["loss/validation"]:
                best, best_weights = epoch, copy.deepcopy(network.state_dict())
            elif epoch - best >= config.patience:
                break
    if logger is not None:
        logger.save()
    network.load_state_dict(best_weights)
    network.eval()
    return FitResult(best, tuple(history))


def supervised_loss(network: nn.Module, rows: Sequence[ValueRow], config: SupervisedConfig) -> Tensor:
    """Loss of a batch, as the mean over its decisions.

    Huber regression of ``U / τ`` weighted by ``f² / (s² + f²)``, s the standard error and f its floor, plus the
    divergence of the policy from ``softmax(U / τ)`` (listwise, Cao et al. 2007), both over the candidates that
    were tried; plus the heads where something was measured for them. The value head learns the soft policy's
    expected utility.
    """
    device = next(network.parameters()).device
    data = _collate(rows, device)
    graphs, num = data.graphs, len(rows)
    output = network(graphs)
    of, tau = graphs.candidate_batch, config.temperature
    oracle = CandidateDistribution(data.utility / tau, data.tried, of, num)
    policy = CandidateDistribution(output.logits, data.tried, of, num)
    wait = policy.flat(torch.zeros(num, dtype=torch.long, device=device))

    delta = config.huber_delta / tau
    gap = output.logits - output.logits[wait][of] - data.utility / tau
    weight = config.stderr_floor**2 / (data.stderr.square() + config.stderr_floor**2)
    # WAIT's utility is 0 by definition: there is nothing to learn from it, and nothing to be proud of
    counted = data.tried.index_fill(0, wait, False)
    errors = weight * F.huber_loss(gap, torch.zeros_like(gap), reduction="none", delta=delta) * counted
    regression = _sum(errors, of, num) / _sum(counted.float(), of, num).clamp(min=1)

    logs = [torch.where(data.tried, p.logprobs, 0.0) for p in (oracle, policy)]
    listwise = _sum(oracle.probs * (logs[0] - logs[1]), of, num)
    soft_value = _sum(oracle.probs * data.utility, of, num)
    value = F.huber_loss(output.value / tau, soft_value / tau, delta=delta)
    return (
        regression.mean()
        + config.listwise_weight * listwise.mean()
        + config.value_weight * value
        + config.risk_weight * risk_loss(output.risk[counted], data.harm[counted])
        + config.urgency_weight * urgency_loss(output.urgency, data.urgency)
    )


@torch.no_grad()
def predict(
    network: nn.Module, rows: Sequence[ValueRow], temperature: float, *, batch_size: int = 64
) -> list[Floats]:
    """Utilities against WAIT that a network predicts, in nats: of each row [C]."""
    network.eval()
    device = next(network.parameters()).device
    found: list[Floats] = []
    for start in range(0, len(rows), batch_size):
        graphs = [row.graph for row in rows[start : start + batch_size]]
        logits = network(batch(graphs).to(device)).logits.double().cpu().numpy()
        ends = np.cumsum([graph.num_candidates for graph in graphs])
        found += [temperature * (own - own[0]) for own in np.split(logits, ends[:-1])]
    return found


def evaluate(network: nn.Module, rows: Sequence[ValueRow], config: SupervisedConfig) -> dict[str, float]:
    """Metrics of :func:`~esper.tamiyo.learning.decision_metrics.decision_metrics`, and ``loss/validation``."""
    predicted = predict(network, rows, config.temperature)
    mean = MeanMetric()
    with torch.no_grad():
        for start in range(0, len(rows), config.batch_size):
            part = rows[start : start + config.batch_size]
            mean.update(float(supervised_loss(network, part, config)), weight=len(part))
    return {**decision_metrics(predicted, rows), "loss/validation": float(mean.compute())}


def _check(train: Sequence[ValueRow], validation: Sequence[ValueRow]) -> None:
    if not train or not validation:
        raise DataFormatError(
            f"expected rows to learn from and rows to stop by, got {len(train)} and {len(validation)}"
        )
    both = {row.group for row in train} & {row.group for row in validation} - {""}
    if both:
        raise DataFormatError(
            f"expected hosts to be in one set only, but {min(both)!r} and {len(both) - 1} more are in both; states of "
            "one host are alike: split by host"
        )


def _collate(rows: Sequence[ValueRow], device: torch.device) -> _Batch:
    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(row, name) for row in rows])).float().to(device)

    return _Batch(
        batch([row.graph for row in rows]).to(device),
        joined("utility").nan_to_num(),
        joined("stderr"),
        joined("harm"),
        torch.tensor([row.urgency for row in rows], dtype=torch.float32, device=device),
        joined("tried").bool(),
    )


def _descend(
    network: nn.Module, optimizer: AdamW, loss: Tensor, gradient_clip_norm: float, epoch: int
) -> None:
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(network.parameters(), gradient_clip_norm)
    if not bool(loss.isfinite()) or not bool(norm.isfinite()):
        raise LearningError(
            f"expected a finite loss and gradient in epoch {epoch}, got {float(loss.detach())} and {float(norm)}; "
            "lower learning_rate, or look at the features"
        )
    optimizer.step()


def _warm_cosine(step: int, warm: int, total: int) -> float:
    """Share of the peak learning rate: linear over ``warm`` steps, then half a cosine down to 0."""
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def _sum(values: Tensor, graph: Tensor, num_graphs: int) -> Tensor:
    return values.new_zeros(num_graphs).index_add(0, graph, values)
