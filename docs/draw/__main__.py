"""Draws all pictures of the documentation into docs/pictures.

python -m docs.draw
"""

import jax

from . import curves, diagrams, plans, style

if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    for module in (plans, curves, diagrams):
        for name, draw in module.PICTURES.items():
            style.save(draw, name)
