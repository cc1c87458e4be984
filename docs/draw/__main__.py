"""Draws all pictures of the documentation into docs/pictures.

python -m docs.draw
"""

from . import curves, diagrams, plans, style

if __name__ == "__main__":
    for module in (plans, curves, diagrams):
        for name, draw in module.PICTURES.items():
            style.save(draw(), name)
