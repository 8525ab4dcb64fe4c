"Rows that cannot be true and files that are not whole: left out and counted, or one clear line, on the way people go."
import csv
import gzip
import io
import shutil
from datetime import datetime

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from ehr_r1.config import Run
from ehr_r1.data.events import DISPLAY
from ehr_r1.data.row_checks import BLANKED, REASONS, TWICE, RowChecks, Tally, ends_early, key_of, possible_years
from ehr_r1.data.table_files import TableError, is_regular, layout_fault, stored
from ehr_r1.data.tables import open_source
from ehr_r1.data.trajectories import build_trajectories, check_repeated, looked_up, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest

OLD, FAR = '1900-01-01 00:00:00', '3036-01-01 00:00:00'
YEARS, END, OF_HADM, OF_STAY, NEGATIVE = REASONS


@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    "The tables of 30 made-up patients."
    root = tmp_path_factory.mktemp('hospital')/'tables'
    build_hospital(root, 30, 42, workers=1)
    return root


@pytest.fixture
def tables(hospital, tmp_path):
    "A copy, to be spoilt."
    return shutil.copytree(hospital, tmp_path/'tables')


def file_of(root, table):
    return next(root.glob(f'*/{table}.csv*'))


def text_of(root, table):
    return gzip.decompress(file_of(root, table).read_bytes()).decode()


def rows_of(root, table):
    return list(csv.DictReader(io.StringIO(text_of(root, table), newline='')))


def put(root, table, rows):
    "Write a table again."
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
    file_of(root, table).write_bytes(gzip.compress(out.getvalue().encode(), 1))


def built(root, home, protocol='strict'):
    "Counts and rows of the trajectories of a folder."
    run = Run('t', home)
    build_trajectories(open_source(root), run, profile('smoke', protocol=protocol, workers=1, shard_patients=7))
    return read_manifest(run.trajectories)['counts'], scan_trajectories(run.trajectories).collect()


@pytest.fixture(scope='module')
def right(hospital, tmp_path_factory):
    return built(hospital, tmp_path_factory.mktemp('right'))


def of_others(rows, who):
    return rows.filter(pl.col('subject_id') != who)


def counted(counts, what='dropped'):
    "Reasons that were met."
    return {why: tables for why, tables in counts[what].items() if tables}


def someone_elses(rows, column, who):
    return next(row[column] for row in rows if row['subject_id'] != who and row[column])


# -- one row -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('table, column, value, reason', [
    ('transfers', 'intime', OLD, YEARS),
    ('emar', 'charttime', FAR, YEARS),
    ('labevents', 'storetime', OLD, YEARS),
    ('omr', 'chartdate', '0001-01-01', YEARS),
    ('vitalsign', 'charttime', OLD, YEARS),
    ('inputevents', 'endtime', 'an hour before', END),
    ('icustays', 'outtime', 'an hour before', END),
    ('poe', 'hadm_id', 'another', OF_HADM),
    ('chartevents', 'stay_id', 'another', OF_STAY),
    ('medrecon', 'stay_id', 'another', OF_STAY),
    ('labevents', 'hadm_id', '-5', NEGATIVE),
    ('chartevents', 'itemid', '-220045', NEGATIVE),
])
def test_one_wrong_cell_costs_its_row_and_nobody_elses(tables, tmp_path, right, capsys, table, column, value, reason):
    rows = rows_of(tables, table)
    row = next(row for row in rows if row[column])
    if value == 'another':
        value = someone_elses(rows, column, row['subject_id'])
    if value == 'an hour before':
        start = row.get('starttime') or row['intime']
        value = f'{datetime.fromisoformat(start).replace(year=int(start[:4]) - 1)}'
    row[column] = value
    put(tables, table, rows)
    counts, store = built(tables, tmp_path)
    assert counted(counts) == {reason: {table: 1}}
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith('rows left out')]
    assert len(said) == 1
    assert reason in said[0]
    assert f'{table} 1' in said[0]
    who = int(row['subject_id'])
    assert_frame_equal(of_others(store, who), of_others(right[1], who))


def test_what_is_right_loses_nothing(right):
    assert counted(right[0]) == counted(right[0], 'blanked') == {}


def test_official_keeps_every_row(tables, tmp_path):
    rows = rows_of(tables, 'emar')
    rows[0]['charttime'], rows[1]['hadm_id'] = OLD, '-5'
    put(tables, 'emar', rows)
    counts, _ = built(tables, tmp_path, 'official')
    assert counts['tables']['emar']['rows'] == len(rows)
    assert set(counts['dropped']) == {'subject_id not in patients'}


@pytest.mark.parametrize('value', ['inf', '-inf', 'Infinity', '1e999'])
def test_a_number_that_is_not_finite_is_blanked(tables, tmp_path, value):
    rows = rows_of(tables, 'labevents')
    row = next(row for row in rows if row['valuenum'])
    row['valuenum'] = value
    put(tables, 'labevents', rows)
    counts, store = built(tables, tmp_path)
    assert counted(counts, 'blanked') == {BLANKED[0]: {'labevents': 1}}
    assert counted(counts) == {}
    assert not store.filter(table='labevents')['cells'].str.contains(r'\x1f-?inf').any()


