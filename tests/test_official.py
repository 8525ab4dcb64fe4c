"Official files: the three layouts as published, strings and all, and what happens when they are broken."
import builtins, gzip, json
from datetime import datetime
import polars as pl, pytest
from ehr_r1.profiles import Profile
from ehr_r1.config import Run
from ehr_r1.stages import read_manifest
from ehr_r1.data.official import (OfficialError, INDEX_COLUMNS, PATIENT_COLUMNS, iter_index, iter_samples, names_of, parse_target, read_index,
                                  read_patient_file, read_samples, samples_to_parquet, split_output, write_index, write_samples, write_store)
from ehr_r1.data.tables import open_source
from ehr_r1.data.tasks import INDEX, TASKS, build_index
from ehr_r1.data.events import STORE
from ehr_r1.data.trajectories import read_patient, store_files

LAB = dict(labevent_id='318', subject_id='10000032', hadm_id='22595853.0', specimen_id='1953111', itemid='50912', order_provider_id='nan', charttime='2180-05-07 05:05:00',
           storetime='2180-05-07 06:15:00', value='0.3', valuenum='0.3', valueuom='mg/dL', ref_range_lower='0.4', ref_range_upper='1.1', flag='abnormal',
           priority='ROUTINE', comments='nan', file_name='labevents')

def lab(**changes): return {**LAB, **changes}

EVENTS = [
    ('patients', None, None, None, [dict(subject_id='10000032', gender='F', anchor_age='52', anchor_year='2180', anchor_year_group='2014 - 2016', dod='2180-09-09')]),
    ('edstays', '2180-05-06 19:17:00', '2180-05-06 19:17:00', '22595853', [dict(subject_id='10000032', hadm_id='22595853.0', stay_id='33258284', intime='2180-05-06 19:17:00',
        outtime='2180-05-06 23:30:00', gender='F', race='WHITE')]),
    ('triage', '2180-05-06 19:17:01', '2180-05-06 19:17:01', 'None', [dict(subject_id='10000032', stay_id='33258284', charttime='2180-05-06 19:17:01', temperature='98.4',
        heartrate='70.0', resprate='16.0', o2sat='97.0', sbp='106.0', dbp='63.0', pain='0', acuity='3.0', chiefcomplaint='Abd pain, Abdominal distention')]),
    ('admissions', '2180-05-06 22:23:00', '2180-05-06 22:23:00', '22595853', [dict(subject_id='10000032', hadm_id='22595853', admittime='2180-05-06 22:23:00',
        dischtime='2180-05-07 17:15:00', deathtime='None', admission_type='URGENT', admission_location='TRANSFER FROM HOSPITAL')]),
    ('labevents', '2180-05-07 05:05:00', '2180-05-07 05:06:00', '22595853', [lab(), lab(itemid='51006.0', charttime='2180-05-07 05:06:00', valuenum='nan', hadm_id='nan')]),
    ('omr', '2180-05-08 00:00:00', '2180-05-08 00:00:00', None, [dict(subject_id='10000032', chartdate='2180-05-08', seq_num='1', result_name='BMI (kg/m2)', result_value='19.2')]),
    ('prescriptions', None, None, '22595853', [dict(subject_id='10000032', hadm_id='22595853', starttime='nan', drug='None', ndc='904201561.0', prod_strength='10 mL Syringe',
        dose_val_rx='3', dose_unit_rx='mL')]),
    ('radiology', '2180-05-07 09:55:00', '2180-05-07 09:55:00', '22595853', [dict(note_id='10000032-RR-16', subject_id='10000032', hadm_id='22595853', note_type='RR', note_seq='16',
        charttime='2180-05-07 09:55:00', text='INDICATION:  ___ "HCV"\nFINDINGS: ascites.')]),
    ('diagnoses_icd', None, None, '22595853', [dict(subject_id='10000032', hadm_id='22595853', seq_num='1', icd_code='5723', icd_version='9')]),
    ('drgcodes', None, None, '22595853', [dict(subject_id='10000032', hadm_id='22595853', drg_type='APR', drg_code='283')]),
]
LOOKUPS = {'item_name': {'50912': 'Creatinine', '51006': 'Urea Nitrogen'}, 'diagnoses': {('9', '5723'): 'Portal hypertension'},
           'CCS Type': {('9', '5723'): 'Other liver diseases'}, 'ATC Type': {'00904201561': 'Other'}, 'exam_name': {'10000032-RR-16': ['PARACENTESIS', 'US ABD']}}

