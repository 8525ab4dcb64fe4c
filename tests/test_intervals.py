"""Intervals that resample patients: their draws, their coverage, tables of scores and paired comparisons."""
import time

import numpy as np
import polars as pl
import pytest

from ehr_r1.evaluation.benchmark import score_run
from ehr_r1.intervals import (
    ENOUGH,
    compare,
    evaluate,
    has_enough,
    interval,
    p_value,
    resample_patients,
    score_all,
    score_table,
    tasks_in_mean,
)
from ehr_r1.scoring import score_risk, weighted_mean

NUMBERS = ('value', 'low', 'high')


def bench(n=300, patients=100, tasks=('t1', 't2')):
    "Risk samples, and a system that knows something."
    rng = np.random.default_rng(0)
    rows = n*len(tasks)
    happened = rng.random(rows) < .4
    labels = np.where(happened, 'yes', 'no')
    samples = pl.DataFrame(dict(
        sample_id=[f'{task}/{i}' for task in tasks for i in range(n)],
        subject_id=rng.integers(0, patients, rows),
        task=np.repeat(tasks, n),
        family='risk',
        label=[[label] for label in labels.tolist()]))
    noise = .2*rng.normal(size=rows)
    risk = np.clip(.4 + .15*happened + noise, 0, 1)
    system = samples.select('sample_id', 'task', risk=pl.Series(risk))
    return samples, system


def scored(samples, system, replicates=100, seed=0):
    "The table of one system, in a fixed order."
    table = score_all(samples, dict(s=system), seed=seed, replicates=replicates)
    return table.sort('task', 'metric')


def numbers(table):
    return table.select(NUMBERS).to_numpy()


def row_of(table, task, metric='auroc'):
    rows = table.filter(task=task, metric=metric)
    return rows.row(0, named=True)


# ---- the table

def test_overall_is_the_mean_over_the_tasks_given():
    samples, system = bench(tasks=('t1', 't2', 'next_event'))
    table = score_all(samples, dict(s=system), tasks={'t1', 't2'}, replicates=20)
    overall = row_of(table, 'overall')
    first, second = row_of(table, 't1'), row_of(table, 't2')
    mean = (first['value'] + second['value'])/2
    assert overall['value'] == pytest.approx(mean)
    assert overall['tasks'] == 2
    assert overall['samples'] == 600
    assert overall['low'] < overall['value'] < overall['high']
    assert row_of(table, 'next_event')['value'] is not None


def test_decision_overall_weighs_tasks_not_samples():
    samples = pl.DataFrame(dict(
        sample_id=['a', 'b', 'c'],
        subject_id=[1, 2, 3],
        task=['x', 'x', 'y'],
        family='decision',
        label=[['p'], ['p'], ['p']]))
    answers = pl.Series([['p'], ['p'], ['q']])
    system = samples.select('sample_id', 'task', answer=answers)
    table = score_all(samples, dict(s=system), replicates=10)
    assert row_of(table, 'overall', 'f1')['value'] == .5


@pytest.fixture(scope='module')
def one_class():
    "A benchmark whose second task has only no."
    samples, system = bench()
    first = pl.col('task') == 't1'
    label = pl.when(first).then('label').otherwise(pl.lit(['no']))
    samples = samples.with_columns(label=label)
    table = scored(samples, system, replicates=50)
    return samples, system, table


def test_one_class_is_null_with_a_reason(one_class):
    samples, system, table = one_class
    row = row_of(table, 't2')
    assert row['value'] is None
    assert row['low'] is None
    assert row['note'] == 'only no'
    assert row['positives'] == 0
    risks = score_risk(samples, system).filter(task='t2')
    assert risks['auroc'].to_list() == [None]


def test_one_class_stays_out_of_the_mean(one_class):
    *_, table = one_class
    overall = row_of(table, 'overall')
    assert overall['tasks'] == 1
    assert 't2' in overall['note']
    assert overall['value'] == row_of(table, 't1')['value']


@pytest.mark.parametrize(('samples', 'positives', 'enters'), [
    (30, None, True), (29, None, False), (60, 30, True), (500, 29, False), (500, 471, False), (500, 0, False)])
