"""Lift: the same pairs as counting in dictionaries with exact fractions, whatever the blocks and the order."""
from collections import defaultdict
from fractions import Fraction
from itertools import product

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ehr_r1.synthesis.cooccurrence import (
    LIFT,
    PAIR,
    TermCounts,
    lift,
    lift_pairs,
    read_term_pairs,
    target_runs,
    telling_terms,
    unpack_pairs,
)


def frame(pairs):
    return pl.DataFrame(list(pairs), schema=PAIR, orient='row')


def random_pairs(rng, samples, term_rate, n):
    "Pairs of which a few terms are common and most are rare."
    drawn_samples = rng.integers(0, samples, n)
    drawn_terms = rng.geometric(term_rate, n)
    return list(zip(drawn_samples.tolist(), drawn_terms.tolist()))


def samples_by_term(pairs):
    found = defaultdict(set)
    for sample, term in pairs:
        found[term].add(sample)
    return found


def dictionary_lift(targets, history, samples, least=5, above=5., keep=20):
    "The definition, literally: sets of samples, a dictionary of dictionaries, fractions."
    in_target, in_history = samples_by_term(targets), samples_by_term(history)
    in_either = samples_by_term([*targets, *history])
    n = {term: len(found) for term, found in in_either.items()}
    rows = []
    for target in sorted(in_target):
        some = []
        for shown in in_history:
            n_pair = len(in_target[target] & in_history[shown])
            value = Fraction(n_pair*samples, n[target]*n[shown])
            if n_pair and shown != target and n[shown] >= least and value > above:
                some.append((-value, -n_pair, shown))
        for minus_value, minus_n_pair, shown in sorted(some)[:keep]:
            counts = (-minus_n_pair, n[target], n[shown], samples)
            rows.append((target, shown, *counts, float(-minus_value)))
    return rows


LARGEST = 2**32 - 1
SMALL = range(10)
IDS = st.sampled_from([*SMALL, 40_000, 2**31, LARGEST])  # numbers need not be dense nor small
PAIRS = st.lists(st.tuples(IDS, IDS), max_size=60)
BLOCK_SIZES = st.sampled_from([1, 2, 5, 1000])
LIMITS = st.fixed_dictionaries(dict(
    samples=st.integers(12, 60),
    least=st.integers(1, 4),
    above=st.sampled_from([0., 1., 1.5, 3., 5.]),
    keep=st.integers(1, 5)))


@settings(max_examples=300, deadline=None)
@given(PAIRS, PAIRS, LIMITS, BLOCK_SIZES)
def test_same_pairs_as_the_definition(targets, history, limits, block):
    found = lift_pairs(frame(targets), frame(history), block=block, **limits)
    expected = dictionary_lift(targets, history, **limits)
    assert found.schema == LIFT
    assert found.rows() == expected


SEEDS = st.integers(0, LARGEST)


@settings(max_examples=60, deadline=None)
@given(SEEDS, st.sampled_from([1, 7, 100, 10**6]))
def test_order_repetitions_parts_and_blocks_change_nothing(seed, block):
    rng = np.random.default_rng(seed)
    targets = random_pairs(rng, 80, .15, 120)
    history = random_pairs(rng, 80, .15, 700)
    limits = dict(
        samples=100,
        least=3,
        above=1.25,
        keep=4)
    whole = lift_pairs(frame(targets), frame(history), **limits)
    assert len(whole)
    assert whole.rows() == dictionary_lift(targets, history, **limits)

    some_again = history[:50]
    mixed = [history[i] for i in rng.permutation(len(history))] + some_again
    cut = int(rng.integers(0, len(mixed)))
    first, second = frame(mixed[:cut]), frame(mixed[cut:])
    twice = frame(targets[::-1] + targets)
    found = lift_pairs(twice, [first, second.lazy()], block=block, **limits)
    assert found.equals(whole)


# the limits

def of(term, samples):
    "Pairs of one term."
    return [(sample, term) for sample in samples]


TARGET = frame(of(1, range(10)))


def test_defaults_are_the_published_limits():
    five_samples = of(2, range(5))
    too_few = of(3, range(4))
    lift_of_five = of(4, range(20))  # lift must be above 5
    history = frame(five_samples + too_few + lift_of_five)
    found = lift_pairs(TARGET, history, 100)
    assert found.rows() == [(1, 2, 5, 10, 5, 100, 10.)]


def test_twenty_pairs_a_target_are_the_default():
    facts, samples = range(100, 130), range(5)
    found = lift_pairs(TARGET, frame(product(samples, facts)), 100)
    assert found['history'].to_list() == list(range(100, 120))


@pytest.mark.parametrize('keep', [1, 2, 3, 4])
def test_equal_lifts_go_by_samples_then_by_term(keep):
    history = []
    for term, samples in {3: 5, 9: 10, 8: 5, 4: 6}.items():
        history += of(term, range(samples))  # lift is 10 for all of them
    found = lift_pairs(TARGET, frame(history), 100, keep=keep)
    assert found['history'].to_list() == [9, 4, 3, 8][:keep]


def test_a_term_is_counted_on_both_sides_together():
    target = of(1, [0, 1])
    history = of(2, [0, 1]) + of(1, [1, 2])
    found = lift_pairs(frame(target), frame(history), 30, least=1, above=0.)
    assert lift(2, 3, 2, 30) == 10
    assert found.row(0) == (1, 2, 2, 3, 2, 30, 10.)


def test_common_terms_are_left_out_before_pairs_are_counted():
    rare_target, common_target = of(1, range(4)), of(2, range(4, 40))
    common_shown, rare_shown = of(3, range(40)), of(4, range(5))
    counts = TermCounts(frame(rare_target + common_target), frame(common_shown + rare_shown), 40)
    shown = np.unique(counts.history.indices)
    assert counts.terms[counts.targets].tolist() == [1]
    assert counts.terms[shown].tolist() == [4]


