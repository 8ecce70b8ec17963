"""The doctor looks at every host of the table: it finds the sites that attaching finds, and changes nothing."""

from __future__ import annotations

import pytest
import torch
from hosts import host, host_names
from torch import nn

import esper
from esper import TamiyoCallback

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")


@pytest.mark.parametrize("name", host_names())
def test_the_doctor_tells_the_sites_of(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = host(name)
    module = case.build(dropout=True)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    classes = [type(part) for part in module.modules()]
    random = torch.get_rng_state()
    found = TamiyoCallback(bus=None).doctor(module, case.batches(1)[0])
    assert torch.equal(torch.get_rng_state(), random)
    assert [type(part) for part in module.modules()] == classes
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    body = esper.attach(case.net(module), case.example())
    prefix = f"{case.network}." if case.network else ""
    told = {(entry.site.kind, entry.site.source, entry.site.target) for entry in found.diagnosis.sites}
    attached = {(s.kind, f"{prefix}{s.source}", f"{prefix}{s.target}") for s in body.sites}
    assert told == attached
    assert found.healthy == bool(attached)
    _every_layer_is_accounted_for(module, found.diagnosis.refused, {target for _, _, target in told})
    assert "Can grow:" in capsys.readouterr().out


def _every_layer_is_accounted_for(module: nn.Module, refused: dict[str, str], growing: set[str]) -> None:
    """A layer with weights of its own can grow, is refused with a reason, or lies inside or around one of these."""
    known = growing | set(refused)
    for name, part in module.named_modules():
        if not name or not list(part.parameters(recurse=False)):
            continue
        inside = any(name.startswith(f"{other}.") for other in known)
        around = any(other.startswith(f"{name}.") for other in known)
        assert name in known or inside or around, name
    assert all(reason for reason in refused.values())
