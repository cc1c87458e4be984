"""Counts the changes of the code that the tests notice: `make mutation`.

Changes the code in one place at a time, such as `<` to `<=`, and runs the tests of its
part, with cosmic-ray. All places would take days, so a random sample is drawn for each
part. It goes on where it was stopped, in two processes, each with a
copy of the tracked files in runs/mutation. When all are done, or with `--summary`,
writes tests/mutation.json: the score, and each change that no test noticed.
"""

import argparse
import ast
import functools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
from typing import Final, NamedTuple

ROOT: Final = pathlib.Path(__file__).resolve().parents[1]
WORK: Final = ROOT / "runs" / "mutation"
NUM_PROCESSES: Final = 2


class Part(NamedTuple):
    """Modules of one purpose, and the tests that should notice a change in them."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]  # Those that notice most come first.


_SHARED: Final = (
    "_api.py",
    "_problem.py",
    "_reference.py",
    "_scaling.py",
    "_validate.py",
)
_MATRIX: Final = "tests/package/matrix"
_CHECKIFY: Final = "tests/package/test_checkify.py"
_ATTENTION: Final = tuple(
    f"tests/package/attention/test_{name}.py"
    for name in (
        "values gradients padding rounding scale bad_input marginals patterns streaming"
    ).split()
)
PARTS: Final = {
    "core": Part(("_core",), (_MATRIX, *_ATTENTION, _CHECKIFY)),
    "matrix": Part(tuple(f"matrix/{x}" for x in _SHARED), (_MATRIX, _CHECKIFY)),
    "attention": Part(
        tuple(
            f"attention/{name}"
            for name in (
                *_SHARED,
                *(
                    "_call.py",
                    "_heads.py",
                    "_marginals.py",
                    "_pattern.py",
                    "_streaming",
                ),
            )
        ),
        (*_ATTENTION, _CHECKIFY, "tests/package/flax"),
    ),
    "collapse": Part(("collapse",), ("tests/package/collapse",)),
}
# Of the replacements of an operator one is enough. A decorator such as `jax.jit`
# changes no result.
ONE_OF_EACH: Final = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|FloorDiv_Mul|Mod_Mul"
    r"|Pow_Mul|BitOr_BitAnd|BitAnd_BitOr)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt"
    r"|Is_IsNot|IsNot_Is)"
    r"|ReplaceUnaryOperator_(Delete_\w+|USub_UAdd)|AddNot|ReplaceTrueWithFalse"
    r"|ReplaceFalseWithTrue|ReplaceAndWithOr|ReplaceOrWithAnd|ExceptionReplacer"
    r"|NumberReplacer|ZeroIterationForLoop)"
)
# A change that makes the tests hang is noticed.
TIMEOUT_S: Final = 900


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, default=50, help="Changes of each part.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--summary", action="store_true", help="Run nothing.")
    options = parser.parse_args()
    if not options.summary:
        for name in options.parts:
            _run(name, options.sample, options.seed)
    summary = _summary(options.sample, options.seed)
    path = ROOT / "tests" / "mutation.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")


def _run(name, sample, seed):
    """Runs the changes of one part that were not run before, in all processes."""
    running = []
    for process in range(NUM_PROCESSES):
        folder = WORK / str(process)
        _copy(folder)
        config = folder / f"{name}.toml"
        session = WORK / f"{name}-{sample}-{seed}-{process}.sqlite"
        config.write_text(_config(PARTS[name]))
        if not session.exists():
            _tool(folder, "init", config, session)
            _draw(session, folder, sample, seed, process)
        running.append(_tool(folder, "exec", config, session, wait=False))
    for each in running:
        each.wait()


def _copy(folder):
    """Makes the folder a copy of the tracked files, each as it is now."""
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def _tool(folder, *args, wait=True):
    command = [pathlib.Path(sys.executable).with_name("cosmic-ray"), *map(str, args)]
    environment = os.environ | {
        # Bytecode of a changed module may be taken for that of another change.
        "PYTHONDONTWRITEBYTECODE": "1",
        # Most programs of the tests stay the same.
        "JAX_COMPILATION_CACHE_DIR": str(WORK / "programs"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    process = subprocess.Popen(command, cwd=folder, env=environment)
    if wait and process.wait():
        sys.exit(f"{command} failed.")
    return process


def _config(part):
    # Tests import the copy, which is the folder in which they run.
    test = f"{sys.executable} -m pytest -x -n0 -p no:cacheprovider -m 'not slow'"
    modules = [f"sinkhorn_jax/{module}" for module in part.modules]
    return "\n".join(
        (
            "[cosmic-ray]",
            f"module-path = {json.dumps(modules)}",
            f"timeout = {TIMEOUT_S}",
            "excluded-modules = []",
            f"test-command = {json.dumps(' '.join((test, *part.tests)))}",
            '[cosmic-ray.distributor]\nname = "local"',
        )
    )


def _draw(session, folder, sample, seed, process):
    """Skips all changes but those that this process has of the sample."""
    from cosmic_ray.work_db import use_db
    from cosmic_ray.work_item import WorkerOutcome, WorkResult

    with use_db(session) as db:
        items = [item for item in db.work_items if _counts(item, folder)]
        items.sort(key=lambda item: _place(item.mutations[0]))
        drawn = random.Random(seed).sample(items, min(sample, len(items)))
        kept = {item.job_id for item in drawn[process::NUM_PROCESSES]}
        skipped = [i.job_id for i in db.work_items if i.job_id not in kept]
        db.set_multiple_results(skipped, WorkResult(WorkerOutcome.SKIPPED))


def _place(mutation):
    operator = mutation.operator_name.removeprefix("core/")
    return (str(mutation.module_path), *mutation.start_pos, operator)


def _counts(item, folder):
    (mutation,) = item.mutations
    spans = _annotations(folder / mutation.module_path)
    is_annotation = any(a <= mutation.start_pos <= b for a, b in spans)
    return bool(ONE_OF_EACH.fullmatch(mutation.operator_name)) and not is_annotation


@functools.cache
def _annotations(path):
    """The places of a module's annotations, first and last: they compute nothing."""
    nodes = ast.walk(ast.parse(path.read_text()))
    found = [
        getattr(node, name, None)
        for node in nodes
        for name in ("annotation", "returns")
    ]
    return [
        ((x.lineno, x.col_offset), (x.end_lineno, x.end_col_offset))
        for x in found
        if x is not None
    ]


def _summary(sample, seed):
    """How many changes were noticed in each part, and those that were not."""
    from cosmic_ray.work_db import WorkDB, use_db
    from cosmic_ray.work_item import WorkerOutcome

    parts, survivors = {}, []
    for name in PARTS:
        killed = total = 0
        for session in sorted(WORK.glob(f"{name}-{sample}-{seed}-*.sqlite")):
            with use_db(session, WorkDB.Mode.open) as db:
                results = dict(db.results)
                for item in db.work_items:
                    result = results.get(item.job_id)
                    if result is None or result.worker_outcome == WorkerOutcome.SKIPPED:
                        continue
                    total += 1
                    killed += result.is_killed
                    if not result.is_killed:
                        module, row, _, operator = _place(item.mutations[0])
                        line = {"at": f"{module}:{row}", "operator": operator}
                        survivors.append(line | {"change": _changed(result.diff)})
        if total:
            parts[name] = {"changes": total, "noticed": killed}
    return {"parts": parts, "unnoticed": survivors}


def _changed(diff):
    """The lines of a unified diff that are other."""
    lines = (line for line in diff.splitlines() if not line.startswith(("---", "+++")))
    return [line for line in lines if line.startswith(("-", "+"))]


if __name__ == "__main__":
    main()
