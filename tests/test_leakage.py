"Under `strict` nothing after the prediction time may change a prompt."
import re
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import at, merged, random_rows, row, store

from ehr_r1.data.index import index_rows
from ehr_r1.data.samples import Record

SEEDS = st.integers(0, 10**6)
QUESTION = ('task', 'prediction_time', 'hadm_id', 'stay_id')  # what makes a sample the same question
ADDED = ('labevents', 'poe', 'vitalsign', 'services', 'radiology', 'pharmacy')


def strict(rows):
    "The store's rows and the index of all samples."
    events = store(rows, 'strict')
    return events, index_rows(events, 'strict')


def some_samples(index, most, seed):
    "A few samples of an index."
    return index.sample(min(most, len(index)), seed=seed).rows(named=True)


def prompt(events, sample, style='official'):
    own = events.filter(pl.col('subject_id') == sample['subject_id'])
    text, *_ = Record(own, style).prompt(sample, 0)
    return text


def both(events, sample):
    "A prompt in the style that shows most, and in the one whose headings count from event to event."
    return [prompt(events, sample, style) for style in ('official', 'binned')]


def trigger(events, sample):
    "The table of the event that makes somebody ask, of the only patient."
    return events.filter(pl.col('event') == sample['trigger'])['table'][0]


def later(sample):
    "The sample's patient after the prediction time."
    is_later = (pl.col('time') > sample['prediction_time']).fill_null(False)
    return (pl.col('subject_id') == sample['subject_id']) & is_later


def delete(rows, sample, rng):
    return rows.filter(~later(sample))


def change(rows, sample, rng):
    hours = int(rng.integers(0, 99))
    changed = dict(cells=pl.lit('changed'), time=pl.col('time') + pl.duration(hours=hours))
    is_later = later(sample)
    return rows.with_columns(**{c: pl.when(is_later).then(changed[c]).otherwise(pl.col(c)) for c in changed})


def add(rows, sample, rng):
    new = []
    for n, table in enumerate(ADDED):
        time = sample['prediction_time'] + timedelta(seconds=int(rng.integers(1, 90_000)))
        ids = dict(subject=sample['subject_id'], stay=sample['stay_id'])
        new.append(row(table, time, sample['hadm_id'], ['added'], n=n, **ids))
    return pl.concat([rows, merged(new)])


def same_question(index, sample):
    "The samples of an index that ask what a sample asks."
    def asks_same(other):
        return all(other[column] == sample[column] for column in QUESTION)

    return list(filter(asks_same, index.rows(named=True)))


def may_vanish(sample, edit):
    "A risk may no longer be asked; diagnoses, which have no time, move behind rows that are added to their admission."
    is_diagnoses = sample['task'].startswith('diagnoses') or sample['label'] == ['diagnoses_icd']
    return sample['family'] == 'risk' or edit is add and is_diagnoses


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, edit=st.sampled_from([delete, change, add]))
def test_future_changes_no_byte(seed, edit):
    rng, rows = np.random.default_rng(seed), random_rows(seed, subjects=1)
    before, index = strict(rows)
    for sample in some_samples(index, 3, seed):
        after, new_index = strict(edit(rows, sample, rng))
        # positions in the event list may shift, because rows without a time move; the question does not
        same = same_question(new_index, sample)
        texts = [both(after, s) for s in same if trigger(after, s) == trigger(before, sample)]
        if texts:
            assert both(before, sample) in texts, (edit.__name__, sample)
        else:
            assert may_vanish(sample, edit), (edit.__name__, sample)


def stamped(seed):
    "Patients whose every row shows its own time."
    stamp = pl.col('time').dt.to_string('AT%Y%m%d%H%M%S').fill_null('ALWAYS')
    return random_rows(seed, subjects=2).with_columns(cells=stamp)


def late_stamps(text, sample):
    "Times in a prompt that lie after the prediction time."
    asked = f"{sample['prediction_time']:%Y%m%d%H%M%S}"
    return [stamp for stamp in re.findall(r'AT(\d{14})', text) if stamp > asked]


@settings(max_examples=5, deadline=None)
@given(seed=SEEDS)
def test_nothing_shown_is_later_than_the_prediction_time(seed):
    events, index = strict(stamped(seed))
    for sample in some_samples(index, 60, seed):
        assert not late_stamps(prompt(events, sample), sample), sample


