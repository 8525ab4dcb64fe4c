"What is known when: totals, results, deaths; and the tables themselves altered after the prediction time."
from datetime import timedelta

import polars as pl
import pytest
from records import at, row, store

from ehr_r1.config import Run
from ehr_r1.data.events import TOTALS
from ehr_r1.data.index import build_index, index_rows
from ehr_r1.data.leakage import try_leakage
from ehr_r1.data.samples import Record
from ehr_r1.data.tables import open_source
from ehr_r1.data.trajectories import build_trajectories, row_time, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile

PATIENT = row('patients', cells=['60.0', 'F'])
ADMISSION = row('admissions', at(1), 7, ['EW EMER.'], until=at(9))
STAY = row('icustays', at(1, 1), 7, until=at(8), stay=5)


def prompts(rows, task, protocol='strict'):
    "The prompts of a task's samples, official style, which shows every column."
    events = store(rows, protocol)
    record = Record(events, 'official')
    samples = index_rows(events, protocol).filter(task=task)
    return [record.prompt(sample, 0)[0] for sample in samples.iter_rows(named=True)]


# -- totals ------------------------------------------------------------------------------------------------------------

DRIP = dict(item_name='NaCl 0.9%', amount='500.0', amountuom='mL', rate='25.0', rateuom='mL/hour')
VENTILATION = dict(item_name='Invasive Ventilation', value='12345.0', valueuom='min')
SHOWN = {'inputevents': DRIP, 'ingredientevents': DRIP, 'procedureevents': VENTILATION}


@pytest.mark.parametrize('table', TOTALS)
@pytest.mark.parametrize('protocol, ends, is_shown', [
    ('strict', at(2), True),          # before the prediction time, a day after the admission to the ICU
    ('strict', at(2, 1), True),       # at that moment
    ('strict', at(2, 1, 1), False),   # a minute later
    ('strict', None, False),          # nobody knows
    ('official', at(5), True),
])
def test_totals_are_known_at_the_end(table, protocol, ends, is_shown):
    act = row(table, at(1, 9), 7, SHOWN[table], until=ends, stay=5)
    text, = prompts([PATIENT, ADMISSION, STAY, act], 'ICU_Stay_7day', protocol)
    total = SHOWN[table][TOTALS[table][0]]
    assert SHOWN[table]['item_name'] in text
    assert (total in text) == is_shown


def test_rates_stand_from_the_start():
    act = row('inputevents', at(1, 9), 7, DRIP, until=at(5), stay=5)
    text, = prompts([PATIENT, ADMISSION, STAY, act], 'ICU_Stay_7day')
    assert '25.0' in text
    assert 'mL/hour' in text
    assert 'Amountuom: nan' in text


@pytest.mark.parametrize('ends', [(at(5), at(6)), (at(6), at(5))])
def test_totals_do_not_order_rows_before_their_end(ends):
    amounts = [DRIP | dict(amount='100.0'), DRIP | dict(amount='20.0', rate='7.0')]
    acts = [row('inputevents', at(1, 9), 7, cells, until=end, stay=5) for cells, end in zip(amounts, ends)]
    other = [a | dict(cells=a['cells'].replace('100.0', '3.0')) for a in acts]
    first, = prompts([PATIENT, ADMISSION, STAY, *acts], 'ICU_Stay_7day')
    second, = prompts([PATIENT, ADMISSION, STAY, *other], 'ICU_Stay_7day')
    assert first == second


# -- one act -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('task, asked, twin', [
    ('inputevents', 'inputevents', 'ingredientevents'),
    ('ingredientevents', 'ingredientevents', 'inputevents'),
])
@pytest.mark.parametrize('minutes, is_shown', [(0, False), (1, True)])
def test_what_is_charted_in_one_stroke_is_hidden(task, asked, twin, minutes, is_shown):
    before = at(1, 12) - timedelta(minutes=minutes)
    rows = [
        PATIENT, ADMISSION, STAY,
        row('labevents', at(1, 8), 7, ['Sodium']),
        row(twin, before, 7, ['Dextrose'], until=at(1, 13), stay=4),  # of a smaller number, so that it stands before
        row(asked, at(1, 12), 7, ['Water'], until=at(1, 13), stay=5),
    ]
    text, = prompts(rows, task)
    assert ('Dextrose' in text) == is_shown


