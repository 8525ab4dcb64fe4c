"""EHRSHOT: files are believed only when they are right, records hide the future, scores as scikit-learn has them."""

import json
from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score

from ehr_r1.config import Run
from ehr_r1.data.sampling import split_of
from ehr_r1.data.table_files import TableError
from ehr_r1.data.tables import open_source
from ehr_r1.data.trajectories import build_trajectories, scan_trajectories
from ehr_r1.hospital.hospital import build_hospital
from ehr_r1.profiles import profile
from ehr_r1.stages import read_manifest
from ehr_r1.transfer.benchmark_stage import build_benchmark
from ehr_r1.transfer.ehrshot import synthetic as ehrshot_synthetic
from ehr_r1.transfer.ehrshot.files import (
    EVENTS,
    SHOT_TASKS,
    all_labels,
    read_events,
    read_labels,
    read_shots,
    read_splits,
    release_files,
    standing,
)
from ehr_r1.transfer.ehrshot.records import MEASURES, Records, count_before, record_pieces
from ehr_r1.transfer.ehrshot.synthetic import DISEASES, as_meds, write_synthetic
from ehr_r1.transfer.ehrshot.tasks import BENCHMARK, ehrshot_right, ehrshot_score
from ehr_r1.transfer.question_sets import ANSWERS, QUESTIONS, RESULTS, asked_questions

P = profile('smoke', other_per_task=0, replicates=10, workers=1, style='compact')

# a small release by hand

EVENT_LINES = """,patient_id,start,end,code,value,unit,visit_id,omop_table
0,1,1950-02-03 00:00:00,,SNOMED/3950001,,,,person
1,1,1950-02-03 00:00:00,,Gender/F,,,,person
2,1,2150-03-01 10:00:00,2150-03-09 12:00:00,Visit/IP,,,7,visit_occurrence
3,1,2150-03-01 11:30:00,,LOINC/2951-2,131.0,mmol/L,7,measurement
4,1,2150-03-02 11:30:00,,LOINC/2345-7,240.0,,7,measurement
5,2,1980-01-01 00:00:00,,Gender/M,,,,person
6,2,2150-01-01 08:00:00,,LOINC/718-7,11.2,g/dL,,measurement
7,2,2150-01-01 08:00:00,,LOINC/5778-6,Grün,,,measurement
"""
SPLIT_LINES = 'omop_person_id,split\n1,train\n2,test\n3,test\n'
LABEL_LINES = dict(
    guo_los='1,2150-03-01T23:59:00,True,boolean\n3,2150-03-01T23:59:00,True,boolean\n',
    lab_anemia='2,2150-01-01 07:59:00,2,categorical\n'
    '2,2151-01-01 07:59:00,0,categorical\n'
    '9,2150-01-01 07:59:00,0,categorical\n',
)
CONCEPTS = [
    'concept_id\tconcept_name\tvocabulary_id\tconcept_code',
    '1\tInpatient Visit\tVisit\tIP',
    '2\tColor of "urine"\tLOINC\t5778-6',
]
NAMES = '\n'.join(CONCEPTS) + '\n'


@pytest.fixture
def small(tmp_path):
    "Two patients with a record, one without."
    folder = tmp_path/'EHRSHOT_ASSETS'

    def put(name, text):
        (folder/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())

    put('data/ehrshot.csv', EVENT_LINES)
    put('splits/person_id_map.csv', SPLIT_LINES)
    put('athena_download/CONCEPT.csv', NAMES)
    for task, lines in LABEL_LINES.items():
        put(f'benchmark/{task}/labeled_patients.csv', 'patient_id,prediction_time,value,label_type\n' + lines)
    return folder, put


def refused(read, *said):
    with pytest.raises(TableError) as e:
        read()
    for word in said:
        assert word in str(e.value), str(e.value)


