"""The command line: help without torch, names of configs, one line for every mistake."""

import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import yaml

from maepretrain import __version__
from maepretrain.cli.main import check_torch_pair
from maepretrain.cli.verbs import VERBS, Verb
from maepretrain.parsing.configs import find_config, shipped_configs
from maepretrain.parsing.errors import UserError
from maepretrain.parsing.help import MATTER
from maepretrain.parsing.options import options_of
from maepretrain.parsing.parser import make_parser
from maepretrain.workflows.pretrain import pretrain_parser

Run = Callable[..., int]
BASE = [
    "-c",
    "data/digits",
    "-c",
    "recipe/mae_digits",
    "--run",
    "nowhere",
    "--data.train",
    "nowhere.tar",
]


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


def test_every_verb_is_in_the_usage(run_cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli("--help") == 0
    out = capsys.readouterr().out
    assert all(f"  {verb.words} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.words)
def test_every_verb_has_its_function(verb: Verb) -> None:
    module, _, name = verb.function.partition(":")
    assert callable(getattr(import_module(module), name))


def help_of(verb: str, *words: str, run_cli: Run, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        run_cli(*verb.split(), "--help", *words)
    assert stop.value.code == 0
    return capsys.readouterr().out


WITH_OPTIONS = [verb.words for verb in VERBS if verb.words not in ("plan", "configs")]


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_every_option_is_documented(
    verb: str, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(verb, "all", run_cli=run_cli, capsys=capsys)
    options = [block for block in text.split("\n\n") if block.startswith("-")]
    assert options or verb.startswith("codec")
    for option in options:
        head, _, description = option.partition("\n")
        assert description.strip() or "trainer" in head, f"{head} has no description"


@pytest.mark.parametrize("verb", WITH_OPTIONS)
def test_help_fits_on_a_screen_and_a_half(
    verb: str, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(verb, run_cli=run_cli, capsys=capsys)
    assert len(text.splitlines()) <= 75
    assert all(len(line) <= 120 for line in text.splitlines())


def test_the_options_that_matter_exist() -> None:
    parser = pretrain_parser(make_parser("pretrain"))
    names = {option.name for option in options_of(parser, [])}
    for section, matter in MATTER.items():
        assert {f"{section}.{name}" for name in matter} <= names


def test_help_finds_options_by_a_word(run_cli: Run, capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("pretrain", "mask", run_cli=run_cli, capsys=capsys)
    assert "--model.mask_ratio" in text
    assert "--optim.base_lr" not in text
    # The text has the word, the name has not.
    assert "--model.norm_pix" not in text
    assert "--model.reconstruct" in text


def test_help_shows_the_arguments_of_the_model_that_a_config_names(
    run_cli: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "sparse.yaml"
    config.write_text("model:\n  class_path: Sparse\n")
    with pytest.raises(SystemExit):
        run_cli("pretrain", "-c", config, "--help")
    out = capsys.readouterr().out
    assert "Model: Sparse" in out
    assert "--model.mask_ratio" not in out


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--optim.base_rl", "3"], "no option --optim.base_rl: did you mean --optim.base_lr?"),
        (["--model.mask_ration", ".5"], "did you mean mask_ratio?"),
        (["--model", "MaskedAutoencode"], "did you mean MaskedAutoencoder?"),
        (["--optim.base_lr", "x"], "Expected a float"),
        (["--zzzz", "3"], "no option --zzzz; --help WORD finds options"),
    ],
)
def test_mistyped_options_name_the_nearest(
    options: list[str], line: str, run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli("pretrain", *BASE, *options) == 2
    assert line in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("optim:\n  base_rl: 3\n", "no option optim.base_rl: did you mean optim.base_lr?"),
        ("sed: 3\n", "no option sed: did you mean seed?"),
        ("trainer:\n  max_epoch: 3\n", "did you mean trainer.max_epochs?"),
        ("model:\n  init_args:\n    mask_ration: .3\n", "did you mean mask_ratio?"),
    ],
)
def test_mistyped_keys_name_the_nearest(
    text: str, line: str, run_cli: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "my.yaml"
    config.write_text(text)
    assert run_cli("pretrain", *BASE, "-c", config) == 2
    assert line in capsys.readouterr().err


def test_configs_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert find_config("data/digits").read_text() == find_config("data/digits.yaml").read_text()
    own = tmp_path / "my.yaml"
    own.write_text("seed: 3\n")
    assert find_config(str(own)) == own
    for wrong in ("mae/nothing", "../pyproject", "/etc/passwd"):
        if not Path(wrong).is_file():
            with pytest.raises(UserError, match="no config file"):
                find_config(wrong)
    assert {
        "data/digits",
        "recipe/mae_digits",
        "eval/finetune_vit",
        "overlay/fast",
    } <= set(shipped_configs())


def test_print_config_is_yaml_that_resolves(
    run_cli: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_cli(
            "pretrain",
            "-c",
            "data/digits",
            "-c",
            "recipe/mae_digits",
            "--optim.base_lr",
            "0.5",
            "--print_config",
        )
    assert stop.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["optim"]["base_lr"] == 0.5
    assert config["model"]["init_args"]["mask_ratio"] == 0.6
    assert config["data"]["crop"]["scale"] is None


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["pretrian"], "no verb pretrian: did you mean pretrain?"),
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
