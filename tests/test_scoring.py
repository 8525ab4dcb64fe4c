"""Scores: definitions by hand, agreement with scikit-learn, hostile answers, and intervals that resample patients."""
import time
import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st
from sklearn.metrics import average_precision_score, brier_score_loss, roc_auc_score
from ehr_r1.scoring import (
    auprc, auroc, brier, calibration, parse_answer, score_decision, score_risk, set_f1, weighted_mean)
from ehr_r1.intervals import compare, evaluate, interval, p_value, resample_patients, score_all, score_table

# ---- answers

@pytest.mark.parametrize('text, opened, lines, status', [
    ('Sodium\nPotassium', False, ['Sodium', 'Potassium'], 'answered'),
    ('<think>Glucose</think>\r\n  Sodium \r\n\n', False, ['Sodium'], 'answered'),
    ('<think>a</think>b<think>c</think>d', False, ['d'], 'answered'),
    ('chain without its opening tag</think>Sodium', True, ['Sodium'], 'answered'),
    ('<think>Sodium', False, [], 'unclosed'),
    ('<think>a</think>Sodium<think>more', False, [], 'unclosed'),
    ('Sodium', True, [], 'unclosed'),
    ('<think>Sodium</think> \n\t', False, [], 'empty'),
    ('', False, [], 'empty'), (None, False, [], 'empty'),
])
def test_answer_is_what_follows_the_last_closing_tag(text, opened, lines, status):
    a = parse_answer(text, opened)
    assert (a.lines, a.status) == (lines, status)

@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(['<think>', '</think>', '\n', '\r\n', '\x00', '\ud800', '\x1f', '\u2028', ' ']), st.text(max_size=8)), max_size=20))
def test_any_text_gives_lines_that_can_be_stored(parts):
    a = parse_answer(''.join(parts))
    assert all(x and x == x.strip() and '\n' not in x for x in a.lines)
    assert (a.status == 'answered') == bool(a.lines)
    assert pl.Series([a.lines], dtype=pl.List(pl.String))[0].to_list() == a.lines

@pytest.mark.parametrize('unit', ['<think>', '</think>', '<think></think>', '\n', 'a\n', '<', '\x00', '\ud800 \n', '<think>\n</think>\nSodium\n'])
def test_ten_megabytes_take_a_moment(unit):
    text = unit*(10_000_000//len(unit))
    start = time.process_time()
    a = parse_answer(text)
    set_f1(['Sodium'], a.lines)
    assert time.process_time()-start < 10

# ---- F1

@pytest.mark.parametrize('gold, pred, f1', [
    (['a', 'b', 'c'], ['b', 'c', 'd'], 2*2/6), (['a'], ['a'], 1), (['a', 'b'], ['a'], 2/3), (['a'], ['b'], 0),
    (['Sodium'], [' sodium ', 'SODIUM'], 1), (['a', 'a', 'b'], ['a'], 2/3), (['Straße'], ['STRASSE'], 1),
    (['a'], [], 0), ([], ['a'], 0), ([], [], 1), (['a'], None, 0), (['a'], ['', '  '], 0),
])
def test_f1_by_hand(gold, pred, f1): assert set_f1(gold, pred) == pytest.approx(f1)

# ---- ranking scores

@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(0, 3)), min_size=2, max_size=60))
def test_agrees_with_scikit_learn_ties_and_weights_included(rows):
    y, s, w = np.array([r[0] for r in rows], int), np.array([r[1] for r in rows])/6, np.array([r[2] for r in rows])
    if len(set(y)) == 2:
        assert auroc(y, s) == pytest.approx(roc_auc_score(y, s))
        assert auprc(y, s) == pytest.approx(average_precision_score(y, s))
    if len(set(y[w > 0])) == 2:
        assert auroc(y, s, w) == pytest.approx(roc_auc_score(y, s, sample_weight=w))
        assert auprc(y, s, w) == pytest.approx(average_precision_score(y, s, sample_weight=w))
        assert brier(y, s, w) == pytest.approx(brier_score_loss(y, s, sample_weight=w, pos_label=1))

def test_rows_of_weights_are_repeated_samples():
    rng = np.random.default_rng(3)
    y, s, w = rng.integers(0, 2, 80), rng.random(80).round(1), rng.integers(0, 4, (5, 80))
    for b in range(5):
        again = np.repeat(np.arange(80), w[b])
        for f in (auroc, auprc, brier): assert f(y, s, w)[b] == pytest.approx(f(y[again], s[again]))

def test_auroc_by_hand():
    assert auroc([0, 0, 1, 1], [.1, .4, .35, .8]) == .75
    assert auroc([0, 1], [.5, .5]) == .5
    assert np.isnan(auroc([1, 1], [.1, .2])) and np.isnan(auroc([], []))