def test_a_small_release_becomes_questions(small):
    folder, _ = small
    questions, counts = BENCHMARK.questions(folder, P)
    assert questions.schema == QUESTIONS and questions['kind'].unique().to_list() == ['risk']
    rows = {r['sample_id']: r for r in questions.iter_rows(named=True)}
    stay = rows['guo_los-1-215003012359-0']
    assert (
        stay['split'] == 'train'
        and stay['gold'] == ['yes']
        and 'Sodium 131 mmol/L [135-145] abnormal' in '\n'.join(stay['context'])
    )
    assert '240' not in '\n'.join(stay['context']) and stay['question'].endswith('Answer yes or no.')
    assert rows['lab_anemia-2-215001010759-0']['gold'] == ['no'] and rows['lab_anemia-2-215101010759-0']['gold'] == [
        'yes'
    ]
    assert 'Color of "urine" Grün' in '\n'.join(rows['lab_anemia-2-215101010759-0']['context'])
    assert counts['access'] == 'credentialed' and counts['source'] == 'EHRSHOT' and counts['shots'] is False


def test_labels_without_a_home_are_counted_and_late_ones_kept(small):
    _, counts = BENCHMARK.questions(small[0], P)
    assert counts['labels of patients without a split'] == 1  # patient 9
    assert counts['labels of patients without a record'] == 1  # patient 3
    assert counts['labels after the end of the record (kept)'] == 1  # patient 2, a year later
    assert counts['labels']['lab_anemia']['held_out'] == dict(labels=2, yes=1, patients=1)
    assert set(counts['tasks without labels']) == set(SHOT_TASKS) - set(LABEL_LINES)


@pytest.mark.parametrize(
    'name, old, new, said',
    [
        ('data/ehrshot.csv', ',omop_table', ',table', ['ehrshot.csv', 'column omop_table']),
        ('data/ehrshot.csv', ',code,', ',kode,', ['ehrshot.csv', 'column code']),
        ('data/ehrshot.csv', '2150-03-01 11:30:00', 'yesterday', ['column start', 'row 4']),
        ('data/ehrshot.csv', '\n4,1,', '\n4,one,', ['column patient_id', 'row 5']),
        ('data/ehrshot.csv', 'Grün', b'Gr\xfcn', ['line 9', 'UTF-8']),
        ('data/ehrshot.csv', '240.0,,7,', '240,0,,7,', ['ehrshot.csv', 'row 5']),
        ('splits/person_id_map.csv', 'omop_person_id', 'person', ['column omop_person_id']),
        ('splits/person_id_map.csv', '3,test', '1,test', ['patient 1', 'more than once', 'row 3']),
        ('splits/person_id_map.csv', '3,test', '3,exam', ['row 3', 'split']),
        ('benchmark/guo_los/labeled_patients.csv', 'prediction_time', 'time', ['column prediction_time']),
        (
            'benchmark/guo_los/labeled_patients.csv',
            '1,2150-03-01T23:59:00,True',
            '1,2150-03-01T23:59:00,maybe',
            ['guo_los', 'column value', 'row 1'],
        ),
        (
            'benchmark/guo_los/labeled_patients.csv',
            '1,2150-03-01T23:59:00',
            '1,2150-03-99',
            ['column prediction_time', 'row 1'],
        ),
        ('benchmark/guo_los/labeled_patients.csv', 'boolean\n3', b'bool\xe9an\n3', ['UTF-8', 'line 2']),
        ('athena_download/CONCEPT.csv', 'concept_name', 'name', ['CONCEPT.csv', 'column concept_name']),
        ('athena_download/CONCEPT.csv', 'Inpatient', b'Inpati\xe9nt', ['CONCEPT.csv', 'UTF-8']),
    ],
)
def test_what_is_wrong_is_said(small, name, old, new, said):
    folder, put = small
    text = (folder/name).read_bytes()
    old, new = (x if isinstance(x, bytes) else x.encode() for x in (old, new))
    assert text.count(old) >= 1
    put(name, text.replace(old, new, 1))
    refused(lambda: BENCHMARK.questions(folder, P), *said)


def test_a_byte_order_mark_is_no_part_of_a_name(small):
    folder, put = small
    asked, _ = BENCHMARK.questions(folder, P)
    for name in ('data/ehrshot.csv', 'splits/person_id_map.csv'):
        put(name, b'\xef\xbb\xbf' + (folder/name).read_bytes())
    assert BENCHMARK.questions(folder, P)[0].equals(asked)


