"""What the package needs to be imported, and what its front page promises."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def run(code):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_import_needs_only_jax_and_jaxtyping():
    blocked = ["flax", "optax", "chex", "matplotlib", "tqdm", "tyro", "tokenizers"]
    blocked += ["grain", "sklearn", "tensorflow_datasets"]
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked}))"
    done = run(f"{code}; import sinkhorn_jax, sinkhorn_jax.collapse")
    assert done.returncode == 0, done.stderr


def test_readme_examples_run():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 150
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL))
    done = run(code)
    assert done.returncode == 0, done.stderr
    rows, cols = map(float, done.stdout.split())
    assert abs(rows - 1) < 1e-5
    assert abs(cols - 1) < 1e-5


def test_public_names_are_documented():
    import sinkhorn_jax

    for name in dir(sinkhorn_jax):
        if not name.startswith("_") and callable(value := getattr(sinkhorn_jax, name)):
            assert value.__doc__, name
