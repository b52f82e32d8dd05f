"""The command `convert`: the tensors of a pickled checkpoint, as safetensors."""

from __future__ import annotations

import argparse

from ade_harness.cli.answer import Answer
from ade_harness.config.model import CheckpointWeights
from ade_harness.files.reading import expanded
from ade_harness.models.checkpoint.convert import convert
from ade_harness.models.checkpoint.parts import Choice
from ade_harness.runtime.console import make_console, print_fact


def run_convert(options: argparse.Namespace) -> Answer:
    """Write the weights of a file as safetensors; raises as :func:`ade_harness.models.checkpoint.convert.convert`."""
    file, output = expanded(options.file), expanded(options.output)
    weights = None if options.weights is None else CheckpointWeights(options.weights)
    choice = Choice(options.prefix, weights, prefix_option="--prefix ", weights_option="--weights ")
    part, left, digest = convert(file, output, choice)
    console = make_console()
    print_fact(console, "written", f"{output} ({len(part.state)} tensors)")
    if str(part):
        print_fact(console, "taken", str(part))
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        print_fact(console, "not read", f"objects of {shown}")
    print_fact(console, "sha256", digest)
    content = {"output": str(output), "tensors": len(part.state), "sha256": digest}
    return Answer({**content, "part": str(part) or None, "left_out": left})
