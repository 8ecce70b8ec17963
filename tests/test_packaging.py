"""pyproject's explicit package list has to follow the folders, or a wheel silently lacks modules."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def code_packages() -> set[str]:
    found = {"esper.callbacks", "esper.conf"}
    for module in (ROOT / "esper").rglob("*.py"):
        found.add(".".join(module.parent.relative_to(ROOT).parts))
    return found


def config_packages() -> set[str]:
    """Folders of the config below its root; they hold no Python, but setuptools counts them."""
    folders = (path for path in (ROOT / "conf").rglob("*") if path.is_dir() and path.name != "__pycache__")
    return {".".join(("esper", *folder.relative_to(ROOT).parts)) for folder in folders}


def test_package_list_equals_the_folders() -> None:
    listed = set(PROJECT["tool"]["setuptools"]["packages"])
    assert listed == code_packages() | config_packages() | {"esper.docs", "esper.tamiyo.weights"}


@pytest.mark.parametrize("package", sorted(code_packages()))
def test_every_package_has_an_init(package: str) -> None:
    folders = PROJECT["tool"]["setuptools"]["package-dir"]
    folder = ROOT / folders.get(package, package.replace(".", "/"))
    assert (folder / "__init__.py").is_file()


def test_config_files_are_packaged() -> None:
    assert PROJECT["tool"]["setuptools"]["package-data"]["*"] == ["*.yaml"]
    others = [
        path
        for path in (ROOT / "conf").rglob("*")
        if path.is_file() and path.suffix not in (".yaml", ".py", ".pyc")
    ]
    assert others == []


def test_extras_that_messages_name_exist() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"wandb", "tensorboard", "mlflow", "onnx"} <= set(extras)


def test_no_file_holds_a_machine_path() -> None:
    for folder in ("esper", "callbacks", "conf", "scripts", ".ci"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and path.suffix not in (".pyc", ".so", ".safetensors"):
                text = path.read_text(encoding="utf-8")
                assert "/work/" not in text, path
                assert "/home/" not in text, path