def test_a_folder_that_is_no_release_says_what_to_name(tmp_path, small):
    refused(lambda: release_files(tmp_path), 'EHR_R1_EHRSHOT')
    folder, _ = small
    for f in folder.glob('benchmark/*/*.csv'):
        f.unlink()
    refused(lambda: release_files(folder), 'labels')
    (folder/'splits'/'person_id_map.csv').unlink()
    refused(lambda: release_files(folder), 'splits')


@pytest.mark.parametrize(
    'name', ['data/data.parquet', 'labels/guo_los/labels.parquet', 'metadata/subject_splits.parquet']
)
def test_parquet_without_a_column_is_refused(small, tmp_path, name):
    folder, put = small
    for t in SHOT_TASKS:
        if t not in LABEL_LINES:
            put(f'benchmark/{t}/labeled_patients.csv', 'patient_id,prediction_time,value,label_type\n')
    for t in LABEL_LINES:
        put(
            f'benchmark/{t}/labeled_patients.csv',
            (folder/'benchmark'/t/'labeled_patients.csv').read_text().replace('T', ' ').replace(' rue', 'True'),
        )
    put('LICENSE.txt', 'none')
    as_meds(folder, out := tmp_path/'meds')
    assert BENCHMARK.questions(out, P)[0].equals(BENCHMARK.questions(folder, P)[0])
    pl.read_parquet(out/name).drop('subject_id').write_parquet(out/name)
    refused(lambda: BENCHMARK.questions(out, P), 'column subject_id')
    (out/name).write_bytes(b'PAR1 but not really')
    refused(lambda: BENCHMARK.questions(out, P), 'cannot be read')


def test_the_end_of_a_visit_is_never_read(small):
    folder, put = small
    before, _ = BENCHMARK.questions(folder, P)
    put('data/ehrshot.csv', EVENT_LINES.replace('2150-03-09 12:00:00', 'whenever'))
    assert BENCHMARK.questions(folder, P)[0].equals(before)


@pytest.mark.parametrize(
    'task, said',
    [
        ('guo_icu', {'True': 'yes', 'false': 'no', '1': 'yes', '0': 'no'}),
        ('lab_anemia', {'0': 'yes', 'normal': 'yes', '1': 'no', '2': 'no', '3': 'no', 'Severe': 'no', 'mild': 'no'}),
    ],
)
def test_of_a_laboratory_result_normal_is_yes(small, task, said):
    folder, put = small
    put(
        f'benchmark/{task}/labeled_patients.csv',
        'patient_id,prediction_time,value,label_type\n'
        + ''.join(f'1,2150-03-01 10:0{i}:00,{v},x\n' for i, v in enumerate(said)),
    )
    assert read_labels(release_files(folder), task)['gold'].to_list() == list(said.values())


@pytest.mark.parametrize('form', ['%Y-%m-%d %H:%M:%S', '%Y-%m-%dT%H:%M:%S', '%Y-%m-%d %H:%M', '%Y-%m-%dT%H:%M:%S.000'])
def test_times_are_read_however_they_are_written(small, form):
    folder, put = small
    put(
        'benchmark/guo_icu/labeled_patients.csv',
        f'patient_id,prediction_time,value,label_type\n1,{datetime(2150, 3, 1, 23, 59):{form}},True,boolean\n',
    )
    assert read_labels(release_files(folder), 'guo_icu')['time'].to_list() == [datetime(2150, 3, 1, 23, 59)]


# shots


def shot(value=True, time='2150-03-01T23:59:00', patient=1):
    one = {
        f'{x}_{part}_k': [v]
        for x, v in (('patient_ids', patient), ('label_times', time), ('label_values', value))
        for part in ('train',)
    }
    return {
        'guo_los': {
            '1': {'0': one | {f'{x}_val_k': [] for x in ('patient_ids', 'label_times', 'label_values')}},
            '-1': {},
        }
    }


def shots_in(folder, put, content):
    put('benchmark/guo_los/all_shots_data.json', content if isinstance(content, (str, bytes)) else json.dumps(content))
    files = release_files(folder)
    return read_shots(files, 'guo_los', all_labels(files)[0].filter(pl.col('task') == 'guo_los'))


