"""The log: what damages a line costs that line."""

import pytest

from iddpm.store.log import Logger, read_rows
from iddpm.store.remote import place


@pytest.mark.parametrize("damage", [b"\xff\n", b"5\n", b"null\n", b"{'step'", b'{"step": 3, "lo'])
def test_a_line_that_is_no_row_is_left_out_and_the_run_goes_on(tmp_path, damage):
    logger = Logger(tmp_path)
    logger.row(step=1, loss=0.5)
    logger.close()
    with open(tmp_path / "log.jsonl", "ab") as file:
        file.write(damage)
    logger = Logger(tmp_path, step=1)
    logger.row(step=2, loss=0.25)
    assert read_rows(tmp_path) == [dict(step=1, loss=0.5), dict(step=2, loss=0.25)]
    assert (tmp_path / "progress.csv").read_text().split() == ["step,loss", "1,0.5", "2,0.25"]


def test_what_another_program_leaves_beside_a_remote_log_stops_no_copy(tmp_path):
    logger = Logger(place(f"memory://told/{tmp_path.name}"))
    folder = logger.path.parent
    (folder / "wandb").mkdir()
    (folder / "wandb" / "debug.log").symlink_to("gone.log")
    (folder / "wandb" / "latest-run").symlink_to(folder / "wandb")
    (folder / "wandb" / "zz.wandb").write_bytes(b"numbers")
    logger.row(step=1, loss=0.5)
    logger.close()
    there = place(f"memory://told/{tmp_path.name}")
    assert (there / "wandb/zz.wandb").read_bytes() == b"numbers" and b'"loss": 0.5' in (there / "log.jsonl").read_bytes()
