"""Sections of the options under `data`, and the options of older versions."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from maepretrain.data.module import shard_data
from maepretrain.data.settings import (
    MOVED_OPTIONS,
    SECTIONS,
    Crop,
    OrderSettings,
    translated,
    with_sections,
    without,
)

OLD = {
    "train": "a.tar",
    "scale": None,
    "flip": 0.0,
    "crops_per_image": 2,
    "low_image_size": [8, 8],
    "low_epochs": 3,
    "seed": 5,
    "lanes": 4,
    "max_faults": 0.5,
    "cache": "folder",
    "cache_gb": 7,
    "mean": [0.5],
}
NEW = {
    "train": "a.tar",
    "crop": {"scale": None, "flip": 0.0, "per_image": 2},
    "low_resolution": {"image_size": [8, 8], "epochs": 3},
    "order": {"seed": 5, "streams": 4},
    "max_errors": 0.5,
    "cache": {"folder": "folder", "gigabytes": 7},
    "mean": [0.5],
}


def test_options_of_older_versions_are_translated() -> None:
    assert translated(OLD) == NEW
    assert translated(NEW) == NEW
    # A path of the cache that was left out.
    assert translated({"cache": None}) == {"cache": {"folder": None}}
    # Both at once: a config of an older version below options of this one.
    assert translated({"crop": {"flip": 0.0}, "scale": None}) == {
        "crop": {"flip": 0.0, "scale": None}
    }


def test_each_moved_option_is_one_of_this_version() -> None:
    for new in MOVED_OPTIONS.values():
        section, _, option = new.rpartition(".")
        fields = SECTIONS[section].__dataclass_fields__ if section else {"max_errors"}
        assert option in fields


def test_options_are_left_out_by_name() -> None:
    left = without(NEW, ["crop.scale", "order", "max_errors", "cache.nothing"])
    assert left == {
        "train": "a.tar",
        "crop": {"flip": 0.0, "per_image": 2},
        "low_resolution": {"image_size": [8, 8], "epochs": 3},
        "cache": {"folder": "folder", "gigabytes": 7},
        "mean": [0.5],
    }


def test_sections_become_objects() -> None:
    arguments = with_sections({"train": None, "crop": {"flip": 0.0}, "order": OrderSettings(3)})
    assert arguments == {"train": None, "crop": Crop(flip=0.0), "order": OrderSettings(3)}
    data = shard_data({"train": None, "image_size": 8, "crop": {"val_share": 1.0}})
    assert data.shape == (3, 8, 8)


@pytest.mark.parametrize("old", MOVED_OPTIONS)
def test_an_old_option_is_named_with_the_new_one(
    old: str, run_cli: Callable[..., int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = {
        f"maepretrain: error: {dashes}data.{old} is now {dashes}data.{MOVED_OPTIONS[old]}\n"
        for dashes in ("", "--")
    }
    common = ["-c", "data/digits", "-c", "recipe/mae_digits", "--run", tmp_path / "run"]
    config = tmp_path / "old.yaml"
    config.write_text(yaml.safe_dump({"data": {old: "a"}}))
    for more in ([f"--data.{old}", "a"], [f"--data.{old}=a"], ["-c", config]):
        assert run_cli("pretrain", *common, *more) == 2
        assert capsys.readouterr().err in lines, more


def test_an_evaluation_takes_the_run_of_an_older_version(
    shards: Path, pretrain_tiny: Callable[..., int], run_cli: Callable[..., int], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert pretrain_tiny(run, "--trainer.max_steps", 2) == 0
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text())
    old_names = {new: old for old, new in MOVED_OPTIONS.items() if old != "streams"}
    old: dict[str, object] = {}
    for name, value in config["data"].items():
        if name in SECTIONS:
            old |= {old_names[f"{name}.{option}"]: inside for option, inside in value.items()}
        else:
            old[str(old_names.get(name, name))] = value
    path.write_text(yaml.safe_dump(config | {"data": old}))
    assert run_cli("knn", "--encoder", run, "--out", tmp_path / "out") == 0
    assert run_cli("embed", "--encoder", run, "--out", tmp_path / "index.npz") == 0
    assert pretrain_tiny(run, "--trainer.max_steps", 3, "--resume") == 0
