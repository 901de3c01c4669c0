"""`python -m maepretrain` is the same as `maepretrain`."""

from maepretrain.cli.main import console

console()
