"Official files: the three layouts as published, strings and all, and what happens when they are broken."
import builtins
import gzip
import json
from datetime import datetime

import polars as pl
import pytest

from ehr_r1.config import Run
from ehr_r1.data.events import STORE
from ehr_r1.data.index import build_index
from ehr_r1.data.official import (
    INDEX_COLUMNS,
    iter_index,
    iter_official_samples,
    read_index,
    read_official_samples,
    samples_to_parquet,
    split_output,
)
from ehr_r1.data.official_patients import PATIENT_COLUMNS, official_names, read_patient_file, write_store
from ehr_r1.data.official_values import OfficialError, parse_target
from ehr_r1.data.official_writing import write_index, write_samples
from ehr_r1.data.tables import open_source
from ehr_r1.data.task_events import INDEX
from ehr_r1.data.tasks import TASKS
from ehr_r1.data.trajectories import read_trajectory, store_files
from ehr_r1.profiles import Profile
from ehr_r1.stages import read_manifest

PATIENT = '10000032'
HADM = '22595853'


def of_patient(**columns):
    "A source row, every value a string."
    return dict(subject_id=PATIENT) | columns


LAB = of_patient(
    labevent_id='318',
    hadm_id=f'{HADM}.0',
    specimen_id='1953111',
    itemid='50912',
    order_provider_id='nan',
    charttime='2180-05-07 05:05:00',
    storetime='2180-05-07 06:15:00',
    value='0.3',
    valuenum='0.3',
    valueuom='mg/dL',
    ref_range_lower='0.4',
    ref_range_upper='1.1',
    flag='abnormal',
    priority='ROUTINE',
    comments='nan',
    file_name='labevents')


def lab(**changes):
    return LAB | changes


def event(table, rows, start=None, hadm=HADM, end=None):
    "An event as the published program writes it."
    return dict(
        file_name=table, starttime=start, endtime=end or start,
        hadm_id=hadm, items=rows)


ADMISSION = of_patient(
    hadm_id=HADM,
    admittime='2180-05-06 22:23:00',
    dischtime='2180-05-07 17:15:00',
    deathtime='None',
    admission_type='URGENT',
    admission_location='TRANSFER FROM HOSPITAL')
DIAGNOSIS = of_patient(
    hadm_id=HADM,
    seq_num='1',
    icd_code='5723',
    icd_version='9')
EVENTS = [
    event('patients', hadm=None, rows=[of_patient(
        gender='F',
        anchor_age='52',
        anchor_year='2180',
        anchor_year_group='2014 - 2016',
        dod='2180-09-09')]),
    event('edstays', start='2180-05-06 19:17:00', rows=[of_patient(
        hadm_id=f'{HADM}.0',
        stay_id='33258284',
        intime='2180-05-06 19:17:00',
        outtime='2180-05-06 23:30:00',
        gender='F',
        race='WHITE')]),
    event('triage', start='2180-05-06 19:17:01', hadm='None', rows=[of_patient(
        stay_id='33258284',
        charttime='2180-05-06 19:17:01',
        temperature='98.4',
        heartrate='70.0',
        resprate='16.0',
        o2sat='97.0',
        sbp='106.0',
        dbp='63.0',
        pain='0',
        acuity='3.0',
        chiefcomplaint='Abd pain, Abdominal distention')]),
    event('admissions', start='2180-05-06 22:23:00', rows=[ADMISSION]),
    event('labevents', start='2180-05-07 05:05:00', end='2180-05-07 05:06:00', rows=[
        lab(),
        lab(itemid='51006.0', charttime='2180-05-07 05:06:00', valuenum='nan', hadm_id='nan')]),
    event('omr', start='2180-05-08 00:00:00', hadm=None, rows=[of_patient(
        chartdate='2180-05-08',
        seq_num='1',
        result_name='BMI (kg/m2)',
        result_value='19.2')]),
    event('prescriptions', rows=[of_patient(
        hadm_id=HADM,
        starttime='nan',
        drug='None',
        ndc='904201561.0',
        prod_strength='10 mL Syringe',
        dose_val_rx='3',
        dose_unit_rx='mL')]),
    event('radiology', start='2180-05-07 09:55:00', rows=[of_patient(
        note_id='10000032-RR-16',
        hadm_id=HADM,
        note_type='RR',
        note_seq='16',
        charttime='2180-05-07 09:55:00',
        text='INDICATION:  ___ "HCV"\nFINDINGS: ascites.')]),
    event('diagnoses_icd', rows=[DIAGNOSIS]),
    event('drgcodes', rows=[of_patient(hadm_id=HADM, drg_type='APR', drg_code='283')]),
]
LOOKUPS = {
    'item_name': {'50912': 'Creatinine', '51006': 'Urea Nitrogen'},
    'diagnoses': {('9', '5723'): 'Portal hypertension'},
    'CCS Type': {('9', '5723'): 'Other liver diseases'},
    'ATC Type': {'00904201561': 'Other'},
    'exam_name': {'10000032-RR-16': ['PARACENTESIS', 'US ABD']},
}