def test_calibration_counts():
    t = calibration([1, 0, 1, 1], [0, .05, .95, 1.])
    assert t['samples'].to_list() == [2, 0, 0, 0, 0, 0, 0, 0, 0, 2] and t['observed'].to_list()[::9] == [.5, 1]
    assert t['mean_risk'][0] == pytest.approx(.025) and t['mean_risk'][1] is None

# ---- frames

def bench(n=300, patients=100, seed=0, tasks=('t1', 't2')):
    "Risk samples, and a system that knows something."
    rng = np.random.default_rng(seed)
    y = rng.random(n*len(tasks)) < .4
    samples = pl.DataFrame(dict(sample_id=[f'{t}/{i}' for t in tasks for i in range(n)], subject_id=rng.integers(0, patients, n*len(tasks)), task=[t for t in tasks for _ in range(n)],
                                family=['risk']*n*len(tasks), label=[['yes'] if v else ['no'] for v in y]))
    return samples, samples.select('sample_id', 'task', risk=pl.Series(np.clip(.4+.15*y+.2*rng.normal(size=len(y)), 0, 1)))

def test_overall_is_the_mean_over_the_tasks_given():
    samples, system = bench(tasks=('t1', 't2', 'next_event'))
    table = score_all(samples, dict(s=system), tasks={'t1', 't2'}, replicates=20).filter(pl.col('metric') == 'auroc')
    value = dict(zip(table['task'], table['value']))
    assert value['overall'] == pytest.approx((value['t1']+value['t2'])/2)
    row = table.filter(pl.col('task') == 'overall').row(0, named=True)
    assert row['tasks'] == 2 and row['samples'] == 600 and 'next_event' in value
    assert row['low'] < row['value'] < row['high']

def test_decision_overall_weighs_tasks_not_samples():
    samples = pl.DataFrame(dict(sample_id=['a', 'b', 'c'], subject_id=[1, 2, 3], task=['x', 'x', 'y'], family=['decision']*3, label=[['p'], ['p'], ['p']]))
    system = samples.select('sample_id', 'task', answer=pl.Series([['p'], ['p'], ['q']]))
    t = score_all(samples, dict(s=system), replicates=10)
    assert t.filter(pl.col('task') == 'overall')['value'].item() == .5

def test_one_class_is_null_with_a_reason():
    samples, system = bench()
    samples = samples.with_columns(label=pl.when(pl.col('task') == 't2').then(pl.lit(['no'])).otherwise('label'))
    t = score_all(samples, dict(s=system), replicates=50)
    row = t.filter((pl.col('task') == 't2') & (pl.col('metric') == 'auroc')).row(0, named=True)
    assert row['value'] is None and row['low'] is None and row['note'] == 'only no' and row['positives'] == 0
    whole = t.filter((pl.col('task') == 'overall') & (pl.col('metric') == 'auroc')).row(0, named=True)
    assert whole['tasks'] == 1 and 't2' in whole['note']
    assert whole['value'] == t.filter((pl.col('task') == 't1') & (pl.col('metric') == 'auroc'))['value'].item()
    assert score_risk(samples, system).filter(pl.col('task') == 't2')['auroc'].to_list() == [None]

def test_what_is_left_out_counts():
    samples = pl.DataFrame(dict(sample_id=['a', 'b'], subject_id=[1, 2], task=['x', 'x'], family=['decision']*2, label=[['p'], ['p']]))
    made = score_decision(samples, pl.DataFrame(dict(sample_id=['a'], task=['x'], answer=[['p']])))
    assert made['f1'].to_list() == [1, 0] and made['missing'].to_list() == [False, True]
    samples, system = bench(tasks=('t1',))
    made = score_risk(samples, system.head(200))
    assert made['samples'].item() == 300 and made['missing'].item() == 100
    assert made['auroc'].item() == pytest.approx(roc_auc_score(samples['label'].list.first() == 'yes', [*system['risk'][:200], *[.5]*100]))

def test_mixed_up_files_are_refused():
    samples, system = bench()
    with pytest.raises(ValueError, match='fit no sample'): score_risk(samples, system.with_columns(sample_id=pl.col('sample_id')+'x'))
    with pytest.raises(ValueError, match='more than once'): score_risk(samples, pl.concat([system, system.head(1)]))
    with pytest.raises(ValueError, match='not between 0 and 1'): score_risk(samples, system.with_columns(risk=pl.lit(1.2)))
    with pytest.raises(ValueError, match='not between 0 and 1'): score_risk(samples, system.with_columns(risk=pl.lit(float('nan'))))
    with pytest.raises(ValueError, match='no column risk'): score_risk(samples, system.drop('risk'))
    with pytest.raises(ValueError, match='neither yes nor no'): score_risk(samples.with_columns(label=pl.lit(['maybe'])), system)

# ---- the bootstrap