def test_thirty_samples_or_answers_of_each_kind_enter_a_mean(samples, positives, enters):
    assert has_enough(samples, positives) == enters


def rare(task, n, yes):
    "Risk samples of a task, so many of them yes."
    labels = [['yes']]*yes + [['no']]*(n - yes)
    ids = [f'{task}/{i}' for i in range(n)]
    return pl.DataFrame(dict(sample_id=ids, subject_id=range(n), task=task, family='risk', label=labels))


@pytest.fixture(scope='module')
def some_rare():
    "Risks with enough answers of each kind, with one yes too few and with one no too few; a decision with too few."
    decision = rare('few', ENOUGH - 1, 0).with_columns(family=pl.lit('decision'))
    risks = [rare('often', 90, ENOUGH), rare('seldom', 90, ENOUGH - 1), rare('nearly all', 90, 91 - ENOUGH)]
    return pl.concat([*risks, decision])


def test_only_named_tasks_with_enough_answers_enter(some_rare):
    assert tasks_in_mean(some_rare) == {'often'}
    assert tasks_in_mean(some_rare, {'seldom', 'few'}) == set()
    assert tasks_in_mean(some_rare.head(0)) == set()


def test_both_sides_of_a_comparison_leave_out_the_same_tasks(some_rare, tmp_path):
    half = some_rare.select('sample_id', 'task', risk=pl.lit(.5), answer=pl.lit(['no']))
    knows = half.with_columns(risk=(some_rare['label'].list.first() == 'yes').cast(pl.Float64))
    score_run(some_rare, dict(half=half, knows=knows), tmp_path, replicates=20)
    scores = pl.read_parquet(tmp_path/'scores.parquet')
    overall = scores.filter(task='overall')
    assert set(overall['system']) == {'half', 'knows'}
    assert set(overall['family']) == {'risk'}
    assert overall['tasks'].unique().to_list() == [1]
    assert overall['samples'].unique().to_list() == [90]
    assert {'seldom', 'few'} < set(scores['task'])
    paired = pl.read_parquet(tmp_path/'comparisons.parquet').filter(task='overall')
    assert paired['tasks'].unique().to_list() == [1]


def test_one_patient_has_no_interval():
    samples, system = bench(patients=1)
    table = scored(samples, system, replicates=20)
    assert table['low'].null_count() == table.height
    assert table['value'].null_count() == 0


# ---- the draws

@pytest.fixture(scope='module')
def resamples():
    "Fifty draws of three patients, who have six samples."
    return resample_patients([5, 5, 7, 9, 9, 9], 50, 1)


def test_each_replicate_draws_as_many_patients_as_there_are(resamples):
    assert resamples.subjects.tolist() == [5, 7, 9]
    assert (resamples.counts.sum(1) == 3).all()


def test_samples_of_a_patient_weigh_the_same(resamples):
    first_of_9, of_5, second_of_9 = resamples.weights([9, 5, 9]).T
    counts_of_5, *_ = resamples.counts.T
    assert (first_of_9 == second_of_9).all()
    assert (of_5 == counts_of_5).all()


def shuffled(frame, seed):
    return frame.sample(fraction=1, shuffle=True, seed=seed)


def test_intervals_do_not_depend_on_the_order_of_rows():
    samples, system = bench()
    in_order = numbers(scored(samples, system))
    of_shuffled = numbers(scored(shuffled(samples, 1), shuffled(system, 2)))
    assert of_shuffled == pytest.approx(in_order, abs=1e-12)


def test_intervals_depend_on_the_seed():
    samples, system = bench()
    first = scored(samples, system, seed=5)
    again = scored(samples, system, seed=5)
    other = scored(samples, system, seed=6)
    assert again.equals(first)
    assert not other['low'].equals(first['low'])


def fourfold(frame):
    "Every row four times, under names of their own."
    name = pl.col('sample_id')
    return pl.concat([frame.with_columns(name + f'#{i}') for i in range(4)])