@pytest.mark.parametrize('samples, lifts', [
    (101, [5.05]),
    (100, []),
])
def test_a_term_as_common_as_can_be_still_passes(samples, lifts):
    target = frame(of(1, range(20)))
    history = frame(of(2, range(20)))
    found = lift_pairs(target, history, samples)
    assert found['lift'].to_list() == lifts


# reading

def test_pairs_are_read_once_each_in_order():
    some = frame([(LARGEST, 0), (1, 5)])
    others = frame([(1, 5), (1, LARGEST)])
    packed = read_term_pairs([some, others])
    samples, terms = unpack_pairs(packed)
    assert samples.tolist() == [1, 1, LARGEST]
    assert terms.tolist() == [5, LARGEST, 0]


def test_files_of_many_row_groups_read_like_frames(tmp_path):
    rng = np.random.default_rng(1)
    targets = random_pairs(rng, 300, .03, 600)
    history = random_pairs(rng, 300, .03, 9_000)
    path = tmp_path/'t.parquet'
    frame(targets).write_parquet(path)
    for i in range(3):
        part = frame(history[i::3]).with_columns(other=pl.lit('x'))
        part.write_parquet(tmp_path/f'h-{i}.parquet', row_group_size=100)
    expected = dictionary_lift(targets, history, 300, 5, 2., 20)
    parts = sorted(tmp_path.glob('h-*'))
    of_paths = lift_pairs(path, parts, 300, above=2.)
    of_pattern = lift_pairs(str(path), str(tmp_path/'h-*.parquet'), 300, above=2., block=50)
    assert expected
    assert of_paths.rows() == expected
    assert of_pattern.rows() == expected


NONE = frame([])
ONE = frame(of(1, [0]))
OTHER = frame(of(2, [1]))  # of another sample


@pytest.mark.parametrize('targets, history', [
    (NONE, NONE),
    (ONE, NONE),
    (NONE, ONE),
    (ONE, OTHER),
    (ONE, ONE),
])
def test_nothing_to_pair_gives_an_empty_frame(targets, history):
    found = lift_pairs(targets, history, 10, least=1, above=0.)
    assert found.schema == LIFT
    assert found.is_empty()


def test_a_column_of_another_type_is_named(tmp_path):
    path = tmp_path/'pairs.parquet'
    sample = pl.Series([0], dtype=pl.UInt32)
    pairs = pl.DataFrame(dict(sample=sample, term='Sodium'))
    pairs.write_parquet(path)
    with pytest.raises(ValueError, match=r"pairs\.parquet: column 'term' is String; number"):
        lift_pairs(ONE, path, 10)


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match="no column 'sample'"):
        lift_pairs(ONE.drop('sample'), ONE, 10)


def test_a_missing_value_is_named(tmp_path):
    path = tmp_path/'pairs.parquet'
    frame([(0, 1), (None, 2)]).write_parquet(path)
    with pytest.raises(ValueError, match=r'pairs\.parquet: a sample or a term is missing'):
        lift_pairs(path, ONE, 10)


def test_more_samples_than_the_task_has_are_an_error():
    targets, history = frame(of(1, [0, 1])), frame(of(2, [7]))
    with pytest.raises(ValueError, match='3 samples have terms, but the task has 2'):
        lift_pairs(targets, history, 2)


# blocks

@pytest.fixture(scope='module')
def counts():
    rng = np.random.default_rng(2)
    targets = random_pairs(rng, 400, .02, 2_000)
    history = random_pairs(rng, 400, .02, 12_000)
    return TermCounts(frame(targets), frame(history), 400, least=1, above=0.)


BLOCKS = pytest.mark.parametrize('block', [1, 300, 5_000, 10**9])


@BLOCKS
def test_runs_cover_all_targets(counts, block):
    begins, ends = zip(*target_runs(counts, block))
    assert begins == (0, *ends[:-1])
    assert ends[-1] == len(counts.targets)


@BLOCKS
def test_runs_hold_no_more_than_a_block(counts, block):
    all_pairs = 0
    for begin, end in target_runs(counts, block):
        pairs = counts.by_target[begin:end]@counts.history
        assert pairs.nnz <= block or end - begin == 1
        all_pairs += pairs.nnz
    assert all_pairs == (counts.by_target@counts.history).nnz


@BLOCKS
def test_two_runs_do_not_fit_in_one_block(counts, block):
    terms_of_samples = np.diff(counts.history.indptr)
    most = np.minimum(counts.by_target@terms_of_samples, len(counts.terms))
    begins, ends = zip(*target_runs(counts, block))
    for begin, end in zip(begins, ends[1:]):
        assert most[begin:end].sum() > block


def test_matrices_are_of_32_bits(counts):
    history = counts.history
    for array in (history.indices, history.indptr, history.data):
        assert array.dtype == np.int32


@pytest.mark.parametrize('seed', range(5))
def test_terms_left_out_before_reading_change_no_pair(seed):
    rng = np.random.default_rng(seed)
    targets, history = (frame(set(random_pairs(rng, 200, rate, n))) for rate, n in ((.1, 300), (.03, 3_000)))
    whole = lift_pairs(targets, history, 200, least=3, above=1.5)
    telling = telling_terms(targets.lazy(), history.lazy(), 200, least=3, above=1.5)
    left = [pairs.join(telling, on='term') for pairs in (targets, history)]
    assert sum(map(len, left)) < len(targets) + len(history)
    assert len(whole) > 5
    assert lift_pairs(*left, 200, least=3, above=1.5).equals(whole)