def patient(folder, events=EVENTS, name='10000032'):
    "Write a patient as the published program does: pandas records, every value a string, items as JSON."
    frame = pl.DataFrame([(*e[:4], e[4] if isinstance(e[4], str) else json.dumps(e[4])) for e in events], schema=dict.fromkeys(PATIENT_COLUMNS, pl.String), orient='row')
    frame.write_parquet(folder/f'{name}.parquet')
    return folder/f'{name}.parquet'

def cells(frame, event): return [c.split('\x1f') for c in frame.filter(pl.col('event') == event)['cells']]

# Patients -------------------------------------------------------------------------------------------------------------------------------------

def test_patient_becomes_store_rows(tmp_path):
    frame = read_patient_file(patient(tmp_path), LOOKUPS)
    assert frame.schema == STORE and len(frame) == 11
    assert frame['event'].to_list() == [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9] and frame['subject_id'].unique().to_list() == [10000032]
    assert cells(frame, 0) == [['52', 'F']] and cells(frame, 2)[0][-1] == 'Abd pain, Abdominal distention'
    assert cells(frame, 4) == [['Creatinine', '0.3', 'mg/dL', '0.4', '1.1', 'abnormal', ''], ['Urea Nitrogen', '', 'mg/dL', '0.4', '1.1', 'abnormal', '']]
    assert cells(frame, 6)[0][:3] == ['', 'Other', '10 mL Syringe']
    assert cells(frame, 7) == [['RR', 'PARACENTESIS\x1eUS ABD', 'INDICATION:  ___ "HCV"\nFINDINGS: ascites.']]
    assert cells(frame, 8) == [['Portal hypertension', 'Other liver diseases']]

def test_patient_times_ids_and_ends(tmp_path):
    rows = read_patient_file(patient(tmp_path)).rows(named=True)
    at = lambda *a: datetime(2180, 5, *a)
    assert [r['time'] for r in rows] == [None, at(6, 19, 17), at(6, 19, 17, 1), at(6, 22, 23), at(7, 5, 5), at(7, 5, 6), at(8), None, at(7, 9, 55), None, None]
    assert rows[4]['end'] == at(7, 5, 6) and rows[5]['start'] == at(7, 5, 5)
    assert [r['hadm_id'] for r in rows] == [None, 22595853, None, 22595853, 22595853, None, None, 22595853, 22595853, 22595853, 22595853]
    assert [r['stay_id'] for r in rows][:3] == [None, 33258284, 33258284]
    assert rows[1]['until'] == at(6, 23, 30) and rows[3]['until'] == at(7, 17, 15) and rows[0]['died'] == datetime(2180, 9, 9) and rows[3]['died'] is None

def test_patient_row_without_time_takes_that_of_its_event(tmp_path):
    events = [EVENTS[0], ('labevents', '2180-05-07 05:05:00', '2180-05-07 05:05:00', None, [lab(charttime='nan')])]
    assert read_patient_file(patient(tmp_path, events))['time'].to_list() == [None, datetime(2180, 5, 7, 5, 5)]

def test_failed_lookup_is_empty_and_tables_may_have_their_own(tmp_path):
    code = dict(subject_id='10000032', icd_code='5723', icd_version='9')
    events = [('diagnoses_icd', None, None, None, [code]), ('procedures_icd', None, None, None, [code | dict(chartdate='2180-05-07')])]
    frame = read_patient_file(patient(tmp_path, events), {'CCS Type': {('9', '5723'): 'disease'}, ('procedures_icd', 'CCS Type'): {('9', '5723'): 'operation'}})
    assert cells(frame, 0) == [['', 'disease']] and cells(frame, 1) == [['', 'operation']]

def test_admission_info_is_kept_where_the_file_has_it(tmp_path):
    event = (*EVENTS[3][:4], [EVENTS[3][4][0] | dict(admission_info='Chief Complaint:\nascites')])
    assert cells(read_patient_file(patient(tmp_path, [event])), 0)[0][-1] == 'Chief Complaint:\nascites'

