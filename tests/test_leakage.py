"Under `strict` nothing after the prediction time may change a prompt."
import re
from datetime import timedelta
import numpy as np, polars as pl, pytest
from hypothesis import given, settings, strategies as st
from ehr_r1.data.samples import Record
from ehr_r1.data.tasks import TASKS, index_rows
from records import random_rows, row, store, at, merged

def strict(rows):
    events = store(rows, 'strict')
    return events, index_rows(events, 'strict')

def prompt(events, s, style='official'):
    return Record(events.filter(pl.col('subject_id') == s['subject_id']), style).prompt(s, 0)[0]

def trigger(events, s): return events.filter(pl.col('event') == s['trigger'])['table'][0] # of the only patient

def delete(rows, s, rng): return rows.filter(~later(s))
def change(rows, s, rng): return rows.with_columns(cells=pl.when(later(s)).then(pl.lit('changed')).otherwise(pl.col('cells')), time=pl.when(later(s)).then(pl.col('time') + pl.duration(hours=int(rng.integers(0, 99)))).otherwise(pl.col('time')))
def add(rows, s, rng):
    new = [row(t, s['prediction_time'] + timedelta(seconds=int(rng.integers(1, 90_000))), s['hadm_id'], ['added'], subject=s['subject_id'], n=k, stay=s['stay_id']) for k, t in enumerate(('labevents', 'poe', 'vitalsign', 'services', 'radiology', 'pharmacy'))]
    return pl.concat([rows, merged(new)])
def later(s): return (pl.col('subject_id') == s['subject_id']) & (pl.col('time') > s['prediction_time']).fill_null(False)

@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), edit=st.sampled_from([delete, change, add]))
def test_future_changes_no_byte(seed, edit):
    rng, rows = np.random.default_rng(seed), random_rows(seed, subjects=1)
    events, index = strict(rows)
    for s in index.sample(min(3, len(index)), seed=seed).iter_rows(named=True):
        after, there = strict(edit(rows, s, rng))
        # positions in the event list may shift, because rows without a time move; the question does not
        same = there.filter(*(pl.col(c).eq_missing(pl.lit(s[c], dtype=there.schema[c])) for c in ('task', 'prediction_time', 'hadm_id', 'stay_id')))
        texts = [prompt(after, x) for x in same.iter_rows(named=True) if trigger(after, x) == trigger(events, s)]
        if texts: assert prompt(events, s) in texts, (edit.__name__, s)
        else: # a risk may no longer be asked; diagnoses have no time of their own and move behind rows that are added to their admission
            assert s['family'] == 'risk' or edit is add and (s['task'].startswith('diagnoses') or s['label'] == ['diagnoses_icd']), (edit.__name__, s)

def stamped(seed): return random_rows(seed, subjects=2).with_columns(cells=pl.when(pl.col('time').is_not_null()).then(pl.col('time').dt.to_string('AT%Y%m%d%H%M%S')).otherwise(pl.lit('ALWAYS')))
def late(text, s): return [m for m in re.findall(r'AT(\d{14})', text) if m > s['prediction_time'].strftime('%Y%m%d%H%M%S')]

@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_nothing_shown_is_later_than_the_prediction_time(seed):
    events, index = strict(stamped(seed))
    for s in index.sample(min(60, len(index)), seed=seed).iter_rows(named=True): assert not late(prompt(events, s), s), s

def test_the_test_can_fail():
    "The official protocol does look ahead, and this very check sees it."
    def leaks(seed):
        events = store(stamped(seed), 'official')
        return any(late(prompt(events, s), s) for s in index_rows(events, 'official').filter(pl.col('family') == 'risk').iter_rows(named=True))
    assert any(leaks(seed) for seed in range(10))

@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_row_order_does_not_matter_under_strict(seed):
    rows = random_rows(seed).with_columns(order=pl.col('order') - pl.col('order') % 2**30) # strict has no row numbers
    assert store(rows, 'strict').equals(store(rows.sample(fraction=1, shuffle=True, seed=seed), 'strict'))

def window_tables(rows, task, protocol='strict'):
    events = store(rows, protocol); out = []
    for s in index_rows(events, protocol).filter(pl.col('task') == task).iter_rows(named=True):
        r = Record(events.filter(pl.col('subject_id') == s['subject_id']), 'official')
        out.append([r.table[i] for i, _ in r.window(s)])
    return out

ED = [row('patients', cells=['60.0', 'F']), row('edstays', at(1, 8), 7, ['F', 'WHITE'], until=at(1, 16), stay=5), row('labevents', at(1, 9), 7, ['Sodium']), row('poe', at(1, 10), 7, ['Medications']),
      row('services', at(1, 12), 7, ['MED']), row('transfers', at(1, 13), 7, ['admit', 'Medicine']), row('admissions', at(1, 12), 7, ['EW EMER.'], until=at(5, 8)), row('labevents', at(1, 20), 7, ['Sodium'])]

def test_ed_windows_lose_rows_of_the_coming_admission():
    assert window_tables(ED, 'ED_Hospitalization', 'official') == [['edstays', 'labevents', 'poe', 'services', 'transfers']]
    assert window_tables(ED, 'ED_Hospitalization') == [['edstays', 'labevents']]

def test_pharmacy_is_masked_for_prescriptions():
    rows = [row('patients', cells=['60.0', 'F']), row('admissions', at(1), 7, until=at(5)), row('labevents', at(1, 1), 7, ['Sodium']), row('pharmacy', at(1, 2), 7, ['Aspirin', 'Unit Dose']), row('prescriptions', at(1, 3), 7, ['Aspirin'])]
    assert window_tables(rows, 'prescriptions', 'official') == [['labevents', 'pharmacy']] and window_tables(rows, 'prescriptions') == [['labevents']]

def test_discharge_notes_are_hidden_from_diagnosis_tasks():
    rows = [row('patients', cells=['60.0', 'F']), row('admissions', at(1), 7, until=at(2)), row('labevents', at(1, 1), 7, ['Sodium']), row('discharge', at(1, 20), 7, ['DS', 'Diagnosis: sepsis']), row('diagnoses_icd', None, 7, ['Sepsis'])]
    for protocol in ('official', 'strict'): assert window_tables(rows, 'diagnoses_icd', protocol) == [['labevents']]

def test_rows_of_another_admission_are_not_shown():
    rows = [row('patients', cells=['60.0', 'F']), row('labevents', at(1, 1), 7, ['Sodium']), row('labevents', at(1, 2), 8, ['Lactate']), row('poe', at(1, 3), 7, ['Lab']), row('services', at(1, 4), 7, ['MED'])]
    assert window_tables(rows, 'services') == [['labevents', 'poe']] and len(window_tables(rows, 'services', 'official')[0]) == 2

def test_a_days_procedures_show_from_the_next_day_on():
    rows = [row('patients', cells=['60.0', 'F']), row('admissions', at(1), 7, until=at(5)), row('procedures_icd', at(2), 7, ['Appendectomy']), row('labevents', at(2, 9), 7, ['Sodium']), row('poe', at(2, 10), 7, ['Lab']), row('services', at(2, 20), 7, ['MED'])]
    assert window_tables(rows, 'services') == [['labevents', 'poe']] and 'procedures_icd' in window_tables(rows, 'services', 'official')[0]