def test_shots_name_labels(small):
    folder, put = small
    assert shots_in(folder, put, shot()).rows() == [(1, 0, 'train', 'guo_los-1-215003012359-0')]
    twice = shot()
    for v in twice['guo_los']['1']['0'].values():
        v *= 2
    assert len(shots_in(folder, put, twice)) == 2  # repeated where a class has too few


@pytest.mark.parametrize(
    'content, said',
    [
        (shot(patient=2), 'patient 2'),
        (shot(value=False), 'with this value'),
        (shot(time='2150-03-01T23:58:00'), 'no train label'),
        ({'guo_icu': {}}, 'guo_los'),
        ('{', 'laid out'),
        ('[]', 'laid out'),
        ({'guo_los': {'1': {'0': {}}}}, 'patient_ids_train_k'),
        ({'guo_los': {'one': {}}}, 'laid out'),
        ({'guo_los': {'1': [1]}}, 'laid out'),
        (b'\xff\xfe', 'laid out'),
    ],
)
def test_shots_that_fit_no_label_are_refused(small, content, said):
    folder, put = small
    refused(lambda: shots_in(folder, put, content), 'guo_los/all_shots_data.json', said)


# the future stays out

ZERO = datetime(2150, 3, 1, 12)


def frame_of(rows):  # (patient, time, code, number, text, unit, table)
    frame = pl.DataFrame(
        rows,
        schema=['patient_id', 'start', 'code', 'number', 'text', 'unit', 'table'],
        orient='row',
        infer_schema_length=None,
    )
    return (
        frame.with_row_index('row')
        .select([pl.col(c).cast(t) for c, t in EVENTS.items()])
        .sort('patient_id', 'start', 'row')
    )


def minute(t):
    return t.replace(second=0, microsecond=0)


def hour(h):
    return ZERO + timedelta(hours=h)


TIMES = st.integers(-180, 180).map(lambda s: ZERO + timedelta(seconds=20 * s))  # three to a minute
SOME = st.lists(
    st.tuples(
        st.integers(1, 2),
        TIMES,
        st.integers(0, 5),
        st.sampled_from(
            ['measurement', 'condition_occurrence', 'drug_exposure', 'observation', 'visit_detail', 'note']
        ),
    ),
    max_size=25,
)


@settings(max_examples=30, deadline=None)
@given(SOME, TIMES, st.sampled_from(['compact', 'official']), st.integers(1, 30))
def test_no_event_of_the_minute_or_later_is_shown_or_counted(rows, now, style, most):
    rows = [
        (p, t, f'X/{k}-{i}', float(i) if table == 'measurement' else None, None, None, table)
        for i, (p, t, k, table) in enumerate(rows)
    ]
    records = Records(frame_of(rows), {c: f'Name<{c}>' for _, _, c, *_ in rows})
    for patient in (1, 2):
        pieces = record_pieces(records, patient, now, style, most)
        known = sorted(
            (t, i, c)
            for i, (p, t, c, *_, table) in enumerate(rows)
            if p == patient and minute(t) < minute(now) and table != 'note'
        )
        shown = {c for _, _, c in known[-most:]}
        assert {c for _, _, c, *_ in rows if f'Name<{c}>' in '\n'.join(pieces)} == shown
        counts = count_before(
            records, pl.DataFrame(dict(patient_id=[patient], time=[now]), schema_overrides=dict(time=pl.Datetime('us')))
        )
        assert counts[:, : 3 * len(records.codes)].sum() == sum(
            p == patient and minute(t) < minute(now) for p, t, *_ in rows
        )


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40), st.integers(0, 4)), max_size=40),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 45)), min_size=1, max_size=12),
)
def test_counts_are_those_of_a_loop(rows, labels):
    records = Records(frame_of([(p, hour(h), f'X/{k}', None, None, None, 'condition_occurrence') for p, h, k in rows]))
    got = count_before(
        records,
        pl.DataFrame(
            [(p, hour(h)) for p, h in labels], schema=dict(patient_id=pl.Int64, time=pl.Datetime('us')), orient='row'
        ),
    ).toarray()
    n = 3 * len(records.codes)
    for i, (p, h) in enumerate(labels):
        for k, code in enumerate(records.codes):
            seen = [g for q, g, c in rows if q == p and f'X/{c}' == code and g < h]
            assert got[i, 3 * k] == len(seen) and got[i, n + 3 * k] == sum(g >= h - 24 for g in seen)