@pytest.mark.parametrize('event, words', [
    (('labevents', '2180-05-07', None, None, 'not json'), 'event 0: column items'),
    (('labevents', '2180-05-07', None, None, '[]'), 'event 0: column items'),
    (('labevents', '2180-05-07', None, None, '["row"]'), 'event 0: column items'),
    (('labevents', '2180-05-07', None, None, '['*100_000), 'event 0: column items'),
    (('labevent', '2180-05-07', None, None, [lab()]), "event 0: column file_name holds 'labevent'"),
    (('labevents', '07/05/2180', None, None, [lab()]), 'event 0: column starttime'),
    (('labevents', '2180-05-07', None, None, [lab(), lab(charttime='yesterday')]), r'event 0 \(labevents\), row 1: column charttime'),
    (('labevents', '2180-05-07', None, None, [lab(hadm_id='22.5')]), 'row 0: column hadm_id'),
    (('labevents', '2180-05-07', None, None, [lab(subject_id='nan')]), 'row 0: column subject_id is empty'),
    (('labevents', '2180-05-07', None, None, [lab(subject_id='7')]), 'rows of patient 7'),
    (('labevents', '2180-05-07', None, None, [{k: v for k, v in LAB.items() if k != 'flag'}]), 'row 0: table labevents lacks the column flag'),
])
def test_broken_patient(tmp_path, event, words):
    with pytest.raises(OfficialError, match='10000032.parquet.*' + words): read_patient_file(patient(tmp_path, [event]))

def test_unreadable_patient_files(tmp_path):
    with pytest.raises(OfficialError, match='5.parquet, file: it is not there'): read_patient_file(tmp_path/'5.parquet')
    (tmp_path/'6.parquet').write_bytes(b'PAR1 cut')
    with pytest.raises(OfficialError, match='6.parquet, file: not a readable Parquet'): read_patient_file(tmp_path/'6.parquet')
    pl.DataFrame({'file_name': ['patients']}).write_parquet(tmp_path/'7.parquet')
    with pytest.raises(OfficialError, match='column starttime is missing'): read_patient_file(tmp_path/'7.parquet')

def test_store_of_a_run(tmp_path):
    source, run, p = tmp_path/'patients_ehr', Run('official', tmp_path), Profile('demo', protocol='official', shard_patients=2); source.mkdir()
    for number in ('9', '100', '20'):
        rows = [(table, start, end, hadm, [row | dict(subject_id=number) for row in rows]) for table, start, end, hadm, rows in EVENTS]
        patient(source, rows, number)
    (source/'notes.txt').write_text('not a patient')
    assert write_store(source, run, p, LOOKUPS, progress=False) and not write_store(source, run, p, LOOKUPS, progress=False)
    assert [pl.read_parquet(f)['subject_id'].unique().to_list() for f in store_files(run.trajectories)] == [[20, 100], [9]]
    assert read_patient(run.trajectories, 9).equals(read_patient_file(source/'9.parquet', LOOKUPS))
    manifest = read_manifest(run.trajectories)
    assert manifest['counts']['access'] == 'credentialed' and manifest['counts']['rows'] == 33 and manifest['counts']['patients'] == 3
    assert write_store(source, run, p, progress=False) # other look-ups, other store
    assert build_index(run, p) and len(pl.read_parquet(run.index/'shard-*.parquet')) > 0

def test_store_is_refused(tmp_path):
    with pytest.raises(OfficialError, match='no file is called'): write_store(tmp_path, Run('official', tmp_path), Profile('demo', protocol='official'), progress=False)
    with pytest.raises(ValueError, match="protocol='official'"): write_store(tmp_path, Run('official', tmp_path), Profile('demo'), progress=False)

def test_names_come_from_the_tables(demo, tmp_path):
    names = names_of(open_source(demo))
    assert names['labevents', 'item_name']['50912'] == 'Creatinine' and names['diagnoses_icd', 'diagnoses']['9', '5723'] == 'Portal hypertension'
    event = ('labevents', '2180-05-07', None, None, [lab(itemid='50912.0')])
    assert cells(read_patient_file(patient(tmp_path, [event]), names), 0)[0][0] == 'Creatinine'

# Index ----------------------------------------------------------------------------------------------------------------------------------------

