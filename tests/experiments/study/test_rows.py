"""Contrasts as rows: what is left out, and the verdicts of made-up values."""

import copy
import dataclasses

import numpy as np
import pytest
from support import study_double

from experiments.study import plan, rows

# As in the study, but for the trainings.
SIZES = dataclasses.replace(
    study_double.TEXT, num_validation=2000, seeds=tuple(range(10))
)
RATES = (0.001, 0.01)
CELL = study_double.cell(SIZES)
MADE_UP = study_double.made_up(CELL)


def with_accuracies(*values):
    return MADE_UP | {"validation_accuracy": list(values)}


def with_entropies(*layers):
    """In the last observation, of every seed; before, attention is uniform."""
    rest = [1.0] * len(layers)
    return MADE_UP | {"entropy": [[rest, rest, list(layers)]] * 10}


def finding(*made):
    """The findings of contrasts, each a quantity and what `made_up` gets of a cell."""
    table = []
    for number, (arguments, options) in enumerate(made):
        arms = plan.against_softmax(sizes=SIZES, rates=RATES)
        contrast = plan.Contrast(f"c{number}", f"claim {number}", arms, **options)
        get = lambda cell, of=arguments: study_double.made_up(cell, **of(cell))
        table.append(rows.row(contrast, get))
    return rows.primary_findings(table)


def residuals(sinkhorn, softmax):
    return lambda cell: {"residual": sinkhorn if cell.num_iters else softmax}


def test_a_cell_is_tested_if_eight_of_ten_networks_are_above_chance():
    learned, chance = [0.9] * 7, [0.5] * 2
    assert rows.why_untested(CELL, with_accuracies(*learned, 0.9, *chance)) is None
    why = rows.why_untested(CELL, with_accuracies(*learned, 0.5, *chance))
    assert why == "70% of the networks are better than chance"
    # Three standard errors are 0.034 of two classes and 2000 texts.
    assert rows.why_untested(CELL, with_accuracies(*[0.535] * 10)) is None
    assert rows.why_untested(CELL, with_accuracies(*[0.532] * 10))
    digits = study_double.cell(dataclasses.replace(SIZES, task="digits"))
    assert rows.why_untested(digits, with_accuracies(*[0.2] * 10)) is None
    assert rows.why_untested(digits, with_accuracies(*[0.1] * 10))


def test_a_cell_is_tested_if_attention_is_not_uniform_in_every_layer():
    assert rows.why_untested(CELL, with_entropies(1.0, 0.98, 1.0)) is None
    why = rows.why_untested(CELL, with_entropies(0.995, 0.991, 1.0))
    assert why == "attention is uniform to within 1% in every layer"


def test_a_residual_is_at_the_floor_in_the_median_seed():
    before_last = lambda *values: {
        "relative_residual": [[[1.0, 1.0, 1.0], [1.0, v, 1.0]] for v in values]
    }
    arm = plan.Arm("arm", 1, ())
    for check in (rows.is_at_floor, rows.is_bounded):
        assert check(arm, before_last(1e-8, 1e-7, 1.0))
        assert not check(arm, before_last(1e-8, 1e-6, 1.0))
        entropy = arm._replace(quantity=plan.ENTROPY)
        assert not check(entropy, before_last(1e-8, 1e-7, 1.0))


def test_a_mean_over_layers_is_bounded_where_the_last_is_at_the_floor():
    result = {"relative_residual": [[[1.0, 0.5, 1e-8, 1.0]]] * 3}
    arm = plan.Arm("arm", 1, (), plan.ALL_LAYERS)
    assert rows.is_bounded(arm, result)
    assert not rows.is_at_floor(arm, result)


def test_networks_that_diverged_leave_their_rate_out():
    result = copy.deepcopy(with_accuracies(*[0.9] * 10))
    result["relative_residual"][3][-1][1] = None
    assert rows.why_untested(CELL, result) == "1 of the networks diverged"