def patient_file(folder, events=EVENTS, name=PATIENT):
    "Write a patient as the published program does: pandas records, every value a string, items as JSON."
    written = []
    for one in events:
        items = one['items']
        if not isinstance(items, str):
            items = json.dumps(items)
        written.append(one | dict(items=items))
    path = folder/f'{name}.parquet'
    frame = pl.DataFrame(written, schema=dict.fromkeys(PATIENT_COLUMNS, pl.String))
    frame.write_parquet(path)
    return path


def cells(frame, number):
    "The cells of the rows of one event."
    rows = frame.filter(pl.col('event') == number)
    return [row.split('\x1f') for row in rows['cells']]


# patients

@pytest.fixture
def patient(tmp_path):
    return read_patient_file(patient_file(tmp_path), LOOKUPS)


def test_a_patient_becomes_rows_of_the_store(patient):
    assert patient.schema == STORE
    assert patient['event'].to_list() == [*range(5), *range(4, 10)]  # event 4 has two rows
    assert patient['subject_id'].unique().to_list() == [10000032]


@pytest.mark.parametrize('number, expected', [
    (0, [['52', 'F']]),
    (4, [['Creatinine', '0.3', 'mg/dL', '0.4', '1.1', 'abnormal', ''],
         ['Urea Nitrogen', '', 'mg/dL', '0.4', '1.1', 'abnormal', '']]),
    (7, [['RR', 'PARACENTESIS\x1eUS ABD', 'INDICATION:  ___ "HCV"\nFINDINGS: ascites.']]),
    (8, [['Portal hypertension', 'Other liver diseases']]),
])
def test_cells_of_a_patient(patient, number, expected):
    assert cells(patient, number) == expected


def test_cells_that_are_missing_or_looked_up(patient):
    assert cells(patient, 2)[0][-1] == 'Abd pain, Abdominal distention'
    assert cells(patient, 6)[0][:3] == ['None', 'Other', '10 mL Syringe']  # pandas 1.5.3 took None for a word


def may(*moment):
    return datetime(2180, 5, *moment)


def test_times_of_rows_and_events(patient):
    assert patient['time'].to_list() == [
        None,               # patients
        may(6, 19, 17),     # edstays
        may(6, 19, 17, 1),  # triage
        may(6, 22, 23),     # admissions
        may(7, 5, 5),       # labevents
        may(7, 5, 6),
        may(8),             # omr
        None,               # prescriptions
        may(7, 9, 55),      # radiology
        None,               # diagnoses_icd
        None,               # drgcodes
    ]
    assert patient['end'][4] == may(7, 5, 6)
    assert patient['start'][5] == may(7, 5, 5)


