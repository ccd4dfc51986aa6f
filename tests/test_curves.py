"""curves.png: drawn from any rows, replaced whole. What it looks like was checked by eye (docs/LOG.md shows one)."""

from __future__ import annotations

from pathlib import Path

from matplotlib.image import imread

from ptlab.curves import draw_comparison, draw_curves


def test_a_run_is_drawn_with_more_ink_than_an_empty_one(tmp_path: Path) -> None:
    rows = [
        {"step": step, "reward/mean": step / 10, "answer/tokens_mean": 20 + step, "time/sample_s": 1.0, "time/train_s": 0.5}
        | ({"eval/accuracy": step / 10, "eval/accuracy_greedy": None} if step % 5 == 0 else {})
        for step in range(10)
    ]
    draw_curves(rows, tmp_path / "full.png", title="full")
    draw_curves([{"step": 0}], tmp_path / "empty.png", title="empty")
    full, empty = imread(tmp_path / "full.png"), imread(tmp_path / "empty.png")
    assert full.shape == empty.shape == (704, 1100, 4)  # 6.4 x 10 inches at 110 dots per inch
    colours = [len({tuple(pixel) for pixel in image[::4, ::4, :3].reshape(-1, 3).round(2)}) for image in (full, empty)]
    assert colours[0] > 2 * colours[1]  # coloured lines and bars against grey axes and "not measured"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.png", "full.png"]


def test_runs_are_compared_a_panel_per_metric(tmp_path: Path) -> None:
    runs = {name: [{"step": s, "a/x": s * factor, "b/y": 1.0} for s in range(3)] for name, factor in {"one": 1, "two": 2}.items()}
    draw_comparison(runs, ["a/x"], tmp_path / "narrow.png")
    draw_comparison(runs, ["a/x", "b/y"], tmp_path / "wide.png")
    assert [imread(tmp_path / f"{name}.png").shape[1] for name in ("narrow", "wide")] == [550, 1100]
