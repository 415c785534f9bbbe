"""Which of several requests brings the engine down, found by letting suspects return alone."""

from __future__ import annotations

from support.factories import make_sequence

from trio_worker.core.sequence import Sequence
from trio_worker.core.trial import PROOF_TOKENS, SUSPECT_CRASHES, Trial


def suspects(*names: str) -> tuple[Trial, list[Sequence]]:
    """A trial of these, all aboard of as many crashes as it takes."""
    trial, sequences = Trial(), [make_sequence(name) for name in names]
    assert trial.tried is None
    for _ in range(SUSPECT_CRASHES):
        assert trial.crashed(sequences) is None
    assert trial.is_on
    return trial, sequences


def produce(sequence: Sequence, tokens: int) -> None:
    sequence.produced += range(tokens)


def test_who_was_aboard_once_is_no_suspect() -> None:
    trial = Trial()
    old, new, newest = (make_sequence(name) for name in ("old", "new", "newest"))
    trial.crashed([old, new])
    trial.crashed([newest])
    assert not trial.has_proof(new), "nobody is suspected"
    trial.crashed([new, newest])
    assert trial.tried is newest
    assert not trial.acquit(old)
    assert [each.crashes for each in (old, new, newest)] == [1, 2, 2]


def test_the_newest_is_tried_first_and_guilty_if_the_engine_ends_with_it() -> None:
    trial, (old, new) = suspects("old", "new")
    assert trial.tried is new
    assert trial.crashed([new]) is new
    assert (new.crashes, old.crashes) == (SUSPECT_CRASHES + 1, 0)
    assert not trial.is_on


def test_an_engine_that_ends_without_the_one_being_tried_proves_nothing() -> None:
    trial, (old, new) = suspects("old", "new")
    assert trial.crashed([]) is None
    assert trial.tried is new
    assert (old.crashes, new.crashes) == (SUSPECT_CRASHES, SUSPECT_CRASHES)


def test_who_gets_past_where_it_was_is_acquitted_and_the_next_is_tried() -> None:
    trial, (old, new) = suspects("old", "new")
    produce(new, PROOF_TOKENS - 1)
    assert not trial.has_proof(new)
    produce(new, 1)
    assert trial.has_proof(new)
    assert trial.acquit(new) is True
    assert (trial.tried, new.crashes) == (old, 0)
    assert not trial.has_proof(new), "it is no suspect any more"
    produce(old, PROOF_TOKENS)
    assert trial.has_proof(old)
    assert trial.acquit(old) is False, "nobody is left to be tried"
    assert not trial.is_on


def test_the_proof_counts_from_what_was_there_when_the_trial_began() -> None:
    trial, (old, new) = suspects("old", "new")
    produce(old, 5)
    trial.acquit(new)
    produce(old, PROOF_TOKENS - 1)
    assert not trial.has_proof(old)
    produce(old, 1)
    assert trial.has_proof(old)


def test_a_suspect_that_leaves_before_its_turn_changes_nothing_for_the_one_being_tried() -> None:
    trial, (old, new) = suspects("old", "new")
    assert trial.acquit(old) is False
    assert (trial.tried, old.crashes) == (new, 0)


def test_when_the_trial_is_dismissed_nothing_is_held_against_anybody() -> None:
    trial, sequences = suspects("a", "b", "c")
    trial.dismiss()
    assert not trial.is_on
    assert [each.crashes for each in sequences] == [0, 0, 0]