def test_admissions_and_stays_of_rows(patient):
    numbered = patient.with_row_index('row')
    with_admission = numbered.filter(pl.col('hadm_id').is_not_null())
    assert with_admission['row'].to_list() == [1, 3, 4, *range(7, 11)]
    assert set(with_admission['hadm_id']) == {int(HADM)}
    assert patient['stay_id'].to_list()[:3] == [None, 33258284, 33258284]


def test_ends_of_stays_and_death(patient):
    assert patient['until'][1] == may(6, 23, 30)
    assert patient['until'][3] == may(7, 17, 15)
    assert patient['died'][0] == datetime(2180, 9, 9)
    assert patient['died'][3] is None


def test_a_row_without_time_takes_that_of_its_event(tmp_path):
    untimed = event('labevents', [lab(charttime='nan')], '2180-05-07 05:05:00', hadm=None)
    frame = read_patient_file(patient_file(tmp_path, [untimed]))
    assert frame['time'].to_list() == [may(7, 5, 5)]


def test_a_failed_lookup_is_empty_and_tables_may_have_their_own(tmp_path):
    code = of_patient(icd_code='5723', icd_version='9')
    dated = code | dict(chartdate='2180-05-07')
    events = [
        event('diagnoses_icd', [code], hadm=None),
        event('procedures_icd', [dated], hadm=None),
    ]
    names = {
        'CCS Type': {('9', '5723'): 'disease'},
        ('procedures_icd', 'CCS Type'): {('9', '5723'): 'operation'},
    }
    frame = read_patient_file(patient_file(tmp_path, events), names)
    assert cells(frame, 0) == [['', 'disease']]
    assert cells(frame, 1) == [['', 'operation']]


def test_admission_info_is_kept_where_the_file_has_it(tmp_path):
    said = 'Chief Complaint:\nascites'
    with_info = ADMISSION | dict(admission_info=said)
    events = [event('admissions', [with_info], '2180-05-06 22:23:00')]
    frame = read_patient_file(patient_file(tmp_path, events))
    assert cells(frame, 0)[0][-1] == said


WITHOUT_FLAG = {key: value for key, value in LAB.items() if key != 'flag'}


@pytest.mark.parametrize('changes, words', [
    (dict(items='not json'), 'event 0: column items'),
    (dict(items='[]'), 'event 0: column items'),
    (dict(items='["row"]'), 'event 0: column items'),
    (dict(items='['*100_000), 'event 0: column items'),
    (dict(file_name='labevent'), "event 0: column file_name holds 'labevent'"),
    (dict(starttime='07/05/2180'), 'event 0: column starttime'),
    (dict(items=[lab(), lab(charttime='yesterday')]), r'event 0 \(labevents\), row 1: column charttime'),
    (dict(items=[lab(hadm_id='22.5')]), 'row 0: column hadm_id'),
    (dict(items=[lab(subject_id='nan')]), 'row 0: column subject_id is empty'),
    (dict(items=[lab(subject_id='7')]), 'rows of patient 7'),
    (dict(items=[WITHOUT_FLAG]), 'row 0: table labevents lacks the column flag'),
])
def test_a_broken_patient_is_named(tmp_path, changes, words):
    whole = event('labevents', [lab()], '2180-05-07', hadm=None)
    broken = whole | dict(endtime=None) | changes
    with pytest.raises(OfficialError, match='10000032.parquet.*' + words):
        read_patient_file(patient_file(tmp_path, [broken]))


def test_a_patient_file_that_is_not_there(tmp_path):
    with pytest.raises(OfficialError, match='5.parquet, file: it is not there'):
        read_patient_file(tmp_path/'5.parquet')


def test_a_patient_file_that_was_cut(tmp_path):
    (tmp_path/'6.parquet').write_bytes(b'PAR1 cut')
    with pytest.raises(OfficialError, match='6.parquet, file: not a readable Parquet'):
        read_patient_file(tmp_path/'6.parquet')


