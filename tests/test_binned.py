"Binned records: what a line says, what a heading gives away, whose values the percentiles are."
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import at, random_rows, row, store

from ehr_r1.data.binned import PERCENTILES, Bins, binned_parts, cuts_of_rows, fit_cuts, percentile_of, span, with_ranges
from ehr_r1.data.events import DISPLAY, FIELD, HIDDEN
from ehr_r1.data.samples import Record
from ehr_r1.data.sampling import split_of
from ehr_r1.data.serialize import TITLES

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=9, max_size=9).map(sorted)
CELL = st.text(st.characters(codec='utf-8', exclude_characters='\x1e\x1f'), max_size=30)
TABLES = st.sampled_from([table for table in DISPLAY if table not in HIDDEN])


def cells_of(table, values):
    "Cells of a row, from texts that are used in turn."
    columns = DISPLAY[table].columns
    return FIELD.join((values*len(columns))[:len(columns)])


@given(VALUES, st.floats(-1e7, 1e7), st.floats(-1e7, 1e7))
def test_a_higher_value_is_of_no_lower_percentile(cuts, one, other):
    low, high = sorted([one, other])
    assert percentile_of(low, cuts) <= percentile_of(high, cuts)
    assert percentile_of(low, cuts) in PERCENTILES


@given(TABLES, st.lists(CELL, min_size=1, max_size=9))
def test_a_line_is_one_line_and_never_a_heading(table, values):
    lines = Bins({}).lines(table, [cells_of(table, values)]) or []
    assert all(line and len(line.splitlines()) == 1 and not line.startswith('#') for line in lines)
    assert len(lines) == len(set(lines))


@given(st.timedeltas(timedelta(days=-9_999), timedelta(days=9_999)))
def test_a_time_reads_in_few_words(gap):
    assert span(gap)[0] == ('-' if gap < timedelta() else '+')
    assert len(span(gap)) <= 7


def test_a_longer_time_reads_no_shorter():
    words = [span(timedelta(minutes=minutes)) for minutes in range(0, 800_000, 7)]
    assert len(set(words)) == 14 and sum(a != b for a, b in zip(words, words[1:])) == 13


@pytest.mark.parametrize('hidden', ['labevents', 'pharmacy', 'radiology'])
def test_headings_say_nothing_of_events_that_are_hidden(hidden):
    shown = [('admissions', at(1), [cells_of('admissions', ['URGENT'])]),
             ('poe', at(1, 5), [cells_of('poe', ['Lab'])])]
    routine = [cells_of('chartevents', ['Turn', '', '', ''])]
    beside = [shown[0], ('chartevents', at(1, 4), routine), ('hcpcsevents', at(1, 4), ['']), shown[1]]
    bins = Bins({})
    assert [part for part in binned_parts(beside, bins) if part] == binned_parts(shown, bins)


def test_percentiles_are_those_of_training_patients(tmp_path):
    rows = [row('labevents', at(2), cells=dict(item_name='Sodium', valuenum=str(100 + subject)), subject=subject)
            for subject in range(1, 400)]
    training = split_of(np.arange(1, 400), 42) == 'train'

    def cuts(spoilt):
        changed = [one if training[one['subject_id'] - 1] or not spoilt else
                   one | dict(cells=cells_of('labevents', ['Sodium', '9999'])) for one in rows]
        store(changed, 'strict').write_parquet(tmp_path/'shard-00000.parquet')
        return fit_cuts([tmp_path/'shard-00000.parquet'], 42)

    assert cuts(False) == cuts(True)
    assert list(cuts(False)['labevents']) == ['Sodium'] and len(cuts(False)['labevents']['Sodium']) == 9


def test_few_values_are_not_ranked():
    few = pl.DataFrame(dict(table='labevents', cells=[cells_of('labevents', ['Sodium', '140'])]*49))
    assert cuts_of_rows(few) == {'labevents': {}}
    assert list(cuts_of_rows(pl.concat([few, few]))['labevents']) == ['Sodium']


def test_a_name_reads_as_its_answer():
    bins = Bins({})
    for table, column in [('prescriptions', 'drug'), ('services', 'curr_service'), ('medrecon', 'name'),
                          ('transfers', 'careunit'), ('diagnosis', 'icd_title'), ('procedures_icd', 'CCS Type')]:
        said = [f'name of {name}' if name == column else '' for name in DISPLAY[table].columns]
        assert f'name of {column}' in bins.lines(table, [FIELD.join(said)])


@given(st.integers(0, 10**6))
def test_each_part_of_a_record_has_a_heading(seed):
    record = Record(store(random_rows(seed, 1), 'strict'), 'binned')
    parts = record.parts([(event, None, None) for event in range(len(record.table))])
    titles = tuple(f'## {title}' for title in TITLES.values())
    assert all(not part or part.startswith(titles) for part in parts)


def test_a_reader_sees_the_values_behind_percentiles():
    cuts = dict(labevents={'Sodium': [120., 125, 130, 135, 138, 141, 144, 147, 150]})
    text = '\n'.join(['## Labs [+1 h]', 'Sodium p0', 'Sodium p50 abnormal', 'Sodium p99', 'Sodium p7', 'Glucose p50',
                      '', '## ED stay [+0]', 'Sodium p50'])
    said = with_ranges(text, cuts).split('\n')
    assert said[1:4] == ['Sodium p0 (below 120)', 'Sodium p50 abnormal (138 to 141)', 'Sodium p99 (150 or more)']
    assert said[4:] == text.split('\n')[4:]
