"""The name, the setting and the network of a cell, and what it refuses."""

import dataclasses
import re

import pytest
from support import study_double

from experiments.study import dial, more, plan
from experiments.study.cell import Cell, Sizes

# Values that are not the default: of the fields of Sizes that texts and images share,
# of the others, and of those of Cell.
OTHER_SIZES = {
    "width": 64,
    "num_heads": 4,
    "mlp_width": 65,
    "num_train": 20_001,
    "num_validation": 2001,
    "num_measured": 65,
    "batch_size": 65,
    "num_steps": 600,
    "num_observations": 6,
    "seeds": (0, 1),
    "data_seed": 1,
}
OF_TEXTS = {"seq_len": 97, "vocab_size": 4001}
OF_IMAGES = {"patch_size": 2, "has_conv_stem": False, "has_own_projections": True}
OTHER_DESIGN = {
    "num_iters": 10,
    "learning_rate": 0.02,
    "layer_norm": "post",
    "has_skip": False,
    "pooling": "mean",
    "depth": 7,
    "column_tau": 0.5,
}
PLAIN = Cell(sizes=Sizes(), num_iters=0, learning_rate=0.01)


def test_names_are_distinct():
    primary = plan.cells_of(plan.primary())
    # 3 designs of 2 normalisers and 3 rates, without skips, and with the mean.
    assert len({cell.name for cell in primary}) == len(primary) == 5 * 2 * 3
    for cell in primary:  # They are names of files.
        assert re.fullmatch(r"[a-z0-9._-]+", cell.name)


def test_secondary_cells_overwrite_no_primary_ones():
    contrasts = [*plan.primary(), *more.secondary(plan.TEXT, plan.IMAGES)]
    every = plan.cells_of([*contrasts, *dial.contrasts(plan.IMAGES)])
    assert len({cell.name for cell in every}) == len(every)


@pytest.mark.parametrize(
    ("task", "used", "unused"),
    [("imdb", OF_TEXTS, OF_IMAGES), ("fashion_mnist", OF_IMAGES, OF_TEXTS)],
)
def test_the_setting_is_what_decides_the_numbers(task, used, unused):
    fields = lambda kind: {field.name for field in dataclasses.fields(kind)}
    known = {"task", *OTHER_SIZES, *OF_TEXTS, *OF_IMAGES}
    assert fields(Sizes) - {"depth"} == known
    assert fields(Cell) - {"sizes"} == set(OTHER_DESIGN)
    plain = dataclasses.replace(PLAIN, sizes=Sizes(task=task))
    settings = [plain.setting]
    for name, value in (OTHER_SIZES | used).items():
        sizes = dataclasses.replace(plain.sizes, **{name: value})
        settings.append(dataclasses.replace(plain, sizes=sizes).setting)
    for name, value in OTHER_DESIGN.items():
        settings.append(dataclasses.replace(plain, **{name: value}).setting)
    for number, setting in enumerate(settings):
        assert setting not in settings[:number]
    # The depth of a cell is its own.
    for name, value in (unused | {"depth": 1}).items():
        sizes = dataclasses.replace(plain.sizes, **{name: value})
        assert dataclasses.replace(plain, sizes=sizes).setting == plain.setting


def test_the_network_has_the_design_of_the_cell():
    sizes = dataclasses.replace(study_double.TEXT, width=16, num_heads=2, mlp_width=24)
    options = {"layer_norm": "post", "pooling": "max", "depth": 3, "num_iters": 4}
    options["column_tau"] = 0.5
    text = study_double.cell(sizes, **options).encoder(11)
    for name, value in {
        **options,
        "width": 16,
        "num_heads": 2,
        "mlp_width": 24,
        "vocab_size": 11,
        "seq_len": 6,
        "patch_size": None,
        "num_classes": 2,
    }.items():
        assert getattr(text, name) == value
    images = dataclasses.replace(sizes, task="digits", patch_size=2)
    digits = study_double.cell(images).encoder(None)
    assert (digits.patch_size, digits.has_conv_stem) == (2, True)
    assert not digits.has_own_projections
    own = dataclasses.replace(images, has_own_projections=True)
    assert study_double.cell(own).encoder(None).has_own_projections
    assert (digits.vocab_size, digits.num_classes) == (None, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mnist"}, "task must be one of .* got 'mnist'"),
        ({"width": 33}, "width must be a multiple of num_heads"),
        ({"seq_len": 1}, "seq_len must be at least 2, got 1"),
        ({"mlp_width": 0}, "mlp_width must be at least 1, got 0"),
        ({"num_steps": 0}, "num_steps must be at least 1, got 0"),
        ({"num_observations": 0}, "num_observations must be at least 1"),
        ({"num_observations": 7}, "num_steps must be a multiple of num_observations"),
        ({"num_measured": 2001}, "num_measured must not exceed num_validation"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seeds": (1, 1)}, "seeds must be distinct"),
    ],
)
def test_bad_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sizes(**options)
