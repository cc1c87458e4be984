"""Checks random problems by the thousand, for every program: `make fuzz`.

Problems of matrices and of attention. It goes on where it was stopped. Of a problem
that fails it prints a simple form, on which the program's `check` fails again, and it
ends with status 1. When all have passed it writes tests/fuzz.json: the largest errors.
"""

import argparse
import json
import os
import pathlib
import sys

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from support import random_attention, random_matrices
from support.properties import check_many
from support.xla_flags import compile_quickly

NETS = (random_matrices, random_attention)
SUMMARY = pathlib.Path(__file__).with_suffix(".json")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    default = pathlib.Path("runs") / "fuzz.json"
    parser.add_argument("--output", type=pathlib.Path, default=default)
    options = parser.parse_args()
    # Set XLA_FLAGS, for instance to nothing, to check fully optimised code.
    compile_quickly()
    jax.config.update("jax_enable_x64", True)
    programs = [program for net in NETS for program in net.every_program()]
    # Those that are compared with the same one after each other.
    programs.sort(key=lambda program: program.oracle.name)
    each = -(-options.examples // len(programs))
    about = {"seed": options.seed, "examples": each, "jax": jax.__version__}
    about["xla_flags"] = os.environ["XLA_FLAGS"]
    done = about | {"worst": {}}
    if options.output.exists():
        before = json.loads(options.output.read_text())
        if {name: before.get(name) for name in about} == about:
            done = before
    options.output.parent.mkdir(parents=True, exist_ok=True)
    has_failed, oracle = False, None
    for number, program in enumerate(programs, start=1):
        if program.name in done["worst"]:
            continue
        if program.oracle != oracle:
            oracle = program.oracle
            for net in NETS:
                net.compiled.cache_clear()
            jax.clear_caches()
        print(f"[{number}/{len(programs)}] {program.name}", flush=True)
        try:
            worst = check_many(program, each, options.seed)
        except Exception as error:
            has_failed = True
            print(f"Failed with --seed {options.seed}: {error}")
            print(*getattr(error, "__notes__", ()), sep="\n", flush=True)
            continue
        done["worst"][program.name] = {
            name: float(f"{error:.2g}") for name, error in worst.items()
        }
        options.output.write_text(json.dumps(done, indent=1) + "\n")
    if not has_failed:
        SUMMARY.write_text(json.dumps(about | summary(programs, done), indent=1) + "\n")
    return has_failed


def summary(programs, done):
    """The number of programs and problems, and the largest errors of each kind."""
    largest = {}
    for program in programs:
        net = "attention" if program.name.startswith("attention") else "matrices"
        kind = f"{net}, {program.implementation}, {program.dtype}"
        errors = largest.setdefault(kind, {})
        for name, error in done["worst"][program.name].items():
            errors[name] = max(error, errors.get(name, 0.0))
    num_problems = len(programs) * done["examples"]
    return {"programs": len(programs), "problems": num_problems, "largest": largest}


if __name__ == "__main__":
    sys.exit(main())