def test_a_date_of_death_outside_the_years_is_blanked(tables, tmp_path):
    rows = rows_of(tables, 'patients')
    rows[0]['dod'] = '1900-01-01'
    put(tables, 'patients', rows)
    counts, store = built(tables, tmp_path)
    assert counted(counts, 'blanked') == {BLANKED[1]: {'patients': 1}}
    assert store.filter(table='patients')['died'].dt.year().min() > 2000


def test_a_dead_patients_later_rows_stay(tables, tmp_path):
    rows = rows_of(tables, 'patients')
    for row in rows:
        row['dod'] = f"{row['anchor_year']}-01-01"  # as state records sometimes have it: before the admission
    put(tables, 'patients', rows)
    counts, _ = built(tables, tmp_path)
    assert counted(counts) == {}


def times(*texts):
    return [text and datetime.fromisoformat(text) for text in texts]


@pytest.mark.parametrize('end, early', [
    ('2180-05-06 00:00', False), ('2180-05-06 09:59', True), ('2180-05-05 00:00', True), (None, False),
])
def test_a_discharge_at_midnight_is_a_day(end, early):
    row = dict(zip(('admittime', 'dischtime', 'deathtime'), times('2180-05-06 10:00', end, None)))
    frame = pl.DataFrame([row], schema=dict.fromkeys(row, pl.Datetime('us')))
    assert bool(frame.select(ends_early('admissions')).item()) is early


def test_the_years_of_a_patient(tables):
    rows = rows_of(tables, 'patients')
    for row, (year, age) in zip(rows, [('2150', '18'), ('2150', '91'), ('2150', ''), ('', '18'), ('99999', '18')]):
        row['anchor_year'], row['anchor_age'] = year, age
    put(tables, 'patients', rows)
    years = possible_years(open_source(tables)).head(5)
    assert years['earliest'].dt.year().to_list() == [2131, 2130, 2130, None, None]
    assert years['latest'].dt.year().to_list() == [2171, 2171, 2171, None, None]


# -- many rows ---------------------------------------------------------------------------------------------------------

def test_more_than_one_in_a_hundred_stops_the_run_and_shows_three(tables, tmp_path):
    rows = rows_of(tables, 'emar')
    for row in rows[::20]:
        row['charttime'] = OLD
    put(tables, 'emar', rows)
    with pytest.raises(TableError) as error:
        built(tables, tmp_path)
    said = str(error.value)
    assert said.startswith(f'hosp/emar.csv.gz: {len(rows[::20]):,} of {len(rows):,} rows (5.')
    assert said.count(f'charttime {OLD}') == 3
    assert '\n' not in said
    assert 'row 1 ' in said and 'row 21 ' in said and 'row 41 ' in said
    kept = [file.read_text() for file in tmp_path.rglob('*.json')]
    assert not any(OLD in text for text in kept)


# -- twice -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('table', ['labevents', 'poe', 'omr', 'prescriptions'])
def test_a_row_that_is_there_twice_is_left_out(tables, tmp_path, right, table):
    rows = rows_of(tables, table)
    put(tables, table, [*rows, rows[3]])
    counts, store = built(tables, tmp_path)
    assert counted(counts) == {TWICE: {table: 1}}
    assert_frame_equal(store, right[1])


