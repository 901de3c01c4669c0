"""What a user gets from a wheel: the configs travel inside it and are found from anywhere."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_configs_travel_inside_the_wheel(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--quiet",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("maepretrain-*.whl")
    inside = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(inside)
    # The checkout itself is not on the path: -P keeps the current folder out, cwd is elsewhere.
    code = (
        f"import sys; sys.path.insert(0, {str(inside)!r})\n"
        "import maepretrain, maepretrain.parsing.configs as arguments\n"
        "print(maepretrain.__file__, arguments.find_config('recipe/mae_digits'))"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )
    package, config = done.stdout.split()
    assert Path(package).is_relative_to(inside)
    assert Path(config) == inside / "maepretrain" / "configs" / "recipe" / "mae_digits.yaml"
    assert (inside / "maepretrain" / "report" / "page.html").is_file()
    assert Path(config).read_bytes() == (ROOT / "configs/recipe/mae_digits.yaml").read_bytes()
