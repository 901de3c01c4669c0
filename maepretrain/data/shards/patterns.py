"""Which shards a pattern names: braces, globs, files and addresses."""

from glob import glob
from pathlib import Path

from braceexpand import braceexpand

from maepretrain.data.errors import ShardError
from maepretrain.data.stores.cache import ShardCache
from maepretrain.data.stores.remote import is_remote


def expand(patterns: str | list[str], cache: ShardCache | None = None) -> list[str]:
    """Shards of one or several patterns: braces (`a-{000..011}.tar`), globs, plain files,
    addresses.

    In the order of the patterns; sorted within a glob.

    Raises:
        ShardError: a pattern that matches no file, or a command (`pipe:`).
    """
    urls: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        urls += _expand_one(pattern, cache)
    if not urls:
        raise ShardError(f"no shards are named: the patterns are {patterns}")
    doubled = len(urls) - len(set(urls))
    if doubled:
        raise ShardError(f"{doubled} shards are named more than once by {patterns}")
    return urls


def _expand_one(pattern: str, cache: ShardCache | None) -> list[str]:
    if pattern.startswith("pipe:"):
        raise ShardError(
            f"{pattern}: what a command prints has no index and no exact resume; read it with "
            "--data.order.exact false --data.order.allow_pipe"
        )
    pattern = pattern.removeprefix("file://")
    path = Path(pattern).expanduser()
    if not is_remote(pattern):
        if path.is_dir():
            raise ShardError(f"{pattern} is a folder; name its shards: {path / '*.tar'}")
        if path.is_file():  # also a name that holds a brace or a bracket
            return [str(path)]
    try:
        urls = list(braceexpand(pattern))
    except ValueError:
        raise ShardError(f"{pattern}: a brace is not closed or not opened") from None
    return [found for url in urls for found in _existing(url, pattern, cache)]


def _existing(url: str, pattern: str, cache: ShardCache | None) -> list[str]:
    if is_remote(url):
        wild = any(character in url.partition("?")[0] for character in "*[")
        found = (cache or ShardCache()).expand(url) if wild else [url]
        return [one for one in found if not one.endswith(".idx")]
    path = Path(url).expanduser()
    found = [str(path)] if path.is_file() else []
    if not found and any(character in url for character in "*?["):
        # Path.glob would take hidden files too.
        matches = [match for match in glob(str(path)) if not match.endswith(".idx")]  # noqa: PTH207
        found = [match for match in sorted(matches) if Path(match).is_file()]
    if not found:
        raise ShardError(f"no shard matches {url}" + (f" of {pattern}" if url != pattern else ""))
    return found