def test_a_row_holds_values_by_arm_rate_and_seed():
    contrast = plan.Contrast(
        "name", "claim", plan.against_softmax(sizes=SIZES, rates=RATES)
    )
    get = lambda cell: study_double.made_up(
        cell, residual=cell.learning_rate, accuracy=0.5 + 0.03 * cell.num_iters
    )
    row = rows.row(contrast, get)
    assert row["rates"] == list(RATES)
    sinkhorn, softmax = row["arms"]
    assert (sinkhorn["sign"], softmax["sign"]) == (1, -1)
    expected = np.log10(RATES)[:, None] + np.arange(10) * np.log10(1.01)
    np.testing.assert_allclose(sinkhorn["values"], expected, rtol=1e-4)
    assert sinkhorn["untested"] == [None, None]
    assert len(set(softmax["untested"])) == 1
    assert softmax["untested"][0].startswith("0% of the networks")
    np.testing.assert_allclose(sinkhorn["accuracy"], [0.8, 0.8])
    assert row["num_missing"] == 0
    half = rows.row(contrast, lambda cell: get(cell) if cell.num_iters else None)
    assert (half["num_missing"], half["arms"]) == (2, [])
    (found,) = rows.primary_findings([half])
    assert found["verdict"] == "untested"
    assert found["text"] == "2 of its cells are not trained yet."


def test_sums_are_means_over_rates():
    arms = [
        {"sign": 1, "values": [[1, 2], [3, 4], [5, 60]]},
        {"sign": -1, "values": [[0, 1], [1, 1], [9, 9]]},
    ]
    np.testing.assert_allclose(rows.sums({"arms": arms}, [0, 1]), [1.5, 2])


@pytest.mark.parametrize(
    ("sinkhorn", "softmax", "verdict"),
    [
        (0.4, 0.1, "supported"),
        (0.1, 0.4, "not supported"),
        (0.1, 0.1, "not supported"),  # Of no size.
    ],
)
def test_verdicts_of_made_up_residuals(sinkhorn, softmax, verdict):
    (found,) = finding((residuals(sinkhorn, softmax), {}))
    assert found["verdict"] == verdict
    assert found["claim"] == "claim 0"
    middle = np.log10([sinkhorn, softmax]) + 4.5 * np.log10(1.01)
    assert (
        "Log10 of the relative residual of the tokens that enter the last layer, "
        f"mean over the rates 0.001, 0.01 of the medians: {middle[0]:.3f} Sinkhorn, "
        f"{middle[1]:.3f} softmax."
    ) in found["text"]
    gain = f"{np.log10(sinkhorn / softmax):.3f}"
    if sinkhorn != softmax:
        p = 2 / 2**10
        assert f"By seed {gain} [{gain}, {gain}], positive for" in found["text"]
        assert f"p = {p:.2g} after Holm's correction." in found["text"]
        each = f"{gain} [{gain}, {gain}]"
        assert found["text"].endswith(f" At each rate: {each}; {each}.")


def test_equality_is_a_claim_too():
    equal = {"kind": "equal"}
    near, far = finding((residuals(0.11, 0.1), equal), (residuals(0.2, 0.1), equal))
    assert near["verdict"] == "supported"
    assert far["verdict"] == "not supported"


def test_rates_that_test_nothing_are_left_out():
    def arguments(cell):
        is_uniform = cell.learning_rate == RATES[1] and not cell.num_iters
        lead = 0.4 if cell.num_iters else 0.1
        # Where softmax is uniform, all would be upside down.
        residual = 1e-4 * lead if is_uniform else lead
        return {"residual": residual, "entropy": 1.01 if is_uniform else 0.8}

    (found,) = finding((arguments, {}))
    assert found["verdict"] == "supported"
    assert "medians at rate 0.001: " in found["text"]
    assert "By seed 0.602" in found["text"]


def test_without_a_rate_the_claim_is_untested():
    def arguments(cell):
        return {"accuracy": 0.5} if cell.num_iters else {"entropy": 1.01}

    (found,) = finding((arguments, {}))
    assert found["verdict"] == "untested"
    assert found["text"] == (
        "0% of the networks are better than chance; attention is uniform to within 1% "
        "in every layer."
    )


def test_residuals_that_are_rounding():
    both, one = finding((residuals(1e-9, 1e-8), {}), (residuals(0.1, 1e-8), {}))
    assert both["verdict"] == "untested"
    assert "all residuals are rounding: at least 6.3 decades" in both["text"].lower()
    assert one["verdict"] == "supported"
    assert "By seed 5.3" in one["text"]
    assert one["text"].endswith("so the difference is at least this.")