def test_same_seed_same_intervals_whatever_the_order():
    samples, system = bench()
    first = score_all(samples, dict(s=system), seed=5, replicates=100)
    shuffled = score_all(samples.sample(fraction=1, shuffle=True, seed=1), dict(s=system.sample(fraction=1, shuffle=True, seed=2)), seed=5, replicates=100).sort('task', 'metric')
    first = first.sort('task', 'metric')
    assert first.select('value', 'low', 'high').to_numpy() == pytest.approx(shuffled.select('value', 'low', 'high').to_numpy(), abs=1e-12)
    assert score_all(samples, dict(s=system), seed=5, replicates=100).sort('task', 'metric').equals(first)
    assert not score_all(samples, dict(s=system), seed=6, replicates=100).sort('task', 'metric')['low'].equals(first['low'])

def test_each_replicate_draws_as_many_patients_as_there_are():
    r = resample_patients([5, 5, 7, 9, 9, 9], 50, 1)
    assert r.subjects.tolist() == [5, 7, 9] and (r.counts.sum(1) == 3).all()
    w = r.weights([9, 5, 9])
    assert (w[:, 0] == w[:, 2]).all() and (w[:, 1] == r.counts[:, 0]).all()

def test_copies_of_a_patients_samples_are_no_new_evidence():
    samples, system = bench(n=200, patients=10**6)
    copies = lambda f: pl.concat([f.with_columns(sample_id=pl.col('sample_id')+f'#{i}') for i in range(4)])
    one = score_all(samples, dict(s=system), replicates=200).sort('task', 'metric')
    four = score_all(copies(samples), dict(s=copies(system)), replicates=200).sort('task', 'metric')
    assert one.select('value', 'low', 'high').to_numpy() == pytest.approx(four.select('value', 'low', 'high').to_numpy(), abs=1e-12)
    as_patients = copies(samples).with_row_index('k').with_columns(subject_id=pl.col('k').cast(pl.Int64))
    rows = score_all(as_patients.drop('k'), dict(s=copies(system)), replicates=200).sort('task', 'metric')
    assert ((rows['high']-rows['low']) < .7*(one['high']-one['low'])).all()

def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, hit, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        who = np.repeat(np.arange(60), 5)
        x = .5+.2*rng.normal(size=60)[who]+.1*rng.normal(size=300)  # samples of a patient resemble each other
        low, high = interval(weighted_mean(x, resample_patients(who, 200, trial).weights(who)))
        hit += low <= .5 <= high
    assert .89 <= hit/trials <= .98

def test_overall_interval_uses_joint_draws():
    "Two tasks with the same samples have the interval of one, not one narrower by the square root of two."
    samples, system = bench(tasks=('t1',))
    twin = lambda f: pl.concat([f, f.with_columns(sample_id=pl.col('sample_id')+'b', task=pl.lit('t2'))])
    t = score_all(twin(samples), dict(s=twin(system)), replicates=100).filter(pl.col('metric') == 'auroc')
    low = dict(zip(t['task'], t['low']))
    assert low['overall'] == pytest.approx(low['t1'])

def test_paired_comparison():
    samples, better = bench(n=400)
    rng = np.random.default_rng(1)
    worse = better.with_columns(risk=pl.Series(np.clip(better['risk']+.3*rng.normal(size=better.height), 0, 1)))
    scores = evaluate(samples, dict(a=better, b=worse, c=better), replicates=300)
    ab, ba, ac = compare(scores, 'a', 'b'), compare(scores, 'b', 'a'), compare(scores, 'a', 'c')
    pick = lambda t: t.filter((pl.col('task') == 'overall') & (pl.col('metric') == 'auroc')).row(0, named=True)
    assert pick(ab)['difference'] > 0 and pick(ab)['p'] < .05 and pick(ab)['low'] > 0
    assert pick(ba)['difference'] == -pick(ab)['difference'] and pick(ba)['p'] == pick(ab)['p']
    assert pick(ac)['difference'] == 0 and pick(ac)['p'] == 1
    table = score_table(scores).filter((pl.col('task') == 'overall') & (pl.col('metric') == 'auroc'))
    spread = dict(zip(table['system'], table['high']-table['low']))
    assert pick(ab)['high']-pick(ab)['low'] < spread['a']+spread['b']

def test_false_alarms_are_as_rare_as_the_p_value_says():
    rng, alarms, trials = np.random.default_rng(0), 0, 300
    for trial in range(trials):
        who = np.arange(80)
        alarms += p_value(weighted_mean(rng.normal(size=80), resample_patients(who, 200, trial).weights(who))) < .05
    assert alarms/trials < .11

def test_one_patient_has_no_interval():
    samples, system = bench(patients=1)
    t = score_all(samples, dict(s=system), replicates=20)
    assert t['low'].null_count() == t.height and t['value'].null_count() == 0

def test_a_thousand_replicates_are_quick():
    samples, system = bench(n=500, patients=4000, tasks=tuple(f't{i}' for i in range(18)))
    start = time.process_time()
    score_all(samples, dict(s=system))
    assert time.process_time()-start < 10