def test_a_patient_file_that_lacks_a_column(tmp_path):
    pl.DataFrame({'file_name': ['patients']}).write_parquet(tmp_path/'7.parquet')
    with pytest.raises(OfficialError, match='column starttime is missing'):
        read_patient_file(tmp_path/'7.parquet')


# the store of a run

OFFICIAL = Profile('demo', protocol='official', shard_patients=2)


@pytest.fixture
def three_patients(tmp_path):
    "A folder of three patients and a file that is none."
    source = tmp_path/'patients_ehr'
    source.mkdir()
    for number in ('9', '100', '20'):
        events = []
        for one in EVENTS:
            rows = [row | dict(subject_id=number) for row in one['items']]
            events.append(one | dict(items=rows))
        patient_file(source, events, number)
    (source/'notes.txt').write_text('not a patient')
    return source


@pytest.fixture
def stored(three_patients, tmp_path):
    "The run whose store was made from the three patients."
    run = Run('official', tmp_path)
    assert write_store(three_patients, run, OFFICIAL, LOOKUPS, progress=False)
    return run


def test_patients_are_in_the_shard_of_their_number(stored):
    shards = [pl.read_parquet(file) for file in store_files(stored.trajectories)]
    assert [set(shard['subject_id']) for shard in shards] == [{20, 100}, {9}]


def test_the_store_holds_what_the_files_hold(stored, three_patients):
    expected = read_patient_file(three_patients/'9.parquet', LOOKUPS)
    assert read_trajectory(stored.trajectories, 9).equals(expected)


def test_the_manifest_of_the_store(stored):
    counts = read_manifest(stored.trajectories)['counts']
    assert counts['access'] == 'credentialed'
    assert (counts['rows'], counts['patients']) == (33, 3)


def test_the_store_is_made_again_for_other_lookups_only(stored, three_patients):
    assert not write_store(three_patients, stored, OFFICIAL, LOOKUPS, progress=False)
    assert write_store(three_patients, stored, OFFICIAL, progress=False)


def test_the_store_can_be_indexed(stored):
    assert build_index(stored, OFFICIAL)
    assert len(pl.read_parquet(stored.index/'shard-*.parquet')) > 0


def test_a_folder_without_patients_is_refused(tmp_path):
    with pytest.raises(OfficialError, match='no file is called'):
        write_store(tmp_path, Run('official', tmp_path), OFFICIAL, progress=False)


def test_the_strict_protocol_is_refused(tmp_path):
    with pytest.raises(ValueError, match="protocol='official'"):
        write_store(tmp_path, Run('official', tmp_path), Profile('demo'), progress=False)


def test_names_come_from_the_tables(demo, tmp_path):
    names = official_names(open_source(demo))
    assert names['labevents', 'item_name']['50912'] == 'Creatinine'
    assert names['diagnoses_icd', 'diagnoses']['9', '5723'] == 'Portal hypertension'
    events = [event('labevents', [lab(itemid='50912.0')], '2180-05-07', hadm=None)]
    frame = read_patient_file(patient_file(tmp_path, events), names)
    assert cells(frame, 0)[0][0] == 'Creatinine'


# index

INDEX_TEXT = ','.join(INDEX_COLUMNS) + '''
10000032,22595853,labevents,labevents,2,14,1.0,nan,"[""Sodium"", ""Potassium""]"
10000032,22595853.0,diagnoses_icd,diagnoses_icd,2,40,1,12.0,"['Crohns', ""Hodgkin's""]"
10000032,,next_event,labevents,2,14,,None,labevents
10000032,None,ED_Hospitalization,edstays,20,31,,,yes
10000032,22595853,Readmission_30day,discharge,4,18,1.0,,no
'''


def index_file(folder, text=INDEX_TEXT):
    (folder/'index.csv').write_text(text)
    return folder/'index.csv'