INDEX_TEXT = ','.join(INDEX_COLUMNS) + '''
10000032,22595853,labevents,labevents,2,14,1.0,nan,"[""Sodium"", ""Potassium""]"
10000032,22595853.0,diagnoses_icd,diagnoses_icd,2,40,1,12.0,"['Crohn''s', \\"Hodgkin's\\"]"
10000032,,next_event,labevents,2,14,,None,labevents
10000032,None,ED_Hospitalization,edstays,20,31,,,yes
10000032,22595853,Readmission_30day,discharge,4,18,1.0,,no
'''.replace("Crohn''s", "Crohns").replace('\\"', '""')

def index_file(folder, text=INDEX_TEXT, name='index.csv'):
    (folder/name).write_text(text)
    return folder/name

def test_index_columns(tmp_path):
    frame = read_index(index_file(tmp_path), progress=False)
    assert frame['label'].to_list() == [['Sodium', 'Potassium'], ['Crohns', "Hodgkin's"], ['labevents'], ['yes'], ['no']]
    assert frame['hadm_id'].to_list() == [22595853, 22595853, None, None, 22595853]
    assert frame['admissions_event'].to_list() == [1, 1, None, None, 1] and frame['discharge_event'].to_list() == [None, 12, None, None, None]
    assert frame['family'].to_list() == ['decision']*3 + ['risk']*2
    assert frame['trigger'].to_list() == [14, 40, 14, 20, 17] and frame['begin'].to_list() == [2, 2, 2, 20, 4] and frame['end'].to_list() == [14, 40, 14, 31, 18]
    assert frame['sample_id'].n_unique() == 5 and frame.schema == INDEX and set(frame['protocol']) == {'official'}

def test_index_may_have_more_columns_in_any_order_and_be_compressed(tmp_path):
    columns = ['', *reversed(INDEX_COLUMNS), 'reasoning']
    (tmp_path/'index.csv.gz').write_bytes(gzip.compress(f"\ufeff{','.join(columns)}\r\n7,yes,,,31,20,edstays,ED_Hospitalization,None,10000032,\"a\r\nb\"\r\n".encode()))
    assert read_index(tmp_path/'index.csv.gz', progress=False).select('subject_id', 'begin', 'end').row(0) == (10000032, 20, 31)

def test_index_comes_in_pieces(tmp_path):
    path = index_file(tmp_path)
    pieces = list(iter_index(path, batch=2, progress=False))
    assert [len(p) for p in pieces] == [2, 2, 1] and pl.concat(pieces).equals(read_index(path, progress=False))

def test_empty_index_has_the_columns(tmp_path):
    frame = read_index(index_file(tmp_path, ','.join(INDEX_COLUMNS) + '\n'), progress=False)
    assert len(frame) == 0 and 'label' in frame.columns

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
def test_broken_index(tmp_path, old, new, words):
    assert old in INDEX_TEXT
    with pytest.raises(OfficialError, match='index.csv, ' + words): read_index(index_file(tmp_path, INDEX_TEXT.replace(old, new, 1)), progress=False)