def test_of_what_is_repeated_the_latest_is_shown_once():
    rows = [
        (1, ZERO + timedelta(hours=h), *x)
        for h, x in enumerate(
            [
                ('LOINC/2951-2', 130.0, None, 'mEq/L', 'measurement'),
                ('LOINC/2947-0', 150.0, None, None, 'measurement'),
                ('X/drug', None, None, None, 'drug_exposure'),
                ('X/drug', None, None, None, 'drug_exposure'),
                ('X/drug', None, None, None, 'drug_exposure'),
            ]
        )
    ]
    text = '\n'.join(
        record_pieces(Records(frame_of(rows), {'X/drug': 'Aspirin'}), 1, ZERO + timedelta(days=1), 'compact', 99)
    )
    assert (
        '130' not in text
        and 'Sodium 150 mmol/L [135-145] abnormal' in text
        and text.count('Aspirin') == 1
        and 'Aspirin, 3 times' in text
    )


@pytest.mark.parametrize(
    'code, number, unit, said',
    [
        ('LOINC/2345-7', 55.0, 'mg/dL', 'Glucose 55 mg/dL [70-100] abnormal'),
        ('LOINC/2345-7', 90.0, None, 'Glucose 90 mg/dL [70-100]'),
        ('LOINC/2345-7', 5.5, 'mmol/L', 'Glucose 5.5 mmol/L'),
        ('LOINC/14749-6', 3.1, 'mmol/L', 'Glucose 3.1 mmol/L [3.9-5.6] abnormal'),
        ('LOINC/39156-5', 31.2, None, 'Body mass index 31.2 kg/m2 [18.5-25] abnormal'),
        ('LOINC/6690-2', 12.4, 'K/uL', 'White blood cells 12.4 K/uL [4-11] abnormal'),
        ('LOINC/17861-6', 9.2, None, 'Calcium 9.2 mg/dL [8.5-10.5]'),
        ('LOINC/2823-3', float(np.float32(5.1)), 'mEq/L', 'Potassium 5.1 mEq/L [3.5-5.1]'),
        ('LOINC/29463-7', 2400.0, None, 'Body weight 2400 oz'),
        ('LOINC/718-7', 112.0, 'g/L', 'Hemoglobin 112 g/L'),
    ],
)
def test_units_ranges_and_flags(code, number, unit, said):
    records = Records(frame_of([(1, ZERO, code, number, None, unit, 'measurement')]))
    assert record_pieces(records, 1, ZERO + timedelta(minutes=1), 'compact', 9)[0].splitlines()[1] == '- ' + said


def test_the_table_of_measurements_is_sound():
    assert len({m.name for m in MEASURES.values()}) == 24 and ' LOINC/39156-5' not in MEASURES
    assert all(m.low is None or m.low < m.high for m in MEASURES.values()) and all(m.units for m in MEASURES.values())
    assert not any(m.units[0] == 'mmol/L' and m.name == 'Calcium' for m in MEASURES.values())


# scores


@settings(max_examples=12, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40))
def test_scores_are_those_of_scikit_learn(rows):
    ids, y, risk = [f's{i}' for i in range(len(rows))], [a for a, _ in rows], [b/6 for _, b in rows]
    questions = pl.DataFrame(
        [
            dict(
                sample_id=s,
                group=s,
                task='new_lupus',
                split='held_out',
                kind='risk',
                context=[],
                question='?',
                gold=['yes' if a else 'no'],
            )
            for s, a in zip(ids, y)
        ],
        schema=QUESTIONS,
    )
    answers = pl.DataFrame(
        [dict(sample_id=s, text=None, risk=r, status='answered') for s, r in zip(ids, risk)], schema=ANSWERS
    )
    results = ehrshot_score(
        questions,
        {'logistic': answers, 'adapted': answers, 'logistic@2.0': answers, 'logistic@2.1': answers.reverse()},
        P,
    )
    assert results.schema == RESULTS
    value = {(r['system'], r['metric']): r['value'] for r in results.iter_rows(named=True) if r['task'] == 'new_lupus'}
    if len(set(y)) < 2:
        assert value['logistic', 'auroc'] is None and ('logistic@2', 'auroc') not in value
    else:
        assert (
            value['logistic', 'auroc']
            == value['adapted', 'auroc']
            == pytest.approx(roc_auc_score(y, risk))
            == pytest.approx(value['logistic@2', 'auroc'])
        )
        assert value['logistic', 'auprc'] == pytest.approx(average_precision_score(y, risk))


