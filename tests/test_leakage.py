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
PATIENT = row('patients', cells=['60.0', 'F'])


def record_of(events, sample):
    rows = events.filter(pl.col('subject_id') == sample['subject_id'])
    return Record(rows, 'official')


def some_samples(index, most, seed):
    "A few samples of an index."
    return index.sample(min(most, len(index)), seed=seed).rows(named=True)


def prompt(events, sample):
    return record_of(events, sample).prompt(sample, 0)[0]


def indexed(rows, protocol='strict'):
    "The store of some rows, and its index."
    events = store(rows, protocol)
    return events, index_rows(events, protocol)


def drawn(index, n, seed):
    "Some index rows."
    some = index.sample(min(n, len(index)), seed=seed)
    return some.iter_rows(named=True)


# the future is changed

def later(sample):
    "Rows of the patient after the prediction time."
    of_patient = pl.col('subject_id') == sample['subject_id']
    after = pl.col('time') > sample['prediction_time']
    return of_patient & after.fill_null(False)


def delete(rows, sample, rng):
    return rows.filter(~later(sample))


def change(rows, sample, rng):
    hours = int(rng.integers(0, 99))
    changed = dict(cells=pl.lit('changed'), time=pl.col('time') + pl.duration(hours=hours))
    is_later = later(sample)
    return rows.with_columns(**{c: pl.when(is_later).then(changed[c]).otherwise(pl.col(c)) for c in changed})


def add(rows, sample, rng):
    tables = ('labevents', 'poe', 'vitalsign', 'services', 'radiology', 'pharmacy')
    new = []
    for n, table in enumerate(tables):
        seconds = int(rng.integers(1, 90_000))
        time = sample['prediction_time'] + timedelta(seconds=seconds)
        new.append(row(
            table, time, sample['hadm_id'], ['added'], n=n,
            subject=sample['subject_id'], stay=sample['stay_id']))
    return pl.concat([rows, merged(new)])


def trigger(events, sample):
    "The table of the trigger; there is one patient only."
    rows = events.filter(pl.col('event') == sample['trigger'])
    return rows['table'][0]


def same_question(index, sample):
    "The samples of an index that ask what a sample asks."
    def asks_same(other):
        return all(other[column] == sample[column] for column in QUESTION)

    return list(filter(asks_same, index.rows(named=True)))


def may_vanish(sample, edit):
    "A risk may no longer be asked; diagnoses have no time and move behind rows added to their admission."
    if sample['family'] == 'risk':
        return True
    of_diagnoses = sample['task'].startswith('diagnoses')
    return edit is add and (of_diagnoses or sample['label'] == ['diagnoses_icd'])


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, edit=st.sampled_from([delete, change, add]))
def test_future_changes_no_byte(seed, edit):
    rng, rows = np.random.default_rng(seed), random_rows(seed, subjects=1)
    before, index = strict(rows)
    for sample in some_samples(index, 3, seed):
        after, new_index = strict(edit(rows, sample, rng))
        # positions in the event list may shift, because rows without a time move; the question does not
        same = same_question(new_index, sample)
        texts = [prompt(after, s) for s in same if trigger(after, s) == trigger(before, sample)]
        if texts:
            assert prompt(events, sample) in texts, sample
        else:
            assert may_vanish(sample, edit), sample


# every row says when it was

def stamped(seed):
    "Random rows whose cells hold their time."
    time = pl.col('time').dt.to_string('AT%Y%m%d%H%M%S')
    cells = time.fill_null('ALWAYS')
    return random_rows(seed, subjects=2).with_columns(cells=cells)


def shown_late(events, sample):
    "Times in the prompt that come after the prediction time."
    now = sample['prediction_time'].strftime('%Y%m%d%H%M%S')
    times = re.findall(r'AT(\d{14})', prompt(events, sample))
    return [time for time in times if time > now]


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



@settings(max_examples=8, deadline=None)
@given(seed=SEEDS)
def test_row_order_does_not_matter_under_strict(seed):
    number = pl.col('order') % 2**30  # strict has no row numbers
    rows = random_rows(seed).with_columns(order=pl.col('order') - number)
    shuffled = rows.sample(fraction=1, shuffle=True, seed=seed)
    assert store(rows, 'strict').equals(store(shuffled, 'strict'))


# which tables a window shows

def window_tables(rows, task, protocol='strict'):
    "The tables of the window of every sample of a task."
    events, index = indexed(rows, protocol)
    found = []
    samples = index.filter(pl.col('task') == task)
    for sample in samples.iter_rows(named=True):
        record = record_of(events, sample)
        shown = [record.table[event] for event, _ in record.window(sample)]
        found.append(shown)
    return found


ED = [
    PATIENT,
    row('edstays', at(1, 8), 7, until=at(1, 16), stay=5),
    row('labevents', at(1, 9), 7, ['Sodium']),
    row('poe', at(1, 10), 7, ['Medications']),
    row('services', at(1, 12), 7, ['MED']),
    row('transfers', at(1, 13), 7, ['admit', 'Medicine']),
    row('admissions', at(1, 12), 7, ['EW EMER.'], until=at(5, 8)),
    row('labevents', at(1, 20), 7, ['Sodium']),
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
def test_ed_windows_lose_rows_of_the_coming_admission(protocol, shown):
    assert window_tables(ED, 'ED_Hospitalization', protocol) == [shown]


@pytest.mark.parametrize('protocol, tables', [
    ('official', ['labevents', 'pharmacy']),
    ('strict', ['labevents']),
])
def test_pharmacy_is_masked_for_prescriptions(protocol, tables):
    assert window_tables(PHARMACY, 'prescriptions', protocol) == [tables]


@pytest.mark.parametrize('protocol', ['official', 'strict'])
def test_discharge_notes_are_hidden_from_diagnosis_tasks(protocol):
    rows = [
        PATIENT,
        row('admissions', at(1), 7, until=at(2)),
        row('labevents', at(1, 1), 7, ['Sodium']),
        row('discharge', at(1, 20), 7, ['DS', 'Diagnosis: sepsis']),
        row('diagnoses_icd', None, 7, ['Sepsis']),
    ]
    assert window_tables(rows, 'diagnoses_icd', protocol) == [['labevents']]


def test_rows_of_another_admission_are_not_shown():
    rows = [
        PATIENT,
        row('labevents', at(1, 1), 7, ['Sodium']),
        row('labevents', at(1, 2), 8, ['Lactate']),
        row('poe', at(1, 3), 7, ['Lab']),
        row('services', at(1, 4), 7, ['MED']),
    ]
    assert window_tables(rows, 'services') == [['labevents', 'poe']]
    assert len(window_tables(rows, 'services', 'official')[0]) == 2


def test_a_days_procedures_show_from_the_next_day_on():
    rows = [
        PATIENT,
        row('admissions', at(1), 7, until=at(5)),
        row('procedures_icd', at(2), 7, ['Appendectomy']),
        row('labevents', at(2, 9), 7, ['Sodium']),
        row('poe', at(2, 10), 7, ['Lab']),
        row('services', at(2, 20), 7, ['MED']),
    ]
    assert window_tables(rows, 'services') == [['labevents', 'poe']]
    assert 'procedures_icd' in window_tables(rows, 'services', 'official')[0]