@pytest.fixture
def index(tmp_path):
    return read_index(index_file(tmp_path), progress=False)


@pytest.mark.parametrize('column, expected', [
    ('label', [
        ['Sodium', 'Potassium'],
        ['Crohns', "Hodgkin's"],
        ['labevents'],
        ['yes'],
        ['no'],
    ]),
    ('hadm_id', [22595853, 22595853, None, None, 22595853]),
    ('admissions_event', [1, 1, None, None, 1]),
    ('discharge_event', [None, 12, None, None, None]),
    ('family', ['decision', 'decision', 'decision', 'risk', 'risk']),
    ('trigger', [14, 40, 14, 20, 17]),
    ('begin', [2, 2, 2, 20, 4]),
    ('end', [14, 40, 14, 31, 18]),
    ('protocol', ['official']*5),
])
def test_columns_of_the_index(index, column, expected):
    assert index[column].to_list() == expected


def test_index_rows_are_ours_and_have_names_of_their_own(index):
    assert index.schema == INDEX
    assert index['sample_id'].n_unique() == 5


def test_an_index_may_have_more_columns_in_any_order_and_be_compressed(tmp_path):
    header = ','.join(['', *reversed(INDEX_COLUMNS), 'reasoning'])
    line = '7,yes,,,31,20,edstays,ED_Hospitalization,None,10000032,"a\r\nb"'
    (tmp_path/'index.csv.gz').write_bytes(gzip.compress(f'\ufeff{header}\r\n{line}\r\n'.encode()))
    found = read_index(tmp_path/'index.csv.gz', progress=False)
    assert found.select('subject_id', 'begin', 'end').rows() == [(10000032, 20, 31)]


def test_an_index_comes_in_pieces(index, tmp_path):
    pieces = list(iter_index(tmp_path/'index.csv', batch=2, progress=False))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    assert pl.concat(pieces).equals(index)


def test_an_empty_index_has_the_columns(tmp_path):
    found = read_index(index_file(tmp_path, ','.join(INDEX_COLUMNS) + '\n'), progress=False)
    assert len(found) == 0
    assert 'label' in found.columns


@pytest.mark.parametrize('old, new, words', [
    ('20,31', '20,x', "line 5: column period_end holds 'x'"),
    ('20,31', '20,31.5', 'line 5: column period_end'),
    ('20,31', ',31', 'line 5: column period_begin is empty'),
    ('20,31', '31,20', 'line 5: the window from 31 to 20 is empty'),
    ('20,31', '-1,31', 'line 5: column period_begin holds -1'),
    ('20,31', '20,31,7', 'line 5: 10 cells where the header has 9'),
    ('31,,,yes', '31,,,', 'line 5: the target holds'),
    ('31,,,yes', '31,,,nan', 'line 5: the target holds'),
    ('31,,,yes', '31,,,[]', 'line 5: the target is an empty list'),
    ('31,,,yes', '31,,,"[""a"", null]"', 'line 5: the target holds None'),
    ('31,,,yes', '31,,,[yes', 'line 5: the target'),
    ('ED_Hospitalization', '', 'line 5: column task holds'),
    ('ED_Hospitalization', 'ED_Hospitalisation', 'line 5: column task holds'),
    ('31,,,yes', '31,,,maybe', 'line 5: the target of ED_Hospitalization'),
    ('"[""Sodium""', '"[""So"dium""', 'line 2: not CSV'),
    ('12.0', '12a', 'line 3: column last_discharge_id'),
    ('last_discharge_id', 'discharge_id', 'line 1: column last_discharge_id is missing'),
])
def test_a_broken_index_is_named(tmp_path, old, new, words):
    assert old in INDEX_TEXT
    path = index_file(tmp_path, INDEX_TEXT.replace(old, new, 1))
    with pytest.raises(OfficialError, match='index.csv, ' + words):
        read_index(path, progress=False)


