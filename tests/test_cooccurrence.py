"""Lift: the same pairs as counting in dictionaries with exact fractions, whatever the blocks and the order; hostile input."""
from collections import defaultdict
from fractions import Fraction
import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st
from ehr_r1.synthesis.cooccurrence import LIFT, PAIR, TermCounts, lift, lift_pairs, read_term_pairs, target_runs

def frame(pairs): return pl.DataFrame(list(pairs), schema=PAIR, orient='row')

def naive(targets, history, samples, least=5, above=5., keep=20):
    "The definition, literally: sets of samples, a dictionary of dictionaries, fractions."
    in_target, in_history = defaultdict(set), defaultdict(set)
    for s, t in targets: in_target[t].add(s)
    for s, h in history: in_history[h].add(s)
    n = {c: len(in_target[c] | in_history[c]) for c in {*in_target, *in_history}}
    by_sample = defaultdict(lambda: (set(), set()))
    for s, t in targets: by_sample[s][0].add(t)
    for s, h in history: by_sample[s][1].add(h)
    met = defaultdict(lambda: defaultdict(int))
    for t_, h_ in by_sample.values():
        for t in t_:
            for h in h_: met[t][h] += 1
    rows = []
    for t in sorted(met):
        some = [(Fraction(k*samples, n[t]*n[h]), k, h) for h, k in met[t].items() if h != t and n[h] >= least]
        some = sorted((x for x in some if x[0] > above), key=lambda x: (-x[0], -x[1], x[2]))[:keep]
        rows += [(t, h, k, n[t], n[h], samples, v.numerator/v.denominator) for v, k, h in some]
    return rows

IDS = [0, 1, 2, 3, 4, 5, 7, 9, 40_000, 2**31 - 1, 2**31, 2**32 - 1] # numbers need not be dense nor small
PAIRS = st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(IDS)), max_size=60)

@settings(max_examples=300, deadline=None)
@given(PAIRS, PAIRS, st.integers(12, 60), st.integers(1, 4), st.sampled_from([0., 1., 1.5, 3., 5.]), st.integers(1, 5),
       st.sampled_from([1, 2, 5, 1000]))
def test_same_pairs_as_the_definition(targets, history, samples, least, above, keep, block):
    found = lift_pairs(frame(targets), frame(history), samples, least, above, keep, block)
    assert found.schema == LIFT and found.rows() == naive(targets, history, samples, least, above, keep)

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([1, 7, 100, 10**6]))
def test_order_repetitions_parts_and_blocks_change_nothing(seed, block):
    rng = np.random.default_rng(seed)
    t, h = ([(int(s), int(c)) for s, c in zip(rng.integers(0, 80, n), rng.geometric(.15, n))] for n in (120, 700))
    whole = lift_pairs(frame(t), frame(h), 100, 3, 1.25, 4)
    assert len(whole) and whole.rows() == naive(t, h, 100, 3, 1.25, 4)
    shuffled = [h[i] for i in rng.permutation(len(h))] + h[:50]
    cut = int(rng.integers(0, len(shuffled)))
    parts = [frame(shuffled[:cut]), frame(shuffled[cut:]).lazy()]
    assert lift_pairs(frame(t[::-1] + t), parts, 100, 3, 1.25, 4, block).equals(whole)

def test_defaults_are_the_published_ones():
    # 100 samples; the answer 1 in ten of them, fact 2 (n=5), fact 3 (n=4: too few), fact 4 (n=20: lift 5 is not above 5)
    target = [(s, 1) for s in range(10)]
    history = [(s, 2) for s in range(5)] + [(s, 3) for s in range(4)] + [(s, 4) for s in range(20)]
    assert lift_pairs(frame(target), frame(history), 100).rows() == [(1, 2, 5, 10, 5, 100, 10.)]
    facts = [(s, 100 + c) for s in range(5) for c in range(30)]
    assert lift_pairs(frame(target), frame(facts), 100)['history'].to_list() == list(range(100, 120)) # twenty; equal ones by term

def test_equal_lifts_go_by_samples_then_by_term():
    target = [(s, 1) for s in range(10)]
    history = [(s, h) for h, n in ((3, 5), (9, 10), (8, 5), (4, 6)) for s in range(n)]    # lift is 10 for all of them
    order = [9, 4, 3, 8]
    for keep in range(1, 5): assert lift_pairs(frame(target), frame(history), 100, keep=keep)['history'].to_list() == order[:keep]

def test_count_takes_target_and_history_together():
    target, history = [(0, 1), (1, 1)], [(0, 2), (1, 2), (2, 1), (1, 1)]
    row = lift_pairs(frame(target), frame(history), 30, least=1, above=0.).row(0, named=True)
    assert (row['history'], row['n_target'], row['n_history'], row['n_pair']) == (2, 3, 2, 2)
    assert row['lift'] == lift(2, 3, 2, 30) == 10

