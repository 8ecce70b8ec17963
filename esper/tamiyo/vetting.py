"""Check a decision against budgets and safety before it is applied."""

from __future__ import annotations

from esper.errors import EsperError
from esper.kasmina.body import Body
from esper.messages import Decision
from esper.tamiyo.ledger import Ledger

__all__ = ["refusal"]


def refusal(
    decision: Decision, *, body: Body, ledger: Ledger, step: int, total_steps: int, epoch: int, halted: str
) -> str:
    """Why ``decision`` may not be applied; empty when it may.

    Args:
        decision: From a policy, a user or the bus: nothing in it is trusted.
        body: The host.
        ledger: Budgets, cooldowns, embargoes.
        step: Optimizer steps so far.
        total_steps: Length of the run.
        epoch: Current epoch.
        halted: Why the governor has stopped growth; empty when it has not.
    """
    if decision.action == "germinate":
        if halted:
            return f"the governor has stopped growth: {halted}"
        return _refuse_germination(decision, body, ledger, step, total_steps, epoch)
    if decision.action in ("cull", "hold"):
        seed = next((seed for seed in body.seeds if seed.seed_id == decision.site), None)
        if seed is None:
            return f"there is no seed {decision.site!r}"
        if decision.action == "hold" and seed.stage != "holding":
            return f"seed {decision.site} is {seed.stage}, and only one that is holding can be held"
    if decision.action == "recycle" and decision.site not in body.topology.layer_names:
        return f"there is no layer {decision.site!r}"
    return ""


def _refuse_germination(
    decision: Decision, body: Body, ledger: Ledger, step: int, total_steps: int, epoch: int
) -> str:
    try:
        site = body.site(decision.site)
        size = decision.size or body.default_size(site, decision.blueprint)
        price = body.cost(site, decision.blueprint, size)
    except EsperError as error:
        return str(error)
    closed = ledger.unavailable(site.name, step)
    if closed:
        return f"site {site.name} is {closed}"
    alive = [seed for seed in body.seeds if seed.stage != "fossilized"]
    if any(seed.site.name == site.name for seed in alive):
        return f"site {site.name} holds a seed that is still on its way"
    if len(alive) >= ledger.budget.max_seeds_alive:
        return f"{len(alive)} seeds are alive, as many as max_seeds_alive allows"
    if ledger.germinations_left(epoch) <= 0:
        return f"epoch {epoch} has had its {ledger.budget.max_germinations_per_epoch} germinations"
    left = ledger.parameters_left(body)
    if price.parameters > left:
        return f"{price.parameters} parameters are more than the {max(0, left)} that the budget leaves"
    samples_left = ledger.num_samples / max(1, step) * max(0, total_steps - step)
    added = 3.0 * price.flops * samples_left
    if added > ledger.flops_left(step, total_steps):
        return f"{added:.3g} training FLOPs are more than the budget leaves"
    return ""
