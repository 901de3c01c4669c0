"""Help that fits on a screen and a half: `--help`, `--help all` and `--help WORD`."""

import shutil
import textwrap

from jsonargparse import ArgumentParser

from maepretrain.parsing.options import Option, chosen_class, options_of

# Of each section the options that matter; the others are shown by `--help all`.
MATTER = {
    "data": (
        "train",
        "val",
        "global_batch",
        "image_size",
        "channels",
        "mean",
        "std",
        "scale",
        "flip",
        "num_workers",
    ),
    "model": (
        "encoder",
        "patch_size",
        "encoder_width",
        "encoder_depth",
        "decoder_width",
        "decoder_depth",
        "decoder",
        "mask_ratio",
        "mask",
        "norm_pix",
    ),
    "optim": (
        "optimizer",
        "base_lr",
        "weight_decay",
        "betas",
        "warmup_epochs",
        "min_lr",
    ),
    "trainer": (
        "max_epochs",
        "max_steps",
        "accelerator",
        "devices",
        "num_nodes",
        "strategy",
        "precision",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "check_val_every_n_epoch",
    ),
}
TITLES = {
    "data": "Data: shards in, batches out",
    "model": "Model",
    "optim": "Optimizer and schedule",
    "trainer": "Trainer (Lightning)",
}


def help_text(parser: ArgumentParser, argv: list[str], word: str | None) -> str:
    """The help of a verb.

    Args:
        parser: of the verb.
        argv: the command line, whose configs may name the class of the model.
        word: None for the options that matter, one line each; "all" for all options in full;
            any other word for the options whose name or text has it.
    """
    options = options_of(parser, argv)
    if word == "all":
        return "\n\n".join(_full(option) for option in options)
    if word is not None:
        return _search(options, word, parser.prog)
    return _short(parser, options, argv)


def _search(options: list[Option], word: str, prog: str) -> str:
    asked = word.lower().lstrip("-").replace("-", "_")
    matching = [o for o in options if asked in o.name.lower() or word.lower() in o.text.lower()]
    if not matching:
        return f"No option of {prog} has {word} in its name or its text; --help all shows them all."
    return "\n\n".join(_full(option) for option in matching)


def _short(parser: ArgumentParser, options: list[Option], argv: list[str]) -> str:
    sections = [name for name in MATTER if any(o.section == name for o in options)]
    own = [option for option in options if option.section not in sections]
    lines = [_line(option) for option in own]
    for name in sections:
        members = [option for option in options if option.section == name]
        matter = [f"{name}.{option}" for option in MATTER[name]]
        shown = [option for option in members if option.name in matter]
        if not shown:
            shown = members[:10]
        title = TITLES[name]
        if name in getattr(parser, "classes", {}):
            title = f"{title}: {chosen_class(parser, name, argv)}"
        lines += ["", f"{title} ({len(shown)} of {len(members)} options)"]
        lines += [_line(option) for option in shown]
    lines += ["", "--help all: every option in full.   --help WORD: options that have the word."]
    return "\n".join(lines)


def _line(option: Option) -> str:
    """Flags, default and the first sentence, cut to the width of the terminal."""
    width = max(80, shutil.get_terminal_size((120, 48)).columns)
    flags = f"  {option.flags}"
    if option.default:
        flags += f" [{option.default}]"
    if len(flags) > 42:
        flags = f"  {option.flags}"
    sentence = option.text.split(". ")[0].removesuffix(".")
    line = f"{flags:<42} {sentence}"
    if len(line) > width:
        line = line[: width - 3].rstrip() + "..."
    return line


def _full(option: Option) -> str:
    about = []
    if option.type:
        about.append(option.type)
    if option.default:
        about.append(f"default {option.default}")
    head = option.flags
    if about:
        head += f"  ({', '.join(about)})"
    text = textwrap.fill(option.text, 96, initial_indent="    ", subsequent_indent="    ")
    return f"{head}\n{text}" if option.text else head