def test_the_test_can_fail():
    "The official protocol does look ahead, and this very check sees it."
    def leaks(seed):
        events = store(stamped(seed), 'official')
        index = index_rows(events, 'official')
        risks = index.filter(family='risk').rows(named=True)
        return any(late_stamps(prompt(events, risk), risk) for risk in risks)

    assert any(leaks(seed) for seed in range(10))


@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_row_order_does_not_matter_under_strict(seed):
    without_row_numbers = pl.col('order') - pl.col('order') % 2**30  # as strict has it
    rows = random_rows(seed).with_columns(order=without_row_numbers)
    shuffled = rows.sample(fraction=1, shuffle=True, seed=seed)
    assert store(rows, 'strict').equals(store(shuffled, 'strict'))


# -- what each window hides --------------------------------------------------------------------------------------------

PATIENT = row('patients', cells=['60.0', 'F'])
ED = [
    PATIENT,
    row('edstays', at(1, 8), 7, ['F', 'WHITE'], until=at(1, 16), stay=5),
    row('labevents', at(1, 9), 7, ['Sodium']),
    row('poe', at(1, 10), 7, ['Medications']),
    row('services', at(1, 12), 7, ['MED']),
    row('transfers', at(1, 13), 7, ['admit', 'Medicine']),
    row('admissions', at(1, 12), 7, ['EW EMER.'], until=at(5, 8)),
    row('labevents', at(1, 20), 7, ['Sodium']),
]
PHARMACY = [
    PATIENT,
    row('admissions', at(1), 7, until=at(5)),
    row('labevents', at(1, 1), 7, ['Sodium']),
    row('pharmacy', at(1, 2), 7, ['Aspirin', 'Unit Dose']),
    row('prescriptions', at(1, 3), 7, ['Aspirin']),
]
DISCHARGE = [
    PATIENT,
    row('admissions', at(1), 7, until=at(2)),
    row('labevents', at(1, 1), 7, ['Sodium']),
    row('discharge', at(1, 20), 7, ['DS', 'Diagnosis: sepsis']),
    row('diagnoses_icd', None, 7, ['Sepsis']),
]
OTHER_ADMISSION = [
    PATIENT,
    row('labevents', at(1, 1), 7, ['Sodium']),
    row('labevents', at(1, 2), 8, ['Lactate']),
    row('poe', at(1, 3), 7, ['Lab']),
    row('services', at(1, 4), 7, ['MED']),
]
PROCEDURES = [
    PATIENT,
    row('admissions', at(1), 7, until=at(5)),
    row('procedures_icd', at(2), 7, ['Appendectomy']),
    row('labevents', at(2, 9), 7, ['Sodium']),
    row('poe', at(2, 10), 7, ['Lab']),
    row('services', at(2, 20), 7, ['MED']),
]


def window_tables(rows, task, protocol):
    "The tables that the windows of a task's samples show."
    events = store(rows, protocol)
    shown = []
    samples = index_rows(events, protocol).filter(task=task)
    for sample in samples.iter_rows(named=True):
        record = Record(events.filter(pl.col('subject_id') == sample['subject_id']), 'official')
        shown.append([record.table[i] for i, _ in record.window(sample)])
    return shown


@pytest.mark.parametrize('protocol, tables', [
    ('official', ['edstays', 'labevents', 'poe', 'services', 'transfers']),
    ('strict', ['edstays', 'labevents']),
])
def test_ed_windows_lose_rows_of_the_coming_admission(protocol, tables):
    assert window_tables(ED, 'ED_Hospitalization', protocol) == [tables]


@pytest.mark.parametrize('protocol, tables', [
    ('official', ['labevents', 'pharmacy']),
    ('strict', ['labevents']),
])
def test_pharmacy_is_masked_for_prescriptions(protocol, tables):
    assert window_tables(PHARMACY, 'prescriptions', protocol) == [tables]


@pytest.mark.parametrize('protocol', ['official', 'strict'])
def test_discharge_notes_are_hidden_from_diagnosis_tasks(protocol):
    assert window_tables(DISCHARGE, 'diagnoses_icd', protocol) == [['labevents']]


def test_rows_of_another_admission_are_not_shown():
    assert window_tables(OTHER_ADMISSION, 'services', 'strict') == [['labevents', 'poe']]
    [official] = window_tables(OTHER_ADMISSION, 'services', 'official')
    assert len(official) == 2


def test_a_days_procedures_show_from_the_next_day_on():
    assert window_tables(PROCEDURES, 'services', 'strict') == [['labevents', 'poe']]
    official = window_tables(PROCEDURES, 'services', 'official')[0]
    assert 'procedures_icd' in official