def test_files_of_many_row_groups_read_like_frames(tmp_path):
    rng = np.random.default_rng(1)
    t, h = ([(int(s), int(c)) for s, c in zip(rng.integers(0, 300, n), rng.geometric(.03, n))] for n in (600, 9_000))
    frame(t).write_parquet(tmp_path/'t.parquet')
    for i in range(3): frame(h[i::3]).with_columns(other=pl.lit('x')).write_parquet(tmp_path/f'h-{i}.parquet', row_group_size=100)
    expected = naive(t, h, 300, 5, 2., 20)
    assert expected and lift_pairs(tmp_path/'t.parquet', sorted(tmp_path.glob('h-*')), 300, above=2.).rows() == expected
    assert lift_pairs(str(tmp_path/'t.parquet'), str(tmp_path/'h-*.parquet'), 300, above=2., block=50).rows() == expected

@pytest.mark.parametrize('t, h', [([], []), ([(0, 1)], []), ([], [(0, 1)]), ([(0, 1)], [(1, 2)]), ([(0, 1)], [(0, 1)])])
def test_nothing_to_pair_gives_an_empty_frame(t, h):
    found = lift_pairs(frame(t), frame(h), 10, least=1, above=0.)
    assert found.schema == LIFT and found.is_empty()

def test_bad_input_is_named(tmp_path):
    ok, path = frame([(0, 1)]), tmp_path/'pairs.parquet'
    pl.DataFrame(dict(sample=[0], term=['Sodium']), schema_overrides=dict(sample=pl.UInt32)).write_parquet(path)
    with pytest.raises(ValueError, match=r"pairs\.parquet: column 'term' is String; number"): lift_pairs(ok, path, 10)
    with pytest.raises(ValueError, match="no column 'sample'"): lift_pairs(ok.drop('sample'), ok, 10)
    pl.DataFrame(dict(sample=[0, None], term=[1, 2]), schema=PAIR).write_parquet(path)
    with pytest.raises(ValueError, match=r'pairs\.parquet: a sample or a term is missing'): lift_pairs(path, ok, 10)
    with pytest.raises(ValueError, match='3 samples have terms, but the task has 2'):
        lift_pairs(frame([(0, 1), (1, 1)]), frame([(7, 2)]), 2)

def test_blocks_cover_all_targets_and_hold_no_more_than_they_may():
    rng = np.random.default_rng(2)
    t, h = ([(int(s), int(c)) for s, c in zip(rng.integers(0, 400, n), rng.geometric(.02, n))] for n in (2_000, 12_000))
    counts = TermCounts(frame(t), frame(h), 400, 1, 0.)
    most = np.minimum(counts.by_target@np.diff(counts.history.indptr), len(counts.terms))
    for block in (1, 300, 5_000, 10**9):
        runs = target_runs(counts, block)
        assert [a for a, _ in runs] == [0, *(b for _, b in runs[:-1])] and runs[-1][1] == len(counts.targets)
        pairs = [(counts.by_target[a:b]@counts.history).nnz for a, b in runs]
        assert all(p <= block or b - a == 1 for p, (a, b) in zip(pairs, runs))
        assert all(most[a:b].sum() > block for a, b in zip([a for a, _ in runs], [b for _, b in runs[1:]])) # two do not fit in one
        assert sum(pairs) == (counts.by_target@counts.history).nnz
    assert counts.history.indices.dtype == counts.history.indptr.dtype == counts.history.data.dtype == np.int32

def test_common_terms_are_left_out_before_pairs_are_counted():
    target = [(s, 1) for s in range(4)] + [(s, 2) for s in range(4, 40)]
    history = [(s, 3) for s in range(40)] + [(s, 4) for s in range(5)]
    counts = TermCounts(frame(target), frame(history), 40)
    assert counts.terms[counts.targets].tolist() == [1] and counts.terms[np.unique(counts.history.indices)].tolist() == [4]
    together = [(s, 1) for s in range(20)], [(s, 2) for s in range(20)]     # as common as a term can be and still pass
    assert lift_pairs(*map(frame, together), 101)['lift'].to_list() == [5.05] and lift_pairs(*map(frame, together), 100).is_empty()

def test_pairs_are_read_once_each_in_order():
    keys = read_term_pairs([frame([(2**32 - 1, 0), (1, 5)]), frame([(1, 5), (1, 2**32 - 1)])])
    assert [divmod(k, 2**32) for k in keys.tolist()] == [(1, 5), (1, 2**32 - 1), (2**32 - 1, 0)]