@pytest.mark.parametrize(
    ("lead", "floor", "verdict"),
    [
        (2.0, 1e-9, "supported"),
        (1.0, 1e-9, "undecided"),  # What is rounding is equal, whatever it would be.
        (1.0, 1e-3, "not supported"),
    ],
)
def test_a_floor_of_the_last_layers_leaves_a_lead_to_test(lead, floor, verdict):
    """Without skip connections the contrast is of a mean over layers for this."""
    of_sinkhorn = lead

    def get(cell):
        made = study_double.made_up(cell)
        lead = of_sinkhorn if cell.num_iters else 1.0
        layers = lead * 10.0 ** -np.arange(cell.depth + 1)
        layers[-2:] = floor
        residual = np.broadcast_to(layers, np.shape(made["relative_residual"]))
        return made | {"relative_residual": residual.tolist()}

    arms = plan.against_softmax(plan.ALL_LAYERS, sizes=SIZES, rates=RATES)
    (found,) = rows.primary_findings([rows.row(plan.Contrast("a", "b", arms), get)])
    assert found["verdict"] == verdict
    assert ("smaller than it is" in found["text"]) == (floor < 1e-6)


def test_every_row_counts_in_holms_correction():
    """Ten seeds that agree have p = 2 / 2^10, which 26 contrasts make 0.0508."""
    lead, untested = residuals(0.4, 0.1), lambda cell: {"accuracy": 0.5}
    for num, verdict in ((25, "supported"), (26, "undecided")):
        first, *rest = finding((lead, {}), *[(untested, {})] * (num - 1))
        assert first["verdict"] == verdict
        assert f"p = {num * 2 / 2**10:.2g} after" in first["text"]
        assert {found["verdict"] for found in rest} == {"untested"}


def test_secondary_findings_use_students_t():
    few = dataclasses.replace(SIZES, seeds=(0, 1, 2, 3, 4))
    arms = plan.against_softmax(sizes=few, rates=RATES[:1])

    def get(cell):
        made = study_double.made_up(cell)
        values = np.array(made["relative_residual"])
        values[:, -1, -2] = 0.1
        if cell.num_iters:  # The logarithms lead by 0.3 on average.
            values[:, -1, -2] *= 10 ** np.array([0.1, 0.2, 0.3, 0.4, 0.5])
        return made | {"relative_residual": values.tolist()}

    row = rows.row(plan.Contrast("name", "claim", arms), get)
    (found,) = rows.secondary_findings([row])
    # t = 0.3 / (0.158 / sqrt 5) = 4.243, p = 0.0132 with four degrees of freedom.
    assert found["verdict"] == "supported"
    text = "By seed 0.300 [0.104, 0.496], positive for 5 of 5 seeds, p = 0.013 after"
    assert text in found["text"]
    # Exact ranks could not reject, and four such rows can not either.
    assert rows.primary_findings([row])[0]["verdict"] == "undecided"
    four = rows.secondary_findings([row] * 4)
    assert {each["verdict"] for each in four} == {"undecided"}


def test_curves_are_the_first_and_the_last_observation():
    made = study_double.made_up(CELL, residual=0.2, entropy=0.7)
    found = rows.curves(CELL, made)
    np.testing.assert_allclose(found["residual"]["init"], np.full((10, 7), 0.5))
    np.testing.assert_allclose(
        found["residual"]["trained"],
        np.tile(0.2 * 1.01 ** np.arange(10)[:, None], 7),
        rtol=1e-3,
    )
    assert np.shape(found["entropy"]["trained"]) == (10, 6)
    course = found["course"]
    assert course["updates"] == [0, 2, 4]
    assert np.shape(course["residual"]) == np.shape(course["entropy"]) == (10, 3)
    np.testing.assert_allclose(course["entropy"][0], [0.9, 0.8, 0.7])
    np.testing.assert_allclose(course["first_gradient"][0], [0.1, 0.15, 0.2])
    assert (found["task"], found["num_iters"]) == ("imdb", 2)
    assert found["paths"] == made["paths"]
