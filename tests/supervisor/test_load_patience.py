"""How long a load of the engine may be silent."""

from __future__ import annotations

from trio_worker.supervisor.load_patience import LoadPatience


def test_a_first_load_may_be_silent_for_long_and_a_further_one_for_some_times_its_length() -> None:
    patience = LoadPatience(turn_timeout_s=3.0)
    patience.begun(now=100.0)
    assert patience.patience_s == 600.0
    patience.stepped(now=101.0)
    patience.prewarming()
    assert (patience.step, patience.patience_s) == ("prewarm", 30.0)
    patience.loaded(now=110.0)
    patience.begun(now=200.0)
    assert (patience.step, patience.patience_s) == ("load", 50.0)
    patience.loaded(now=201.0)
    patience.begun(now=300.0)
    assert patience.patience_s == 50.0, "of the longest"


def test_a_download_makes_no_later_load_last_as_long() -> None:
    patience = LoadPatience(turn_timeout_s=3.0)
    patience.begun(now=100.0)
    for step_at in (102.0, 700.0, 1_100.0):  # downloads, converts, loads
        patience.stepped(now=step_at)
        assert patience.patience_s == 600.0
    patience.loaded(now=1_108.0)
    patience.begun(now=2_000.0)
    assert patience.patience_s == 50.0, "(2 + 8) s, five times"
    patience.loaded(now=2_000.1)
    quick = LoadPatience(turn_timeout_s=3.0)
    quick.loaded(now=0.5)
    quick.begun(now=1.0)
    assert quick.patience_s == 20.0, "the least"
