"""The choice of the checkpoint that a resume goes on from."""

from pathlib import Path

from maepretrain.checkpoints.folder import being_replaced
from maepretrain.checkpoints.saved import read_meta
from maepretrain.ranks import say


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, also where a kill left one without its name."""
    nameless = [old for path, old in being_replaced(folder) if not path.exists()]
    return sorted(folder.glob("[!.]*.ckpt")) + nameless


def choose(folder: Path, asked: str) -> Path | None:
    """The checkpoint to go on from, None where there is none yet.

    Args:
        folder: of a run's checkpoints.
        asked: "last", "best", a path, or "auto": last.ckpt or, where it cannot be read, the one of
            most steps that can.

    Raises:
        ValueError: there is none of that name, or "auto" finds some and none can be read.
    """
    if asked == "auto":
        return _choose_last(folder)
    path = folder / f"{asked}.ckpt" if asked in ("last", "best") else Path(asked)
    if not path.exists():
        raise ValueError(f"ckpt_path {asked}: there is no {path}")
    return path


def _choose_last(folder: Path) -> Path | None:
    """last.ckpt or, where it cannot be read, the checkpoint of most steps."""
    steps: dict[Path, int] = {}
    failure = ""
    for path in checkpoints(folder):
        try:
            steps[path] = int(read_meta(path)["global_step"])
        except ValueError as error:
            failure = str(error)
            say(f"left out      {failure}")
    if not steps:
        if failure:
            raise ValueError(f"{failure}, nor any other of {folder}; put one that can in its place")
        return None
    newest = max(steps, key=lambda path: steps[path])
    # Somebody may have put an older one in its place.
    last = next((path for path in steps if "last.ckpt" in path.name), newest)
    if steps[newest] > steps[last]:
        further = steps[newest] - steps[last]
        say(f"resumed from  {last}; {newest.name} is {further} steps further: --ckpt_path {newest}")
    return last
