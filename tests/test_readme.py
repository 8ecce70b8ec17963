"""What the README says has to work."""

from __future__ import annotations

import re
import shlex
import warnings
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from esper.cli import main
from esper.settings import parse_settings

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def test_both_commands_stand_at_the_top() -> None:
    first = TEXT.index("```bash")
    assert TEXT.index("./scripts/train") < TEXT.index("./scripts/test") < TEXT.index("```python")
    assert TEXT[:first].count("\n") < 8


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippets_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPER_RUNTIME_DIR", str(tmp_path / "runtime"))
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers is not about the snippet
        exec(compile(SNIPPETS[index], f"README.md snippet {index}", "exec"), names)
    assert "plain" in names
    if "callback" in names:
        assert names["callback"].summary()["seeds_germinated"] > 0  # type: ignore[attr-defined]
        assert names["trainer"].callback_metrics["test_acc"] > 0.9  # type: ignore[attr-defined]


def test_the_first_example_is_short() -> None:
    assert len([line for line in SNIPPETS[0].splitlines() if line.strip()]) <= 15


def test_every_command_named_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out
    for command in set(re.findall(r"`esper (\w+)", TEXT)):
        # a long name has a line of its own
        assert re.search(rf"^    {command}\s", listed, flags=re.MULTILINE), command


def test_every_train_command_composes() -> None:
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", TEXT, flags=re.DOTALL))
    lines = re.findall(r"^esper train (.*?)(?:\s+#.*)?$", blocks, flags=re.MULTILINE)
    assert lines
    with initialize_config_module("esper.conf", version_base="1.3"):
        for line in lines:
            overrides = [argument.split(",")[0] for argument in shlex.split(line) if argument != "-m"]
            config = OmegaConf.to_container(compose("train", overrides), resolve=True)
            assert isinstance(config, dict)
            parse_settings({str(key): value for key, value in config.items()})


def test_the_map_names_every_folder() -> None:
    for folder in (ROOT / "esper").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            assert f"`esper/{folder.name}/`" in TEXT, folder.name