@pytest.mark.parametrize('table', ['labevents', 'omr'])
def test_a_table_that_was_appended_to_itself_is_refused(tables, tmp_path, table):
    rows = rows_of(tables, table)
    put(tables, table, rows + rows[:len(rows)//4])
    with pytest.raises(TableError, match=f'hosp/{table}.csv.gz.*there twice'):
        built(tables, tmp_path)


@pytest.mark.parametrize('protocol', ['strict', 'official'])
@pytest.mark.parametrize('table, column', [('labevents', 'value'), ('pharmacy', 'medication')])
def test_a_key_with_two_rows_is_refused(tables, tmp_path, table, column, protocol):
    rows = rows_of(tables, table)
    put(tables, table, [*rows, rows[3] | {column: 'changed'}])
    with pytest.raises(TableError, match=f'rows 4 and {len(rows) + 1:,} have the same key'):
        built(tables, tmp_path, protocol)


def test_chartevents_appended_to_itself_is_refused(tables, tmp_path):
    rows = rows_of(tables, 'chartevents')
    put(tables, 'chartevents', rows + rows)
    with pytest.raises(TableError, match='chartevents.csv.gz.*appended to itself'):
        built(tables, tmp_path)


def test_a_few_equal_rows_of_chartevents_stay_and_are_counted(tables, tmp_path):
    rows = rows_of(tables, 'chartevents')
    put(tables, 'chartevents', rows + rows[:5])
    counts, _ = built(tables, tmp_path)
    assert counts['tables']['chartevents']['rows'] == len(rows) + 5
    assert counts['repeated']['chartevents'] >= 5
    check_repeated(None, 79_803, 668_862)  # the demo's


# -- layout ------------------------------------------------------------------------------------------------------------

def short(text):
    lines = text.split('\n')
    lines[3] = lines[3].rpartition(',')[0]
    return '\n'.join(lines).encode()


def long(text):
    return text.replace('\n', ',x\n').replace(',x\n', '\n', 3).replace(',x\n', ',x\n', 1).encode()


def latin(text):
    lines = text.encode().split(b'\n')
    lines[3] = lines[3].rpartition(b',')[0] + b',caf\xe9'
    return b'\n'.join(lines)


LAYOUTS = {
    'short': lambda text: gzip.compress(short(text)),
    'long': lambda text: gzip.compress(long(text)),
    'latin': lambda text: gzip.compress(latin(text)),
    'padded': lambda text: gzip.compress(text.encode()) + bytes(512),
    'junk': lambda text: gzip.compress(text.encode()) + b'junk',
    'cut': lambda text: gzip.compress(text.encode())[:-30],
    'doubled column': lambda text: gzip.compress(text.replace('subject_id', 'SUBJECT_ID,subject_id', 1).encode()),
}
PLACES = {'short': 'row 3', 'long': 'row', 'latin': 'line 4', 'padded': 'after line', 'junk': 'line', 'cut': 'line',
          'doubled column': 'column subject_id'}


@pytest.mark.parametrize('table', ['poe', 'vitalsign', 'chartevents', 'radiology_detail'])
@pytest.mark.parametrize('kind', LAYOUTS)
def test_a_file_that_is_not_whole_is_refused(tables, tmp_path, table, kind):
    path = file_of(tables, table)
    path.write_bytes(LAYOUTS[kind](text_of(tables, table)))
    with pytest.raises(TableError) as error:
        built(tables, tmp_path, 'official' if table == 'poe' else 'strict')
    said = str(error.value)
    assert said.startswith(f'{path.relative_to(tables)}')
    assert PLACES[kind] in said
    assert said.count('. ') == 1 and '\n' not in said


@pytest.mark.parametrize('header, column', [
    ('a,b,A', 'a'), ('a,b,b', 'b'), ('a, B ,b', 'b'),
])
def test_a_column_twice_in_whatever_case(tmp_path, header, column):
    path = tmp_path/'x.csv'
    path.write_text(f'{header}\n1,2,3\n')
    with pytest.raises(TableError, match=f'x.csv, column {column}: it is there twice'):
        stored(path, 'x.csv')


@pytest.mark.parametrize('header', ['a,b,', 'a,b_duplicated_0,b_duplicated', ',a,b'])
def test_names_that_are_not_twice(tmp_path, header):
    path = tmp_path/'x.csv'
    path.write_text(f'{header}\n1,2,3\n')
    stored(path, 'x.csv')


CELLS = st.text(st.sampled_from('a ,"\n\té'), max_size=5)
TABLE = st.lists(st.lists(CELLS, min_size=3, max_size=3), min_size=1, max_size=6)


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    return tmp_path_factory.mktemp('layout')/'x.csv'


@given(TABLE, st.sampled_from(['\n', '\r\n']), st.booleans())
def test_what_a_writer_wrote_is_regular(place, rows, line_end, last_break):
    out = io.StringIO()
    csv.writer(out, lineterminator=line_end).writerows([['x', 'y', 'z'], *rows])
    text = out.getvalue()
    place.write_bytes((text if last_break else text.removesuffix(line_end)).encode())
    assert is_regular(place)


@given(TABLE, st.integers(0, 5), st.sampled_from([2, 4]))
def test_a_row_of_another_length_is_found(place, rows, number, fields):
    rows[number % len(rows)] = (rows[number % len(rows)]*2)[:fields]
    out = io.StringIO()
    csv.writer(out, lineterminator='\n').writerows([['x', 'y', 'z'], *rows])
    place.write_bytes(out.getvalue().encode())
    assert f'{fields} fields where the header has 3' in str(layout_fault(place, 'x.csv'))


def test_zeros_in_place_of_lost_blocks_are_found(tmp_path):
    path = tmp_path/'x.csv'
    path.write_bytes(b'a,b\n1,2\n' + bytes(512))
    assert 'x.csv' in str(layout_fault(path, 'x.csv'))


# -- counting ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('protocol', ['strict', 'official'])
def test_every_row_is_counted_once(hospital, protocol):
    source = open_source(hospital)
    checks = RowChecks(source) if protocol == 'strict' else None
    for table in filter(source.has, DISPLAY):
        found = looked_up(source, table, protocol)
        tally, key = Tally(), key_of(table, protocol)
        kept = tally.counting(checks.flagged(found, table) if checks else found, key)
        rows = len(kept.collect(engine='streaming'))
        assert rows == source.rows(table)
        if key is not None or checks:
            assert tally.rows == len(tally.keys) == rows


# -- the demo ----------------------------------------------------------------------------------------------------------

def test_the_demo_loses_nothing(demo, tmp_path):
    source = open_source(demo)
    checks = RowChecks(source)
    for table in ('admissions', 'transfers', 'emar', 'procedureevents', 'vitalsign'):
        flagged = checks.flagged(source.scan(table, row_index='row'), table)
        assert flagged.filter(pl.col('reason').is_not_null()).collect().is_empty()
