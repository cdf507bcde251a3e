"""Charts: what the figures contain, and how they are written."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest

from library.adapters.blocks import SD, SDXL
from library.training.charts import style
from library.training.charts.block_chart import BlockRow, draw_blocks
from library.training.charts.loss_curve import MOST_POINTS, draw_course, limits, plot_loss_curve, window_of
from library.training.charts.series import read_metrics, series_of, smoothed, thinned


def losses(values, **rates):
    """Return the lines of a metrics file with a loss for each step; None is a step that was left out."""
    rows = []
    for step, value in enumerate(values, 1):
        rows.append(
            {"step": step} | ({"left_out": 1} if value is None else {"loss/current": value, "loss/average": 1.0})
        )
        rows[-1] |= {f"lr/{name}": rate(step) if callable(rate) else rate for name, rate in rates.items()}
    return rows


def validated(points):
    return [{"step": step, "loss/validation/step_average": loss} for step, loss in points]


def lines_of(axes):
    """Return label -> points of each line that has one."""
    return {
        str(line.get_label()): [tuple(point) for point in np.array(line.get_xydata()).tolist()] for line in axes.lines
    }


def written_on(axis):
    return [label.get_text() for label in axis.get_ticklabels() if label.get_text()]


def is_round(tick):
    """Whether a number is 1, 2, 2.5 or 5 times a whole number times a power of ten: it has few digits."""
    return float(f"{tick:.3g}") == pytest.approx(tick, rel=1e-9)


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---- series -------------------------------------------------------------------------------------------------


def test_what_a_metrics_file_says(tmp_path):
    path = tmp_path / "x-metrics.jsonl"
    rows = [
        *losses([0.5, None, math.nan, 0.25], unet=1e-4),
        {"step": 4, "loss/epoch_average": 9.0},
        {"step": 4, "loss/validation/step_average": 0.3},
        {"step": 4, "loss/validation/epoch_average": 0.3},
        {"step": 8, "loss/validation/epoch_average": math.inf},
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows) + '{"step": 9, "loss/cur', encoding="utf-8")
    series = read_metrics(path)
    assert series.losses == [(1, 0.5), (4, 0.25)]
    assert series.validation == [(4, 0.3)]
    assert series.left_out == [2, 3]
    assert series.rates == {"unet": [(step, 1e-4) for step in (1, 2, 3, 4)]}
    assert read_metrics(tmp_path / "gone.jsonl") == series_of([])


def test_damaged_lines_of_a_metrics_file_are_left_out(tmp_path):
    path = tmp_path / "x-metrics.jsonl"
    damaged = [b'{"step": 1, "loss/cur', b"\xe3\x81", b"[1]", b"3", b'{"step": "x", "loss/current": 1}', b"{}"]
    damaged += [b'{"step": 1e400, "loss/current": 1}', b'{"step": 2, "loss/current": "y", "lr/unet": [1]}', b"\xff\x00"]
    path.write_bytes(b"\n".join([*damaged, b'{"step": 3, "loss/current": 0.5, "lr/unet": 1e-4}', b'{"step": 4, "\xe3']))
    series = read_metrics(path)
    assert (series.losses, series.left_out, series.rates) == ([(3, 0.5)], [], {"unet": [(3, 1e-4)]})


def test_an_adapted_rate_is_the_rate():
    rows = [{"step": 1, "loss/current": 1.0, "lr/unet": 1.0, "lr/d*lr/unet": 3e-5, "lr/textencoder": 0.5}]
    assert series_of(rows).rates == {"unet": [(1, 3e-5)], "textencoder": [(1, 0.5)]}


def test_smoothing_keeps_lines_and_the_mean_of_noise():
    line = [(step, 3.0 - step / 100) for step in range(1, 201)]
    means = smoothed(line, 21)
    assert [step for step, _ in means] == [step for step, _ in line]
    assert [value for _, value in means[10:-10]] == pytest.approx([value for _, value in line[10:-10]])
    assert smoothed(line, 1) == line
    noise = [(step, value) for step, value in enumerate(np.random.default_rng(0).normal(1.0, 0.5, 2000).tolist())]
    spread = np.std([value for _, value in smoothed(noise, 101)])
    assert spread < 0.1


def test_an_enormous_loss_spoils_only_its_surroundings():
    points = [(step, 1e30 if step == 50 else 0.1) for step in range(200)]
    means = dict(smoothed(points, 21))
    assert means[50] > 1e28
    assert [means[step] for step in (*range(39), *range(62, 200))] == pytest.approx([0.1] * 177)


@pytest.mark.parametrize("number", [1, 2, 99, 100, 101, 12345])
def test_thinning_keeps_extremes_order_and_ends(number):
    points = list(enumerate(np.random.default_rng(number).normal(size=number).tolist()))
    few = thinned(points, 100)
    assert len(few) <= 100
    assert few == sorted(set(few)) and set(few) <= set(points)
    for extreme in (min, max):
        assert extreme(few, key=lambda point: point[1]) == extreme(points, key=lambda point: point[1])
    assert few[0][0] <= number / 50 and few[-1][0] >= number - 1 - number / 50


# ---- the loss -----------------------------------------------------------------------------------------------


def test_every_series_is_in_the_figure():
    values = [0.3 * math.exp(-step / 50) + 0.1 + 0.02 * math.sin(step) for step in range(1, 201)]
    points = [(50, 0.3), (100, 0.2), (150, 0.19), (200, 0.21)]
    rows = losses(values, unet=lambda step: 1e-4 / step, textencoder=5e-5) + validated(points)
    figure = draw_course(series_of(rows))
    above, below = figure.axes
    drawn = lines_of(above)
    raw = next(found for label, found in drawn.items() if label.startswith("training, each step"))
    assert raw == [(step, value) for step, value in enumerate(values, 1)]
    assert drawn["training, smoothed over 15 steps"] == smoothed(raw, 15)
    assert drawn["validation"] == points
    assert drawn["lowest validation: 0.19 at step 150"] == [(150, 0.19)]
    rates = lines_of(below)
    assert rates["learning rate: unet"] == [(step, 1e-4 / step) for step in range(1, 201)]
    assert {rate for _, rate in rates["learning rate: textencoder"]} == {5e-5}
    assert set(legend_of(figure)) == {*drawn, *rates}
    assert (above.get_ylabel(), below.get_xlabel()) == ("loss", "step")
    assert above.get_title(loc="left") and below.get_title(loc="left") == "Learning rate"


def test_the_first_of_equal_validations_is_the_best():
    figure = draw_course(series_of(losses([0.5, 0.4, 0.3]) + validated([(1, 0.2), (2, 0.2), (3, 0.3)])))
    assert "lowest validation: 0.2 at step 1" in legend_of(figure)


@pytest.mark.parametrize(
    ("number", "window"), [(1, 1), (20, 1), (21, 5), (40, 11), (100, 15), (300, 15), (1000, 51), (100_000, 5001)]
)
def test_short_runs_are_smoothed_over_more_of_their_steps(number, window):
    assert window_of(number) == window


@pytest.mark.parametrize(
    ("last", "scale"), [(0.9, 1.0), (7, 0.1), (24, 0.3), (250, 0.02), (3000, 1234.5), (99_999, 1e-5)]
)
def test_ticks_are_round_and_within_the_axes(last, scale):
    number = max(2, int(last))
    values = [scale * (1 + 0.3 * math.cos(step)) for step in range(1, number + 1)]
    figure = draw_course(series_of(losses(values, unet=3.3e-4)))
    figure.draw_without_rendering()
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            ticks = [tick for tick in axis.get_ticklocs() if low <= tick <= high]
            assert 2 <= len(ticks) <= 12
            assert all(map(is_round, ticks))
    steps = [text.replace(",", "") for text in written_on(figure.axes[-1].xaxis)]
    assert all(text.lstrip("−-").isdecimal() for text in steps)


def test_losses_of_several_decades_are_on_a_logarithmic_axis():
    values = [2 * math.exp(-step / 40) for step in range(300)]
    (axes,) = draw_course(series_of(losses(values))).axes
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    ticks = [tick for tick in axes.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 4
    assert all(is_round(tick) for tick in ticks)
    assert draw_course(series_of(losses([0.3, 0.1, 0.2]))).axes[0].get_yscale() == "linear"
    assert draw_course(series_of(losses([0.3, 0.0, 0.2]))).axes[0].get_yscale() == "linear"


def test_a_loss_of_zero_has_no_place_on_a_logarithmic_axis_but_the_others_do():
    values = [0.0 if step % 10 == 5 else 2 * math.exp(-step / 40) for step in range(300)]
    figure = draw_course(series_of(losses(values)))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert 0 < axes.get_ylim()[0] < min(value for _, value in smoothed(list(enumerate(values)), 15))


def test_left_out_steps_are_marked():
    figure = draw_course(series_of(losses([0.5, None, 0.4, math.nan, 0.3, 0.2])))
    drawn = lines_of(figure.axes[0])
    assert [step for step, _ in drawn["2 steps left out: the loss was not finite"]] == [2, 4]
    assert [step for step, _ in drawn["training, each step"]] == [1, 3, 5, 6]
    one = draw_course(series_of(losses([0.5, None, 0.4])))
    assert "1 step left out: the loss was not finite" in legend_of(one)


@pytest.mark.parametrize("values", [[0.5], [0.1] * 500, [0.0, 0.0], [1e-12, 1e-12], [1e-3, 1e30]])
def test_odd_losses_give_a_chart_that_shows_them(values):
    figure = draw_course(series_of(losses(values)))
    low, high = figure.axes[0].get_ylim()
    assert math.isfinite(low) and math.isfinite(high)
    assert all(low < value < high for value in values)
    figure.draw_without_rendering()


def test_single_high_losses_are_counted_and_do_not_flatten_the_rest():
    values = [0.1 + 0.05 * math.exp(-step / 100) for step in range(1000)]
    values[700] = 0.9
    figure = draw_course(series_of(losses(values)))
    assert figure.axes[0].get_ylim()[1] < 0.3
    assert "training, each step (1 beyond the axis)" in legend_of(figure)


def test_smoothed_losses_and_validation_are_within_the_axes():
    steps = np.random.default_rng(0).lognormal(-2, 1.5, 1000).tolist()
    for lines in ([0.1, 0.12, 0.11], [0.1], [3.0, 0.1], [5.0, 5.1], [0.1, 0.5]):
        low, high = limits(steps, lines)
        assert low < min(lines) <= max(lines) < high
        assert low > 0
        assert sum(low < step < high for step in steps) > 500
    assert high - low < 4 * (0.5 - 0.1)  # of the last lines; single steps reach 15


def test_a_hundred_thousand_steps_are_a_few_thousand_points():
    values = np.random.default_rng(0).lognormal(-2, 0.5, 100_000).tolist()
    figure = draw_course(series_of(losses(values, unet=lambda step: 1e-4 / step)))
    drawn = [points for axes in figure.axes for points in lines_of(axes).values()]
    assert max(map(len, drawn)) <= MOST_POINTS
    assert min(map(len, drawn)) > MOST_POINTS / 2
    assert drawn[0][-1][0] > 99_900


def test_equal_rates_are_one_line_and_many_have_one_label():
    same = draw_course(series_of(losses([0.3, 0.2], unet=1e-4, textencoder=1e-4)))
    assert list(lines_of(same.axes[1])) == ["learning rate"]
    rates = {f"block{number}": number * 1e-5 for number in range(1, 12)}
    many = draw_course(series_of(losses([0.3, 0.2], **rates)))
    assert len(many.axes[1].lines) == 11
    assert [text for text in legend_of(many) if "rate" in text] == ["learning rates of 11 groups"]


def test_rates_of_different_size_are_on_a_logarithmic_axis_and_written_as_in_options():
    figure = draw_course(series_of(losses([0.3, 0.2], unet=1e-3, textencoder=1e-6)))
    figure.draw_without_rendering()
    assert figure.axes[1].get_yscale() == "log"
    assert {"1e-3", "1e-6"} <= set(written_on(figure.axes[1].yaxis))
    nothing = draw_course(series_of(losses([0.3, 0.2], unet=0.0)))
    assert nothing.axes[1].get_yscale() == "linear"


@pytest.mark.parametrize(
    ("rate", "text"), [(0.0, "0"), (1e-4, "1e-4"), (6.42e-4, "6.42e-4"), (1.5e-5, "1.5e-5"), (1.0, "1e0"), (20, "2e1")]
)
def test_rates_as_texts(rate, text):
    assert style.rate_text(rate) == text


# ---- files --------------------------------------------------------------------------------------------------


def test_files_are_equal_for_equal_metrics_and_whatever_the_user_has_set(tmp_path):
    import matplotlib

    metrics = tmp_path / "x-metrics.jsonl"
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in losses([0.3, 0.2, 0.25])), encoding="utf-8")
    before = dict(matplotlib.rcParams)
    assert plot_loss_curve(metrics, tmp_path / "a.png")
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context(
        {"savefig.dpi": 30, "font.size": 30, "axes.facecolor": "red", "savefig.transparent": True}
    ):
        assert plot_loss_curve(metrics, tmp_path / "b.png")
    first, second = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    assert b"Software" not in first and b"matplotlib" not in first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png", metrics.name]


def test_fewer_than_two_steps_give_no_file(tmp_path):
    metrics = tmp_path / "x-metrics.jsonl"
    assert not plot_loss_curve(metrics, tmp_path / "a.png")
    metrics.write_text("".join(f"{json.dumps(row)}\n" for row in losses([0.3, None])), encoding="utf-8")
    assert not plot_loss_curve(metrics, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


# ---- blocks -------------------------------------------------------------------------------------------------


def widths_of(axes):
    """Return the lengths of the bars, in order."""
    return [bar.get_width() for container in axes.containers for bar in container]


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (SD, {0: "IN00", 4: "IN04", 11: "IN11", 12: "MID", 13: "OUT00", 24: "OUT11"}),
        (SDXL, {0: "first", 1: "IN00", 9: "IN08", 10: "MID0", 12: "MID2", 13: "OUT00", 21: "OUT08", 22: "last"}),
    ],
)
def test_blocks_have_a_bar_for_rate_rank_and_modules(table, names):
    blocks = [
        BlockRow(n, n / 10, {4, 8} if n == 5 else {2 + n}, n) if n % 4 else BlockRow(n) for n in range(table.count)
    ]
    figure = draw_blocks(blocks, table, 2e-4)
    figure.draw_without_rendering()
    rates, ranks, modules = figure.axes
    drawn = [widths_of(axes) for axes in figure.axes]
    has = [block.count > 0 for block in blocks]
    assert drawn[0] == pytest.approx([2e-4 * n / 10 * has[n] for n in range(table.count)])
    assert drawn[1] == [max(block.ranks, default=0) for block in blocks]
    assert drawn[2] == [block.count for block in blocks]
    texts = [[text.get_text() for text in axes.texts] for axes in (rates, ranks, modules)]
    assert texts[0].count("no modules") == has.count(False)
    assert {"2e-5", "2.6e-4"} <= set(texts[0]) and "4/8" in texts[1] and "21" in texts[2]
    labels = dict(enumerate(written_on(rates.yaxis)))
    assert {number: labels[number].split() for number in names} == {n: [str(n), name] for n, name in names.items()}
    low, high = rates.get_ylim()
    assert low > high  # the first block is above
    assert [axes.get_xlabel() for axes in figure.axes[::2]] == ["learning rate", "modules"]
    assert table.name in figure.get_suptitle()
    for axes in figure.axes:
        end = axes.get_xlim()[1]
        assert max(widths_of(axes)) < end
        assert all(is_round(tick) for tick in axes.get_xticks())


def test_texts_of_blocks_stay_within_the_figure_and_apart():
    blocks = [BlockRow(n, 1 + n / 30, {128}, 100) for n in range(25)]
    figure = draw_blocks(blocks, SD, 1.11e-4)
    figure.draw_without_rendering()
    inside = figure.bbox
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert all(inside.x0 <= box.x0 and box.x1 <= inside.x1 for box in boxes)
    for first, second in itertools.pairwise(boxes):
        assert not first.overlaps(second)