@pytest.fixture(scope='module')
def few_per_patient():
    "Samples of which hardly two are of one patient, a system, and its table."
    samples, system = bench(n=200, patients=10**6)
    table = scored(samples, system, replicates=200)
    return samples, system, table


def test_copies_of_a_patients_samples_are_no_new_evidence(few_per_patient):
    samples, system, one = few_per_patient
    four = scored(fourfold(samples), fourfold(system), replicates=200)
    assert numbers(four) == pytest.approx(numbers(one), abs=1e-12)


def widths(table):
    return table['high'] - table['low']


def test_resampling_rows_would_claim_more(few_per_patient):
    samples, system, one = few_per_patient
    copies = fourfold(samples)
    each_a_patient = copies.with_columns(subject_id=pl.int_range(len(copies)))
    rows = scored(each_a_patient, fourfold(system), replicates=200)
    assert (widths(rows) < .7*widths(one)).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(60), 5)
    covered = []
    for trial in range(300):
        of_patient = .2*rng.normal(size=60)  # samples of a patient resemble each other
        of_sample = .1*rng.normal(size=300)
        values = .5 + of_patient[patients] + of_sample
        weights = resample_patients(patients, 200, trial).weights(patients)
        low, high = interval(weighted_mean(values, weights))
        covered.append(low <= .5 <= high)
    assert .89 <= np.mean(covered) <= .98


def test_overall_interval_uses_joint_draws():
    "Two tasks with the same samples have the interval of one, not one narrower by the square root of two."
    samples, system = bench(tasks=('t1',))

    def twin(frame):
        second = frame.with_columns(pl.col('sample_id') + 'b', task=pl.lit('t2'))
        return pl.concat([frame, second])

    table = scored(twin(samples), twin(system))
    overall, first = row_of(table, 'overall'), row_of(table, 't1')
    assert overall['low'] == pytest.approx(first['low'])


def test_a_thousand_replicates_are_quick():
    tasks = [f't{i}' for i in range(18)]
    samples, system = bench(n=500, patients=4000, tasks=tasks)
    start = time.process_time()
    score_all(samples, dict(s=system))
    assert time.process_time() - start < 10


# ---- comparisons

@pytest.fixture(scope='module')
def three_systems():
    "Scores of a system, of the same with noise, and of the first again."
    samples, better = bench(n=400)
    rng = np.random.default_rng(1)
    noise = pl.Series(.3*rng.normal(size=better.height))
    worse = better.with_columns((pl.col('risk') + noise).clip(0, 1))
    systems = dict(a=better, b=worse, c=better)
    return evaluate(samples, systems, replicates=300)


def overall_of(scores, first, second):
    return row_of(compare(scores, first, second), 'overall')


def test_a_better_system_is_found_better(three_systems):
    row = overall_of(three_systems, 'a', 'b')
    assert row['difference'] > 0
    assert row['low'] > 0
    assert row['p'] < .05


def test_a_comparison_turned_round_has_the_other_sign(three_systems):
    there = overall_of(three_systems, 'a', 'b')
    back = overall_of(three_systems, 'b', 'a')
    assert back['difference'] == -there['difference']
    assert back['p'] == there['p']


def test_a_system_does_not_differ_from_itself(three_systems):
    row = overall_of(three_systems, 'a', 'c')
    assert row['difference'] == 0
    assert row['p'] == 1


def test_a_paired_interval_is_narrower_than_both(three_systems):
    row = overall_of(three_systems, 'a', 'b')
    table = score_table(three_systems).filter(task='overall', metric='auroc')
    width = dict(zip(table['system'], widths(table)))
    assert row['high'] - row['low'] < width['a'] + width['b']


def test_false_alarms_are_as_rare_as_the_p_value_says():
    rng = np.random.default_rng(0)
    patients = np.arange(80)
    alarms = []
    for trial in range(300):
        no_difference = rng.normal(size=80)
        weights = resample_patients(patients, 200, trial).weights(patients)
        p = p_value(weighted_mean(no_difference, weights))
        alarms.append(p < .05)
    assert np.mean(alarms) < .11
