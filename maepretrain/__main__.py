"""`python -m maepretrain` is the same as `maepretrain`."""

from maepretrain.cli import console

console()
