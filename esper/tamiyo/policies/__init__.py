"""Growth policies, one a module, behind :class:`esper.tamiyo.state.Policy`; made by name."""

from esper.tamiyo.policies.registry import make_policy, policy_names

__all__ = ["make_policy", "policy_names"]
