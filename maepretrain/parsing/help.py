"""Help that fits on a screen and a half: `--help`, `--help all` and `--help WORD`."""

import shutil
import textwrap
from typing import Any

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
        "crop.scale",
        "crop.flip",
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
# Options of a section at the most.
MOST = 10
TITLES = {
    "data": "Data: shards in, batches out",
    "model": "Model",
    "optim": "Optimizer and schedule",
    "trainer": "Trainer (Lightning)",
}


def help_text(parser: Any, argv: list[str], word: str | None) -> str:
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


def _short(parser: Any, options: list[Option], argv: list[str]) -> str:
    sections: dict[str, list[Option]] = {}
    lines = []
    for option in options:
        if option.section in MATTER:
            sections.setdefault(option.section, []).append(option)
        else:
            lines.append(_line(option))
    for name in MATTER:
        if name in sections:
            title = TITLES[name]
            if name in parser.classes:
                title = f"{title}: {chosen_class(parser, name, argv)}"
            lines += _section(name, title, sections[name])
    lines += ["", "--help all: every option in full.   --help WORD: options that have the word."]
    return "\n".join(lines)


def _section(name: str, title: str, options: list[Option]) -> list[str]:
    """The options of a section that matter, under its title."""
    matter = [f"{name}.{option}" for option in MATTER[name]]
    shown = [option for option in options if option.name in matter]
    # Of another class than the masked autoencoder, the first ones.
    shown = shown or options[:MOST]
    head = f"{title} ({len(shown)} of {len(options)} options)"
    return ["", head, *(_line(option) for option in shown)]


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
