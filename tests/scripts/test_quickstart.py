"""What the quickstart's report says, and when it calls a resume a failure."""

import bytes_alive
import report
import torch

HISTORY = [{"step": 10, "loss": 7.0}, {"step": 20, "loss": 6.0}, {"step": 20, "eval_loss": 6.5}]


def test_losses_after_a_resume_must_be_those_of_the_first_run() -> None:
    first = report.losses(HISTORY, "loss")
    assert report.compare(first, {20: 6.0})[1]
    text, same = report.compare(first, {20: 6.001})
    assert not same
    assert "1.7e-04" in text
    assert "(at most 1e-06)" in text
    # On another number of processes sums come in another order.
    assert report.compare(first, {20: 6.0003}, report.MOVED_TOLERANCE)[1]
    assert not report.compare(first, {20: 6.001}, report.MOVED_TOLERANCE)[1]


def test_a_resume_that_trained_nothing_proves_nothing() -> None:
    resumed = report.losses(report.after(HISTORY, 20), "loss")
    assert report.compare(report.losses(HISTORY, "loss"), resumed) == (
        "the resumed run trained no step of the first",
        False,
    )


def test_bytes_are_counted_once_per_storage_and_by_kind() -> None:
    model = torch.nn.Linear(8, 8, bias=False)
    model.register_parameter("tied", model.weight)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    counted = bytes_alive.count(model, optimizer)
    assert counted["parameters"] == 8 * 8 * 4
    assert counted["gradients"] == 8 * 8 * 4
    # Two moments, and the number of steps.
    assert counted["optimizer state"] == 2 * 8 * 8 * 4 + 4


def test_the_table_compares_training_state_and_hides_nothing() -> None:
    plain = {"parameters": 100, "gradients": 100, "optimizer state": 200, "other": 1, "disk": 0}
    rank = {"parameters": 50, "gradients": 50, "optimizer state": 100, "other": 60, "disk": 77}
    table = report.bytes_table([plain], [rank, rank])
    assert "the largest rank keeps 50.0% of plain PyTorch's training state" in table
    assert table.count("260") == 2
    assert table.count("77") == 2
