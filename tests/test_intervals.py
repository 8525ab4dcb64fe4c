"""Intervals that resample patients: their draws, their coverage, tables of scores and paired comparisons."""
import time

import numpy as np
import polars as pl
import pytest

from ehr_r1.intervals import (
    compare,
    evaluate,
    interval,
    p_value,
    resample_patients,
    score_all,
    score_table,
)
from ehr_r1.scoring import score_risk, weighted_mean

NUMBERS = ('value', 'low', 'high')


def bench(n=300, patients=100, tasks=('t1', 't2')):
    "Risk samples, and a system that knows something."
    rng = np.random.default_rng(0)
    rows = n*len(tasks)
    happened = rng.random(rows) < .4
    samples = pl.DataFrame(dict(
        sample_id=[f'{task}/{i}' for task in tasks for i in range(n)],
        subject_id=rng.integers(0, patients, rows),
        task=[task for task in tasks for _ in range(n)],
        family=['risk']*rows,
        label=[['yes'] if yes else ['no'] for yes in happened]))
    risk = np.clip(.4 + .15*happened + .2*rng.normal(size=rows), 0, 1)
    return samples, samples.select('sample_id', 'task', risk=pl.Series(risk))


def scored(samples, system, replicates=100, seed=0):
    "The table of one system, in a fixed order."
    return score_all(samples, dict(s=system), seed=seed, replicates=replicates).sort('task', 'metric')


def numbers(table):
    return table.select(NUMBERS).to_numpy()


def row_of(table, task, metric='auroc'):
    return table.filter((pl.col('task') == task) & (pl.col('metric') == metric)).row(0, named=True)


# ---- the table

def test_overall_is_the_mean_over_the_tasks_given():
    samples, system = bench(tasks=('t1', 't2', 'next_event'))
    table = score_all(samples, dict(s=system), tasks={'t1', 't2'}, replicates=20)
    overall = row_of(table, 'overall')
    parts = [row_of(table, task)['value'] for task in ('t1', 't2')]
    assert overall['value'] == pytest.approx(sum(parts)/2)
    assert overall['tasks'] == 2
    assert overall['samples'] == 600
    assert overall['low'] < overall['value'] < overall['high']
    assert row_of(table, 'next_event')['value'] is not None


def test_decision_overall_weighs_tasks_not_samples():
    samples = pl.DataFrame(dict(sample_id=['a', 'b', 'c'], subject_id=[1, 2, 3], task=['x', 'x', 'y'],
                                family=['decision']*3, label=[['p'], ['p'], ['p']]))
    system = samples.select('sample_id', 'task', answer=pl.Series([['p'], ['p'], ['q']]))
    table = score_all(samples, dict(s=system), replicates=10)
    assert row_of(table, 'overall', 'f1')['value'] == .5


@pytest.fixture(scope='module')
def one_class():
    "A benchmark whose second task has only no."
    samples, system = bench()
    second = pl.col('task') == 't2'
    samples = samples.with_columns(label=pl.when(second).then(pl.lit(['no'])).otherwise('label'))
    return samples, system, scored(samples, system, replicates=50)


def test_one_class_is_null_with_a_reason(one_class):
    samples, system, table = one_class
    row = row_of(table, 't2')
    assert row['value'] is None
    assert row['low'] is None
    assert row['note'] == 'only no'
    assert row['positives'] == 0
    assert score_risk(samples, system).filter(pl.col('task') == 't2')['auroc'].to_list() == [None]


def test_one_class_stays_out_of_the_mean(one_class):
    *_, table = one_class
    overall = row_of(table, 'overall')
    assert overall['tasks'] == 1
    assert 't2' in overall['note']
    assert overall['value'] == row_of(table, 't1')['value']


def test_one_patient_has_no_interval():
    samples, system = bench(patients=1)
    table = scored(samples, system, replicates=20)
    assert table['low'].null_count() == table.height
    assert table['value'].null_count() == 0


# ---- the draws

def test_each_replicate_draws_as_many_patients_as_there_are():
    resamples = resample_patients([5, 5, 7, 9, 9, 9], 50, 1)
    assert resamples.subjects.tolist() == [5, 7, 9]
    assert (resamples.counts.sum(1) == 3).all()


def test_samples_of_a_patient_weigh_the_same():
    resamples = resample_patients([5, 5, 7, 9, 9, 9], 50, 1)
    weights = resamples.weights([9, 5, 9])
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == resamples.counts[:, 0]).all()