def test_broken_text_files(tmp_path):
    whole = gzip.compress(INDEX_TEXT.encode()*50)
    for name, data, words in [('a.csv.gz', whole[:len(whole)//2], 'gzip'), ('b.csv', b'\xff\xfe\x00', 'not UTF-8'), ('c.csv.gz', b'plain', 'gzip'), ('d.csv', b'', 'missing')]:
        (tmp_path/name).write_bytes(data)
        with pytest.raises(OfficialError, match=words): read_index(tmp_path/name, progress=False)
    with pytest.raises(OfficialError, match='not there'): read_index(tmp_path/'none.csv', progress=False)

@pytest.mark.parametrize('cell', ["[__import__('os').system('touch {0}')]", "[open('{0}', 'w')]", "[*map(print, 'a')]", '[' * 50_000, "['a' for _ in 'b']"])
def test_targets_are_not_run(tmp_path, cell):
    with pytest.raises(OfficialError): parse_target(cell.format(tmp_path/'made'))
    assert not (tmp_path/'made').exists()

def test_a_call_is_only_text():
    assert parse_target("exit(1)") == ["exit(1)"] and parse_target('"quoted" name') == ['"quoted" name']

# Samples --------------------------------------------------------------------------------------------------------------------------------------

DECISION = dict(idx=0, instruction='Given the sequence of events that have occurred in a hospital, please give the next Labotary Test Events suggestion for the patients.',
                input='## Patient Demographics [None]\n- Anchor_Age: 52\n- Gender: F', output='Sodium\nPotassium', candidates=['Potassium', 'Lactate', 'Sodium'],
                task_info=dict(target_key='item_name', event='labevents', metric='em', bid_event=[], task_type='decision_making', task='labevents',
                               target="['Sodium', 'Potassium']", label=['Sodium', 'Potassium']))
RISK = dict(idx=1, instruction='Will the patient die?', input='## Patient Demographics [None]', output='no', candidates=['yes', 'no'],
            task_info=dict(target_key=None, event='admissions', metric='aucroc', task_type='risk_prediction', task='Inpatient_Mortality', subject_id='10000032', hadm_id='22595853',
                           period_begin=3, period_end=40, admissions_id=float('nan'), last_discharge_id='', target='no', label='no'))

def with_info(record, **changes): return record | dict(task_info=record['task_info'] | changes)

def lines_file(folder, *records, name='ehr_bench.jsonl'):
    (folder/name).write_text(''.join((r if isinstance(r, str) else json.dumps(r)) + '\n' for r in records))
    return folder/name

def test_samples(tmp_path):
    first, second = read_samples(lines_file(tmp_path, DECISION, RISK), 'held_out', progress=False).rows(named=True)
    assert first['messages'] == [dict(role='system', content='You are a helpful assistant.'), dict(role='user', content=DECISION['input'] + '\n' + DECISION['instruction']),
                                 dict(role='assistant', content='Sodium\nPotassium')]
    assert first['label'] == ['Sodium', 'Potassium'] and first['candidates'] == DECISION['candidates'] and first['family'] == 'decision'
    assert first['subject_id'] is None and first['trigger'] is None and first['chain'] is None
    assert second['family'] == 'risk' and second['label'] == ['no'] and (second['subject_id'], second['hadm_id'], second['begin'], second['end'], second['trigger']) == (10000032, 22595853, 3, 40, 3)
    assert second['admissions_event'] is None and second['split'] == 'held_out' and first['sample_id'] != second['sample_id']

@pytest.mark.parametrize('record', [
    DECISION | dict(output='<think>\nThe sodium fell.\n</think>\n\nSodium\nPotassium'),
    DECISION | dict(output='  <think>The sodium fell.</think>Sodium\nPotassium'),
    with_info(DECISION, reasoning='The sodium fell.'),
    with_info(DECISION, reasoning="['The sodium fell.']"),
    with_info(DECISION, reasoning=['<think>The sodium fell.</think>']),
    with_info(DECISION, reasoning=json.dumps(dict(choices=[dict(message=dict(content='The sodium fell.'))]))),
])
def test_chains(tmp_path, record):
    row = read_samples(lines_file(tmp_path, record), 'train', progress=False).row(0, named=True)
    assert row['chain'] == 'The sodium fell.' and row['messages'][-1]['content'] == 'Sodium\nPotassium' and row['label'] == ['Sodium', 'Potassium']

def test_labels_come_from_target_or_answer_where_label_is_missing(tmp_path):
    bare = {k: v for k, v in DECISION['task_info'].items() if k != 'label'}
    frame = read_samples(lines_file(tmp_path, DECISION | dict(task_info=bare), DECISION | dict(idx=1, task_info=dict(task='labevents'))), 'train', progress=False)
    assert frame['label'].to_list() == [['Sodium', 'Potassium']]*2 and frame['family'].to_list() == ['decision']*2

def test_the_task_says_what_is_a_risk(tmp_path):
    frame = read_samples(lines_file(tmp_path, RISK | dict(task_info=dict(task='ICU_Readmission'), candidates=None)), 'train', progress=False)
    assert frame.select('family', 'label', 'candidates').row(0) == ('risk', ['no'], []) # nor candidates

@pytest.mark.parametrize('line, words', [
    ('{"idx": 3, "inp', 'line 2: not JSON'), ('['*100_000, 'line 2: not JSON'), ('[1]', 'line 2: the line is not a JSON object'),
    ({k: v for k, v in RISK.items() if k != 'output'}, 'line 2: key output is missing'), (RISK | dict(input=3), 'line 2: key input'),
    (RISK | dict(task_info='x'), 'line 2: key task_info'), (RISK | dict(idx='one'), 'line 2: column idx'), (RISK | dict(idx=None), 'line 2: key idx is missing'),
    (RISK | dict(output='<think>never ends'), 'line 2: key output: the reasoning'), (RISK | dict(candidates='yes'), 'line 2: key candidates'),
    (with_info(RISK, task=''), 'line 2: column task holds'), (with_info(RISK, period_end='x'), 'line 2: column period_end'), (with_info(RISK, label=[{}]), 'line 2: the target holds'),
    (DECISION | dict(input='other'), 'line 2: the sample of line 1 again'),
])
def test_broken_samples(tmp_path, line, words):
    with pytest.raises(OfficialError, match='ehr_bench.jsonl, ' + words): read_samples(lines_file(tmp_path, DECISION, line), 'train', progress=False)

def test_good_lines_before_a_bad_one_are_handed_out(tmp_path):
    pieces = iter_samples(lines_file(tmp_path, DECISION, RISK, 'broken'), 'train', batch=2, progress=False)
    assert len(next(pieces)) == 2
    with pytest.raises(OfficialError, match='line 3'): next(pieces)

def test_parquet_is_whole_or_not_there(tmp_path):
    path = lines_file(tmp_path, DECISION, RISK)
    assert samples_to_parquet(path, tmp_path/'samples.parquet', 'train', progress=False) == 2
    assert pl.read_parquet(tmp_path/'samples.parquet').equals(read_samples(path, 'train', progress=False))
    with pytest.raises(OfficialError): samples_to_parquet(lines_file(tmp_path, DECISION, 'broken', name='b.jsonl'), tmp_path/'b.parquet', 'train', progress=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['b.jsonl', 'ehr_bench.jsonl', 'samples.parquet']

def test_split_output():
    assert split_output('yes') == (None, 'yes') and split_output('<think></think>yes') == (None, 'yes')

# Round trips ----------------------------------------------------------------------------------------------------------------------------------

def test_index_round_trip(tmp_path):
    index = read_index(index_file(tmp_path), progress=False)
    assert write_index(index, tmp_path/'again.csv') == 5
    assert read_index(tmp_path/'again.csv', progress=False).equals(index)
    lines = (tmp_path/'again.csv').read_text().splitlines()
    assert lines[0] == ','.join(INDEX_COLUMNS) and lines[3] == '10000032,None,next_event,labevents,2,14,,,"[""labevents""]"' and lines[4].endswith(',yes')

def test_samples_round_trip(tmp_path):
    samples = read_samples(lines_file(tmp_path, DECISION | dict(output='<think>\nµ "quotes"\nand more\n</think>\n\nSodium\nPotassium'), RISK), 'train', progress=False)
    again = tmp_path/'again'/'ehr_bench.jsonl'; again.parent.mkdir() # a sample without patient and window is named after its file
    write_samples(samples, again)
    assert read_samples(again, 'train', progress=False).equals(samples)
    record = json.loads(again.read_text().splitlines()[0])
    assert record['instruction'] == DECISION['instruction'] and record['input'] == DECISION['input'] and record['task_info']['label'] == ['Sodium', 'Potassium']

def test_every_task_round_trips(tmp_path):
    rows = [dict(subject_id=7, hadm_id=70 + i, task=t.name, family=t.family, protocol='official', begin=3, end=20, admissions_event=2, label=['yes'] if t.family == 'risk' else ['a, "b"', "c's"],
                 trigger=20 if t.family == 'decision' else 19 if t.trigger == 'discharge' else 3) for i, t in enumerate(TASKS.values())]
    index = pl.DataFrame(rows, schema=INDEX).with_columns(sample_id=pl.Series([f"7-{TASKS[r['task']].id}-{r['trigger']}" for r in rows]))
    write_index(index, tmp_path/'index.csv')
    assert len(index) == 45 and read_index(tmp_path/'index.csv', progress=False).equals(index)

def test_split_is_named(tmp_path):
    with pytest.raises(ValueError, match='train, tuning, held_out'): read_samples(lines_file(tmp_path, RISK), 'test', progress=False)

def test_nothing_is_evaluated(tmp_path, monkeypatch):
    for name in ('eval', 'exec'): monkeypatch.setattr(builtins, name, lambda *a, **k: pytest.fail('read data as code'))
    read_index(index_file(tmp_path), progress=False)
    read_samples(lines_file(tmp_path, DECISION, RISK), 'train', progress=False)
