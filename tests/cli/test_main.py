"""The command line: help without torch, names of configs, one line for every mistake."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maepretrain import __version__
from maepretrain.cli.main import VERBS, check_torch_pair
from maepretrain.parsing import UserError, find_config, shipped_configs

Run = Callable[..., int]


def python(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=cwd
    )


def test_help_needs_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from maepretrain.cli.main import main; main(['--help']); "
        "print(sorted(sys.modules))"
    )
    done = python("-c", code)
    assert "maepretrain VERB" in done.stdout
    for heavy in ("torch", "lightning", "numpy", "jsonargparse"):
        assert f"'{heavy}'" not in done.stdout


def test_python_dash_m_is_the_same(tmp_path: Path) -> None:
    done = python("-m", "maepretrain", "--version", cwd=tmp_path)
    assert done.stdout.strip() == __version__


def test_every_verb_is_in_the_help(run_cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out or f"maepretrain {verb} " in out for verb in VERBS)


@pytest.mark.parametrize(
    "verb",
    [
        *(["pretrain"], ["finetune"], ["probe"], ["quickstart"], ["shards", "write"], ["embed"]),
        *(["reconstruct"], ["denoise"], ["search"], ["generate", "sample"]),
        *(["generate", "interpolate"], ["generate", "traverse"]),
    ],
)
def test_every_option_is_documented(
    verb: list[str], run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(*verb, "--help")
    assert stop.value.code == 0
    options = capsys.readouterr().out.partition("options:")[2].split("\n  --")[1:]
    assert options
    for option in options:
        name, _, rest = " ".join(option.split()).partition(" ")
        # "--name METAVAR description (type: ...)": more words than the metavariable before the type
        if not name.startswith(("trainer", "print_config")) and ".help" not in name:
            words = rest.partition(" (type")[0].partition(" (required")[0].split()
            assert len(words) > 2 or name in {"data", "optim"}, f"--{name} has no description"


def test_configs_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert find_config("mae/digits").read_text() == find_config("mae/digits.yaml").read_text()
    own = tmp_path / "my.yaml"
    own.write_text("seed: 3\n")
    assert find_config(str(own)) == own
    for wrong in ("mae/nothing", "../pyproject", "/etc/passwd"):
        if not Path(wrong).is_file():
            with pytest.raises(UserError, match="no config file"):
                find_config(wrong)
    assert {"mae/digits", "mae/fashion_mnist", "mae/vit_base", "mae/fast"} <= set(shipped_configs())


def test_print_config_is_yaml_that_resolves(
    run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli("pretrain", "-c", "mae/digits", "--optim.base_lr", "0.5", "--print_config")
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["optim"]["base_lr"] == 0.5
    assert config["model"]["init_args"]["mask_ratio"] == 0.6
    assert config["data"]["scale"] is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["pretrian"], "no verb pretrian"),
        (["shards"], "one of: write, index"),
        (["shards", "write", "nowhere", "out"], "no such folder: nowhere"),
        (["shards", "index", "nowhere/*.tar"], "no shard matches nowhere/*.tar"),
        (["pretrain"], "model"),
        (["probe", "--encoder", "nowhere"], "nowhere is no run folder"),
        (["probe"], "encoder"),
        (["quickstart", "--epochs", "many"], "epochs"),
    ],
)
def test_mistakes_are_one_line(
    argv: list[str], line: str, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("maepretrain: error: ")
    assert line in error
    assert error.count("\n") == 1


def test_the_installed_pair_of_torch_and_torchvision_belongs_together() -> None:
    check_torch_pair()


def test_a_broken_pair_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    installed = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "2.1.0" if name == "torch" else installed(name)
    )
    with pytest.raises(UserError, match=r"but torch 2\.1\.0 is installed"):
        check_torch_pair()