def test_intervals_do_not_depend_on_the_order_of_rows():
    samples, system = bench()
    shuffled = samples.sample(fraction=1, shuffle=True, seed=1), system.sample(fraction=1, shuffle=True, seed=2)
    assert numbers(scored(samples, system)) == pytest.approx(numbers(scored(*shuffled)), abs=1e-12)


def test_intervals_depend_on_the_seed():
    samples, system = bench()
    first = scored(samples, system, seed=5)
    assert scored(samples, system, seed=5).equals(first)
    assert not scored(samples, system, seed=6)['low'].equals(first['low'])


def fourfold(frame):
    "Every row four times, under names of their own."
    return pl.concat([frame.with_columns(sample_id=pl.col('sample_id') + f'#{i}') for i in range(4)])


def test_copies_of_a_patients_samples_are_no_new_evidence():
    samples, system = bench(n=200, patients=10**6)
    one = scored(samples, system, replicates=200)
    four = scored(fourfold(samples), fourfold(system), replicates=200)
    assert numbers(one) == pytest.approx(numbers(four), abs=1e-12)


def test_resampling_rows_would_claim_more():
    samples, system = bench(n=200, patients=10**6)
    one = scored(samples, system, replicates=200)
    each_a_patient = fourfold(samples).with_row_index('row').with_columns(subject_id=pl.col('row').cast(pl.Int64))
    rows = scored(each_a_patient.drop('row'), fourfold(system), replicates=200)
    assert ((rows['high'] - rows['low']) < .7*(one['high'] - one['low'])).all()


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, trials, covered = np.random.default_rng(0), 300, 0
    patients = np.repeat(np.arange(60), 5)
    for trial in range(trials):
        of_patient = .2*rng.normal(size=60)[patients]  # samples of a patient resemble each other
        values = .5 + of_patient + .1*rng.normal(size=300)
        weights = resample_patients(patients, 200, trial).weights(patients)
        low, high = interval(weighted_mean(values, weights))
        covered += low <= .5 <= high
    assert .89 <= covered/trials <= .98


def test_overall_interval_uses_joint_draws():
    "Two tasks with the same samples have the interval of one, not one narrower by the square root of two."
    samples, system = bench(tasks=('t1',))

    def twin(frame):
        return pl.concat([frame, frame.with_columns(sample_id=pl.col('sample_id') + 'b', task=pl.lit('t2'))])

    table = scored(twin(samples), twin(system))
    assert row_of(table, 'overall')['low'] == pytest.approx(row_of(table, 't1')['low'])


def test_a_thousand_replicates_are_quick():
    samples, system = bench(n=500, patients=4000, tasks=tuple(f't{i}' for i in range(18)))
    start = time.process_time()
    score_all(samples, dict(s=system))
    assert time.process_time() - start < 10


# ---- comparisons

@pytest.fixture(scope='module')
def three_systems():
    "Scores of a system, of the same with noise, and of the first again."
    samples, better = bench(n=400)
    noise = .3*np.random.default_rng(1).normal(size=better.height)
    worse = better.with_columns(risk=pl.Series(np.clip(better['risk'] + noise, 0, 1)))
    return evaluate(samples, dict(a=better, b=worse, c=better), replicates=300)


def overall_of(scores, first, second):
    return row_of(compare(scores, first, second), 'overall')


def test_a_better_system_is_found_better(three_systems):
    row = overall_of(three_systems, 'a', 'b')
    assert row['difference'] > 0
    assert row['low'] > 0
    assert row['p'] < .05


def test_a_comparison_turned_round_has_the_other_sign(three_systems):
    there, back = overall_of(three_systems, 'a', 'b'), overall_of(three_systems, 'b', 'a')
    assert back['difference'] == -there['difference']
    assert back['p'] == there['p']


def test_a_system_does_not_differ_from_itself(three_systems):
    row = overall_of(three_systems, 'a', 'c')
    assert row['difference'] == 0
    assert row['p'] == 1


def test_a_paired_interval_is_narrower_than_both(three_systems):
    row = overall_of(three_systems, 'a', 'b')
    table = score_table(three_systems).filter((pl.col('task') == 'overall') & (pl.col('metric') == 'auroc'))
    spread = dict(zip(table['system'], table['high'] - table['low']))
    assert row['high'] - row['low'] < spread['a'] + spread['b']


def test_false_alarms_are_as_rare_as_the_p_value_says():
    rng, trials, alarms = np.random.default_rng(0), 300, 0
    patients = np.arange(80)
    for trial in range(trials):
        weights = resample_patients(patients, 200, trial).weights(patients)
        alarms += p_value(weighted_mean(rng.normal(size=80), weights)) < .05
    assert alarms/trials < .11