def test_a_model_is_held_against_counts_on_the_same_questions():
    ids = [f's{i}' for i in range(6)]
    questions = pl.DataFrame(
        [
            dict(
                sample_id=s,
                group=s,
                task='guo_los',
                split='held_out',
                kind='risk',
                context=['x'],
                question='?',
                gold=[g],
            )
            for s, g in zip(ids, ['yes', 'no'] * 3)
        ],
        schema=QUESTIONS,
    )
    answers = pl.DataFrame(
        [dict(sample_id=s, text=None, risk=r, status='answered') for s, r in zip(ids, [0.9, 0.1, 0.8, 0.2, 0.1, 0.9])],
        schema=ANSWERS,
    )
    gap = answers.head(4).with_columns(risk=pl.when(pl.col('sample_id') == 's0').then(None).otherwise('risk'))
    rows = {
        (r['system'], r['metric'], r['task']): r
        for r in ehrshot_score(questions, dict(logistic=answers, base=gap), P).iter_rows(named=True)
    }
    assert (
        rows['logistic', 'auroc', 'guo_los']['value'] == pytest.approx(5/9)
        and rows['logistic', 'auroc_asked', 'guo_los']['value'] == 1
    )
    base = rows['base', 'auroc', 'guo_los']
    assert (base['samples'], base['missing']) == (4, 1) and base['note'].startswith('4 of 6 asked')


@given(
    st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()),
    st.one_of(st.text(), st.integers(), st.floats(), st.booleans(), st.none()),
    st.sampled_from(['yes', 'no']),
)
def test_the_judge_of_answers_never_fails(a, b, gold):
    assert ehrshot_right([gold], dict(prediction=a, label=b)) in (True, False)
    assert not ehrshot_right([gold], {}) and ehrshot_right(
        [gold], dict(prediction=gold.upper(), label=int(gold == 'yes'))
    )


# the synthetic release, from a hospital of thirty


@pytest.fixture(scope='module')
def hospital(tmp_path_factory):
    root = tmp_path_factory.mktemp('ehrshot')
    build_hospital(root/'tables', 30, 7, workers=1, progress=False)
    run, p = Run('thirty', root), profile('smoke', workers=1, other_per_task=3, replicates=20)
    build_trajectories(open_source(root/'tables'), run, p)
    folder = run.folder/'transfer'/'ehrshot_files'
    with pytest.MonkeyPatch.context() as patch:  # two sizes and replicates are enough here
        patch.setattr(ehrshot_synthetic, 'SIZES', (2, 16))
        patch.setattr(ehrshot_synthetic, 'REPLICATES', 2)
        assert write_synthetic(run, p, folder) and not write_synthetic(run, p, folder)
        yield run, p, folder


def test_both_releases_ask_the_same(hospital, tmp_path):
    run, p, folder = hospital
    as_meds(folder, tmp_path)
    (questions, counts), (others, told) = BENCHMARK.questions(folder, p), BENCHMARK.questions(tmp_path, p)
    assert len(questions) > 100 and questions.equals(others)
    assert {k: v for k, v in counts.items() if k not in ('release', 'shots')} == {
        k: v for k, v in told.items() if k not in ('release', 'shots')
    }
    assert (counts['release'], told['release'], counts['shots'], told['shots']) == ('csv', 'meds', True, False)
    assert standing(release_files(folder)) == dict(release='csv', source='synthetic', access='open')


def contents(folder):
    "What stands in each file, without those that tell of the run."
    told = ('manifest.json', 'measured.json')
    files = [x for x in sorted(folder.rglob('*')) if x.is_file() and x.name not in told]
    return {x.relative_to(folder): x.read_bytes() for x in files}


def test_synthetic_files_are_the_same_bytes_again(hospital, tmp_path):
    run, p, folder = hospital
    write_synthetic(run, p, tmp_path/'again'/'ehrshot_files')
    assert contents(folder) == contents(tmp_path/'again'/'ehrshot_files')


