"""What is relied on of jsonargparse and argparse beyond their public names."""

from jsonargparse import ArgumentParser

from maepretrain.parsing.jsonargparse_internals import actions_of, type_of


def function(flag: bool = False, many: list[int] | None = None) -> None:
    """A function.

    Args:
        flag: the text of the flag.
        many: the text of the numbers.
    """


def test_options_of_a_function_have_names_types_defaults_and_texts() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function)
    options = {action.dest: action for action in actions_of(parser)}
    assert type_of(options["flag"]) is bool
    assert options["flag"].default is False
    assert options["flag"].help == "the text of the flag."
    assert options["flag"].option_strings == ["--flag"]
    assert options["many"].help == "the text of the numbers."


def test_an_option_takes_no_value_once_it_is_told_so() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(function)
    for action in actions_of(parser):
        if type_of(action) is bool:
            action.nargs = "?"
            action.const = True
    assert parser.parse_args(["--flag"]).flag is True
    assert parser.parse_args(["--flag", "false"]).flag is False