# -- the later of two times --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('table', ['labevents', 'microbiologyevents', 'radiology', 'discharge'])
@pytest.mark.parametrize('stored, expected', [(at(1, 11), at(1, 11)), (at(1, 7), at(1, 9)), (None, at(1, 9))])
def test_a_row_is_known_at_the_later_of_its_two_times(table, stored, expected):
    times = dict(charttime=[at(1, 9)], storetime=[stored], chartdate=[at(1)])
    frame = pl.DataFrame(times, schema=dict.fromkeys(times, pl.Datetime('us')))
    assert frame.select(row_time(table, 'available')).item() == expected
    assert frame.select(row_time(table, 'charttime')).item() == at(1, 9)


# -- deaths ------------------------------------------------------------------------------------------------------------

def stay_that_ends(left, died):
    "A stay with a death, or without one."
    return [
        row('patients', cells=['60.0', 'F'], died=died and died.replace(hour=0, minute=0)),
        row('admissions', at(1, 8), 7, ['EW EMER.'], until=left, died=died),
        row('labevents', at(1, 9), 7, ['Sodium']),
    ]


@pytest.mark.parametrize('left, died, label', [
    (at(5, 12), at(5, 12), 'yes'),
    (at(5), at(5, 12), 'yes'),   # left at midnight, died at noon
    (at(5, 12), None, 'no'),
])
def test_who_died_in_hospital(left, died, label):
    index = index_rows(store(stay_that_ends(left, died), 'strict'), 'strict')
    assert index.filter(task='Inpatient_Mortality')['label'].to_list() == [[label]]


def test_a_stay_ends_at_the_later_of_discharge_and_death():
    index = index_rows(store(stay_that_ends(at(4), at(4, 12)), 'strict'), 'strict')
    assert index.filter(task='LengthOfStay_3day')['label'].to_list() == [['yes']]


def test_death_on_the_day_after_discharge_is_not_in_hospital():
    rows = stay_that_ends(at(5, 12), None)
    rows[0] = row('patients', cells=['60.0', 'F'], died=at(5))  # dod is the day of discharge, at home in the evening
    index = index_rows(store(rows, 'strict'), 'strict')
    assert index.filter(task='Inpatient_Mortality')['label'].to_list() == [['no']]


# -- the tables themselves ---------------------------------------------------------------------------------------------

SMOKE = profile('smoke', workers=1)


@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    "Tables, trajectories and index of a small hospital."
    folder = tmp_path_factory.mktemp('future')
    build_hospital(folder/'tables', 60, 7, workers=1, progress=False)
    run, source = Run('first', folder), open_source(folder/'tables')
    build_trajectories(source, run, SMOKE)
    build_index(run, SMOKE)
    return source, scan_trajectories(run.trajectories).collect(), pl.read_parquet(run.index/'shard-*.parquet')


@pytest.fixture
def rebuilt(tmp_path):
    "Builds trajectories from a folder of altered tables."
    def rows(tables):
        run = Run(tables.name, tmp_path)
        build_trajectories(open_source(tables), run, SMOKE)
        return scan_trajectories(run.trajectories).collect()
    return rows


@pytest.mark.parametrize('seed', range(3))
def test_an_altered_future_changes_no_prompt(hospital, rebuilt, tmp_path, seed):
    found = try_leakage(*hospital, rebuilt, tmp_path, seed)
    assert found.is_empty(), found.select('way', 'task', 'subject_id', 'what').rows()


class Finished(Record):
    "Shows totals from the start, as the published code does."
    def cells_at(self, event, now):
        return self.cells[event]


class Everything(Record):
    "Shows whole windows."
    def window(self, sample):
        return ((event, None) for event in range(sample['begin'], sample['end'] + 1) if event < len(self.table))


@pytest.mark.parametrize('record', [Finished, Everything])
def test_the_test_can_fail(hospital, rebuilt, tmp_path, record):
    found = try_leakage(*hospital, rebuilt, tmp_path, 0, record=record)
    assert 'changed' in found['what'].to_list()


def test_a_sample_that_is_gone_has_not_passed(hospital, rebuilt, tmp_path):
    def without_labs(tables):
        labs = tables/'hosp'/'labevents.parquet'
        pl.read_parquet(labs).head(0).write_parquet(labs)
        return rebuilt(tables)

    found = try_leakage(*hospital, without_labs, tmp_path, 0)
    assert 'gone' in found['what'].to_list()