WHOLE = gzip.compress(INDEX_TEXT.encode()*50)


@pytest.mark.parametrize('name, data, words', [
    ('a.csv.gz', WHOLE[:len(WHOLE)//2], 'gzip'),
    ('b.csv', b'\xff\xfe\x00', 'not UTF-8'),
    ('c.csv.gz', b'plain', 'gzip'),
    ('d.csv', b'', 'missing'),
])
def test_a_file_that_is_no_text_is_named(tmp_path, name, data, words):
    (tmp_path/name).write_bytes(data)
    with pytest.raises(OfficialError, match=words):
        read_index(tmp_path/name, progress=False)


def test_an_index_that_is_not_there(tmp_path):
    with pytest.raises(OfficialError, match='not there'):
        read_index(tmp_path/'none.csv', progress=False)


# nothing is run

@pytest.mark.parametrize('cell', [
    "[__import__('os').system('touch {0}')]",
    "[open('{0}', 'w')]",
    "[*map(print, 'a')]",
    '['*50_000,
    "['a' for _ in 'b']",
])
def test_targets_are_not_run(tmp_path, cell):
    with pytest.raises(OfficialError):
        parse_target(cell.format(tmp_path/'made'))
    assert not (tmp_path/'made').exists()


@pytest.mark.parametrize('text', ['exit(1)', '"quoted" name'])
def test_a_text_that_looks_like_code_is_only_text(text):
    assert parse_target(text) == [text]


# samples

DECISION = dict(
    idx=0,
    instruction='Please give the next Labotary Test Events suggestion for the patients.',
    input='## Patient Demographics [None]\n- Anchor_Age: 52\n- Gender: F',
    output='Sodium\nPotassium',
    candidates=['Potassium', 'Lactate', 'Sodium'],
    task_info=dict(
        target_key='item_name',
        event='labevents',
        metric='em',
        bid_event=[],
        task_type='decision_making',
        task='labevents',
        target="['Sodium', 'Potassium']",
        label=['Sodium', 'Potassium']))
RISK = dict(
    idx=1,
    instruction='Will the patient die?',
    input='## Patient Demographics [None]',
    output='no',
    candidates=['yes', 'no'],
    task_info=dict(
        target_key=None,
        event='admissions',
        metric='aucroc',
        task_type='risk_prediction',
        task='Inpatient_Mortality',
        subject_id=PATIENT,
        hadm_id=HADM,
        period_begin=3,
        period_end=40,
        admissions_id=float('nan'),
        last_discharge_id='',
        target='no',
        label='no'))


def with_info(record, **changes):
    return record | dict(task_info=record['task_info'] | changes)


def lines_file(folder, *records, name='ehr_bench.jsonl'):
    path = folder/name
    with path.open('w') as file:
        for record in records:
            line = record if isinstance(record, str) else json.dumps(record)
            file.write(f'{line}\n')
    return path


def read_lines_file(folder, *records, split='train'):
    return read_official_samples(lines_file(folder, *records), split, progress=False)


def test_a_decision_as_published(tmp_path):
    sample = read_lines_file(tmp_path, DECISION, RISK).row(0, named=True)
    assert sample['messages'] == [
        dict(role='system', content='You are a helpful assistant.'),
        dict(role='user', content=DECISION['input'] + '\n' + DECISION['instruction']),
        dict(role='assistant', content='Sodium\nPotassium'),
    ]
    assert sample['label'] == ['Sodium', 'Potassium']
    assert sample['candidates'] == DECISION['candidates']
    assert sample['family'] == 'decision'
    for column in ('subject_id', 'trigger', 'chain'):
        assert sample[column] is None


def test_a_risk_with_its_window(tmp_path):
    found = read_lines_file(tmp_path, DECISION, RISK, split='held_out')
    sample = found.row(1, named=True)
    assert (sample['family'], sample['split']) == ('risk', 'held_out')
    assert sample['label'] == ['no']
    where = ('subject_id', 'hadm_id', 'begin', 'end', 'trigger', 'admissions_event')
    assert [sample[column] for column in where] == [10000032, 22595853, 3, 40, 3, None]


def test_samples_have_names_of_their_own(tmp_path):
    assert read_lines_file(tmp_path, DECISION, RISK)['sample_id'].n_unique() == 2


COMPLETION = dict(choices=[dict(message=dict(content='The sodium fell.'))])


@pytest.mark.parametrize('record', [
    DECISION | dict(output='<think>\nThe sodium fell.\n</think>\n\nSodium\nPotassium'),
    DECISION | dict(output='  <think>The sodium fell.</think>Sodium\nPotassium'),
    with_info(DECISION, reasoning='The sodium fell.'),
    with_info(DECISION, reasoning="['The sodium fell.']"),
    with_info(DECISION, reasoning=['<think>The sodium fell.</think>']),
    with_info(DECISION, reasoning=json.dumps(COMPLETION)),
])
def test_a_chain_is_taken_off_the_answer(tmp_path, record):
    sample = read_lines_file(tmp_path, record).row(0, named=True)
    assert sample['chain'] == 'The sodium fell.'
    assert sample['messages'][-1]['content'] == 'Sodium\nPotassium'
    assert sample['label'] == ['Sodium', 'Potassium']


WITHOUT_LABEL = {key: value for key, value in DECISION['task_info'].items() if key != 'label'}


@pytest.mark.parametrize('info', [WITHOUT_LABEL, dict(task='labevents')])
def test_labels_come_from_target_or_answer_where_label_is_missing(tmp_path, info):
    found = read_lines_file(tmp_path, DECISION | dict(task_info=info))
    sample = found.row(0, named=True)
    assert sample['label'] == ['Sodium', 'Potassium']
    assert sample['family'] == 'decision'


def test_the_task_says_what_is_a_risk_and_candidates_may_be_missing(tmp_path):
    bare = RISK | dict(task_info=dict(task='ICU_Readmission'), candidates=None)
    found = read_lines_file(tmp_path, bare)
    assert found.select('family', 'label', 'candidates').rows() == [('risk', ['no'], [])]


WITHOUT_OUTPUT = {key: value for key, value in RISK.items() if key != 'output'}


@pytest.mark.parametrize('line, words', [
    ('{"idx": 3, "inp', 'line 2: not JSON'),
    ('['*100_000, 'line 2: not JSON'),
    ('[1]', 'line 2: the line is not a JSON object'),
    (WITHOUT_OUTPUT, 'line 2: key output is missing'),
    (RISK | dict(input=3), 'line 2: key input'),
    (RISK | dict(task_info='x'), 'line 2: key task_info'),
    (RISK | dict(idx='one'), 'line 2: column idx'),
    (RISK | dict(idx=None), 'line 2: key idx is missing'),
    (RISK | dict(output='<think>never ends'), 'line 2: key output: the reasoning'),
    (RISK | dict(candidates='yes'), 'line 2: key candidates'),
    (with_info(RISK, task=''), 'line 2: column task holds'),
    (with_info(RISK, period_end='x'), 'line 2: column period_end'),
    (with_info(RISK, label=[{}]), 'line 2: the target holds'),
    (DECISION | dict(input='other'), 'line 2: the sample of line 1 again'),
])
def test_a_broken_sample_is_named(tmp_path, line, words):
    with pytest.raises(OfficialError, match='ehr_bench.jsonl, ' + words):
        read_lines_file(tmp_path, DECISION, line)


def test_good_lines_before_a_bad_one_are_handed_out(tmp_path):
    path = lines_file(tmp_path, DECISION, RISK, 'broken')
    pieces = iter_official_samples(path, 'train', batch=2, progress=False)
    assert len(next(pieces)) == 2
    with pytest.raises(OfficialError, match='line 3'):
        next(pieces)


def test_a_file_of_samples_becomes_parquet(tmp_path):
    path = lines_file(tmp_path, DECISION, RISK)
    assert samples_to_parquet(path, tmp_path/'samples.parquet', 'train', progress=False) == 2
    expected = read_official_samples(path, 'train', progress=False)
    assert pl.read_parquet(tmp_path/'samples.parquet').equals(expected)


def test_a_broken_file_leaves_no_parquet(tmp_path):
    path = lines_file(tmp_path, DECISION, 'broken')
    with pytest.raises(OfficialError):
        samples_to_parquet(path, tmp_path/'samples.parquet', 'train', progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ['ehr_bench.jsonl']


def test_a_split_is_one_of_three(tmp_path):
    with pytest.raises(ValueError, match='train, tuning, held_out'):
        read_lines_file(tmp_path, RISK, split='test')


@pytest.mark.parametrize('output', ['yes', '<think></think>yes'])
def test_an_answer_without_a_chain(output):
    assert split_output(output) == (None, 'yes')


# there and back

def test_an_index_comes_back(index, tmp_path):
    assert write_index(index, tmp_path/'again.csv') == 5
    assert read_index(tmp_path/'again.csv', progress=False).equals(index)


def test_an_index_is_written_in_the_official_layout(index, tmp_path):
    write_index(index, tmp_path/'again.csv')
    lines = (tmp_path/'again.csv').read_text().splitlines()
    assert lines[0] == ','.join(INDEX_COLUMNS)
    assert lines[3] == '10000032,None,next_event,labevents,2,14,,,"[""labevents""]"'
    assert lines[4].endswith(',yes')


def index_row(task, hadm):
    "A sample of a task, as an official index can name it."
    if task.family == 'decision':
        trigger = 20
    else:
        trigger = 19 if task.trigger == 'discharge' else 3
    return dict(
        sample_id=f'7-{task.id}-{trigger}',
        subject_id=7,
        hadm_id=hadm,
        task=task.name,
        family=task.family,
        protocol='official',
        begin=3,
        end=20,
        admissions_event=2,
        trigger=trigger,
        label=['yes'] if task.family == 'risk' else ['a, "b"', "c's"])


def test_every_task_comes_back(tmp_path):
    rows = [index_row(task, hadm) for hadm, task in enumerate(TASKS.values(), 70)]
    index = pl.DataFrame(rows, schema=INDEX)
    write_index(index, tmp_path/'index.csv')
    assert len(index) == 45
    assert read_index(tmp_path/'index.csv', progress=False).equals(index)


@pytest.fixture
def written_again(tmp_path):
    "Two samples, and the file they were written to; a sample without patient and window is named after its file."
    output = '<think>\nµ "quotes"\nand more\n</think>\n\nSodium\nPotassium'
    samples = read_lines_file(tmp_path, DECISION | dict(output=output), RISK)
    again = tmp_path/'again'/'ehr_bench.jsonl'
    again.parent.mkdir()
    write_samples(samples, again)
    return samples, again


def test_samples_come_back(written_again):
    samples, again = written_again
    assert read_official_samples(again, 'train', progress=False).equals(samples)


def test_samples_are_written_in_the_official_layout(written_again):
    record = json.loads(written_again[1].read_text().splitlines()[0])
    assert record['instruction'] == DECISION['instruction']
    assert record['input'] == DECISION['input']
    assert record['task_info']['label'] == ['Sodium', 'Potassium']


def test_nothing_is_evaluated(tmp_path, monkeypatch):
    for name in ('eval', 'exec'):
        monkeypatch.setattr(builtins, name, lambda *a, **k: pytest.fail('read data as code'))
    assert len(read_index(index_file(tmp_path), progress=False)) == 5
    assert len(read_lines_file(tmp_path, DECISION, RISK)) == 2