def test_synthetic_labels_are_what_happened(hospital):
    run, p, folder = hospital
    files = release_files(folder)
    events, store = read_events(files), scan_trajectories(run.trajectories).collect()
    code = events['code'].cast(pl.String)
    labels = {t: read_labels(files, t) for t in SHOT_TASKS}
    stays = {
        (r['subject_id'], r['time']): r for r in store.filter(pl.col('table') == 'admissions').iter_rows(named=True)
    }
    for patient, time, gold in labels['guo_los'].rows():
        own = [r for (s, t), r in stays.items() if s == patient and t.date() == time.date()]
        assert any((gold == 'yes') == (r['until'] - r['time'] >= timedelta(days=7)) and r['until'] > time for r in own)
    hemoglobin = events.filter(code == 'LOINC/718-7')
    results = sorted(
        zip(
            hemoglobin['patient_id'],
            hemoglobin['start'],
            np.round(hemoglobin['number'].to_numpy().astype(float), 3) >= 12,
        )
    )
    assert (
        sorted((s, t + timedelta(minutes=1), g == 'yes') for s, t, g in labels['lab_anemia'].rows()) == results
        and len(results) > 50
    )
    for task, (disease, _, _) in DISEASES.items():
        first = dict(events.filter(code == disease).group_by('patient_id').agg(pl.col('start').min()).rows())
        for patient, time, gold in labels[task].rows():
            assert time.strftime('%H:%M') == '23:59'
            when = first.get(patient)
            assert when is None or when > time
            if gold == 'yes':
                assert when - time < timedelta(days=366)


def test_synthetic_test_patients_are_new_to_the_run_s_models(hospital):
    run, p, folder = hospital
    splits = read_splits(release_files(folder))
    assert splits['split'].to_list() == list(split_of(splits['patient_id'].to_numpy(), p.seed))


def test_real_tables_are_not_declared_open(hospital, tmp_path):
    run, p, _ = hospital
    other = Run('real', tmp_path)
    other.trajectories.mkdir(parents=True)
    made = read_manifest(run.trajectories)
    (other.trajectories/'manifest.json').write_text(
        json.dumps(made | dict(counts=made['counts'] | dict(source='3.1')))
    )
    refused(lambda: write_synthetic(other, p, tmp_path/'out'), '3.1')
    assert not (tmp_path/'out').exists()


def test_from_files_to_scores(hospital):
    run, p, folder = hospital
    assert build_benchmark(run, p, BENCHMARK, folder) and not build_benchmark(run, p, BENCHMARK, folder)
    out = run.folder/'transfer'/'ehrshot'
    results, questions = pl.read_parquet(out/'results.parquet'), pl.read_parquet(out/'questions.parquet')
    assert results.schema == RESULTS and set(results['system']) == {'logistic', 'boosting', 'logistic@2', 'logistic@16'}
    held = questions.filter(pl.col('split') == 'held_out')
    assert (
        held.filter(pl.col('context').list.len() > 0)['sample_id'].to_list()
        == asked_questions(questions, p)['sample_id'].to_list()
    )
    assert questions.filter((pl.col('split') != 'held_out') & (pl.col('context').list.len() == 0)).is_empty()
    answered = {f.stem: pl.read_parquet(f) for f in (out/'answers').glob('*.parquet')}
    assert len(answered) == 2 + 2 * 2 and all(
        set(f['sample_id']) == set(held['sample_id']) and f['risk'].is_between(0, 1).all() for f in answered.values()
    )
    y = dict(held.select('sample_id', pl.col('gold').list.first() == 'yes').rows())
    task = held.filter(pl.col('task') == 'lab_anemia')['sample_id'].to_list()
    risk = dict(answered['logistic'].select('sample_id', 'risk').rows())
    found = results.filter(
        (pl.col('system') == 'logistic') & (pl.col('task') == 'lab_anemia') & (pl.col('metric') == 'auroc')
    )['value'].item()
    assert found == pytest.approx(roc_auc_score([y[s] for s in task], [risk[s] for s in task]))
    counts = read_manifest(out)['counts']
    assert counts['access'] == 'open' and counts['labels']['guo_los']['train']['labels'] > 0
