"Split, sampling and candidates."
import numpy as np
import polars as pl
import pytest

from ehr_r1.data.sampling import Candidates, choose, split_of
from ehr_r1.profiles import profile


def index(n=4000, task='services', label=lambda i: ['MED'], **columns):
    "Index rows of 500 patients, with some columns replaced."
    rng = np.random.default_rng(0)
    rows = dict(
        subject_id=rng.integers(0, 500, n),
        trigger=np.arange(n),
        task=task,
        label=[label(i) for i in range(n)],
        begin=1,
        end=30,
        admissions_event=1,
        patient_events=99)
    return pl.DataFrame(rows | columns, schema_overrides=dict(trigger=pl.Int32))


def answers(chosen):
    return chosen['label'].list.first()


# split

@pytest.fixture(scope='module')
def patients():
    return np.arange(10_000_000, 10_020_000)


def test_the_split_of_a_patient_depends_on_no_other(patients):
    whole = split_of(patients, 42)
    backwards = split_of(patients[::-1], 42)
    assert (backwards[::-1] == whole).all()
    assert (split_of(patients[:7], 42) == whole[:7]).all()


def test_the_split_depends_on_the_seed(patients):
    assert (split_of(patients, 43) != split_of(patients, 42)).any()


@pytest.mark.parametrize('split, share', [
    ('train', .8),
    ('tuning', .1),
    ('held_out', .1),
])
def test_the_shares_of_the_splits(patients, split, share):
    found = (split_of(patients, 42) == split).mean()
    assert abs(found - share) < .01


def test_no_patient_is_in_two_splits_or_sets():
    services, _ = choose(index(task='services'), profile('smoke'))
    orders, _ = choose(index(task='poe'), profile('smoke'))
    by_patient = pl.concat([services, orders]).group_by('subject_id')
    places = by_patient.agg(pl.col('split', 'set').n_unique())
    assert places['split'].max() == 1
    assert places['set'].max() == 1


def test_the_benchmark_is_held_out():
    chosen, _ = choose(index(), profile('smoke'))
    bench = chosen.filter(pl.col('set') == 'ehr_bench')
    assert set(bench['split']) == {'held_out'}


# draw and caps

def test_who_is_chosen_does_not_depend_on_order():
    rows = index()
    shuffled = rows.sample(fraction=1, shuffle=True, seed=3)
    first, _ = choose(rows, profile('smoke'))
    second, _ = choose(shuffled, profile('smoke'))
    assert set(first['trigger']) == set(second['trigger'])


SMALL = dict(ins_per_task=50, bench_per_task=20)


def test_caps_of_a_decision():
    _, counts = choose(index(), profile('smoke', **SMALL))
    assert (counts['ehr_ins'], counts['ehr_bench']) == (50, 20)


def test_caps_of_a_risk_are_half_yes_and_half_no():
    rows = index(task='Inpatient_Mortality', label=lambda i: ['yes' if i % 9 == 0 else 'no'])
    chosen, _ = choose(rows, profile('smoke', **SMALL))
    sizes = chosen.group_by('set', answers(chosen)).len()['len']
    assert sizes.sort().to_list() == [10, 10, 25, 25]


def test_a_rare_answer_is_taken_as_often_as_it_is_there():
    rows = index(n=300, task='Inpatient_Mortality', label=lambda i: ['yes' if i == 5 else 'no'])
    chosen, _ = choose(rows, profile('smoke', **SMALL))
    assert (answers(chosen) == 'yes').sum() == 1


def test_rare_labels_are_preferred():
    rows = index(label=lambda i: ['RARE' if i % 40 == 0 else 'MED'])
    chosen, _ = choose(rows, profile('smoke', ins_per_task=400))
    in_ins = chosen.filter(pl.col('set') == 'ehr_ins')
    assert (answers(in_ins) == 'RARE').mean() > .15 > 1/40


# filters

@pytest.fixture
def three_bad_rows():
    "A short window, a long one, a patient of many events; and three rows without fault."
    end = [5, 30, 200, 30, 30, 30]
    patient_events = [99, 99, 99, 5000, 99, 99]
    return index(n=6, end=end, patient_events=patient_events)


def test_filters_are_counted(three_bad_rows):
    _, counts = choose(three_bad_rows, profile('smoke'))
    assert counts['eligible'] == 3
    assert list(counts['dropped'].values()) == [1, 1, 1]


def test_without_caps_there_are_no_filters(three_bad_rows):
    _, counts = choose(three_bad_rows, profile('smoke', caps='none'))
    assert counts['eligible'] == 6


@pytest.mark.parametrize('protocol, eligible', [
    ('strict', 2),
    ('official', 1),
])
def test_windows_of_diagnoses_reach_back_to_the_admission(protocol, eligible):
    rows = index(n=3, task='diagnoses_icd', begin=[1, 2, 3], admissions_event=2)
    _, counts = choose(rows, profile('smoke', protocol=protocol))
    assert counts['eligible'] == eligible


def test_chart_events_have_fewer_than_10_labels():
    ten = [f'x{k}' for k in range(10)]
    rows = index(n=2, task='chartevents', label=lambda i: ten[i:])
    _, counts = choose(rows, profile('smoke'))
    assert counts['eligible'] == 1


# candidates

@pytest.fixture(scope='module')
def many():
    labels = [f'{name} {i}' for name in ('Sodium', 'Lactate') for i in range(150)]
    return Candidates(labels, 'labevents', 42, ['Unseen'])


def test_candidates_hold_the_answers_once_each(many):
    found = many('1-labevents-2', ['Sodium 7', 'Unseen'])
    assert {'Sodium 7', 'Unseen'} <= set(found)
    assert len(found) == len(set(found)) <= 102


def test_candidates_are_shuffled_the_same_way_again(many):
    found = many('1-labevents-2', ['Sodium 7', 'Unseen'])
    assert found == many('1-labevents-2', ['Sodium 7', 'Unseen'])
    assert found != sorted(found)


def test_candidates_look_alike(many):
    found = many('x', ['Sodium 7'])
    assert sum(label.startswith('Sodium') for label in found) >= 95


def test_candidates_of_a_risk():
    candidates = Candidates([], 'ED_Hospitalization', 42)
    assert candidates('x', ['yes']) == ['yes', 'no']


def test_a_small_label_set_is_shown_whole_with_the_answers():
    few = Candidates(['A', 'B'], 'services', 42)
    assert sorted(few('x', ['C'])) == ['A', 'B', 'C']
